"""One forward pass: what the backward pass needs is noted in the user's own, inside of the ``backpack`` block or before it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc.compat import backpack, extend, extensions

SEQUENCE = (5, 6)


class Attention(nn.Module):
    """Fused attention, whose kernel has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Scan(nn.Module):
    """Torch's kernel has a wrong second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.logcumsumexp(x, 1)


def elementwise(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 4), activation, nn.Linear(4, 3))


# Model, the shape of a sample, and whether its Hessian needs another forward pass if it is not known before the first.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "relu": (lambda: elementwise(nn.ReLU()), (6,), False),
    "tanh": (lambda: elementwise(nn.Tanh()), (6,), False),
    "gelu": (lambda: elementwise(nn.GELU()), (6,), False),
    "softsign": (lambda: elementwise(nn.Softsign()), (6,), False),
    "hardsigmoid": (lambda: elementwise(nn.Hardsigmoid()), (6,), False),
    "hardsigmoid and norm": (lambda: nn.Sequential(elementwise(nn.Hardsigmoid()), nn.LayerNorm(3)), (6,), False),
    "scan": (lambda: nn.Sequential(nn.Linear(6, 5), Scan(), nn.Linear(5, 3)), (6,), True),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(5, 4, 3), nn.SiLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(8, 3)),
        SEQUENCE,
        False,
    ),
    "norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)), (6,), False),
    "attention": (Attention, SEQUENCE, True),
}


def counted(model: nn.Module) -> list[int]:
    """A list that gets an entry for each forward pass of a module; not by a hook, which would not see all of them."""
    calls: list[int] = []
    inner = model.forward
    model.forward = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]  # type: ignore[method-assign]
    return calls


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor, list[int]]:
    torch.manual_seed(0)
    build, shape, _ = MODELS[name]
    model = build()
    return model, torch.randn(7, *shape), torch.arange(7) % 3, counted(model)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_hessian_is_read_off_the_forward_pass(name: str, inside: bool) -> None:
    model, X, y, calls = problem(name)
    model_fn, params = curvfunc.functionalize(model)
    want = curvfunc.diag_hessian(model_fn, params, X, y)
    parts = curvfunc.batch_diag_hessian(model_fn, params, X, y)
    model, loss_fn = extend(model), extend(nn.CrossEntropyLoss())
    active = backpack(extensions.DiagHessian(), extensions.BatchDiagHessian(), extensions.DiagGGNExact())
    calls.clear()
    if inside:
        with active:
            loss_fn(model(X), y).backward()
    else:
        loss = loss_fn(model(X), y)
        with active:
            loss.backward()
    assert len(calls) == (1 if inside or not MODELS[name][2] else 2)
    assert_close({n: p.diag_h for n, p in model.named_parameters()}, want)
    assert_close({n: p.diag_h_batch for n, p in model.named_parameters()}, parts)


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_hessian_can_be_differentiated(name: str) -> None:
    model, X, y, _ = problem(name)
    params = list(model.parameters())
    model_fn, values = curvfunc.functionalize(model)

    def penalty(values: Any) -> Tensor:
        return sum(d.square().sum() for d in curvfunc.diag_hessian(model_fn, values, X, y).values())

    want = list(torch.func.grad(penalty)(values).values())
    model, loss_fn = extend(model), extend(nn.CrossEntropyLoss())
    with backpack(extensions.DiagHessian()):
        loss_fn(model(X), y).backward(create_graph=True)
    got = torch.autograd.grad(sum(p.diag_h.square().sum() for p in params), params, allow_unused=True)
    assert_close([torch.zeros_like(p) if g is None else g for g, p in zip(got, params, strict=True)], want, rtol=1e-9)
    for p in params:
        p.grad = None  # and with it the graph


ONE_PASS = ["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance", "DiagGGNExact", "DiagGGNMC", "BatchDiagGGNExact",
            "BatchDiagGGNMC", "KFAC", "KFLR", "KFRA", "DiagHessian", "BatchDiagHessian", "SqrtGGNExact", "SqrtGGNMC"]  # fmt: skip


@pytest.mark.parametrize("name", ["relu", "tanh", "convolution"])
@pytest.mark.parametrize("extension", ONE_PASS)
def test_one_forward_pass(extension: str, name: str) -> None:
    if extension == "KFRA" and name == "convolution":
        name = "gelu"
    model, X, y, calls = problem(name)
    model, loss_fn = extend(model), extend(nn.CrossEntropyLoss())
    active = getattr(extensions, extension)()
    with backpack(active):
        loss_fn(model(X), y).backward()
    assert len(calls) == 1
    assert all(hasattr(p, active.savefield) for p in model.parameters())


def test_several_extensions_share_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need no columns of their own take the fewest; those beside one that returns them take its columns."""
    from curvfunc.compat import upstream

    pulled: list[int] = []
    pull = upstream.pull
    monkeypatch.setattr(upstream, "pull", lambda t, columns, **kw: (pulled.append(len(columns)), pull(t, columns, **kw))[1])
    names = ("DiagGGNExact", "KFLR", "BatchDiagGGNExact")
    for extra, want in ((), [2]), (("SqrtGGNExact",), [3]):
        pulled.clear()
        model, X, y, _ = problem("tanh")
        model, loss_fn = extend(model), extend(nn.CrossEntropyLoss())
        with backpack(*(getattr(extensions, e)() for e in (*names, *extra))):
            loss_fn(model(X), y).backward()
        assert pulled == want
