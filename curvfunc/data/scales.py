"""The scale of a batch in a larger one: what its loss divides by, told by its options, by the caller, or by its gradients."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from curvfunc import losses
from curvfunc.tensors.samples import flatten

__all__ = ["Reduction", "check_reduction", "mass", "observed"]

Reduction = str | Callable[[Tensor, Any], Any]
Reference = tuple[Tensor, Any] | None


def check_reduction(loss: losses.Loss, reduction: Any) -> None:
    """Raise unless it is for this loss, and says something."""
    if reduction is not None and losses.has_normalizer(loss):
        raise ValueError("reduction is for losses of one's own; that of this loss_fn is one of its options. Leave it out.")
    if reduction is not None and not callable(reduction) and reduction not in ("sum", "mean", "terms"):
        raise ValueError(f"reduction must be 'sum', 'mean' or a function (output, y) -> weight, or 'terms', got {reduction!r}.")


def mass(loss: losses.Loss, reduction: Reduction | None, samples: int, out: Tensor | None, y: Any, like: Tensor) -> Tensor:
    """What the loss divides by for a batch, a scalar; 1 for a sum.

    Args:
        loss: The loss.
        reduction: How one of the caller's own reduces; None where `losses.normalizer` knows.
        samples: Number of samples of the batch.
        out: Output of the model, which only a function ``reduction``, and "terms", are told.
        y: Targets.
        like: Whose device is that of the result.
    """
    if reduction is None:
        return losses.normalizer(loss, y)
    if reduction == "terms":
        disguise = losses.unmasked(loss, cast(Tensor, out), y)
        if disguise is None:
            raise ValueError(
                "reduction='terms' is for losses that only move entries of the output before cross-entropy, squared error "
                "or BCE with logits, and this one is not known to. Pass 'sum', 'mean', or a function (output, y) -> total "
                "weight."
            )
        return losses.normalizer(disguise.loss, disguise.y)
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    if callable(reduction):
        assert out is not None
        given = torch.as_tensor(reduction(out, y), dtype=wide, device=like.device)
        if given.ndim:
            raise ValueError(
                f"reduction returned shape {tuple(given.shape)}; a number is needed: the total weight of the batch."
            )
        return given
    return torch.full((), samples if reduction == "mean" else 1, dtype=wide, device=like.device)


def observed(loss: losses.Loss, out: Tensor, y: Any, reference: Reference, known: Reduction | None) -> tuple[str, Reference]:
    """Whether a loss of one's own is a sum or a mean, and the sample that is compared with the next batch.

    Args:
        loss: The loss.
        out: Output of the model for this batch.
        y: Its targets.
        reference: A sample of the first batch; None if this is the first. From a checkpoint, its targets are a list.
        known: What was observed before.

    Raises:
        ValueError: If it is neither, or another one than before.
    """
    remedy = (
        "So the scale of a batch in a larger one is not known. Pass reduction='sum', 'mean' (over samples), or a function "
        "(output, y) -> total weight."
    )
    if (disguise := losses.unmasked(loss, out, y)) is not None:
        kind = "sum" if losses.is_sum(disguise.loss) else "terms"
        return _as_before(kind, known, remedy), reference
    if reference is None:
        reference = losses.reference_sample(loss, out, y)
    elif isinstance(reference[1], list):
        reference = reference[0], flatten(y)[1](reference[1])
    if reference is None:
        raise ValueError(f"all gradients of loss_fn are zero here, as those of a sum and of a mean may be. {remedy}")
    try:
        kind = losses.observed_reduction(loss, out, y, reference)
    except ValueError as error:
        raise ValueError(f"{error}. {remedy}") from error
    return _as_before(kind, known, remedy), reference


def _as_before(kind: str, known: Reduction | None, remedy: str) -> str:
    """The same as for the batches before."""
    if known not in (None, kind):
        what = {"terms": "mean over the terms of a known loss"}
        was, now = what.get(str(known), known), what.get(kind, kind)
        raise ValueError(f"loss_fn is a {was} for the first batch, and a {now} for this one. {remedy}")
    return kind
