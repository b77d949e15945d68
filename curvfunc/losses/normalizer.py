"""What the mean of a loss divides by: W in R = 1/W, which is not always the number of samples."""

from typing import Any

import torch
from torch import Tensor

from curvfunc.losses.custom import autodiff_gradient
from curvfunc.losses.normal_form import Loss, is_sum, label, values_visible
from curvfunc.tensors.samples import flatten, leaves, tree_map

__all__ = ["has_normalizer", "normalizer", "observed_reduction", "reference_sample"]


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


def reference_sample(loss: Loss, out: Tensor, y: Any) -> tuple[Tensor, Any] | None:
    """The sample with the largest gradient, output [1, ...] and targets, which counts in any mean; None where all are zero."""
    sizes = autodiff_gradient(loss, out.detach(), y).reshape(out.shape[0], -1).abs().amax(1)
    place = int(sizes.argmax())
    if not sizes[place] > 0:
        return None
    pick = lambda t: t[place : place + 1].clone() if isinstance(t, Tensor) else t
    return pick(out.detach()), tree_map(pick, y)


def observed_reduction(loss: Loss, out: Tensor, y: Any, reference: tuple[Tensor, Any]) -> str:
    """Whether a loss of one's own is a sum or a mean over samples, for this batch and the one that ``reference`` is from.

    As many copies of a reference sample as the batch has samples are put beside it. The gradients of the copies stay as they
    are without the batch if the loss is a sum. They become half as large if the loss divides by N times what the reference
    counts. A mean over anything else, such as positions that are not padding, does neither, unless the batch has
    exactly as many of these per sample as the reference, in which case it is a mean over samples here.

    Args:
        loss: The loss.
        out: Output of the model, [N, ...].
        y: Targets, all tensors with leading axis N.
        reference: A sample of the first batch, from `reference_sample`.

    Returns:
        "sum" or "mean".

    Raises:
        ValueError: If it is neither.
    """
    if not values_visible(out, y):
        raise ValueError(f"{label(loss)}: whether it is a sum or a mean is read from its values, and they cannot be seen here.")
    num = out.shape[0]
    copies = lambda t: t.expand(num, *t.shape[1:]) if isinstance(t, Tensor) else t
    lone_out, lone_y = copies(reference[0]), tree_map(copies, reference[1])
    try:
        targets, rebuild = flatten(y)
        pairs = zip(leaves(lone_y), targets, strict=True)
        together = rebuild([torch.cat([a, b]) if isinstance(a, Tensor) else b for a, b in pairs])
        alone = autodiff_gradient(loss, lone_out, lone_y)[0]
        beside = autodiff_gradient(loss, torch.cat([lone_out, out.detach()]), together)[0]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{label(loss)} fails for a batch and copies of a sample of the first one: {error}") from error
    atol = float(alone.abs().max()) * torch.finfo(out.dtype).eps ** 0.5
    for kind, expected in (("sum", alone), ("mean", alone / 2)):
        if torch.allclose(beside, expected, rtol=0.0, atol=atol):
            return kind
    raise ValueError(f"{label(loss)} is neither a sum nor a mean over samples")
