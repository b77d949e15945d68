"""Sums of gradients in which each sample has a weight of its own. Axes as in `curvfunc.uses.forms`."""

from dataclasses import replace

import torch
from torch import Tensor

from curvfunc.uses.forms import Bound, Direct, Parts, sample_blocks, total

__all__ = ["weighted_total"]


def weighted_total(b: Bound, weights: Tensor) -> Tensor:
    """Σ_n w[n] g of the only vector, [*shape]; inputs that have to be made are made for some samples at a time."""
    w = weights.to(b.g.device, b.g.dtype)
    if isinstance(b.form, Direct):
        return torch.tensordot(w, b.g[0], 1)
    g = b.g * w.reshape(-1, *[1] * (b.g.ndim - 2))
    if not isinstance(b.inputs, Parts):
        return total(replace(b, g=g))
    parts = [total(replace(b, g=g[:, samples], inputs=b.part(samples))) for samples in sample_blocks(b, 0)]
    return sum(parts[1:], parts[0])
