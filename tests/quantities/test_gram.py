"""Gram matrices of per-sample gradients and of the GGN's root, against the vectors themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc.uses import second_moments

pytestmark = pytest.mark.usefixtures("float64")

N, C = 4, 3


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(C, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(self.embed(tokens)).tanh().mean(1), self.embed.weight)


class Generic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.scale = nn.Linear(3, C), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.linalg.cross(x, self.scale.expand_as(x)).sinh())


def sequence() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2), nn.Flatten(), nn.Linear(10, C))


def cnn(width: int, groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, width, 3, groups=groups), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, C)
    )


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C)), lambda: torch.randn(N, 3)),
    "sequence": (sequence, lambda: torch.randn(N, 5, 3)),
    "narrow_cnn": (lambda: cnn(2, 1), lambda: torch.randn(N, 2, 6, 6)),
    "grouped_cnn": (lambda: cnn(4, 2), lambda: torch.randn(N, 2, 4, 4)),
    "wide_cnn": (lambda: cnn(64, 1), lambda: torch.randn(N, 2, 4, 4)),
    "tied": (Tied, lambda: torch.randint(0, C, (N, 5))),
    "generic": (Generic, lambda: torch.randn(N, 3)),
}


def make(net: str) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    build, data = NETS[net]
    return (*curvfunc.functionalize(build()), data(), torch.randint(0, C, (N,)))


def gram(vectors: Tensor, batch_dims: int) -> Tensor:
    rows = vectors.reshape(vectors.shape[:batch_dims].numel(), -1)
    return (rows @ rows.T).view(*vectors.shape[:batch_dims], *vectors.shape[:batch_dims])


@pytest.mark.parametrize("block", [1 << 21, 64])
@pytest.mark.parametrize("net", NETS)
def test_gram_matrices_of_the_vectors(net: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moments, "BLOCK_BYTES", block)
    model_fn, params, X, y = make(net)
    for options in ({}, {"subsampling": [2, 0, 2]}, {"loss_fn": nn.CrossEntropyLoss(reduction="sum")}):
        gradients = curvfunc.batch_grad(model_fn, params, X, y, **options)
        expected = {k: gram(g, 1) for k, g in gradients.items()}
        assert_close(curvfunc.batch_dot(model_fn, params, X, y, **options), expected)
        assert_close(curvfunc.batch_dot_total(model_fn, params, X, y, **options), sum(expected.values()))
        roots = curvfunc.sqrt_ggn(model_fn, params, X, y, **options)
        expected = {k: gram(s, 2) for k, s in roots.items()}
        assert_close(curvfunc.ggn_gram(model_fn, params, X, y, **options), expected)
        assert_close(curvfunc.ggn_gram(model_fn, params, X, y, chunk_size=2, **options), expected)
        assert_close(curvfunc.ggn_gram_total(model_fn, params, X, y, **options), sum(expected.values()))


def test_both_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contraction of positions where they are few, and no larger intermediate than it says."""
    taken = []
    for name in ("_gram_of_positions", "_gram_of_gradients"):
        original = getattr(second_moments, name)
        monkeypatch.setattr(
            second_moments, name, lambda *bs, name=name, original=original: (taken.append(name), original(*bs))[1]
        )
    curvfunc.batch_dot(*make("mlp"))
    assert set(taken) == {"_gram_of_positions"}
    taken.clear()
    curvfunc.batch_dot(*make("wide_cnn"))
    assert "_gram_of_positions" in taken
    taken.clear()
    curvfunc.batch_dot(*make("narrow_cnn"))
    assert "_gram_of_gradients" in taken


def test_monte_carlo_draws_are_those_of_the_root() -> None:
    model_fn, params, X, y = make("mlp")
    seeded = lambda: torch.Generator().manual_seed(7)
    roots = curvfunc.sqrt_ggn(model_fn, params, X, y, mc_samples=2, generator=seeded())
    expected = {k: gram(s, 2) for k, s in roots.items()}
    got = curvfunc.ggn_gram(model_fn, params, X, y, mc_samples=2, generator=seeded())
    assert_close(got, expected)
    total = curvfunc.ggn_gram_total(model_fn, params, X, y, mc_samples=2, generator=seeded())
    assert_close(total, sum(expected.values()))


def test_eigenvalues_are_those_of_the_ggn() -> None:
    model_fn, params, X, y = make("mlp")
    total = curvfunc.ggn_gram_total(model_fn, params, X, y)
    small = torch.linalg.eigvalsh(total.reshape(C * N, C * N))
    large = torch.linalg.eigvalsh(curvfunc.ggn_operator(model_fn, params, X, y).dense())
    assert small[-1] > 1e-2
    assert_close(small, large[-C * N :])
    assert large[: -C * N].abs().max() < 1e-12


def test_diagonal_is_batch_l2_in_one_pass() -> None:
    model_fn, params, X, y = make("sequence")
    specs = {"dot": curvfunc.BatchDot(), "l2": curvfunc.BatchL2(), "gram": curvfunc.GGNGram()}
    specs |= {"root": curvfunc.SqrtGGN(), "diagonal": curvfunc.DiagGGN()}
    got = curvfunc.compute(model_fn, params, X, y, specs, chunk_size=1)
    assert_close({k: t.diagonal() for k, t in got["dot"].items()}, got["l2"])
    assert_close(got["gram"], {k: gram(s, 2) for k, s in got["root"].items()})


def test_transformations() -> None:
    model_fn, params, X, y = make("wide_cnn")
    ensemble = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    got = torch.vmap(lambda p: curvfunc.ggn_gram(model_fn, p, X, y))(ensemble)
    assert_close({k: t[1] for k, t in got.items()}, curvfunc.ggn_gram(model_fn, {k: 2 * p for k, p in params.items()}, X, y))
    gradient = torch.func.grad(lambda p: curvfunc.batch_dot_total(model_fn, p, X, y).sum())(params)
    expected = torch.func.grad(
        lambda p: sum(g.square().sum() for g in torch.func.grad(lambda q: F.cross_entropy(model_fn(q, X), y))(p).values())
    )(params)
    assert_close(gradient, expected)  # the sum over all pairs is the squared norm of the gradient
    compiled = torch.compile(curvfunc.batch_dot, fullgraph=True, backend="aot_eager")
    assert_close(compiled(model_fn, params, X, y), curvfunc.batch_dot(model_fn, params, X, y))
