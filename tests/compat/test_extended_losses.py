"""Several extended losses in one backward pass: sums where there are any, else an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn
from torch.func import functional_call, hessian

import curvfunc
from curvfunc.compat import backpack, extend, extensions
from curvfunc.compat.extensions import (
    GGNMP,
    HMP,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
)

pytestmark = pytest.mark.usefixtures("float64")
N = 5
Losses = list[Callable[[dict[str, Tensor], Tensor], Tensor]]  # parameters and input to what goes into each loss


class Called(nn.Module):
    """The same module, for both losses."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), self.net(x.flip(1) + 1)


class Headed(nn.Module):
    """A head for each loss."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Sequential(nn.Linear(4, 5), activation), nn.Linear(5, 3), nn.Linear(5, 3)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.a(h), self.b(h)


class Apart(nn.Module):
    """Nothing in common."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3)), nn.Linear(4, 3)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def outputs(model: nn.Module, k: int) -> Callable[[Any, Tensor], Tensor]:
    """The k-th output as a function of parameters by name."""

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.both(x)[k]

    output = Output()
    return lambda params, x: functional_call(output, {f"inner.{name}": p for name, p in params.items()}, x)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, 4, generator=generator), torch.arange(N) % 3, (torch.arange(N) + 1) % 3


def extended(kind: type[nn.Module], activation: nn.Module) -> tuple[Any, dict[str, Tensor], Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    model = kind(activation)
    for child in model.children():
        extend(child)
    X, y, z = batch()
    return model, {k: p.detach() for k, p in model.named_parameters()}, X, (y, z)


def run(model: Any, X: Tensor, ys: tuple[Tensor, Tensor], *exts: Any, hook: Any = None) -> None:
    losses = [extend(nn.CrossEntropyLoss()), extend(nn.CrossEntropyLoss(reduction="sum"))]
    with backpack(*exts, extension_hook=hook):
        sum(loss(out, y) for loss, out, y in zip(losses, model.both(X), ys, strict=True)).backward()


LOSSES = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
ADDED: dict[Any, Callable[..., Any]] = {
    DiagGGNExact: curvfunc.diag_ggn,
    BatchDiagGGNExact: curvfunc.batch_diag_ggn,
    DiagHessian: curvfunc.diag_hessian,
    BatchDiagHessian: curvfunc.batch_diag_hessian,
    BatchGrad: curvfunc.batch_grad,
}


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh()], ids=["relu", "tanh"])
@pytest.mark.parametrize("kind", [Called, Headed, Apart])
@pytest.mark.parametrize("extension", ADDED)
def test_results_that_add_up(extension: Any, kind: Any, activation: nn.Module) -> None:
    model, params, X, ys = extended(kind, activation)
    parts = [
        ADDED[extension](outputs(model, k), params, X, y, loss_fn=loss)
        for k, (y, loss) in enumerate(zip(ys, LOSSES, strict=True))
    ]
    run(model, X, ys, extension())
    field = extension().savefield
    assert_close({k: getattr(p, field) for k, p in model.named_parameters()}, {k: parts[0][k] + parts[1][k] for k in params})


@pytest.mark.parametrize("kind", [Called, Headed, Apart])
def test_whole_blocks(kind: Any) -> None:
    """Against the Hessian of the sum, of each parameter alone."""
    model, params, X, ys = extended(kind, nn.Tanh())

    def total(params: dict[str, Tensor]) -> Tensor:
        return sum(loss(outputs(model, k)(params, X), y) for k, (y, loss) in enumerate(zip(ys, LOSSES, strict=True)))

    run(model, X, ys, HMP(), DiagHessian())
    for name, p in model.named_parameters():
        block = hessian(lambda q, name=name: total({**params, name: q}))(p.detach()).reshape(p.numel(), p.numel())
        unit = torch.eye(p.numel()).reshape(-1, *p.shape)
        assert_close(p.hmp(unit).flatten(1), block, rtol=1e-9)
        assert_close(p.diag_h.flatten(), block.diag(), rtol=1e-9)


@pytest.mark.parametrize("kind", [Called, Headed, Apart])
def test_roots_and_products(kind: Any) -> None:
    model, _, X, ys = extended(kind, nn.Tanh())
    run(model, X, ys, SqrtGGNExact(), GGNMP(), DiagGGNExact())
    for p in model.parameters():
        root = p.sqrt_ggn_exact.flatten(2).flatten(0, 1)
        unit = torch.eye(p.numel()).reshape(-1, *p.shape)
        assert_close(p.ggnmp(unit).flatten(1), root.T @ root)
        assert_close((root.T @ root).diag().reshape(p.shape), p.diag_ggn_exact)


NOT_ADDED = ["KFAC", "KFLR", "KFRA", "PCHMP"]


@pytest.mark.parametrize("extension", NOT_ADDED)
def test_what_does_not_add_up_is_refused(extension: str) -> None:
    ext = getattr(extensions, extension)()
    for kind in (Called, Headed):
        model, _, X, ys = extended(kind, nn.Tanh())
        for p in model.parameters():
            setattr(p, ext.savefield, "of an earlier pass")
        with pytest.raises(ValueError, match=f"two extended losses .* {extension} of their sum cannot be had"):
            run(model, X, ys, ext)
        assert not any(hasattr(p, ext.savefield) for p in model.parameters() if p.shape == (5, 4))
    model, _, X, ys = extended(Apart, nn.Tanh())
    run(model, X, ys, ext)
    assert all(hasattr(p, ext.savefield) for p in model.parameters())


def test_the_hook_sees_the_sum() -> None:
    """It runs on a module when both losses have been reached; and large results are not overwritten."""
    model, _, X, ys = extended(Called, nn.Tanh())
    run(model, X, ys, DiagGGNExact())
    want = {k: p.diag_ggn_exact for k, p in model.named_parameters()}
    found: dict[str, Tensor] = {}

    def hook(module: nn.Module) -> None:
        for name, p in module.named_parameters(recurse=False):
            if hasattr(p, "diag_ggn_exact"):  # the hook runs once for each call
                found[f"{id(module)}.{name}"] = p.diag_ggn_exact
                del p.diag_ggn_exact

    run(model, X, ys, DiagGGNExact(), hook=hook)
    layers = {id(m): name for name, m in model.named_modules()}
    assert_close({f"{layers[int(k.split('.')[0])]}.{k.split('.')[1]}": v for k, v in found.items()}, dict(sorted(want.items())))


def test_results_that_were_taken_away_in_between() -> None:
    model, _, X, ys = extended(Headed, nn.Tanh())

    def hook(module: nn.Module) -> None:
        for p in model.parameters():
            p.__dict__.pop("diag_ggn_exact", None)

    with pytest.raises(RuntimeError, match="DiagGGNExact has for the first was deleted"):
        run(model, X, ys, DiagGGNExact(), hook=hook)


def test_different_numbers_of_samples() -> None:
    torch.manual_seed(0)
    model, loss_fn = extend(nn.Linear(4, 3)), extend(nn.CrossEntropyLoss())
    X, y = torch.randn(7, 4), torch.arange(7) % 3
    batches = [(X[:3], y[:3]), (X[3:], y[3:])]
    with backpack(DiagGGNExact()):
        sum(loss_fn(model(x), t) for x, t in batches).backward()
    model_fn, params = curvfunc.functionalize(model)
    parts = [curvfunc.diag_ggn(model_fn, params, x, t) for x, t in batches]
    assert_close(model.weight.diag_ggn_exact, parts[0]["weight"] + parts[1]["weight"])
    for ext in (BatchDiagGGNExact(), SqrtGGNExact()):
        with backpack(ext), pytest.raises(ValueError, match=f"{type(ext).__name__} has no sum"):
            sum(loss_fn(model(x), t) for x, t in batches).backward()
        assert not hasattr(model.weight, ext.savefield)


def test_large_results_of_both_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the first loss is no memory for that of the second."""
    monkeypatch.setattr("curvfunc.compat.memory.LEAST_BYTES", 0)
    model, params, X, ys = extended(Called, nn.Tanh())
    fn = [outputs(model, k) for k in (0, 1)]
    want = [curvfunc.batch_diag_ggn(f, params, X, y, loss_fn=ls) for f, y, ls in zip(fn, ys, LOSSES, strict=True)]
    for _ in range(3):
        run(model, X, ys, BatchDiagGGNExact(), SqrtGGNExact(), SumGradSquared(), BatchGrad())
    for k, p in model.named_parameters():
        assert_close(p.diag_ggn_exact_batch, want[0][k] + want[1][k])
        assert_close(p.sqrt_ggn_exact.square().sum(0), p.diag_ggn_exact_batch)
        assert_close(p.grad_batch.square().sum(0), p.sum_grad_squared)
