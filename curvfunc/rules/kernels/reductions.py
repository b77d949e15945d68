"""Distances, cumulative sums, and a loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cdist", "linear_cross_entropy", "logcumsumexp"]


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = "use_mm_for_euclid_dist_if_necessary") -> Tensor:
    """The backward kernel is wrong under vmap, and has no derivative; where matrix products do the work it does not run."""
    large = x1.shape[-2] > 25 or x2.shape[-2] > 25
    modes = {None: large, "use_mm_for_euclid_dist_if_necessary": large, "use_mm_for_euclid_dist": True}
    if p == 2 and modes.get(compute_mode, False):
        return torch.cdist(x1, x2, p, compute_mode)  # type: ignore[arg-type]
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p == 0:
        return (difference != 0).sum(-1) + (difference * 0).sum(-1)
    if p == 1:
        return difference.abs().sum(-1)
    if p == float("inf"):
        return difference.abs().amax(-1)
    powers = difference.square() if p == 2 else _nonzero_power(difference.abs(), p)
    return _nonzero_power(powers.sum(-1), 1 / p)


def _nonzero_power(x: Tensor, p: float) -> Tensor:
    """x**p, with derivative 0 at 0."""
    zero = x == 0
    safe = torch.where(zero, 1.0, x)
    return torch.where(zero, 0.0, safe.sqrt() if p == 0.5 else safe**p)


def logcumsumexp(input: Tensor, dim: int) -> Tensor:
    """The derivative of the backward kernel by the cotangent is zero at zero, and the next one is nan."""
    if input.is_complex() or input.ndim == 0:
        return torch.logcumsumexp(input, dim)
    x, step, size = input, 1, input.shape[dim]
    while step < size:  # after step k, each entry stands for itself and the 2**k - 1 before it
        later, earlier = x.narrow(dim, step, size - step), x.narrow(dim, 0, size - step)
        x = torch.cat([x.narrow(dim, 0, step), torch.logaddexp(later, earlier)], dim)
        step *= 2
    return x + 0.0  # the kernel has no negative zeros


def linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """In chunks, the gradient is made in the forward pass: wrong under vmap, and with derivative zero."""
    return F.linear_cross_entropy(*args, **kwargs)
