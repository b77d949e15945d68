"""Contractions in blocks: the same, however the work is cut."""

from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from curvfunc import contractions
from curvfunc.contractions import formed
from curvfunc.forms import Bound, Outer, per_sample
from curvfunc.second_moments import second_moment

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
    monkeypatch.setattr(contractions, "BLOCK_BYTES", gradients * Q * P * K * 8)
    b = bound(v)
    weights = torch.randn(v, N) if weighted else torch.ones(v, N)
    names = ["squares", "sample_squares", "sample_norms", *(["total"] if v == 1 else [])]
    with torch.set_grad_enabled(graph):
        found = formed(b, names, weights if weighted else None)
    assert_close(found, {name: naive(b, weights)[name] for name in names})


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
