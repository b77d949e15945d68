"""Against BackPACK 1.7.1, run live on the same networks in float32; Monte-Carlo quantities on the same draws."""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import optree
import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import losses

backpack = pytest.importorskip("backpack", reason="BackPACK is not installed")
extensions = pytest.importorskip("backpack.extensions", reason="BackPACK is not installed")

# BackPACK's hooks on modules whose input needs no gradient
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

N, C = 5, 3

# BackPACK's extension, the name of its result, and the function with its arguments.
EXACT: dict[str, tuple[str, str, dict[str, int]]] = {
    "BatchGrad": ("grad_batch", "batch_grad", {}),
    "BatchL2Grad": ("batch_l2", "batch_l2", {}),
    "SumGradSquared": ("sum_grad_squared", "sum_grad_squared", {}),
    "Variance": ("variance", "variance", {}),
    "DiagGGNExact": ("diag_ggn_exact", "diag_ggn", {}),
    "BatchDiagGGNExact": ("diag_ggn_exact_batch", "batch_diag_ggn", {}),
    "SqrtGGNExact": ("sqrt_ggn_exact", "sqrt_ggn", {}),
    "KFLR": ("kflr", "kflr", {}),
}
SAMPLED: dict[str, tuple[str, str, dict[str, int]]] = {
    "DiagGGNMC": ("diag_ggn_mc", "diag_ggn", {"mc_samples": 2}),
    "BatchDiagGGNMC": ("diag_ggn_mc_batch", "batch_diag_ggn", {"mc_samples": 3}),
    "SqrtGGNMC": ("sqrt_ggn_mc", "sqrt_ggn", {"mc_samples": 2}),
    "KFAC": ("kfac", "kfac", {"mc_samples": 2}),
}

# A maker for a number of outputs, and the shape of one input.
NETWORKS: dict[str, tuple[Callable[[int], list[nn.Module]], tuple[int, ...]]] = {
    "linear": (lambda outputs: [nn.Linear(6, outputs)], (6,)),
    "mlp": (
        lambda outputs: [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.Sigmoid(), nn.Linear(4, outputs)],
        (6,),
    ),
    "conv1d": (
        lambda outputs: [
            nn.Conv1d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv1d(3, 2, 2, dilation=2, bias=False), nn.ReLU(),
            nn.Flatten(), nn.Linear(4, outputs),
        ],
        (2, 8),
    ),
    "conv2d": (
        lambda outputs: [
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, (2, 1), stride=(2, 1)),
            nn.Sigmoid(), nn.Flatten(), nn.Linear(9, outputs),
        ],
        (2, 5, 6),
    ),
    "conv3d": (
        lambda outputs: [
            nn.Conv3d(1, 2, (1, 2, 2), padding=(0, 1, 0)), nn.ReLU(),
            nn.Conv3d(2, 2, 2, stride=(1, 2, 1)), nn.Flatten(), nn.Linear(4, outputs),
        ],
        (1, 2, 3, 3),
    ),
}  # fmt: skip
LOSSES: dict[str, tuple[Callable[[], nn.Module], int, Callable[[], Tensor]]] = {
    "cross-entropy": (nn.CrossEntropyLoss, C, lambda: torch.randint(C, (N,))),
    "cross-entropy, sum": (lambda: nn.CrossEntropyLoss(reduction="sum"), C, lambda: torch.randint(C, (N,))),
    "squared error": (nn.MSELoss, C, lambda: torch.randn(N, C)),
    "squared error, sum": (lambda: nn.MSELoss(reduction="sum"), C, lambda: torch.randn(N, C)),
    "bce": (nn.BCEWithLogitsLoss, 1, lambda: torch.randint(2, (N, 1)).float()),
    "bce, sum": (lambda: nn.BCEWithLogitsLoss(reduction="sum"), 1, lambda: torch.randint(2, (N, 1)).float()),
}


def problem(network: str, loss: str) -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    (make, shape), (make_loss, outputs, targets) = NETWORKS[network], LOSSES[loss]
    return nn.Sequential(*make(outputs)), torch.randn(N, *shape), targets(), make_loss()


def ours(net: nn.Module, X: Tensor, y: Tensor, loss_fn: nn.Module, name: str, **kwargs: Any) -> Any:
    model_fn, params = curvfunc.functionalize(net)
    return getattr(curvfunc, name)(model_fn, params, X, y, loss_fn=loss_fn, **kwargs)


def theirs(net: nn.Module, X: Tensor, y: Tensor, loss_fn: nn.Module, extension: Any, attribute: str) -> Any:
    """BackPACK's results by parameter name; lists of factors as tuples."""
    net, loss_fn = backpack.extend(copy.deepcopy(net)), backpack.extend(copy.deepcopy(loss_fn))
    loss = loss_fn(net(X), y)
    with backpack.backpack(extension):
        loss.backward()
    results = {name: getattr(p, attribute) for name, p in net.named_parameters()}
    return {name: tuple(r) if isinstance(r, list) else r for name, r in results.items()}


@pytest.mark.parametrize("extension", EXACT)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_exact(network: str, loss: str, extension: str) -> None:
    arguments = problem(network, loss)
    attribute, name, kwargs = EXACT[extension]
    want = theirs(*arguments, getattr(extensions, extension)(), attribute)
    assert_close(ours(*arguments, name, **kwargs), want, rtol=1e-4)


@pytest.mark.parametrize("extension", SAMPLED)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_sampled(network: str, loss: str, extension: str, same_draws: None) -> None:
    arguments = problem(network, loss)
    attribute, name, kwargs = SAMPLED[extension]
    want = theirs(*arguments, getattr(extensions, extension)(**kwargs), attribute)
    assert_close(ours(*arguments, name, **kwargs, generator=generator()), want, rtol=1e-4)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of BackPACK's likelihoods come from our generator; what it makes of them stays its own."""

    def categorical(logits: Tensor, size: torch.Size) -> Tensor:
        return losses.draw_categories(logits.softmax(1), size[0], generator())

    def bernoulli(logits: Tensor, size: torch.Size) -> Tensor:
        return losses.draw_bits(logits, size[0], generator()).to(logits.dtype)

    def gaussian(mean: Tensor, size: torch.Size) -> Tensor:
        return mean + math.sqrt(0.5) * losses.draw_normal(mean, size[0], generator())

    for module, cls, draw in [
        ("crossentropyloss", "CrossEntropyLossDerivatives", categorical),
        ("bcewithlogitsloss", "BCELossWithLogitsDerivatives", bernoulli),
        ("mseloss", "MSELossDerivatives", gaussian),
    ]:
        peer = pytest.importorskip(f"backpack.core.derivatives.{module}")

        def distribution(self: Any, outputs: Tensor, draw: Any = draw) -> Any:
            return SimpleNamespace(sample=lambda sample_shape: draw(outputs.detach(), sample_shape))

        monkeypatch.setattr(getattr(peer, cls), "_make_distribution", distribution)


@pytest.mark.parametrize("extension", ["DiagGGNMC", "KFAC"])
def test_draws_are_of_the_same_distribution(extension: str) -> None:
    """Without shared draws the means of many are the same, within 5 standard errors of their difference."""
    arguments = problem("mlp", "cross-entropy")
    attribute, name, _ = SAMPLED[extension]
    draws = 200
    runs = [
        (ours(*arguments, name, mc_samples=1), theirs(*arguments, getattr(extensions, extension)(), attribute))
        for _ in range(draws)
    ]
    for pairs in zip(*(optree.tree_leaves(mine) + optree.tree_leaves(peer) for mine, peer in runs), strict=True):
        assert torch.stack(pairs).isfinite().all()
    mine = [optree.tree_leaves(m) for m, _ in runs]
    peer = [optree.tree_leaves(p) for _, p in runs]
    for a, b in zip(zip(*mine, strict=True), zip(*peer, strict=True), strict=True):
        first, second = torch.stack(a).double(), torch.stack(b).double()
        error = (first.var(0) / draws + second.var(0) / draws).sqrt()
        assert ((first.mean(0) - second.mean(0)).abs() <= 5 * error + 1e-6 * second.mean(0).abs().max()).all()


@pytest.mark.parametrize("extension", ["BatchGrad", "SqrtGGNExact"])
def test_subsampling(extension: str) -> None:
    arguments = problem("conv2d", "cross-entropy")
    attribute, name, kwargs = EXACT[extension]
    index = [3, 0]
    want = theirs(*arguments, getattr(extensions, extension)(subsampling=index), attribute)
    assert_close(ours(*arguments, name, **kwargs, subsampling=index), want, rtol=1e-4)


@pytest.mark.parametrize("extension", ["BatchGrad", "DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact"])
@pytest.mark.parametrize("groups", [2, 4])
def test_groups(groups: int, extension: str) -> None:
    arguments = grouped(groups)
    attribute, name, kwargs = EXACT[extension]
    want = theirs(*arguments, getattr(extensions, extension)(), attribute)
    assert_close(ours(*arguments, name, **kwargs), want, rtol=1e-4)


@pytest.mark.parametrize("groups", [2, 4])
def test_norms_of_groups(groups: int) -> None:
    """Those of BackPACK's gradients: its BatchL2Grad is not the norm of its BatchGrad where there are groups."""
    arguments = grouped(groups)
    gradients = theirs(*arguments, extensions.BatchGrad(), "grad_batch")
    want = {k: g.flatten(1).square().sum(1) for k, g in gradients.items()}
    assert_close(ours(*arguments, "batch_l2"), want, rtol=1e-4)


def grouped(groups: int) -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    net = nn.Sequential(nn.Conv2d(4, 8, 2, groups=groups), nn.ReLU(), nn.Flatten(), nn.Linear(32, C))
    return net, torch.randn(N, 4, 3, 3), torch.randint(C, (N,)), nn.CrossEntropyLoss()


@pytest.mark.parametrize("extension", [e for e in EXACT if e != "KFLR"])
def test_shared_axes(extension: str) -> None:
    """Linear layers on positions, for what BackPACK has there."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(6, C))
    arguments = net, torch.randn(N, 2, 4), torch.randint(C, (N,)), nn.CrossEntropyLoss()
    attribute, name, kwargs = EXACT[extension]
    want = theirs(*arguments, getattr(extensions, extension)(), attribute)
    assert_close(ours(*arguments, name, **kwargs), want, rtol=1e-4)


@pytest.mark.parametrize("extension", ["DiagGGNExact", "SqrtGGNExact", "BatchGrad", "KFLR"])
def test_classes_at_positions(extension: str) -> None:
    net = nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Conv1d(4, C, 1))
    arguments = net, torch.randn(N, 2, 4), torch.randint(C, (N, 3)), nn.CrossEntropyLoss()
    attribute, name, kwargs = EXACT[extension]
    want = theirs(*arguments, getattr(extensions, extension)(), attribute)
    assert_close(ours(*arguments, name, **kwargs), want, rtol=1e-4)
