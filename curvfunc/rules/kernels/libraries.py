"""Kernels of vendors' libraries that cannot be differentiated as torch's own can."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

__all__ = ["without_cudnn"]


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
