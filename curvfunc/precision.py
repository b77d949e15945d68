"""Low precision is for the model: sums of squares and curvature of losses need more."""

import torch
from torch import Tensor

__all__ = ["at_least_float32"]


def at_least_float32(t: Tensor) -> Tensor:
    """The tensor in single precision if it has less."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t
