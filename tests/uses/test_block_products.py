"""Products with blocks of the GGN from its root at the uses of a parameter: in the shim, without another forward pass."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Mark, Marked, assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc.compat import backpack, blocks, extend, graphs
from curvfunc.compat.extensions import GGNMP, HMP, PCHMP

N, C = 6, 3


class Shared(nn.Module):
    """An embedding whose table is the head too, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(C, 4, padding_idx=1), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.layer(F.relu(self.layer(self.table(tokens))))
        return F.linear(h.mean(1), self.table.weight)


class Lookup(nn.Module):
    """An embedding of a sequence."""

    def __init__(self, activation: nn.Module = nn.ReLU()) -> None:
        super().__init__()
        self.activation = activation
        self.table, self.layer, self.head = nn.Embedding(7, 4, padding_idx=1), nn.Linear(4, 5), nn.Linear(5, C)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.activation(self.layer(self.table(tokens))).mean(1))


class Skip(nn.Module):
    """A skip connection over a smooth activation, after another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(h + F.softplus(self.second(h)))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, C), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(C))


def elementwise(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 4), activation, nn.Linear(4, C))


def images() -> Tensor:
    return torch.randn(N, 2, 5, 5)


def sequences() -> Tensor:
    return torch.randn(N, 2, 4)


ALL = {"ggnmp", "hmp", "pchmp"}

# Model, input, and the products for which columns at the uses of parameters are enough.
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, C)), lambda: torch.randn(N, 4), ALL),
    "tanh": (lambda: elementwise(nn.Tanh()), lambda: torch.randn(N, 4), ALL),
    "gelu": (lambda: elementwise(nn.GELU()), lambda: torch.randn(N, 4), ALL),
    "softsign": (lambda: elementwise(nn.Softsign()), lambda: torch.randn(N, 4), {"ggnmp", "hmp"}),
    "smooth conv": (lambda: flat(nn.Conv2d(2, 3, 2), nn.Sigmoid(), nn.Conv2d(3, 2, 2), nn.SiLU()), images, ALL),
    "smooth sequence": (lambda: flat(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3), nn.Tanh()), sequences, ALL),
    "smooth embedding": (lambda: Lookup(nn.Tanh()), lambda: torch.randint(7, (N, 5)), ALL),
    "skip": (lambda: Skip(), lambda: torch.randn(N, 4), ALL),
    "conv": (lambda: flat(nn.Conv2d(2, 4, 2), nn.ReLU(), nn.MaxPool2d(2)), images, ALL),
    "grouped": (lambda: flat(nn.Conv1d(4, 6, 2, groups=2), nn.ReLU()), lambda: torch.randn(N, 4, 5), ALL),
    "two positions": (lambda: flat(nn.Conv1d(4, 6, 2, groups=2), nn.ReLU()), lambda: torch.randn(N, 4, 3), ALL),
    "transposed": (lambda: flat(nn.ConvTranspose1d(4, 6, 2, groups=2), nn.ReLU()), lambda: torch.randn(N, 4, 3), ALL),
    "transposed, two positions": (lambda: flat(nn.ConvTranspose1d(4, 6, 2, groups=2)), lambda: torch.randn(N, 4, 1), ALL),
    "sequence": (lambda: flat(nn.Linear(4, 5), nn.ReLU()), sequences, ALL),
    "embedding": (Lookup, lambda: torch.randint(7, (N, 5)), ALL),
    "shared": (Shared, lambda: torch.randint(C, (N, 5)), {"ggnmp"}),
    "norm": (lambda: flat(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU()), lambda: torch.randn(N, 4), {"ggnmp"}),
    "unused": (Unused, lambda: torch.randn(N, 4), ALL),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor, list[int]]:
    """Model, data, and a list that gets an entry for each forward pass."""
    torch.manual_seed(0)
    build, inputs, _ = NETS[name]
    model, X = build(), inputs()
    model(X)
    calls: list[int] = []
    inner = model.forward
    model.forward = lambda *args: (calls.append(1), inner(*args))[1]  # type: ignore[method-assign]
    return model, X, torch.arange(N) % C, calls


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("vectors", [1, 4])
@pytest.mark.parametrize("name", NETS)
def test_products_need_one_forward_pass(name: str, vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, X, y, calls = problem(name)
    model_fn, params = curvfunc.functionalize(model)
    vs = {k: torch.randn(vectors, *p.shape) for k, p in params.items()}

    def values(products: dict[str, Any]) -> dict[str, Tensor]:
        return {k: products[k](v) for k, v in vs.items()}

    wanted = [
        ext
        for ext in (GGNMP(), HMP(), PCHMP("pchmp"), PCHMP("pchmp_abs", "abs"))
        if ext.savefield.split("_")[0] in NETS[name][2]
    ]
    want = {}
    for ext in wanted:
        options = {"modify": ext.get_modification_mode()} if isinstance(ext, PCHMP) else {}
        product = getattr(curvfunc, ext.savefield.removesuffix("_abs"))
        want[ext.savefield] = values(product(model_fn, params, X, y, **options))
    extend(model)
    reached = {k: p for k, p in model.named_parameters() if not k.startswith("other.")}
    loss = extend(nn.CrossEntropyLoss())(model(X), y)
    calls.clear()
    monkeypatch.setattr(blocks, "MOST_ENTRIES", 100)
    for limit in (1 << 40, 0):  # columns, and the graph
        monkeypatch.setattr(blocks, "LARGEST_BYTES", limit)
        with backpack(*wanted):
            loss.backward(retain_graph=True)
        kinds = {type(getattr(p, field)) for p in reached.values() for field in want}
        assert kinds == {blocks.BlockProduct if limit else graphs.GraphProduct}
        for field, values_of in want.items():
            got = {k: getattr(p, field)(vs[k]) for k, p in reached.items()}
            assert_close(got, {k: values_of.pop(k) for k in reached}, rtol=1e-9)
            values_of |= got
        assert not calls
    unused = {k: p for k, p in model.named_parameters() if k not in reached}
    assert not any(hasattr(p, field) or values_of[k].any() for k, p in unused.items() for field, values_of in want.items())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["mlp", "conv", "sequence", "tanh"])
def test_losses_that_are_not_convex(name: str) -> None:
    """Weights of both signs: those of a negative multiple of a loss, and of negative class weights."""
    model, X, y, calls = problem(name)
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, -0.5, 2.0]), reduction="sum")
    model_fn, params = curvfunc.functionalize(model)
    ggn = curvfunc.ggnmp(model_fn, params, X, y, loss_fn=loss_fn)
    hessian = curvfunc.hmp(model_fn, params, X, y, loss_fn=loss_fn)
    extend(model)
    loss = extend(loss_fn)(model(X), y)
    calls.clear()
    with backpack(GGNMP(), HMP()):
        loss.backward()
    assert not calls
    for k, p in model.named_parameters():
        v = torch.randn(3, *p.shape)
        assert_close(p.ggnmp(v), ggn[k](v), rtol=1e-9)
        assert_close(p.hmp(v), hessian[k](v), rtol=1e-9)


@pytest.mark.parametrize("extension", [GGNMP, HMP, PCHMP])
def test_products_keep_no_graph(extension: Any) -> None:
    """Neither is it collected as garbage later."""
    mark = Mark()
    gone = weakref.ref(mark)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.up, self.down = nn.Linear(4, 2), nn.ConvTranspose1d(2, 2, 2), nn.Conv1d(2, 2, 2)
            self.last = nn.Linear(2, C)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(Marked.apply(x, marks.pop()) if marks else x)
            return self.last(F.relu(self.down(self.up(h.unsqueeze(2)))).flatten(1))

    marks = [mark]
    model, loss_fn = extend(Net()), extend(nn.CrossEntropyLoss())
    X, y = torch.randn(N, 4, requires_grad=True), torch.arange(N) % C
    gc.disable()
    try:
        with backpack(extension()):
            loss_fn(model(X), y).backward()
        assert all(hasattr(p, extension().savefield) for p in model.parameters())
        del mark
        assert gone() is None
    finally:
        gc.enable()


def test_products_stay_where_they_were_taken() -> None:
    model, X, y, _ = problem("mlp")
    extend(model)
    with backpack(HMP()):
        extend(nn.CrossEntropyLoss())(model(X), y).backward()
    weight = model.get_parameter("0.weight")
    v = torch.randn(2, *weight.shape)
    want = weight.hmp(v)
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad)
    assert_close(weight.hmp(v), want)
    with pytest.raises(ValueError, match=r"v has shape \(4, 5\)"):
        weight.hmp(v[0].T)
    with pytest.raises(ValueError, match="Convert it"):
        weight.hmp(v.double())
    X.zero_()
    with pytest.raises(RuntimeError, match=r"shape \(5, 4\) was changed in place after the backward pass"):
        weight.hmp(v)


def test_low_precision() -> None:
    model, X, y, _ = problem("mlp")
    model, X = extend(model.to(torch.bfloat16)), X.to(torch.bfloat16)
    with backpack(GGNMP()):
        extend(nn.CrossEntropyLoss())(model(X), y).backward()
    model_fn, params = curvfunc.functionalize(model.float())
    want = curvfunc.ggnmp(model_fn, params, X.float(), y)
    for k, p in model.named_parameters():
        v = torch.randn(2, *p.shape).to(torch.bfloat16)
        got = p.ggnmp(v)
        assert got.dtype == torch.bfloat16
        assert_close(got.float(), want[k](v.float()), rtol=3e-2)
