"""Results are tensors of their own: dense, and with memory that nothing else has."""

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from problems import PROBLEMS
from torch import Tensor, nn

import curvfunc
from curvfunc import (
    KFAC,
    KFLR,
    KFRA,
    BatchDiagGGN,
    BatchDiagHessian,
    BatchDot,
    BatchGrad,
    BatchL2,
    DiagGGN,
    DiagHessian,
    GGNGram,
    Grad,
    Loss,
    Output,
    SqrtGGN,
    SumGradSquared,
    Variance,
    compute,
    functionalize,
)
from curvfunc.compat import backpack, extend, extensions

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

N, C = 4, 3
FIRST = [Loss(), Output(), Grad(), BatchGrad(), BatchL2(), SumGradSquared(), Variance(), BatchDot()]
SECOND = [
    DiagGGN(),
    BatchDiagGGN(),
    SqrtGGN(),
    KFLR(),
    KFLR(kfac_approx="reduce"),
    DiagHessian(),
    BatchDiagHessian(),
    GGNGram(),
]
SPECS = FIRST + SECOND


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, C), torch.tensor([0, 1, 2, 0])


def biases() -> dict[str, Tensor]:
    """Two that get the same cotangent, and one that is not used."""
    return {"w": torch.randn(C, C), "a": torch.randn(C), "b": torch.randn(C), "unused": torch.randn(2, 2)}


def plain(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ p["w"] + p["a"] + p["b"]


def without_rules(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return (
        torch.special.i0e(x) @ torch.sinc(p["w"]).T.T + torch.cumsum(p["a"], 0) + torch.fmax(x * 0, p["b"]) + torch.sinc(p["b"])
    )


def one_by_one(p: dict[str, Tensor], x: Tensor) -> Tensor:
    rows = [row @ p["w"] if row.sum().item() > 1e9 else row @ p["w"] + p["a"] + p["b"] for row in x]
    return torch.stack(rows)


MODELS = {"plain": plain, "vmap": without_rules, "loop": one_by_one}


def check(results: Any, *others: Any) -> None:
    """Each result is dense, and to spoil it changes no other one and none of the other tensors."""
    leaves, given = optree.tree_leaves(results), optree.tree_leaves(others)
    kept = [t.detach().clone() for t in given]
    for t in leaves:
        expected = 1
        for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
            assert size == 1 or stride == expected, f"strides {t.stride()} of shape {tuple(t.shape)}"
            expected *= size
    for k, t in enumerate(leaves):
        before = [s.detach().clone() for s in leaves[k + 1 :]]
        with torch.no_grad():
            t.detach().fill_(7.0)
        for s, value in zip(leaves[k + 1 :], before, strict=True):
            assert torch.equal(s, value)
    for t, value in zip(given, kept, strict=True):
        assert torch.equal(t, value)


@pytest.mark.parametrize("subsampling", [None, [2, 0, 2]])
@pytest.mark.parametrize("name", MODELS)
def test_each_path(name: str, subsampling: Any) -> None:
    params, (X, y) = biases(), data()
    specs = [s for s in SPECS if not (isinstance(s, (DiagHessian, BatchDiagHessian)) and subsampling)]
    call = lambda: compute(MODELS[name], params, X, y, [specs, specs], subsampling=subsampling)
    assert curvfunc.explain(MODELS[name], params, X).rows[0].path == name
    first = call()
    values = optree.tree_map(torch.clone, first)
    check(first, params, X, y)
    assert_close(call(), values)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_all_problems(name: str) -> None:
    model_fn, params, X, y, loss_fn = PROBLEMS[name].make()
    results = compute(model_fn, params, X, y, [*FIRST, DiagGGN(), BatchDiagGGN(), SqrtGGN(), KFLR()], loss_fn=loss_fn)
    check(results, params, X, y)


def test_kronecker_factors_with_averages() -> None:
    model_fn, params = functionalize(nn.Sequential(nn.Linear(C, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Linear(4, C)))
    X, y = data()
    check(compute(model_fn, params, X, y, [KFRA(), KFRA(), KFAC(2), KFAC(2)]), params, X, y)


@pytest.mark.parametrize("name", MODELS)
def test_differentiable_calls(name: str) -> None:
    params, (X, y) = {k: p.requires_grad_() for k, p in biases().items()}, data()
    specs = [s for s in SPECS if not isinstance(s, (DiagHessian, BatchDiagHessian))]
    results = compute(MODELS[name], params, X, y, [specs, specs])
    gradient = torch.autograd.grad(sum(t.square().sum() for t in optree.tree_leaves(results)), list(params.values())[:3])
    one = compute(MODELS[name], params, X, y, specs)
    want = torch.autograd.grad(2 * sum(t.square().sum() for t in optree.tree_leaves(one)), list(params.values())[:3])
    assert_close(gradient, want)
    check(compute(MODELS[name], params, X, y, [specs, specs]), params, X, y)


@pytest.mark.parametrize("specs", [Output(), Loss(), (Loss(), Output(), Output())])
def test_outputs_that_are_inputs(specs: Any) -> None:
    X, y = data()
    first = lambda out, y: out[0, 0] + 0 * out.sum() if len(out) > 1e9 else out[0, 0]
    for loss_fn in (F.cross_entropy, first):
        check(compute(lambda p, x: x, biases(), X, y, specs, loss_fn=loss_fn), X, y)


def test_outputs_that_the_model_keeps() -> None:
    """In a buffer, in an attribute, and in a tensor that a function captured."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(C, C)
            self.register_buffer("table", torch.zeros(N, C))

        def forward(self, x: Tensor) -> Tensor:
            kept.append(self.linear(x))
            return kept[-1]

    X, y = data()
    kept: list[Tensor] = []
    model_fn, params = functionalize(Cached())
    out = compute(model_fn, params, X, y, Output())
    check(out, kept[-1].detach())
    table = torch.zeros(N, C)

    def stored(p: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            table.copy_(x @ p["w"])
        return table

    check(compute(stored, biases(), X, y, Output()), table)
    params = {"p": torch.randn(N, C)}
    check(compute(lambda p, x: p["p"], params, X, y, Output()), params)


def test_gradients_that_a_backward_pass_keeps() -> None:
    kept = torch.randn(C)

    class Shift(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
            return x + a

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return g, kept

    X, y = data()
    check(compute(lambda p, x: Shift.apply(x @ p["w"], p["a"]), biases(), X, y, Grad()), kept)


@pytest.mark.parametrize("where", ["hook", "function", "loss"])
@pytest.mark.parametrize("specs", [[BatchGrad()], [BatchGrad(), BatchGrad(), Grad(), Variance()]], ids=["one", "several"])
def test_cotangents_that_somebody_keeps(specs: list[Any], where: str) -> None:
    """The gradients of a bias's samples are those of the outputs, which hooks, functions and losses see."""
    kept: list[Tensor] = []

    def keep(g: Tensor) -> Tensor:
        kept.append(g.mul(1.0))
        return kept[-1]

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return keep(g)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(C, C), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            if where == "hook":
                hidden.register_hook(keep)
            return self.last(Kept.apply(hidden) if where == "function" else hidden)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return (Kept.apply(out) if where == "loss" else out).square().mean(0).sum()

    model_fn, params = functionalize(Net())
    X, y = data()
    results = compute(model_fn, params, X, y, specs, loss_fn=loss_fn)
    assert kept
    check(results, kept, params, X)


@pytest.mark.parametrize("name", ["mlp: squared error", "conv2d, groups", "resnet", "gpt"])
def test_nothing_is_copied_that_is_its_own_already(name: str) -> None:
    model_fn, params, X, y, loss_fn = PROBLEMS[name].make()
    specs = [Loss(), Output(), Grad(), BatchGrad(), BatchL2(), Variance(), DiagGGN(), BatchDiagGGN(), SqrtGGN()]
    with pytest.MonkeyPatch.context() as patch:
        copies: list[tuple[int, ...]] = []
        clone = torch.Tensor.clone
        patch.setattr(torch.Tensor, "clone", lambda t, **kwargs: copies.append(tuple(t.shape)) or clone(t, **kwargs))
        compute(model_fn, params, X, y, specs, loss_fn=loss_fn)
    assert not copies


def test_sparse_gradients_become_dense() -> None:
    model_fn, params = functionalize(nn.Sequential(nn.Embedding(5, C, sparse=True), nn.Flatten()))
    X, y = torch.tensor([[0], [3], [0], [1]]), torch.tensor([0, 1, 2, 0])
    specs = [Grad(), Variance(), BatchGrad()]
    dense, _ = functionalize(nn.Sequential(nn.Embedding(5, C), nn.Flatten()))
    results = compute(model_fn, params, X, y, specs)
    assert_close(results, compute(dense, params, X, y, specs))
    check(results, params)


# --- transformations --------------------------------------------------------------------------------------------------

ENSEMBLES = {
    "all": {"w": 0, "a": 0, "b": 0, "unused": 0},
    "one": {"w": 0, "a": None, "b": None, "unused": None},
}


@pytest.mark.parametrize("dims", ENSEMBLES)
@pytest.mark.parametrize("name", ["plain", "vmap"])
def test_vmap(name: str, dims: str) -> None:
    X, y = data()
    params = {k: torch.randn(2, *p.shape) if ENSEMBLES[dims][k] == 0 else p for k, p in biases().items()}
    call = torch.vmap(lambda p: compute(MODELS[name], p, X, y, [FIRST, FIRST, SECOND[:4]]), in_dims=(ENSEMBLES[dims],))
    first = call(params)
    values = optree.tree_map(torch.clone, first)
    check(first, params, X, y)
    assert_close(call(params), values)


def test_vmap_twice() -> None:
    X, y = data()
    params = {k: torch.randn(3, *p.shape) if k == "a" else p for k, p in biases().items()}
    inner = torch.vmap(lambda x, p: compute(plain, p, x, y, FIRST), in_dims=(0, None))
    outer = torch.vmap(inner, in_dims=(None, {"w": None, "a": 0, "b": None, "unused": None}))
    results = outer(torch.stack([X, 2 * X]), params)
    assert {t.shape[:2] for t in optree.tree_leaves(results)} == {(3, 2)}
    check(results, params, X, y)


def test_results_that_depend_on_nothing_mapped_stay_alone() -> None:
    """Where vmap maps something else, no copies are made for it."""
    params, (X, y) = biases(), data()

    def scaled(factor: Tensor) -> Tensor:
        result = compute(plain, params, X, y, BatchGrad())["w"]
        assert not torch._C._functorch.is_batchedtensor(result)
        return result * factor

    assert torch.vmap(scaled)(torch.ones(2)).shape == (2, N, C, C)


@pytest.mark.parametrize("name", ["plain", "vmap"])
def test_grad_and_jvp(name: str) -> None:
    params, (X, y) = biases(), data()
    tangents = {k: torch.randn_like(p) for k, p in params.items()}
    call = lambda p: compute(MODELS[name], p, X, y, [FIRST, FIRST])
    check(torch.func.jvp(call, (params,), (tangents,)), params, tangents, X, y)
    _, results = torch.func.grad(lambda p: (p["a"].sum(), call(p)), has_aux=True)(params)
    check(results, params, X, y)
    add = lambda p: compute(lambda p, x: x + p["a"], p, torch.zeros(N, C), y, Output())
    primal, tangent = torch.func.jvp(add, ({"a": torch.ones(N, C)},), ({"a": (moved := torch.randn(N, C))},))
    check((primal, tangent), moved)


@pytest.mark.parametrize("twice", [False, True])
def test_compiled(twice: bool, compile_backend: str) -> None:
    params, (X, y) = biases(), data()
    specs = [SPECS, SPECS] if twice else SPECS
    step = torch.compile(lambda p, X: compute(plain, p, X, y, specs), fullgraph=True, backend=compile_backend)
    first = step(params, X)
    values = optree.tree_map(torch.clone, first)
    check(first, params, X, y)
    assert_close(step(params, X), values)
    identity = torch.compile(lambda p, X: compute(lambda p, x: x, p, X, y, Output()), fullgraph=True, backend="aot_eager")
    check(identity(params, X), X)


# --- products ---------------------------------------------------------------------------------------------------------


def shift(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return x + p["a"] + p["b"]


def half_square(out: Tensor, y: Tensor) -> Tensor:
    return out.square().sum() / 2


PRODUCTS: dict[str, Callable[..., Any]] = {
    "jvp": lambda p, x, y, v: curvfunc.jvp(shift, p, x, v),
    "vjp": lambda p, x, y, v: curvfunc.vjp(shift, p, x, v["a"]),
    "hessian_vp": lambda p, x, y, v: curvfunc.hessian_vp(shift, p, x, y, v, loss_fn=half_square),
    "ggn_vp": lambda p, x, y, v: curvfunc.ggn_vp(shift, p, x, y, v, loss_fn=half_square),
    "fisher_vp": lambda p, x, y, v: curvfunc.fisher_vp(shift, p, x, y, v, loss_fn=F.mse_loss),
    "operator": lambda p, x, y, v: curvfunc.hessian_operator(shift, p, x, y, loss_fn=half_square) @ v,
    "unflatten": lambda p, x, y, v: (op := curvfunc.ggn_operator(shift, p, x, y)).unflatten(op.flatten(v)),
    "hmp": lambda p, x, y, v: optree.tree_map(lambda f, u: f(u[None]), curvfunc.hmp(shift, p, x, y, loss_fn=half_square), v),
    "ggnmp": lambda p, x, y, v: optree.tree_map(
        lambda f, u: f(u[None].expand(2, -1, -1)), curvfunc.ggnmp(shift, p, x, y, loss_fn=half_square), v
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    """One sample and parameters of its shape, so that Jacobian and Hessian are the identity."""
    X, y = torch.randn(1, C), torch.randn(1, C) if name == "fisher_vp" else torch.tensor([1])
    params, v = ({k: torch.randn(1, C) for k in ("a", "b", "unused")} for _ in range(2))
    check(PRODUCTS[name](params, X, y, v), params, X, y, v)
    if name not in ("operator", "unflatten", "hmp", "ggnmp"):
        members = {k: torch.randn(2, 1, C) for k in params}
        check(torch.vmap(lambda v: PRODUCTS[name](params, X, y, v))(members), members, params, X)
        required = {k: p.clone().requires_grad_() for k, p in params.items()}
        check(PRODUCTS[name](required, X, y, v), required, v)


# --- the caller's memory ----------------------------------------------------------------------------------------------


def test_earlier_results_as_memory() -> None:
    """Also where the model is another one by then."""
    params, (X, y) = biases(), data()
    specs = [BatchGrad(), SqrtGGN(), BatchDiagGGN(), Grad(), Output(), KFLR()]
    other = lambda p, x: x @ p["w"] * p["a"] + p["b"] + p["unused"].sum()
    memory = compute(plain, params, X, y, specs)
    want = compute(other, params, X, y, specs)
    assert_close(compute(other, params, X, y, specs, out=memory), want)
    assert_close(compute(plain, params, X, y, specs, out=memory), compute(plain, params, X, y, specs))


def test_results_beside_memory() -> None:
    params, (X, y) = biases(), data()
    memory = compute(plain, params, X, y, BatchGrad())
    results = compute(plain, params, X, y, [BatchGrad(), BatchGrad(), Grad()], out=[memory, None, None])
    check(results, params, X, y)


def test_memory_that_is_not_its_own() -> None:
    params, (X, y) = biases(), data()
    memory = compute(plain, params, X, y, BatchGrad())
    into = lambda out, specs=BatchGrad(), x=X: compute(plain, params, x, y, specs, out=out)
    with pytest.raises(ValueError, match=r"out for BatchGrad shares memory with out for BatchGrad.*memory of their own"):
        into({**memory, "a": memory["b"]})
    with pytest.raises(ValueError, match=r"out for BatchGrad has strides \(0, 0\) for shape \(4, 3\).*torch\.empty"):
        into({**memory, "a": torch.zeros(()).expand(N, C)})
    with pytest.raises(ValueError, match="out for Output shares memory with X"):
        into(X, Output())
    with pytest.raises(ValueError, match="out for Grad shares memory with parameter"):
        into({k: params[k] for k in params}, Grad())
    whole = torch.zeros(N, 3 * C)
    with pytest.raises(ValueError, match="shares memory"):
        into({**memory, "a": whole[:, :C], "b": whole[:, 1 : C + 1]})


def test_memory_in_parts_of_one_tensor() -> None:
    params, (X, y) = biases(), data()
    sizes = [p.numel() for p in params.values()]
    whole = torch.zeros(N, sum(sizes))
    parts = whole.split(sizes, dim=1)
    memory = {k: part.view(N, *p.shape) for (k, p), part in zip(params.items(), parts, strict=True)}
    compute(plain, params, X, y, BatchGrad(), out=memory)
    want = compute(plain, params, X, y, BatchGrad())
    assert_close(whole, torch.cat([g.flatten(1) for g in want.values()], dim=1))


# --- extended modules -------------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Two biases with the same cotangent; with ``rules`` on the plain path."""

    def __init__(self, rules: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(C, C, bias=False)
        self.a, self.b = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(C))
        self.rules = rules

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x) + self.a + self.b
        return out if self.rules else out + torch.sinc(self.a) * 0


@pytest.mark.parametrize("rules", [True, False])
def test_extended_modules(rules: bool) -> None:
    module, loss = extend(Shifted(rules)), extend(nn.CrossEntropyLoss())
    X, y = data()
    asked = (
        extensions.BatchGrad(),
        extensions.BatchL2Grad(),
        extensions.Variance(),
        extensions.SqrtGGNExact(),
        extensions.DiagGGNExact(),
        extensions.KFLR(),
        extensions.BatchDiagHessian(),
        extensions.DiagHessian(),
    )
    with backpack(*asked):
        loss(module(X), y).backward()
    fields = [ext.savefield for ext in asked]
    results = [[getattr(p, field) for field in fields] + [p.grad] for p in module.parameters()]
    check(results, X, y)
