"""Averages of factors over batches."""

from typing import Any

import optree
import torch
from torch import Tensor

from curvfunc.kronecker.decomposition import hidden

__all__ = ["interpolate"]


def interpolate(old: Any, new: Any, weight: float | Tensor) -> Any:
    """(1 - w) old + w new, for each factor: with a constant w, an exponential moving average.

    A Kronecker product is not linear in its factors together, so the average of the factors is not that of the products; it
    is what K-FAC takes.

    Args:
        old: Factors, or `ekfac`'s moments: any tree of tensors [*shape].
        new: A tree with the same structure and shapes.
        weight: w, a number or a tensor without axes, from 0 (all old) to 1 (all new).

    Returns:
        A tree like ``old``, of the same shapes.

    Raises:
        ValueError: If the trees or shapes differ, the weight is not between 0 and 1, or ``new`` is not finite.

    References:
        Martens and Grosse 2015, sec. 5, where w = 1 - min(1 - 1/k, 0.95) at step k.

    Example:
        >>> old, new = {"weight": (torch.eye(2), torch.eye(3))}, {"weight": (3 * torch.eye(2), torch.eye(3))}
        >>> kronecker.interpolate(old, new, 0.25)["weight"][0]
        tensor([[1.5000, 0.0000],
                [0.0000, 1.5000]])
    """
    unknown = isinstance(weight, Tensor) and hidden(weight)
    if isinstance(weight, bool) or not (unknown or 0 <= float(weight) <= 1):
        raise ValueError(f"weight must be a number from 0 to 1, got {weight!r}.")
    paths, leaves, tree = optree.tree_flatten_with_path(old)
    others, other = optree.tree_flatten(new)
    if other != tree:
        raise ValueError(f"old and new have different trees, {tree} and {other}. They must be of the same parameters.")
    averages = []
    for path, a, b in zip(paths, leaves, others, strict=True):
        name = ".".join(map(str, path))
        if a.shape != b.shape:
            raise ValueError(f"{name} has shape {tuple(a.shape)} in old and {tuple(b.shape)} in new.")
        if not hidden(b) and not b.isfinite().all():
            raise ValueError(f"{name} of new has entries that are not finite; leave this batch out of the average.")
        averages.append(
            torch.lerp(a, b, weight) if isinstance(weight, float) else torch.lerp(a, b, torch.as_tensor(weight).to(a))
        )
    return tree.unflatten(averages)
