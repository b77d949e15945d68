"""Draws of labels, out of place: they run under ``vmap(randomness="different")`` and compiled."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["draw_bits", "draw_categories", "draw_normal"]


def draw_categories(probs: Tensor, mc_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draw classes from probabilities [N, C, *d]: [M, N, *d], an exponential race (argmin_c E_c / p_c).

    Out of place, so it runs under ``vmap(randomness="different")`` and compiled. E = -log u with 0 < u < 1 is positive
    and finite, so no class can win because of its noise alone: u = 0, which ``torch.rand`` may draw, is moved up.
    """
    u = _drawn(torch.rand, probs, mc_samples, generator)
    return (probs / u.clamp(min=torch.finfo(u.dtype).tiny).log()).argmin(2)  # the largest p / E, with its sign


def draw_bits(logits: Tensor, mc_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draw from Bernoulli(sigmoid(logits)) for logits of any shape: boolean [M, *shape]."""
    u = _drawn(torch.rand, logits, mc_samples, generator)
    return u < logits.sigmoid()


def draw_normal(like: Tensor, mc_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draw standard normal noise [M, *shape] of the shape, device and dtype of ``like``."""
    return _drawn(torch.randn, like, mc_samples, generator)


def _drawn(draw: Callable[..., Tensor], like: Tensor, mc_samples: int, generator: torch.Generator | None) -> Tensor:
    given = {} if generator is None else {"generator": generator}  # with one, even None, sizes must be no symbols
    return draw((mc_samples, *like.shape), device=like.device, dtype=like.dtype, **given)
