"""Random signs."""

from typing import Any

import torch
from torch import Generator, Tensor

__all__ = ["random_signs"]


def random_signs(shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    """Signs ±1 with equal chances, of the dtype and device of ``like``."""
    given: dict[str, Any] = (
        {} if generator is None else {"generator": generator}
    )  # with one, even None, sizes must be no symbols
    bits = torch.randint(0, 2, shape, device=like.device, **given)
    return (2 * bits - 1).to(like.dtype)
