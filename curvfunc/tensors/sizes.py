"""Sizes that may be symbols, in code that is compiled for batches of any size."""

from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["has_symbols", "hint", "ranges", "room"]

ON_GPU = 64  # times as much goes together where there is no cache to stay in, and each step costs its launch


def has_symbols() -> bool:
    """Whether operations are traced for sizes that are symbols."""
    if not is_in_torch_dispatch_mode():
        return False
    mode = detect_fake_mode()
    return mode is not None and mode.shape_env is not None and bool(mode.shape_env.backed_var_to_val)


def hint(size: Any) -> int:
    """A size, or the one that a symbol had when it was made: for what decides about memory and time, and never about results.

    A symbol is not bound to its hint thereby. One that has none, since it depends on data, is.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    found = size.node.hint
    return int(size) if found is None else int(found)


def ranges(total: Any, size: Any) -> list[tuple[Any, Any]]:
    """Parts of ``range(total)`` of at most ``size``, or about that many where ``total`` is a symbol; all but the last alike."""
    size = max(1, hint(size))
    if not isinstance(total, torch.SymInt):
        return [(i, min(i + size, total)) for i in range(0, total, size)]
    parts = -(-hint(total) // size)
    each = total // parts
    return [(each * i, each * (i + 1) if i + 1 < parts else total) for i in range(parts)]


def room(size: int, t: Tensor) -> int:
    """How many bytes go together, for ``size`` bytes on the CPU, with tensors on the device of ``t``."""
    return size if t.device.type == "cpu" else ON_GPU * size
