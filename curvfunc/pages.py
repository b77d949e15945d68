"""Memory for large results on CPU, in huge pages where the system has them on request.

Tensors above the allocator's largest threshold come from memory that is new each time. The system hands it out page by page,
filled with zeros, which costs more than the arithmetic that writes results there: with pages of 4 KiB some 3 GB/s were
measured, with huge ones 17 GB/s, and 25 GB/s where the memory was there before.
"""

import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _functorch

__all__ = ["empty", "is_large", "may_overwrite"]

# From here on glibc always maps new memory (its DEFAULT_MMAP_THRESHOLD_MAX).
LEAST_BYTES = 1 << 25


def empty(like: Tensor, *shape: int) -> Tensor:
    """``like.new_empty(shape)``, to be written as a whole."""
    result = like.new_empty(shape)
    traced = type(result) is not Tensor or torch.compiler.is_compiling()
    if MADVISE is not None and not traced and is_large(result.shape, result):
        start = -(-result.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        MADVISE(start, result.nbytes - mmap.PAGESIZE, HUGE)  # advice: whether it is taken makes no difference to results
    return result


def is_large(shape: Sequence[int], like: Tensor) -> bool:
    """Whether a tensor of that shape, with the type and device of ``like``, would come from new memory each time."""
    return like.device.type == "cpu" and math.prod(shape) * like.element_size() >= LEAST_BYTES


def may_overwrite() -> bool:
    """Whether values can be overwritten: no graph and no transformation may ask for them again."""
    return not torch.is_grad_enabled() and _functorch.peek_interpreter_stack() is None


def _madvise() -> Callable[[int, int, int | None], int] | None:
    """The system's function, where there is one."""
    if sys.platform != "linux" or HUGE is None:
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
MADVISE = _madvise()
