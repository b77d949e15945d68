"""Memory on CPU, which costs more than the arithmetic that fills it wherever it is new.

The system hands out new memory page by page, filled with zeros: with pages of 4 KiB some 3 GB/s were measured, with huge ones
17 GB/s, and 25 GB/s where the memory was there before. So

- large results come from huge pages, where the system has them on request;
- everything below comes from memory that the process has already. glibc maps and unmaps each block above a threshold, and
  gives back what is free above twice that; it raises the threshold to the largest block that was ever freed, up to 32 MiB.
  One such block, freed when curvfunc is imported, has later ones stay: 10 to 25 % of the time of a step on a small CNN.
"""

import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _functorch

from curvfunc.tensors.sizes import hint

__all__ = ["empty", "is_large", "may_overwrite"]

# From here on glibc always maps new memory (its DEFAULT_MMAP_THRESHOLD_MAX).
LEAST_BYTES = 1 << 25

torch.empty(LEAST_BYTES - 2 * mmap.PAGESIZE, dtype=torch.uint8, device="cpu")  # freed at once, and never touched


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
    return like.device.type == "cpu" and hint(math.prod(shape)) * like.element_size() >= LEAST_BYTES


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
