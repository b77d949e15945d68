"""Products in the shim for which columns would be too many: on the graph of the user's own forward pass."""

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
from curvfunc.compat import backpack, extend, extensions, graphs
from curvfunc.compat.extensions import GGNMP, HMP, PCHMP, BatchGrad

N, C = 6, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6), nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class NoRule(nn.Module):
    """Columns would take a forward pass for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, C), nn.Parameter(torch.rand(C) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.atan2(self.layer(x.mean(1)), self.scale)


def wide(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(C))


# Model, and the extensions that it supports.
NETS: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "attention": (Attention, [HMP()]),
    "recurrent": (Recurrent, [HMP()]),
    "norm": (lambda: wide(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU()), [HMP()]),
    "no rule": (NoRule, [HMP(), GGNMP()]),
    "smooth": (lambda: wide(nn.Conv1d(5, 24, 3), nn.Tanh()), [HMP(), PCHMP("clip"), PCHMP("abs", modify="abs")]),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor, list[int]]:
    """Model, data, and a list that gets an entry for each forward pass."""
    torch.manual_seed(0)
    model, X = NETS[name][0](), torch.randn(N, 5, 6)
    model(X)
    calls: list[int] = []
    inner = model.forward
    model.forward = lambda *args: (calls.append(1), inner(*args))[1]  # type: ignore[method-assign]
    return model, X, torch.arange(N) % C, calls


def functional(ext: Any) -> Callable[..., Any]:
    if isinstance(ext, PCHMP):
        return lambda *args: curvfunc.pchmp(*args, modify=ext.get_modification_mode())
    return curvfunc.hmp if isinstance(ext, HMP) else curvfunc.ggnmp


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_one_forward_pass(name: str, inside: bool) -> None:
    model, X, y, calls = problem(name)
    exts = NETS[name][1]
    model_fn, params = curvfunc.functionalize(model)
    vs = {k: torch.randn(3, *p.shape) for k, p in params.items()}
    wanted = {ext.savefield: functional(ext)(model_fn, params, X, y) for ext in exts}
    extend(model)
    loss_fn = extend(nn.CrossEntropyLoss())
    calls.clear()
    if inside:
        with backpack(*exts):
            loss_fn(model(X), y).backward()
    else:
        loss = loss_fn(model(X), y)
        with backpack(*exts):
            loss.backward()
    fused = name == "attention" and not inside  # that kernel has no second derivative
    assert len(calls) == 1 + fused
    for field, products in wanted.items():
        for k, p in model.named_parameters():
            product = getattr(p, field)
            assert isinstance(product, graphs.GraphProduct) != fused
            assert_close(product(vs[k]), products[k](vs[k]), rtol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("run", [Tensor.backward, torch.autograd.backward])
def test_what_is_between_the_module_and_the_loss_counts(run: Callable[[Tensor], None]) -> None:
    model, X, y, _ = problem("norm")
    model_fn, params = curvfunc.functionalize(model)
    want = curvfunc.hmp(lambda p, X: model_fn(p, X).tanh() * 2, params, X, y)
    extend(model)
    with backpack(HMP()):
        run(extend(nn.CrossEntropyLoss())(model(X).tanh() * 2, y))
    for k, p in model.named_parameters():
        v = torch.randn(2, *p.shape)
        assert_close(p.hmp(v), want[k](v), rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_two_modules_and_gradients_by_name() -> None:
    first, second = (
        extend(nn.Sequential(nn.Linear(6, 24), nn.Tanh())),
        extend(nn.Sequential(nn.LayerNorm(24), nn.Linear(24, C))),
    )
    params = {"first": dict(first.named_parameters()), "second": dict(second.named_parameters())}
    X, y = torch.randn(N, 6), torch.arange(N) % C

    def model_fn(p: Any, X: Tensor) -> Tensor:
        return torch.func.functional_call(second, p["second"], torch.func.functional_call(first, p["first"], X))

    detached = {k: {name: p.detach() for name, p in ps.items()} for k, ps in params.items()}
    want = curvfunc.hmp(model_fn, detached, X, y)
    loss = extend(nn.CrossEntropyLoss())(second(first(X)), y)
    with backpack(HMP()):
        torch.autograd.grad(loss, [*first.parameters(), *second.parameters()])
    for part, ps in params.items():
        for name, p in ps.items():
            v = torch.randn(2, *p.shape)
            assert_close(p.hmp(v), want[part][name](v), rtol=1e-9)


SECOND = ["DiagGGNExact", "DiagGGNMC", "KFAC", "KFLR", "KFRA", "DiagHessian", "BatchDiagHessian", "SqrtGGNExact"]


class Layers(nn.Module):
    """Layers that are extended one by one, with functions between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between, self.first, self.last = between, nn.Linear(6, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def separately(between: Callable[[Tensor], Tensor]) -> Layers:
    model = Layers(between)
    extend(model.first)
    extend(model.last)
    return model


MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h - h.mean(0),
    "neighbour": lambda h: h + h.roll(1, 0),
    "one pair": lambda h: torch.cat([h[:1] + h[1:2], h[1:]]),
    "the other pair": lambda h: torch.cat([h[:1], h[1:2] + h[:1], h[2:]]),
    "product": lambda h: (h @ h.mT) @ h,
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("place", ["before the loss", "between modules"])
@pytest.mark.parametrize("name", MIXED)
def test_samples_that_are_mixed_outside_of_modules(name: str, place: str) -> None:
    """Products are those of the whole batch; what is a sum over samples is refused."""
    X, y, loss_fn = torch.randn(N, 6), torch.arange(N) % C, extend(nn.CrossEntropyLoss())
    inside = place == "between modules"
    model = separately(MIXED[name] if inside else F.relu)
    after = (lambda out: out) if inside else MIXED[name]
    params = {k: p.detach() for k, p in model.named_parameters()}
    want = curvfunc.hmp(lambda p, X: after(torch.func.functional_call(model, p, X)), params, X, y)
    for extension in SECOND:
        ext = getattr(extensions, extension)()
        with backpack(ext), pytest.raises(ValueError, match=f"{extension} needs .* samples of the batch are mixed"):
            loss_fn(after(model(X)), y).backward()
        assert not hasattr(model.last.weight, ext.savefield)
    with backpack(HMP()):
        loss_fn(after(model(X)), y).backward()
    for k, p in model.named_parameters():
        v = torch.randn(2, *p.shape)
        assert_close(p.hmp(v), want[k](v), rtol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "between",
    [torch.tanh, lambda h: h.cumsum(1), lambda h: h.T.contiguous().T, lambda h: F.max_pool1d(h, 3, 1, 1), torch.softmax],
    ids=["elementwise", "linear", "transposed", "pool", "softmax"],
)
def test_samples_that_stay_apart_outside_of_modules(between: Callable[..., Tensor]) -> None:
    X, y = torch.randn(N, 6), torch.arange(N) % C
    model = separately((lambda h: between(h, 1)) if between is torch.softmax else between)
    params = {k: p.detach() for k, p in model.named_parameters()}
    want = curvfunc.diag_ggn(lambda p, X: torch.func.functional_call(model, p, X), params, X, y)
    with backpack(extensions.DiagGGNExact()):
        extend(nn.CrossEntropyLoss())(model(X), y).backward()
    assert_close({k: p.diag_ggn_exact for k, p in model.named_parameters()}, want, rtol=1e-10)


def test_the_graph_counts_as_freed() -> None:
    """It is kept for the products alone: another backward pass with extensions finds nothing, as without products."""
    model, X, y, _ = problem("norm")
    loss = extend(nn.CrossEntropyLoss())(extend(model)(X), y)
    with backpack(HMP()):
        loss.backward()
    with backpack(BatchGrad()), pytest.raises(RuntimeError, match="freed by an earlier backward pass"):
        loss.backward()


def test_statistics_of_the_batch_are_refused() -> None:
    model, X, y, _ = problem("norm")
    model = extend(nn.Sequential(nn.BatchNorm1d(5), model))
    with backpack(PCHMP()), pytest.raises(NotImplementedError, match="BatchNorm module in training mode"):
        extend(nn.CrossEntropyLoss())(model(X), y).backward()


def test_parameters_that_changed_are_noticed() -> None:
    model, X, y, _ = problem("norm")
    extend(model)
    with backpack(HMP()):
        extend(nn.CrossEntropyLoss())(model(X), y).backward()
    weight = model.get_parameter("4.weight")
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match=r"parameter '0.weight' needs .* modified by an inplace operation .* optimizer.step"):
        model.get_parameter("0.weight").hmp(torch.randn(1, 5, 6))
    with pytest.raises(ValueError, match=r"parameter '0.weight' has shape \(6, 5\)"):
        model.get_parameter("0.weight").hmp(torch.randn(6, 5))


def test_code_that_has_nothing_to_do_with_it() -> None:
    """Compiled functions, and other gradients, inside of the block."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (x.sin() * 2).sum(), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, requires_grad=True)
    with backpack(HMP()):
        compiled(x).backward()
        assert_close(x.grad, 2 * x.detach().cos())
        assert_close(torch.func.grad(lambda t: t.sin().sum())(x.detach()), x.detach().cos())


class Net(nn.Module):
    def __init__(self, marks: list[Any]) -> None:
        super().__init__()
        self.marks, self.first, self.norm, self.last = marks, nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(F.relu(self.first(Marked.apply(x, self.marks.pop()) if self.marks else x))))


@pytest.mark.parametrize("end", ["functions", "model", "next step", "one function"])
def test_the_graph_goes(end: str) -> None:
    """With the last function, with the model, or with the next functions; at once, not as garbage that is collected."""
    marks: list[Any] = [Mark()]
    gone = weakref.ref(marks[0])
    model, loss_fn = extend(Net(marks)), extend(nn.CrossEntropyLoss())
    X, y, hessian = torch.randn(N, 4, requires_grad=True), torch.arange(N) % C, HMP()

    def step() -> None:
        with backpack(hessian):
            loss_fn(model(X), y).backward()

    gc.collect()
    gc.disable()
    try:
        step()
        kept = model.first.weight.hmp
        assert gone() is not None
        if end == "functions":
            del kept
            for p in model.parameters():
                del p.hmp
            assert gone() is None
            assert model not in graphs.HELD or not graphs.HELD[model]
        elif end == "model":
            del model
            assert gone() is None
            with pytest.raises(RuntimeError, match="keep the module"):
                kept(torch.randn(1, 5, 4))
        elif end == "next step":
            del kept
            step()
            assert gone() is None
            assert len(graphs.HELD[model]) == 1
        else:
            for p in model.parameters():
                del p.hmp
            assert gone() is not None
            assert kept(torch.randn(2, 5, 4)).shape == (2, 5, 4)
            del kept
            assert gone() is None
    finally:
        gc.enable()
