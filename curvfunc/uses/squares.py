"""Sums of squares of gradients, from the forms that they have.

Axes as in `curvfunc.uses.forms`: ``n`` sample, ``v`` backpropagated vector, ``q`` group, ``s`` shared position, ``o``/``k``
features out/in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from curvfunc.tensors import pages
from curvfunc.tensors.pages import may_overwrite
from curvfunc.tensors.sizes import hint, ranges, room
from curvfunc.uses import forms
from curvfunc.uses.forms import (
    Bound,
    Direct,
    Outer,
    Rows,
    arranged,
    flat_vectors,
    is_flat,
    outer,
    sample_blocks,
    scatter,
    total,
)

__all__ = [
    "condensed",
    "condenses",
    "formed",
    "sample_norms",
    "sample_squares",
    "squared_inputs",
    "squares",
    "weighted_sample_squares",
    "weighted_squares",
]

# Gradients of a sample larger than half a block are formed in parts of no fewer output features than this (measured: products
# of fewer rows are slow).
LEAST_ROWS = 32

# Products of pairs of positions for an entry of a gradient that take as long as to write and read the entry.
FEWER = 2


def squares(b: Bound) -> Tensor:
    """Squared gradients summed over vectors and samples, Σ_vn g²: [*shape]."""
    if isinstance(b.form, Direct):
        return b.g.flatten(0, 1).square().sum(0)
    if isinstance(b.form, Rows):
        part = (b.g * _same_row(b)).sum(0)  # [n, s, d]
        return scatter(part.flatten(0, 1), b.x.flatten(), b.form.shape[0])
    if b.positions == 1:  # (g xᵀ)² = g² (x²)ᵀ, so the sum over samples is one matrix product
        g, x = _over_vectors(b.g.square())[:, :, 0], b.x.square()[:, :, 0]
        return arranged(b, g.permute(1, 2, 0) @ x.transpose(0, 1))
    return formed(b, ["squares"])["squares"]


def sample_squares(b: Bound, out: Tensor | None = None) -> Tensor:
    """Squared gradients summed over vectors, Σ_v g²: [n, *shape]; written to ``out`` if given."""
    into = out if is_flat(b) else None
    if isinstance(b.form, Direct):
        result = _over_vectors(b.g.square())
    elif isinstance(b.form, Rows):
        result = scatter((b.g * _same_row(b)).sum(0), b.x, b.form.shape[0])
    elif b.positions > 1:
        result = formed(b, ["sample_squares"], out=into)["sample_squares"]
    else:
        g, x = _over_vectors(b.g.square()).contiguous().mT, b.x.square()
        result = arranged(b, outer(g, x, into))
    return result if out is None else out if into is not None else out.copy_(result)


def _over_vectors(t: Tensor) -> Tensor:
    """Summed over vectors; a single one takes no work."""
    return t[0] if len(t) == 1 else t.sum(0)


def weighted_squares(b: Bound, weights: Tensor) -> Tensor:
    """Squared gradients, each vector of each sample with its weight of any sign: Σ_vn w[v,n] g², [*shape]."""
    if isinstance(b.form, Direct):
        return torch.einsum("vn,vnp->p", weights, flat_vectors(b.g).square()).reshape(b.form.shape)
    if isinstance(b.form, Rows):
        return weighted_sample_squares(b, weights).sum(0)
    if b.positions > 1:
        return formed(b, ["squares"], weights)["squares"]
    g = torch.einsum("vn,vnqo->nqo", weights, b.g[:, :, :, 0].square())
    return arranged(b, g.permute(1, 2, 0) @ b.x[:, :, 0].square().transpose(0, 1))


def weighted_sample_squares(b: Bound, weights: Tensor) -> Tensor:
    """As `weighted_squares` for each sample, Σ_v w[v,n] g²: [n, *shape]."""
    if isinstance(b.form, Direct):
        return torch.einsum("vn,vnp->np", weights, flat_vectors(b.g).square()).reshape(b.g.shape[1:])
    if isinstance(b.form, Rows):
        return scatter(torch.einsum("vn,vnsd->nsd", weights, b.g * _same_row(b)), b.x, b.form.shape[0])
    if b.positions > 1:
        return formed(b, ["sample_squares"], weights)["sample_squares"]
    g = torch.einsum("vn,vnqo->nqo", weights, b.g[:, :, :, 0].square())
    return arranged(b, g.unsqueeze(-1) * b.x.square())


def formed(b: Bound, names: Sequence[str], weights: Tensor | None = None, out: Tensor | None = None) -> dict[str, Tensor]:
    """Contractions of an `Outer` use for which its gradients have to be formed, in blocks that stay in cache.

    Args:
        b: The use.
        names: Any of "squares", "sample_squares", "sample_norms", and for one vector "total", its sum over samples.
        weights: Weights [v, n] of the squares.
        out: Memory for "sample_squares".

    Returns:
        ``{name: result}``.
    """
    if weights is None and set(names) == {"total", "sample_norms"} and _has_few_positions(b):
        return {"total": total(b), "sample_norms": sample_norms(b)}
    if weights is None and [*names] == ["squares"] and _is_one_gradient(b):
        return {"squares": arranged(b, _squared_in_place(b))}
    n, o = b.g.shape[1], b.g.shape[4]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    begun: set[int] = set()  # ranges of output features of which there was a block
    for samples, vectors, outputs, part, x in _blocks(b, o if "sample_squares" in names else _rows(b)):
        g = b.g[vectors, samples, ..., outputs].permute(1, 2, 0, 4, 3)  # [m, q, v, o, s]
        block = (g.flatten(2, 3) @ x).unflatten(2, g.shape[2:4])  # [m, q, v, o, k]
        first = vectors.start == 0 and part == 0  # of these samples
        if "total" in found:
            _add(found["total"], block, outputs, o, part not in begun)
        squared = block.square_() if may_overwrite() else block.square()
        if weights is not None:
            w = weights[vectors, samples].mT[:, None, None]  # [m, 1, 1, v]
            squared = (w @ squared.flatten(3)).unflatten(3, squared.shape[3:])
        if "squares" in found:
            _add(found["squares"], squared, outputs, o, part not in begun)
        if "sample_squares" in found:
            _place(found["sample_squares"], squared.sum(2), first, samples, n, out)
        if "sample_norms" in found:
            _place(found["sample_norms"], squared.flatten(1).sum(1), first, samples, n)
        begun.add(part)
    results = {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}
    return {name: r if name == "sample_norms" else arranged(b, r) for name, r in results.items()}


def _is_one_gradient(b: Bound) -> bool:
    """Whether there is one vector of one sample, whose gradient is squared where it is formed."""
    v, n, q = b.g.shape[:3]
    return v == n == q == 1 and may_overwrite() and not torch.compiler.is_compiling()


def _squared_in_place(b: Bound) -> Tensor:
    """Its squares, [q, o, k], of so many output features at a time as stay in cache."""
    g, x = b.g[0, 0, 0].mT, b.part(slice(0, 1))[0, 0]  # [o, s], [s, k]
    result = pages.empty(g, 1, len(g), x.shape[1])
    for start, stop in ranges(len(g), _rows(b)):
        torch.mm(g[start:stop], x, out=result[0, start:stop]).square_()
    return result


def _add(parts: list[Tensor], block: Tensor, outputs: slice, num: int, first: bool) -> None:
    """Add the sum of a block [m, q, v, o, k] over samples and vectors to the only entry of a list.

    Args:
        parts: The list. Its entry is changed in place where no graph needs the old value.
        block: The block.
        outputs: Its output features.
        num: Number of all of these.
        first: Whether it is the first block with them.
    """
    if not may_overwrite() or torch.compiler.is_compiling():
        parts[:] = [parts[0] + block.sum((0, 2)) if parts else block.sum((0, 2))]
        return
    m, q, v, _, k = block.shape
    if not parts:
        parts.append(block.new_empty(q, num, k))
    to, single = parts[0][:, outputs], m == v == 1
    if not first:
        to += block[0, :, 0] if single else block.sum((0, 2))
    elif single:
        to.copy_(block[0, :, 0])
    else:
        torch.sum(block, (0, 2), out=to)


def _place(parts: list[Tensor], part: Tensor, first: bool, samples: slice, num: int, out: Tensor | None = None) -> None:
    """Put the results of a block of ``num`` samples in their place, or add them to those of the blocks before."""
    if not may_overwrite():
        if first:
            parts.append(part)
        else:  # blocks of samples are the same for all vectors
            k = samples.start // (samples.stop - samples.start) if samples.stop < num else -1
            parts[k] = parts[k] + part
        return
    if not parts:
        if out is None and part.shape[0] == num:
            parts.append(part)
            return
        parts.append(pages.empty(part, num, *part.shape[1:]) if out is None else out.view(num, *part.shape[1:]))
    if first:
        parts[0][samples] = part
    else:
        parts[0][samples] += part


def _has_few_positions(b: Bound) -> bool:
    """Whether products of positions and the gradient as one product take less time than forming gradients in memory.

    A gradient that is larger than the cache is written and read some times; two products of an entry take as long as that.
    """
    s, o, k = b.positions, b.g.shape[4], b.features
    return s * s * (o + k) < FEWER * o * k


def _rows(b: Bound) -> int:
    """How many output features are formed together: not all where gradients of several samples would not stay in cache."""
    v, n, q, _, o = b.g.shape
    if not may_overwrite() or torch.compiler.is_compiling():
        return o
    fit = room(forms.BLOCK_BYTES, b.g) // hint(max(1, q * b.features * b.g.element_size()))
    return o if 2 * hint(o) <= fit else min(o, max(LEAST_ROWS, fit // hint(max(1, n * v))))


def squared_inputs(b: Bound, batched: bool) -> Tensor:
    """Σ_s g x² of one vector, [*shape] or [n, *shape]; for a bias, where `Direct` sums g, Σ_s g."""
    if not isinstance(b.form, Outer):
        return b.g[0] if batched else b.g[0].sum(0)
    equation = "nqso,nqsk->nqok" if batched else "nqso,nqsk->qok"
    return arranged(b, torch.einsum(equation, b.g[0], b.x.square()))


def sample_norms(b: Bound) -> Tensor:
    """Squared norms of the gradients summed over vectors, Σ_v ‖g‖²: [n]."""
    if isinstance(b.form, Direct):
        return flat_vectors(b.g).square().sum((0, 2))
    if isinstance(b.form, Rows):
        return (b.g * _same_row(b)).sum((0, 2, 3))
    s, o, k = b.positions, b.g.shape[4], b.features
    if s == 1:
        product = b.g.square().sum((0, 4)) * b.x.square().sum(3)  # [n, q, 1]
        return product.flatten() if product.shape[1] == 1 else product.sum((1, 2))
    if s * (o + k) < o * k:  # ‖Σ_s g xᵀ‖² = Σ_st (g gᵀ)(x xᵀ): the Gram matrices are smaller than the gradient
        gram = b.x @ b.x.mT
        parts = [(g @ g.mT * gram).flatten(1).sum(1) for g in b.g]
        return sum(parts[1:], parts[0])
    return formed(b, ["sample_norms"])["sample_norms"]


def condenses(b: Bound) -> bool:
    """Whether sums of squares need no more of the vectors than `condensed` leaves."""
    return isinstance(b.form, Outer) and b.positions == 1 and may_overwrite()


def condensed(b: Bound) -> Bound:
    """The same sums of squares from one vector: (g xᵀ)² = g² (x²)ᵀ, so only Σ_v g² counts."""
    return replace(b, g=b.g.square().sum(0, keepdim=True).sqrt())


def _blocks(b: Bound, rows: int) -> Iterator[tuple[slice, slice, slice, int, Tensor]]:
    """Samples, vectors, so many output features, the number of these, and inputs x whose gradients stay in cache."""
    v, _, q, _, o = b.g.shape
    one = max(1, q * rows * b.features)
    size = max(1, min(hint(v), room(forms.BLOCK_BYTES, b.g) // (hint(one) * b.g.element_size())))
    for samples in sample_blocks(b, one * size):
        x = b.part(samples)
        for start, stop in ranges(v, size):
            for part, (j, end) in enumerate(ranges(o, rows)):
                yield samples, slice(start, stop), slice(j, end), part, x


def _same_row(b: Bound) -> Tensor:
    """At each position the sum of g over the sample's positions with the same row, [v, n, s, d]."""
    same = (b.x.unsqueeze(2) == b.x.unsqueeze(1)).to(b.g.dtype)
    return same @ b.g
