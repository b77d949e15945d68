"""Memory on CPU, which costs more than the arithmetic that fills it wherever it is new.

The system hands out new memory page by page, filled with zeros: with pages of 4 KiB some 3 GB/s were measured, with huge ones
17 GB/s, and 25 GB/s where the memory was there before. In a virtual machine, what was free for a while may have gone back to
the host, and costs ten times that. So

- large results come from memory that the process keeps. It remembers the blocks that it handed out, and takes one again as soon
  as nobody else holds it: no tensor, view, graph, array or storage. The blocks that are remembered take at most `MOST_BYTES`;
  those that nobody holds go where memory is short, and on request (`empty_cache`);
- new blocks are of huge pages, where the system has them on request;
- everything below comes from memory that the process has already. glibc maps and unmaps each block above a threshold, and
  gives back what is free above twice that; it raises the threshold to the largest block that was ever freed, up to 32 MiB.
  One such block, freed when curvfunc is imported, has later ones stay: 10 to 25 % of the time of a step on a small CNN.
"""

import ctypes
import math
import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _functorch

from curvfunc.tensors.sizes import hint

__all__ = ["empty", "empty_cache", "is_large", "may_overwrite"]

# From here on glibc always maps new memory (its DEFAULT_MMAP_THRESHOLD_MAX).
LEAST_BYTES = 1 << 25

torch.empty(LEAST_BYTES - 2 * mmap.PAGESIZE, dtype=torch.uint8, device="cpu")  # freed at once, and never touched


def empty(like: Tensor, *shape: int) -> Tensor:
    """``like.new_empty(shape)``, to be written as a whole; large ones in memory that an earlier one had, if it is free."""
    traced = type(like) is not Tensor or torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None
    if traced or not is_large(shape, like):
        return like.new_empty(shape)
    result = like.new_empty(0)
    if type(result) is not Tensor:  # a mode makes others
        return like.new_empty(shape)
    storage = _BLOCKS.take(math.prod(shape) * like.element_size())
    with torch.no_grad():
        return result.set_(storage, 0, shape)  # type: ignore[call-overload]


def empty_cache() -> None:
    """Give back the memory that large results had on CPU, where nobody holds it any more.

    curvfunc keeps it for later results of the same size, up to an eighth of the machine's memory. It goes by itself where
    memory is short. (On GPUs torch itself keeps memory: ``torch.cuda.empty_cache``.)

    Example:
        >>> import curvfunc
        >>> curvfunc.empty_cache()
    """
    _BLOCKS.release()


class _Blocks:
    """Memory that was handed out, the least recently taken first."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew, with what was handed out in other hands."""
        self._lock = threading.Lock()
        self._blocks: list[torch.UntypedStorage] = []

    def take(self, size: int) -> torch.UntypedStorage:
        """Memory of that many bytes that nobody holds."""
        with self._lock:
            for k in range(len(self._blocks)):
                if self._blocks[k].nbytes() == size and self._is_free(k):
                    self._blocks.append(self._blocks.pop(k))
                    return self._blocks[-1]
            if _is_short(size):
                self._drop()
            block = _new(size)
            if size <= MOST_BYTES and _COUNT is not None:
                self._blocks.append(block)
                while sum(b.nbytes() for b in self._blocks) > MOST_BYTES:
                    del self._blocks[0]
            return block

    def release(self) -> None:
        """Forget what nobody holds, so that it goes."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        for k in reversed(range(len(self._blocks))):
            if self._is_free(k):
                del self._blocks[k]

    def _is_free(self, k: int) -> bool:
        """Whether this list alone holds a block: neither a tensor does, nor a name in Python, nor another process."""
        unseen = _COUNT is not None and _COUNT(self._blocks[k]._cdata) == 1 and not self._blocks[k].is_shared()
        return unseen and sys.getrefcount(self._blocks[k]) <= _REFERENCES


def is_large(shape: Sequence[int], like: Tensor) -> bool:
    """Whether a tensor of that shape, with the type and device of ``like``, would come from new memory each time."""
    return like.device.type == "cpu" and hint(math.prod(shape)) * like.element_size() >= LEAST_BYTES


def may_overwrite() -> bool:
    """Whether values can be overwritten: no graph and no transformation may ask for them again."""
    return not torch.is_grad_enabled() and _functorch.peek_interpreter_stack() is None


def _new(size: int) -> torch.UntypedStorage:
    """New memory, of huge pages where the system has them."""
    storage = torch.UntypedStorage(size, device="cpu")
    if MADVISE is not None and size > 2 * mmap.PAGESIZE:
        start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        MADVISE(start, size - mmap.PAGESIZE, HUGE)  # advice: whether it is taken makes no difference to results
    return storage


def _is_short(size: int) -> bool:
    """Whether new memory of that size would leave less than a sixteenth of all; unknown where the system does not say."""
    try:
        with open("/proc/meminfo") as info:
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in info if line.startswith("Mem")}
        return kilobytes["MemAvailable"] * 1024 - size < kilobytes["MemTotal"] * 64
    except (OSError, KeyError, ValueError, IndexError):
        return False


def _total() -> int:
    """All memory of the machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 33


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
MOST_BYTES = _total() // 8

# How many tensors hold a memory: no public interface of torch. Without it nothing is kept.
_COUNT: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_BLOCKS = _Blocks()


def _references() -> int:
    """What Python counts for a block that nothing but a list holds."""
    only = [torch.UntypedStorage(1, device="cpu")]
    return sys.getrefcount(only[0])


_REFERENCES = _references()

if hasattr(os, "register_at_fork"):  # another thread may have held the lock
    os.register_at_fork(after_in_child=_BLOCKS.reset)
