"""Inner products of gradients in a metric M = U diag(Λ) Uᵀ, without forming the gradients where there is one position.

With a sample's gradient as a matrix in the metric's basis, G̃[v,n] = Σ_s g̃[v,n,s] x̃[n,s]ᵀ (see `curvfunc.uses.rotations`),
⟨G, M H⟩ = Σ_rc Λ_rc G̃_rc H̃_rc. For one position and one sample that is Σ_r g̃_r h̃_r (Λ x̃²)_r.

Axes as in `curvfunc.uses.forms`; ``r`` and ``c`` are the features in the basis.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from curvfunc.tensors.sizes import room
from curvfunc.uses import forms
from curvfunc.uses.forms import Bound, Outer, Products, Rows, flat_vectors, per_sample
from curvfunc.uses.rotations import rotated_outer, rotated_rows, with_ones

__all__ = ["Measured", "Metric", "cross_products", "measured", "norms", "products", "with_query"]


class Layout(Protocol):
    """How a parameter is a matrix."""

    @property
    def name(self) -> str:
        """Of the parameter."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""

    def matrix(self, t: Tensor, rows: int) -> Tensor:
        """Gradients [..., *shape] as matrices of so many rows."""


@dataclass(frozen=True)
class Metric:
    """A parameter's block of a metric.

    Attributes:
        bases: (U of the rows, V of the columns), (U,) for the flat gradient, or () for that as it is.
        values: Λ [rows, columns], or [numel] for less than two bases.
        joined: Whether the last column is that of the bias beside a weight.
        layout: Of the parameter.
    """

    bases: tuple[Tensor, ...]
    values: Tensor
    joined: bool
    layout: Layout


@dataclass(eq=False)
class Measured(Bound):
    """A use in the basis of a metric, with g [v, n, 1, s, r], x [n, 1, s, c] and the weights Λ [r, c]."""

    weights: Tensor


def measured(b: Bound, metric: Metric | None = None) -> Measured:
    """A use in the basis of a metric; one that is measured already stays as it is. Without a metric there are no features."""
    if isinstance(b, Measured):
        return b
    if metric is None:
        return _of_flat(b.g.new_zeros(*b.g.shape[:2], 0), b.g.new_zeros(0))
    layout, values = metric.layout, metric.values.to(b.g.dtype)
    assert not isinstance(b.form, Products)
    if tuple(b.form.shape) != layout.shape:
        raise ValueError(
            f"the factors are of shape {layout.shape} for parameter {layout.name!r}, which has {tuple(b.form.shape)} here. "
            "Compute both with the same model and params."
        )
    bases = [u.to(b.g.dtype) for u in metric.bases]
    if len(bases) < 2:
        if not bases and isinstance(b.form, Outer) and b.g.shape[2] == 1:
            rows = b.features if b.form.inputs_first else b.g.shape[4]
            weights = layout.matrix(values.reshape(b.form.shape), rows)
            return _plain(b.g, b.x, weights.mT if b.form.inputs_first else weights)
        flat = flat_vectors(per_sample(b))
        return _of_flat(flat @ bases[0] if bases else flat, values)
    if isinstance(b.form, Outer):
        g, x = rotated_outer(with_ones(b) if metric.joined else b, *bases)
        return _plain(g, x, values.mT if b.form.inputs_first else values)
    if metric.joined:
        raise ValueError(
            f"parameter {layout.name!r} was joined with its bias when the factors were computed, and is used in another way "
            "here. Compute factors and structure of this model function."
        )
    if isinstance(b.form, Rows):
        return _plain(*rotated_rows(b, *bases), values.mT)
    U, V = bases
    return _of_flat((U.mT @ layout.matrix(per_sample(b), len(U)) @ V).flatten(2), values.flatten())


def _plain(g: Tensor, x: Tensor, weights: Tensor) -> Measured:
    return Measured(Outer(lambda: x, lambda g: g, torch.Size((g.shape[4], x.shape[3]))), g, x, weights)


def _of_flat(g: Tensor, values: Tensor) -> Measured:
    """Of gradients [v, n, numel]: rows that meet a single input, which is one."""
    return _plain(g[:, :, None, None], g.new_ones(g.shape[1], 1, 1, 1), values.unsqueeze(1))


def norms(b: Bound, metric: Metric | None = None) -> Tensor:
    """Squared norms of the gradients summed over vectors, Σ_v ⟨G, M G⟩: [n]."""
    m = measured(b, metric)
    if m.positions == 1:
        return (m.g[:, :, 0, 0].square() * (m.x[:, 0, 0].square() @ m.weights.mT)).sum((0, 2))
    v, n = m.g.shape[:2]
    total = m.g.new_zeros(n)
    for some in _features(m, v * n):
        total = total + (_gradients(m, some).square() * m.weights[some]).sum((0, 2, 3))
    return total


def products(m: Measured) -> Tensor:
    """Inner products of each sample's gradients, ⟨G[v,n], M G[w,n]⟩: [n, v, w]."""
    if m.positions == 1:
        g = m.g[:, :, 0, 0].transpose(0, 1)  # [n, v, r]
        return (g * (m.x[:, 0, 0].square() @ m.weights.mT).unsqueeze(1)) @ g.mT
    v, n = m.g.shape[:2]
    total = m.g.new_zeros(n, v, v)
    for some in _features(m, v * n):
        G = _gradients(m, some)
        left, right = [t.transpose(0, 1).flatten(2) for t in (G * m.weights[some], G)]
        total = total + left @ right.mT
    return total


def cross_products(a: Measured, g: Tensor, x: Tensor) -> Tensor:
    """Inner products of the gradients of the only vector with those of other samples, ⟨G[n], M H[m]⟩: [n, m].

    Args:
        a: The use at the samples n.
        g: Of the same use at the samples m, [m, s, r].
        x: Likewise, [m, s, c].
    """
    num = len(g)
    b = _plain(g[None, :, None], x[:, None], a.weights)
    total = a.g.new_zeros(a.g.shape[1], num)
    for some in _features(a, a.g.shape[1] + num):
        if a.positions == b.positions == 1:  # Σ_r g_r h_r (x Λ_r yᵀ): inputs alone are multiplied
            inner = (a.x[:, 0, 0] * a.weights[some].unsqueeze(1)) @ b.x[:, 0, 0].mT  # [r, n, m]
            rows, columns = a.g[0, :, 0, 0, some].mT.unsqueeze(2), b.g[0, :, 0, 0, some].mT.unsqueeze(1)
            total = total + (rows * columns * inner).sum(0)
        else:
            total = total + (_gradients(a, some)[0] * a.weights[some]).flatten(1) @ _gradients(b, some)[0].flatten(1).mT
    return total


def with_query(b: Bound, operand: tuple[Metric | None, Tensor, Tensor]) -> Tensor:
    """`cross_products` in a metric with the gradients of a query, [n, m]."""
    metric, g, x = operand
    m = measured(b, metric)
    return cross_products(m, g.to(m.g.dtype), x.to(m.g.dtype))


def _features(m: Measured, gradients: int) -> Iterator[slice]:
    """Rows that go together, so that what is formed of so many gradients is small."""
    rows = m.g.shape[4]
    size = max(1, 4 * room(forms.BLOCK_BYTES, m.g) // max(1, gradients * m.features * m.g.element_size()))
    for j in range(0, rows, size):
        yield slice(j, min(j + size, rows))


def _gradients(m: Measured, rows: slice) -> Tensor:
    """Some rows of the gradients, [v, n, r, c]."""
    return m.g[:, :, 0, :, rows].mT @ m.x[:, 0]
