"""X and y in containers: what tokenizers return, mappings, dataclasses and named tuples, on every path."""

import dataclasses
import functools
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from types import MappingProxyType
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
    BatchGrad,
    DiagGGN,
    DiagHessian,
    Grad,
    Loss,
    Output,
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
SPECS = [Loss(), Output(), Grad(), BatchGrad(), Variance(), DiagGGN(), BatchDiagGGN(), DiagHessian(), KFLR()]


@dataclasses.dataclass
class Plain:
    a: Any
    b: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    a: Any
    b: Any = None


@dataclasses.dataclass
class Derived:
    """Has a field and a property of its own making, and an attribute that is no field."""

    a: Any
    b: Any = None
    c: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        assert self.a.ndim == 2, "the class checks what it is made of"
        self.c = 2 * self.a
        self.name = "derived"

    @functools.cached_property
    def doubled(self) -> Tensor:
        return 2 * self.a


Named = namedtuple("Named", ["a", "b"])


class Record(OrderedDict):
    """A dictionary whose entries are attributes too, as the outputs of transformers are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def derived(a: Tensor, b: Tensor) -> Derived:
    made = Derived(a, b)
    assert made.doubled is made.doubled
    return made


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "UserDict": lambda a, b: UserDict(a=a, b=b),
    "mapping": lambda a, b: MappingProxyType({"a": a, "b": b}),
    "subclass of a dictionary": lambda a, b: Record(a=a, b=b),
    "dataclass": Plain,
    "frozen dataclass with slots": Frozen,
    "dataclass with more than its arguments": derived,
    "namedtuple": Named,
    "nested": lambda a, b: {"x": (Plain(UserDict(a=a), [b]), None)},
}


def parts(x: Any) -> tuple[Tensor, Tensor]:
    """a and b of a container, which must be of the kind that was passed."""
    if isinstance(x, dict) and "x" in x:
        inner = x["x"][0]
        assert isinstance(inner, Plain)
        assert isinstance(inner.a, UserDict)
        return inner.a["a"], inner.b[0]
    if isinstance(x, (UserDict, MappingProxyType)):
        return x["a"], x["b"]
    if isinstance(x, Derived):
        assert x.name == "derived"
        return (x.c + x.doubled) / 4, x.b
    return x.a, x.b


def plain(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(a, p["w"])) * b, p["v"])


def without_rules(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(a, torch.sinc(p["w"]))) * b, p["v"]) + torch.fmax(b.sum(1, keepdim=True), p["v"][0, 0])


def one_by_one(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    return without_rules(p, a, b) if a.sum().item() < 1e9 else a


MODELS = {"plain": plain, "vmap": without_rules, "loop": one_by_one}


def data() -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    return {"w": torch.randn(4, 5), "v": torch.randn(C, 4)}, torch.randn(N, 5), torch.randn(N, 4), torch.arange(N) % C


@pytest.mark.parametrize("subsampling", [None, [2, 0, 2]])
@pytest.mark.parametrize("path", MODELS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(container: str, path: str, subsampling: Any) -> None:
    params, a, b, y = data()
    model = MODELS[path]
    make = CONTAINERS[container]
    own = lambda p, x: model(p, *parts(x))
    pair = lambda p, x: model(p, *x)
    assert {row.path for row in curvfunc.explain(own, params, make(a, b)).rows} == {path}
    got = compute(own, params, make(a, b), y, SPECS, subsampling=subsampling)
    assert_close(got, compute(pair, params, (a, b), y, SPECS, subsampling=subsampling))


@pytest.mark.parametrize("container", CONTAINERS)
def test_products_and_operators(container: str) -> None:
    params, a, b, y = data()
    X = CONTAINERS[container](a, b)
    own = lambda p, x: plain(p, *parts(x))
    pair = lambda p, x: plain(p, *x)
    v = {k: torch.randn_like(p) for k, p in params.items()}
    for subsampling in (None, [1, 1, 3]):
        given = {"subsampling": subsampling}
        for product in (curvfunc.hessian_vp, curvfunc.ggn_vp, curvfunc.fisher_vp):
            assert_close(product(own, params, X, y, v, **given), product(pair, params, (a, b), y, v, **given))
        assert_close(curvfunc.jvp(own, params, X, v, **given), curvfunc.jvp(pair, params, (a, b), v, **given))
        operator = curvfunc.ggn_operator(own, params, X, y, **given)
        assert_close(operator @ v, curvfunc.ggn_operator(pair, params, (a, b), y, **given) @ v)


@pytest.mark.parametrize("container", CONTAINERS)
def test_targets(container: str) -> None:
    params, a, b, _ = data()
    target, weight = torch.randn(N, C), torch.rand(N, C)
    model = lambda p, x: plain(p, *x)

    def own(out: Tensor, y: Any) -> Tensor:
        value, scale = parts(y)
        return (scale * (out - value).square()).mean()

    pair = lambda out, y: (y[1] * (out - y[0]).square()).mean()
    y = CONTAINERS[container](target, weight)
    specs = [Loss(), Grad(), BatchGrad(), DiagGGN(), DiagHessian()]
    for subsampling in (None, [3, 1]):
        got = compute(model, params, (a, b), y, specs, loss_fn=own, subsampling=subsampling)
        assert_close(got, compute(model, params, (a, b), (target, weight), specs, loss_fn=pair, subsampling=subsampling))
    stacked = optree.tree_map(lambda p: torch.stack([p, 2 * p]), params)
    assert_close(
        torch.vmap(lambda p: compute(model, p, (a, b), y, specs, loss_fn=own))(stacked),
        torch.vmap(lambda p: compute(model, p, (a, b), (target, weight), specs, loss_fn=pair))(stacked),
    )


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Linear(5, 4), nn.Linear(4, C)

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.w(a))
        return self.v(h if b is None else h * b)


class OneArgument(Keywords):
    def forward(self, x: Any) -> Tensor:  # type: ignore[override]
        return super().forward(*parts(x))


@pytest.mark.parametrize("container", CONTAINERS)
def test_modules_get_mappings_as_keywords_and_all_else_as_one_argument(container: str) -> None:
    _, a, b, y = data()
    X = CONTAINERS[container](a, b)
    keywords = container in ("UserDict", "mapping", "subclass of a dictionary")
    module, reference = Keywords() if keywords else OneArgument(), Keywords()
    reference.load_state_dict(module.state_dict())
    model_fn, params = functionalize(module)
    if container == "nested":
        X = (X,)
    assert_close(compute(model_fn, params, X, y, SPECS), compute(functionalize(reference)[0], params, (a, b), y, SPECS))


def test_transformers() -> None:
    """BatchEncoding as X, and a model's output as X of the next one."""
    outputs = pytest.importorskip("transformers.modeling_outputs")
    encoding = pytest.importorskip("transformers.tokenization_utils_base").BatchEncoding
    ids, mask, y = torch.randint(7, (N, 6)), torch.rand(N, 6), torch.arange(N) % C

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, C)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head((self.embed(input_ids) * attention_mask.unsqueeze(-1)).sum(1))

    model_fn, params = functionalize(Bag())
    want = {"input_ids": ids, "attention_mask": mask}
    for subsampling in (None, [1, 3]):
        got = compute(model_fn, params, encoding(want), y, SPECS, subsampling=subsampling)
        assert_close(got, compute(model_fn, params, want, y, SPECS, subsampling=subsampling))
    states = outputs.BaseModelOutput(last_hidden_state=torch.randn(N, 6, 4))
    head = {"w": torch.randn(C, 4)}
    own = lambda p, x: F.linear(x.last_hidden_state.mean(1) + 0 * x[0].sum((1, 2), keepdim=True)[:, 0], p["w"])
    plain = lambda p, x: F.linear(x.mean(1), p["w"])
    for subsampling in (None, [1, 3]):
        got = compute(own, head, states, y, SPECS, subsampling=subsampling)
        assert_close(got, compute(plain, head, states.last_hidden_state, y, SPECS, subsampling=subsampling))


def test_registered_classes() -> None:
    class Box:
        def __init__(self, a: Any, b: Any) -> None:
            self.a, self.b = a, b

    torch.utils._pytree.register_pytree_node(Box, lambda x: ([x.a, x.b], None), lambda values, _: Box(*values))
    params, a, b, y = data()
    got = compute(lambda p, x: plain(p, x.a, x.b), params, Box(a, b), y, SPECS, subsampling=[1, 2])
    assert_close(got, compute(lambda p, x: plain(p, *x), params, (a, b), y, SPECS, subsampling=[1, 2]))


@pytest.mark.parametrize("container", ["UserDict", "dataclass", "namedtuple"])
def test_extended_modules(container: str) -> None:
    _, a, b, y = data()
    module, loss = extend(OneArgument()), extend(nn.CrossEntropyLoss())
    with backpack(extensions.BatchGrad(), extensions.DiagGGNExact()):
        loss(module(CONTAINERS[container](a, b)), y).backward()
    reference = Keywords()
    reference.load_state_dict(module.state_dict())
    each, diagonal = compute(*functionalize(reference), (a, b), y, (BatchGrad(), DiagGGN()))
    assert_close({k: p.grad_batch for k, p in module.named_parameters()}, each)
    assert_close({k: p.diag_ggn_exact for k, p in module.named_parameters()}, diagonal)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiled(model: Any) -> Any:
    return torch.compile(lambda p, X, y: compute(model, p, X, y, (Grad(), BatchGrad())), fullgraph=True, backend="aot_eager")


def test_compiled_calls_take_what_torch_takes() -> None:
    params, a, b, y = data()
    want = compute(lambda p, x: plain(p, *x), params, (a, b), y, (Grad(), BatchGrad()))
    model = lambda p, x: plain(p, x.a, x.b)
    assert_close(compiled(model)(params, Named(a, b), y), want)
    torch.export.register_dataclass(Plain)
    try:
        assert_close(compiled(model)(params, Plain(a, b), y), want)
    finally:
        torch.utils._pytree._deregister_pytree_node(Plain)


def test_compiled_calls_refuse_other_containers() -> None:
    params, a, b, y = data()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"(?s)UserDict.*dict\(X\)"):
        compiled(lambda p, x: plain(p, x["a"], x["b"]))(params, UserDict(a=a, b=b), y)
    v = {k: torch.randn_like(p) for k, p in params.items()}
    step = lambda p, X: curvfunc.jvp(lambda p, x: plain(p, x.a, x.b), p, X, v)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"(?s)Frozen.*dictionary"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(params, Frozen(a, b))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_tensors_besides_the_fields() -> None:
    """They cannot follow a subset, so that they would be those of other samples."""
    params, a, b, y = data()
    X = Plain(a)
    X.mask = b  # type: ignore[attr-defined]
    with pytest.raises(
        TypeError, match=r"X holds a Plain with tensors \['mask'\] besides its items or fields.*Make them fields"
    ):
        compute(lambda p, x: plain(p, x.a, x.mask), params, X, y, BatchGrad())


@pytest.mark.parametrize("X", [Plain(torch.zeros(N, 5), "text"), UserDict(a=[1, 2]), object()])
def test_what_is_no_tensor(X: Any) -> None:
    params, *_, y = data()
    with pytest.raises(TypeError, match="X must hold tensors, got (str|int|object); use torch.as_tensor"):
        compute(lambda p, x: x, params, X, y, BatchGrad())


def test_different_numbers_of_samples() -> None:
    params, a, b, y = data()
    with pytest.raises(ValueError, match=r"tensors in X have \[3, 4\] samples"):
        compute(lambda p, x: x, params, Plain(a, b[:3]), y, BatchGrad())
