"""What modules call for vendors' libraries, which cannot be differentiated as torch's own kernels can."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from curvfunc.tensors.ownership import base

__all__ = ["as_laid_out", "data_ptr", "without_cudnn"]


def without_cudnn(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same in torch's own kernels: cuDNN's recurrent networks have derivatives in training mode only, and no second ones.

    Args:
        function: ``torch.lstm``, for instance.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.backends.cudnn.enabled or not args[0].is_cuda:
            return function(*args, **kwargs)
        with torch.backends.cudnn.flags(enabled=False, allow_tf32=torch.backends.cudnn.allow_tf32):
            return function(*args, **kwargs)

    return run


def data_ptr(t: Tensor) -> int:
    """The address of a tensor's memory, below all levels of torch.func: who compares addresses learns what is the same."""
    return base(t).data_ptr()


def as_laid_out(*_: Any, **__: Any) -> None:
    """In place of a layout of weights for cuDNN, of which modules take care as they run: it would move parameters' memory."""
