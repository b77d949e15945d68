"""Products of gradients with each other, and of what they are made of: Gram matrices and Kronecker factors.

Axes as in `curvfunc.uses.forms`: ``n`` sample, ``v`` backpropagated vector, ``q`` group, ``s`` shared position, ``o``/``k``
features out/in.
"""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from curvfunc.tensors import pages
from curvfunc.tensors.pages import may_overwrite
from curvfunc.tensors.sizes import hint, ranges, room
from curvfunc.uses.forms import (
    BLOCK_BYTES,
    Bound,
    Direct,
    Outer,
    Products,
    Rows,
    flat_vectors,
    per_sample,
    scatter,
    sums_positions,
)

__all__ = [
    "InputFactor",
    "cross_gram",
    "gram",
    "input_factor",
    "joined_input_factor",
    "output_factor",
    "second_moment",
    "shared_factor",
]


def gram(b: Bound) -> Tensor:
    """Inner products of the gradients, [v, n, v, n]."""
    return _inner_products(b, b)


def cross_gram(b: Bound, first: int) -> Tensor:
    """Inner products of the gradients of the first samples with those of the others, [v, first, v, n - first]."""
    v, n = b.g.shape[:2]
    if first in (0, n):
        return b.g.new_zeros(v, first, v, n - first)
    parts = []
    for samples in (slice(None, first), slice(first, None)):
        g = b.g[:, samples]
        parts.append(replace(b, g=g, inputs=g if isinstance(b.form, Direct) else b.x[samples]))
    return _inner_products(*parts)


def _inner_products(a: Bound, b: Bound) -> Tensor:
    """Inner products of the gradients of one use, of some samples and of the same or others, [v, n, v, m]."""
    v, n, m = *a.g.shape[:2], b.g.shape[1]
    if isinstance(a.form, Outer):
        s, o, k = a.positions, a.g.shape[4], a.features
        made = n if a is b else n + m
        # ⟨Σ_s g xᵀ, Σ_t h yᵀ⟩ = Σ_st (g hᵀ)(x yᵀ) costs v² n m s² o + n m s² k, the gradients themselves v s o k each, and
        # then v² n m o k
        if s * s * (v * v * o + k) * n * m <= (s * made + v * n * m) * v * o * k:
            return _gram_of_positions(a, b)
        return _gram_of_gradients(a, b)
    flat = flat_vectors(per_sample(a)).flatten(0, 1)
    other = flat if a is b else flat_vectors(per_sample(b)).flatten(0, 1)
    return (flat @ other.mT).view(v, n, v, m)


def _gram_of_positions(a: Bound, b: Bound) -> Tensor:
    """Inner products at all pairs of positions, in blocks of samples; no gradient is formed."""
    v, n, q, s, _ = a.g.shape
    m = b.g.shape[1]
    g, x = a.g.permute(2, 0, 1, 3, 4), a.x.transpose(0, 1)  # [q, v, n, s, o], [q, n, s, k]
    h, y = (g, x) if a is b else (b.g.permute(2, 0, 1, 3, 4), b.x.transpose(0, 1))
    everything, inputs = h.flatten(1, 3), y.flatten(1, 2)
    rows = []
    for j, stop in ranges(n, room(BLOCK_BYTES, a.g) // hint(v * v * m * q * s * s * a.g.element_size())):
        num = stop - j
        outer = g[:, :, j : j + num].flatten(1, 3) @ everything.mT  # [q, v num s, v m s]
        inner = x[:, j : j + num].flatten(1, 2) @ inputs.mT  # [q, num s, m s]
        product = outer.view(q, v, num, s, v, m, s) * inner.view(q, 1, num, s, 1, m, s)
        rows.append(product.sum((0, 3, 6)))
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _gram_of_gradients(a: Bound, b: Bound) -> Tensor:
    """Inner products of the gradients, formed for one block of output features at a time."""
    v, n, q, s, o = a.g.shape
    m = b.g.shape[1]
    made = n if a is b else n + m
    size = max(1, 8 * room(BLOCK_BYTES, a.g) // hint(v * made * q * a.features * a.g.element_size()))

    def gradients(of: Bound, j: int) -> Tensor:
        g = of.g[..., j : j + size].mT  # [v, n, q, j, s]
        return (g @ of.x if s > 1 else g * of.x).flatten(2).flatten(0, 1)

    total = None
    for j in range(0, o, size):
        flat = gradients(a, j)
        part = flat @ (flat if a is b else gradients(b, j)).mT
        total = part if total is None else total + part
    assert total is not None
    return total.view(v, n, v, m)


def output_factor(b: Bound, approximation: str | None = None) -> Tensor:
    """The Kronecker factor of the outputs, B [o, o]; for `Direct`, the exact block [numel, numel].

    B = Σ_vns g gᵀ in the expand approximation, B = Σ_vn (Σ_s g)(Σ_s g)ᵀ in the reduce approximation and, if none is
    given, for convolutions.
    """
    if isinstance(b.form, Direct):
        return second_moment(flat_vectors(b.g).flatten(0, 1).mT)
    g = b.g if isinstance(b.form, Rows) else b.g.transpose(2, 3).flatten(3)  # [v, n, s, q o]
    if approximation == "reduce" or (approximation is None and sums_positions(b)):
        g = g.sum(2, keepdim=True)
    return second_moment(g.flatten(0, 2).mT)


def shared_factor(b: Bound, approximation: str | None = None) -> int | None:
    """What uses with the same output factor have in common: a weight and the bias that is Σ_s g of it."""
    if isinstance(b.form, Direct):
        return None if b.form.sums is None else id(b.form.sums)
    form = b.form.form if isinstance(b.form, Products) else b.form
    if not isinstance(form, Outer):
        return None
    summed = approximation == "reduce" or (approximation is None and form.sum_positions)
    return id(form) if summed or b.positions == 1 else None


class InputFactor(NamedTuple):
    """A Kronecker factor, and whether it comes before the one of the outputs."""

    factor: Tensor
    first: bool


def input_factor(b: Bound, approximation: str | None = None) -> InputFactor | None:
    """The Kronecker factor of the inputs, A [k, k]; None for `Direct`. Groups are averaged.

    A = 1/(N S) Σ_ns x xᵀ in the expand approximation, A = 1/N Σ_n (1/S Σ_s x)(1/S Σ_s x)ᵀ in the reduce approximation;
    if none is given, A = 1/N Σ_ns x xᵀ for convolutions.
    """
    if isinstance(b.form, Direct):
        return None
    if isinstance(b.form, Rows):
        weight = b.g.new_full((*b.x.shape, 1), 1 / b.x.shape[1])
        x = scatter(weight, b.x, b.form.shape[0]).squeeze(2)  # [n, rows]: how often each row occurs
        return InputFactor(x.mT @ x / x.shape[0] if approximation == "reduce" else x.mean(0).diag(), True)
    n, q, s = b.g.shape[1:4]
    if isinstance(b.form, Products):
        positions = s if approximation == "expand" or not sums_positions(b) else 1
        return InputFactor(b.x / (n * q * positions), b.form.form.inputs_first)
    assert isinstance(b.form, Outer)
    x = b.x.mean(2, keepdim=True) if approximation == "reduce" else b.x
    positions = s if approximation == "expand" or (approximation is None and not sums_positions(b)) else 1
    # features first, as patches are stored, or last, as all other inputs are
    x = x.flatten(0, 2).mT if x.stride(3) == 1 else x.permute(3, 1, 0, 2).flatten(1)
    return InputFactor(second_moment(x, 1 / (n * q * positions)), b.form.inputs_first)


def joined_input_factor(b: Bound, biased: bool, approximation: str | None = None) -> InputFactor | None:
    """As `input_factor`, of inputs with a one appended where the use has a bias beside it: A [k + 1, k + 1]."""
    found = input_factor(b, approximation)
    if found is None or not biased or not isinstance(b.form, (Outer, Products)):
        return found
    n, q, s = b.g.shape[1:4]
    summed = approximation == "reduce" or (approximation is None and sums_positions(b))
    scale = 1 / (n * q) if summed else 1 / (n * q * s)
    if isinstance(b.form, Products):
        assert b.form.form.sums is not None
        total = b.form.form.sums()
    else:
        total = (b.x.mean(2) if approximation == "reduce" else b.x.sum(2)).sum((0, 1))
    A = found.factor
    total = total.to(A.dtype) * scale
    last = torch.cat([total, A.new_full((1,), s if summed and approximation != "reduce" else 1.0)])
    return InputFactor(torch.cat([torch.cat([A, total[:, None]], dim=1), last[None]]), found.first)


def second_moment(x: Tensor, scale: float = 1.0) -> Tensor:
    """``scale`` x xᵀ for x [k, m]. Where it is large, only what lies on one side of the diagonal is computed."""
    k, m = x.shape
    if not may_overwrite():
        return x @ x.mT * scale
    if k < 256 or m < 512 or x.device.type != "cpu":
        if pages.is_large((k, k), x):
            return _large_moment(x, scale) if torch.compiler.is_compiling() else _scaled_product(x, scale)
        return torch.addmm(x.new_zeros(1), x, x.mT, beta=0, alpha=scale)
    edges = [*range(0, k, -(-k // 4)), k]
    if torch.compiler.is_compiling():  # where slices are not written in place
        return _mirrored([scale * (x[a:b] @ x[a:].mT) for a, b in pairwise(edges)], edges)
    zero, result = x.new_zeros(1), pages.empty(x, k, k)
    for start, stop in pairwise(edges):
        torch.addmm(zero, x[start:stop], x[start:].mT, beta=0, alpha=scale, out=result[start:stop, start:])
        result[stop:, start:stop] = result[start:stop, stop:].mT
    return result


def _scaled_product(x: Tensor, scale: float) -> Tensor:
    return torch.addmm(x.new_zeros(1), x, x.mT, beta=0, alpha=scale, out=pages.empty(x, len(x), len(x)))


@torch.library.custom_op("curvfunc::large_moment", mutates_args=())
def _large_moment(x: Tensor, scale: float) -> Tensor:
    return _scaled_product(x, scale)


@_large_moment.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return x.new_empty(len(x), len(x))


def _mirrored(upper: list[Tensor], edges: list[int]) -> Tensor:
    """A symmetric matrix from its rows in blocks, each from the diagonal on."""
    rows = []
    for i, block in enumerate(upper):
        a, b = edges[i], edges[i + 1]
        left = [above[:, a - edges[j] : b - edges[j]].mT for j, above in enumerate(upper[:i])]
        rows.append(torch.cat([*left, block], dim=1))
    return torch.cat(rows)
