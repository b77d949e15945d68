"""Modules with parts that torch.jit scripted or traced, at parameters that are not their own."""

import copy
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import (
    KFLR,
    BatchDiagGGN,
    BatchDiagHessian,
    BatchGrad,
    BatchL2,
    DiagGGN,
    DiagHessian,
    Grad,
    Loss,
    Output,
    SqrtGGN,
    Variance,
    compute,
    functionalize,
)
from curvfunc.compat import backpack, extend, extensions

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:`torch.jit.trace:DeprecationWarning"),
]

N, C = 5, 3
SPECS = [Loss(), Output(), Grad(), BatchGrad(), BatchL2(), Variance(), DiagGGN(), BatchDiagGGN(), SqrtGGN()]
HESSIANS = [DiagHessian(), BatchDiagHessian()]


class Gated(nn.Module):
    """Parameters of all kinds: a layer's, one without a rule, a frozen one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4))
        self.frozen = nn.Parameter(torch.rand(4), requires_grad=False)
        self.register_buffer("shift", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.linear(x)) * self.scale * self.frozen + self.shift
        return h * torch.tanh(h.sum(-1, keepdim=True))


class Shared(nn.Module):
    """A part that is used twice, and shares its weight with what is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.gated = Gated()
        self.gated.linear.weight = self.first.weight
        self.last = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gated(torch.tanh(self.gated(self.first(x)))))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Gated(), nn.Linear(4, C))


def script(module: nn.Module, X: Tensor) -> Any:
    return torch.jit.script(module)


def trace(module: nn.Module, X: Tensor) -> Any:
    return torch.jit.trace(module, X)


def of_part(how: Callable[..., Any]) -> Callable[..., Any]:
    def convert(module: nn.Module, X: Tensor) -> Any:
        module[1] = how(module[1], X)
        return module

    return convert


WAYS = {"script": script, "trace": trace, "scripted part": of_part(script), "traced part": of_part(trace)}


def pair(way: str, calls: int = 0) -> tuple[Any, Any, dict[str, Tensor], Tensor, Tensor]:
    """The converted module, the one it was made of, other parameters than theirs, and data."""
    X, y = torch.randn(N, 4), torch.arange(N) % C
    plain = network()
    converted = WAYS[way](copy.deepcopy(plain), X)
    for _ in range(calls):  # torch specializes what was called a few times
        converted(X).sum().backward()
    params = {k: torch.randn_like(p) for k, p in functionalize(plain)[1].items()}
    return converted, plain, params, X, y


@pytest.mark.parametrize("subsampling", [None, [3, 1, 3]])
@pytest.mark.parametrize("calls", [0, 4])
@pytest.mark.parametrize("way", WAYS)
def test_all_quantities(way: str, calls: int, subsampling: Any) -> None:
    converted, plain, params, X, y = pair(way, calls)
    model_fn, own = functionalize(converted)
    assert own.keys() == params.keys()
    before = {k: t.clone() for k, t in converted.state_dict().items()}
    for _ in range(3):
        got = compute(model_fn, params, X, y, SPECS + HESSIANS, subsampling=subsampling)
        assert_close(got, compute(functionalize(plain)[0], params, X, y, SPECS + HESSIANS, subsampling=subsampling))
    assert all(torch.equal(t, before[k]) for k, t in converted.state_dict().items())
    assert dict(converted.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    alone = {"2.bias": params["2.bias"]}  # the others stay fixed at the module's own
    grads, out = compute(model_fn, own | alone, X, y, [BatchGrad(), Output()])
    assert_close(compute(model_fn, alone, X, y, [BatchGrad(), Output()]), [{"2.bias": grads["2.bias"]}, out])


@pytest.mark.parametrize("calls", [0, 4])
@pytest.mark.parametrize("way", WAYS)
def test_products(way: str, calls: int) -> None:
    converted, plain, params, X, y = pair(way, calls)
    ours, theirs = functionalize(converted)[0], functionalize(plain)[0]
    v = {k: torch.randn_like(p) for k, p in params.items()}
    for product in (curvfunc.hessian_vp, curvfunc.ggn_vp, curvfunc.fisher_vp):
        assert_close(product(ours, params, X, y, v), product(theirs, params, X, y, v))
    assert_close(curvfunc.jvp(ours, params, X, v), curvfunc.jvp(theirs, params, X, v))
    u = torch.randn(N, C)
    assert_close(curvfunc.vjp(ours, params, X, u), curvfunc.vjp(theirs, params, X, u))
    columns = {k: torch.randn(3, *p.shape) for k, p in params.items()}
    for blocks in (curvfunc.hmp, curvfunc.ggnmp):
        got, want = (optree.tree_map(lambda f, c: f(c), blocks(f, params, X, y), columns) for f in (ours, theirs))
        assert_close(got, want)


@pytest.mark.parametrize("calls", [0, 4])
@pytest.mark.parametrize("way", WAYS)
def test_transformations(way: str, calls: int) -> None:
    converted, _, params, X, y = pair(way, calls)
    scripted = functionalize(converted)[0]
    stacked = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    specs = [Output(), BatchGrad(), DiagGGN()]
    total = lambda f, p: sum(t.square().sum() for t in optree.tree_leaves(compute(f, p, X, y, specs)))
    for call in (
        lambda: torch.vmap(lambda p: compute(scripted, p, X, y, specs))(stacked),
        lambda: torch.vmap(lambda p: curvfunc.ggn_vp(scripted, p, X, y, params))(stacked),
        lambda: torch.func.grad(lambda p: total(scripted, p))(params),
        lambda: torch.func.jvp(lambda p: total(scripted, p), (params,), (params,)),
        lambda: torch.func.grad(lambda p: curvfunc.hessian_vp(scripted, p, X, y, p)[next(iter(p))].sum())(params),
    ):
        with pytest.raises(ValueError, match="scripted or traced code"):
            call()
    assert torch._C.ScriptMethod.__call__.__name__ != "watched"


def test_parameters_that_are_shared_with_scripted_parts() -> None:
    X, y = torch.randn(N, 4), torch.arange(N) % C
    plain, converted = Shared(), Shared()
    converted.load_state_dict(plain.state_dict())
    converted.gated = torch.jit.script(converted.gated)
    assert converted.gated.linear.weight is converted.first.weight
    ours, theirs = functionalize(converted), functionalize(plain)
    assert ours[1].keys() == theirs[1].keys()
    params = {k: torch.randn_like(p) for k, p in ours[1].items()}
    assert_close(compute(ours[0], params, X, y, SPECS), compute(theirs[0], params, X, y, SPECS))


def test_explanations_name_the_scripted_part() -> None:
    converted, _, params, X, _ = pair("scripted part")
    rows = {row.name: row for row in curvfunc.explain(functionalize(converted)[0], params, X).rows}
    assert {row.path for row in rows.values()} == {"vmap"}
    assert rows["2.weight"].rule == "linear"
    assert rows["1.scale"].rule == "generic"
    assert "'1' is scripted; use the Python module" in rows["1.scale"].why


def test_explanations_of_modules_that_are_scripted_as_a_whole() -> None:
    converted, _, params, X, _ = pair("script")
    rows = curvfunc.explain(functionalize(converted)[0], params, X).rows
    assert all("the module is scripted; use the Python module" in row.why for row in rows)


def test_compiled_calls_say_what_to_do() -> None:
    converted, _, params, X, y = pair("scripted part")
    model_fn, _ = functionalize(converted)
    step = torch.compile(lambda p: compute(model_fn, p, X, y, BatchGrad()), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="(?s)cannot look into scripted modules.*Python modules"):
        step(params)


@pytest.mark.parametrize("way", ["scripted part", "traced part"])
def test_extended_modules(way: str) -> None:
    converted, plain, _, X, y = pair(way)
    converted.load_state_dict(plain.state_dict())
    module, loss = extend(converted), extend(nn.CrossEntropyLoss())
    asked = (extensions.BatchGrad(), extensions.Variance(), extensions.DiagGGNExact(), extensions.DiagHessian())
    with backpack(*asked):
        loss(module(X), y).backward()
    want = compute(*functionalize(plain), X, y, (BatchGrad(), Variance(), DiagGGN(), DiagHessian()))
    for ext, expected in zip(asked, want, strict=True):
        found = {k: getattr(p, ext.savefield) for k, p in module.named_parameters() if p.requires_grad}
        assert_close(found, expected)


def test_scripted_modules_cannot_be_extended() -> None:
    with pytest.raises(TypeError, match="scripted module.*contains it"):
        extend(torch.jit.script(nn.Linear(2, 2)))


def test_scripted_functions_of_parameters() -> None:
    """In a plain function, where nothing says that there is one: the graph does."""

    def scale(x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(x * w) * w.sum()

    scripted = torch.jit.script(scale)
    X, y, params = torch.randn(N, C), torch.arange(N) % C, {"w": torch.randn(C), "v": torch.randn(C, C)}
    for _ in range(4):
        got = compute(lambda p, x: scripted(x @ p["v"], p["w"]), params, X, y, SPECS + HESSIANS)
        assert_close(got, compute(lambda p, x: scale(x @ p["v"], p["w"]), params, X, y, SPECS + HESSIANS))
        required = {k: p.clone().requires_grad_() for k, p in params.items()}
        scripted(X @ required["v"], required["w"]).sum().backward()


def test_samples_that_a_scripted_part_mixes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, C)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            return h - h.mean(0)

    model_fn, params = functionalize(nn.Sequential(torch.jit.script(Mixed())))
    with pytest.raises(ValueError, match="mixes the samples"):
        compute(model_fn, params, torch.randn(N, 4), torch.arange(N) % C, BatchGrad())


@pytest.mark.parametrize("way", WAYS)
def test_kronecker_factors(way: str) -> None:
    """Without a rule, a parameter has its exact block."""
    converted, plain, params, X, y = pair(way)
    got = compute(functionalize(converted)[0], params, X, y, KFLR())
    diagonal = compute(functionalize(plain)[0], params, X, y, DiagGGN())
    for name, factors in got.items():
        if len(factors) == 1:
            assert_close(factors[0].diagonal().reshape(diagonal[name].shape), diagonal[name])


class ScriptedThenTurned(nn.Module):
    """Dynamo gives up at the scripted part, and would go on with what is called from there."""

    def __init__(self) -> None:
        super().__init__()
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
        self.weight, self.head = nn.Parameter(torch.randn(3, 3, 6)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv1d(self.scripted(x).mT, self.weight.narrow(-1, 1, 3), padding=1)
        return self.head(h.mT.sum(1))


@pytest.mark.filterwarnings("ignore")  # of dynamo, where it gives up
def test_where_dynamo_gives_up_it_does_not_look_into_the_engine() -> None:
    model_fn, params = functionalize(ScriptedThenTurned())
    X, y = torch.randn(4, 4, 3), torch.arange(4) % 3
    torch.compiler.reset()
    compiled = torch.compile(lambda p, X, y: compute(model_fn, p, X, y, [BatchGrad(), DiagGGN()]), backend="aot_eager")
    assert_close(compiled(params, X, y), compute(model_fn, params, X, y, [BatchGrad(), DiagGGN()]))
    v = {k: torch.randn_like(p) for k, p in params.items()}
    compiled = torch.compile(lambda p, X, y: curvfunc.ggn_vp(model_fn, p, X, y, v), backend="aot_eager")
    assert_close(compiled(params, X, y), curvfunc.ggn_vp(model_fn, params, X, y, v))
    torch.compiler.reset()
