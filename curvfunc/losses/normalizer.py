"""What the mean of a loss divides by: W in R = 1/W, which is not always the number of samples."""

import functools
from typing import Any

import torch
from torch import Tensor

from curvfunc.losses.custom import autodiff_gradient
from curvfunc.losses.normal_form import Loss, is_sum, label, values_visible
from curvfunc.tensors.samples import tree_map

__all__ = ["has_normalizer", "normalizer", "observed_reduction"]


def has_normalizer(loss: Loss) -> bool:
    """Whether `normalizer` knows the loss."""
    return loss.name in ("cross_entropy", "mse_loss", "bce_with_logits")


def normalizer(loss: Loss, y: Tensor) -> Tensor:
    """What the mean divides by for these targets; 1 for a sum.

    Cross-entropy divides by the total weight of the labels, ignored ones left out (for probabilities by the number of
    positions, whatever the weights), the others by the number of the output's entries (squared errors with weights: by
    the sum of these; BCE's weights do not count).

    Args:
        loss: A loss that has one (`has_normalizer`).
        y: Targets of one batch.

    Returns:
        W, a scalar tensor; zero where all positions are ignored.
    """
    wide = torch.float32 if y.device.type == "mps" else torch.float64
    weight = loss.tensors.get("weight")
    if is_sum(loss):
        return torch.ones((), dtype=wide, device=y.device)
    if loss.name == "mse_loss" and weight is not None:
        return weight.to(wide).sum()
    if loss.name != "cross_entropy" or y.is_floating_point():
        entries = y.numel() // y.shape[1] if loss.name == "cross_entropy" else y.numel()
        return torch.full((), entries, dtype=wide, device=y.device)
    kept = y != dict(loss.options)["ignore_index"]
    if weight is None:
        return kept.sum().to(wide)
    return torch.where(kept, weight.to(wide)[torch.where(kept, y, 0).long()], 0.0).sum()


def observed_reduction(loss: Loss, out: Tensor, y: Any) -> str | None:
    """Whether a loss of one's own is a sum or a mean over samples, from its gradients.

    The first half of the samples is listed a second time. That leaves the gradients of a sum as they are, and those of a mean
    over N samples become N / (N + N/2) times as large. A mean over anything else, such as positions that are not padding,
    does neither, unless the two halves have equal shares of it.

    Args:
        loss: The loss.
        out: Output of the model, [N, ...].
        y: Targets, all tensors with leading axis N.

    Returns:
        "sum", "mean", or None where all gradients are zero.

    Raises:
        ValueError: If it is neither.
    """
    if not values_visible(out, y):
        raise ValueError(f"{label(loss)}: whether it is a sum or a mean is read from its values, and they cannot be seen here.")
    num = out.shape[0]
    half = max(1, num // 2)
    more = lambda t: torch.cat([t, t[:half]]) if isinstance(t, Tensor) else t
    out = out.detach()
    try:
        gradient = autodiff_gradient(loss, out, y)
        longer = autodiff_gradient(loss, more(out), tree_map(more, y))[:num]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{label(loss)} fails when samples are listed twice: {error}") from error
    size = gradient.abs().max()
    if not size > 0:
        return None
    close = functools.partial(torch.allclose, longer, rtol=0.0, atol=float(size) * torch.finfo(out.dtype).eps ** 0.5)
    if close(gradient):
        return "sum"
    if close(gradient * (num / (num + half))):
        return "mean"
    raise ValueError(f"{label(loss)} is neither a sum nor a mean over samples")
