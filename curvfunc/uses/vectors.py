"""Contractions of linear maps of vectors, dW[n] = g[n] x[n]ᵀ, and of the biases beside them, db[n] = g[n].

The same as of an `Outer` form with one group and one position, without the axes for these: in small networks the views that
make them take as long as the work. What a weight and its bias have in common is formed once, and all maps' squares together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvfunc.tensors import pages
from curvfunc.uses.forms import Outer, outer
from curvfunc.uses.second_moments import InputFactor, second_moment

__all__ = ["COVERED", "OUTPUTS", "contract", "fits"]

SQUARES = frozenset({"squares", "sample_squares", "sample_norms"})
OUTPUTS = frozenset({"output_factor", "output_factor_expand", "output_factor_reduce"})
INPUTS = frozenset({"input_factor", "input_factor_expand", "input_factor_reduce"})
COVERED = SQUARES | OUTPUTS | INPUTS | {"per_sample"}

WIDE = (
    128  # features of which moments are scaled as they are formed; of fewer, one operation more takes less than a bias of zero
)

PRECISE = (torch.float32, torch.float64)


def fits(form: Outer, g: Tensor) -> bool:
    """Whether a cotangent [n, o] or [v, n, o] is of the type of the inputs, in single precision at least."""
    x = form.vectors
    return x is not None and g.dtype is x.dtype and g.dtype in PRECISE


def contract(name: str, maps: Sequence[Outer], gs: Sequence[Tensor], squared: Sequence[Tensor]) -> list[tuple[Any, Any]]:
    """A contraction of each map, for the weight, and for a bias beside it.

    Args:
        name: Among `COVERED`. Gradients of samples have no axis of columns where there is one column only.
        maps: The uses of the weights, which have ``vectors``.
        gs: The cotangents [n, o] of the outputs, or those of several columns [v, n, o].
        squared: Their squares, summed over columns, for what has a use for these.
    """
    xs: list[Any] = [form.vectors for form in maps]
    flipped = [form.inputs_first for form in maps]
    if name in OUTPUTS:
        factors = [_moment(g if g.ndim == 2 else g.flatten(0, 1)) for g in gs]
        return [(B, B.clone()) for B in factors]  # whoever gets one may change it
    if name in INPUTS:
        return [(InputFactor(_moment(x, 1 / x.shape[0]), first), None) for x, first in zip(xs, flipped, strict=True)]
    if name == "per_sample":
        return [(_products(g, x, first), g) for g, x, first in zip(gs, xs, flipped, strict=True)]
    triples = [*zip(squared, squares(xs), flipped, strict=True)]
    if name == "squares":
        return [(xx.mT @ gg if first else gg.mT @ xx, gg.sum(0)) for gg, xx, first in triples]
    if name == "sample_squares":
        return [(_products(gg, xx, first), gg) for gg, xx, first in triples]
    return [(norms * xx.sum(1), norms) for gg, xx, _ in triples for norms in (gg.sum(1),)]


def squares(gs: Sequence[Tensor]) -> list[Tensor]:
    """The squares of cotangents, summed over columns."""
    found = torch._foreach_mul([*gs], [*gs])
    return [g.sum(0) for g in found] if found[0].ndim == 3 else [*found]


def _products(g: Tensor, x: Tensor, flipped: bool) -> Tensor:
    """g xᵀ for each sample, or x gᵀ."""
    first, last = (x, g) if flipped else (g, x)
    first, last = first.unsqueeze(-1), last.unsqueeze(-2)
    if first.ndim < last.ndim:  # inputs are the same for all columns
        first = first.expand(len(last), *first.shape)
    if first.is_contiguous() and not pages.is_large((*first.shape[:-1], last.shape[-1]), g):
        return first * last
    return outer(first, last, None)


def _moment(rows: Tensor, scale: float | None = None) -> Tensor:
    """``scale`` Σ_n x xᵀ."""
    k = rows.shape[1]
    if k >= WIDE:
        return second_moment(rows.mT, 1.0 if scale is None else scale)
    found = torch.mm(rows.mT, rows, out=pages.empty(rows, k, k)) if pages.is_large((k, k), rows) else rows.mT @ rows
    return found if scale is None else found.mul_(scale)
