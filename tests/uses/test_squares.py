"""Contractions in blocks: the same, however the work is cut."""

from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import reference
from curvfunc.rules import conv
from curvfunc.uses import forms, squares
from curvfunc.uses.forms import Bound, Outer, per_sample
from curvfunc.uses.second_moments import second_moment
from curvfunc.uses.squares import formed

pytestmark = pytest.mark.usefixtures("float64")

V, N, Q, S, P, K = 3, 5, 2, 4, 3, 6


def bound(v: int) -> Bound:
    generator = torch.Generator().manual_seed(v)
    g = torch.randn(v, N, Q, S, P, generator=generator)
    x = torch.randn(N, Q, S, K, generator=generator)
    return Bound(Outer(lambda: x, lambda g: g, torch.Size((Q * P, K))), g, x)


def naive(b: Bound, weights: Tensor) -> dict[str, Tensor]:
    gradients = torch.einsum("vnqso,nqsk->vnqok", b.g, b.x).reshape(*b.g.shape[:2], Q * P, K)
    squared = gradients.square() * weights[:, :, None, None]
    return {
        "squares": squared.sum((0, 1)),
        "sample_squares": squared.sum(0),
        "sample_norms": squared.sum((0, 2, 3)),
        "total": gradients.sum((0, 1)),
    }


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gradients", [1, 2, 4, 100])  # of one vector and sample, that fit into a block
@pytest.mark.parametrize("v", [1, V])
@pytest.mark.parametrize("graph", [False, True])
def test_blocks(monkeypatch: Any, v: int, gradients: int, weighted: bool, graph: bool) -> None:
    monkeypatch.setattr(forms, "BLOCK_BYTES", gradients * Q * P * K * 8)
    b = bound(v)
    weights = torch.randn(v, N) if weighted else torch.ones(v, N)
    names = ["squares", "sample_squares", "sample_norms", *(["total"] if v == 1 else [])]
    with torch.set_grad_enabled(graph):
        found = formed(b, names, weights if weighted else None)
    assert_close(found, {name: naive(b, weights)[name] for name in names})


@pytest.mark.cpu
@pytest.mark.parametrize("size", [1, 60, 10**6])  # of a block, in entries
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("names", [["squares"], ["squares", "sample_norms"], ["total", "squares", "sample_norms"]])
@pytest.mark.parametrize("v", [1, V])
def test_blocks_of_output_features(monkeypatch: Any, v: int, names: list[str], rows: int, size: int) -> None:
    """Gradients larger than a block are formed in parts."""
    monkeypatch.setattr(forms, "BLOCK_BYTES", size * 8)
    monkeypatch.setattr(squares, "LEAST_ROWS", rows)
    b = bound(v)
    weights = torch.randn(v, N)
    names = [name for name in names if name != "total" or v == 1]
    with torch.no_grad():
        assert squares._rows(b) == (P if size == 10**6 else rows)
        assert_close(formed(b, names, weights), {name: naive(b, weights)[name] for name in names})


@pytest.mark.parametrize("positions", [2, 4])
def test_norms_and_sum_of_few_positions(monkeypatch: Any, positions: int) -> None:
    """From products of positions, or from gradients where there are more."""
    g, x = torch.randn(1, N, Q, positions, 8), torch.randn(N, Q, positions, 9)
    b = Bound(Outer(lambda: x, lambda g: g, torch.Size((Q * 8, 9))), g, x)
    gradients = torch.einsum("nqso,nqsk->nqok", g[0], x).flatten(1, 2)
    made: list[int] = []
    monkeypatch.setattr(squares, "_blocks", lambda *a, of=squares._blocks: (made.append(1), of(*a))[1])
    with torch.no_grad():
        found = formed(b, ["total", "sample_norms"])
    assert_close(found, {"total": gradients.sum(0), "sample_norms": gradients.square().sum((1, 2))})
    assert bool(made) == (positions == 4)


@pytest.mark.parametrize("samples", [1, 100])  # whose patches fit into a block
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_patches_in_parts(samples: int, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of convolutions, made for a block of samples at a time if one chunk of columns meets them, as a whole else."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 2, stride=2, groups=2), nn.Flatten())
    model_fn, params = curvfunc.functionalize(nn.Sequential(net, nn.Linear(54, 3)))
    X, y = torch.randn(5, 2, 6, 6), torch.arange(5) % 3
    made: list[int] = []
    unfold = conv.unfold
    monkeypatch.setattr(conv, "unfold", lambda x, *args, **kw: (made.append(len(x)), unfold(x, *args, **kw))[1])
    monkeypatch.setattr(forms, "PATCHES_BYTES", samples * 8 * 36 * 18)
    for quantity in ("batch_grad", "variance", "diag_ggn", "sqrt_ggn", "batch_l2"):
        made.clear()
        got = getattr(curvfunc, quantity)(model_fn, params, X, y, chunk_size=chunk_size)
        whole = samples == 100 or (chunk_size == 1 and "ggn" in quantity)
        assert (max(made) == 5) == whole
        assert_close(got, getattr(reference, quantity)(model_fn, params, X, y), rtol=1e-10)


def test_a_bias_has_a_factor_of_its_own() -> None:
    """It is that of the weight, but may be changed without it."""
    layers = nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 3)
    model_fn, params = curvfunc.functionalize(nn.Sequential(*layers))
    X, y = torch.randn(5, 2, 5), torch.arange(5) % 3
    for factors in (curvfunc.kflr(model_fn, params, X, y), curvfunc.kfac(model_fn, params, X, y, mc_samples=2)):
        for layer in ("0", "2"):
            of_weight, of_bias = factors[f"{layer}.weight"][0], factors[f"{layer}.bias"][0]
            assert torch.equal(of_weight, of_bias)
            before = of_bias.clone()
            of_weight.zero_()
            assert torch.equal(of_bias, before)


def test_a_bias_of_shared_positions_has_another_factor() -> None:
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(8, 3)))
    X, y = torch.randn(5, 2, 3), torch.arange(5) % 3
    got = curvfunc.kflr(model_fn, params, X, y)
    assert_close(got, reference.kflr(model_fn, params, X, y), rtol=1e-10)
    assert not torch.allclose(got["0.weight"][0], got["0.bias"][0])


def test_gradients_in_given_memory() -> None:
    b = bound(V)
    with torch.no_grad():
        expected = per_sample(b)
        out = torch.full_like(expected, torch.nan)
        assert per_sample(b, out) is out
    assert_close(out, expected)


@pytest.mark.parametrize("shape", [(803, 700), (256, 512), (300, 100), (20, 2000)])
def test_second_moment(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, requires_grad=True)
    expected = 0.3 * x @ x.mT
    assert_close(second_moment(x, 0.3), expected)
    with torch.no_grad():
        assert_close(second_moment(x, 0.3), expected)
        assert_close(torch.compile(second_moment, backend="aot_eager", fullgraph=True)(x, 0.3), expected)
