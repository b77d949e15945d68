"""Low precision is for the model: sums of squares and curvature of losses need more."""

import torch
from torch import Tensor

__all__ = ["LOW", "at_least_float32", "wide"]

LOW = (torch.bfloat16, torch.float16)


def at_least_float32(t: Tensor) -> Tensor:
    """The tensor in single precision if it has less."""
    return t.float() if t.dtype in LOW else t


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type, or single precision if that is more."""
    return torch.float32 if dtype in LOW else dtype
