"""Max pooling of images on CPUs: the same values and gradients as torch's, in a fraction of the time.

Torch's kernel for channels last finds the maxima three to five times as fast as that for channels first, even if the input
has to be copied for it. The output is then gathered from the input, so that a backward pass is a scatter of one tensor,
whatever the number of columns: vmap's rule for torch's own backward pass copies the input once per column.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

__all__ = ["FASTER"]

SMALLEST = 1 << 14  # entries: below, calls take longer than what they do


def _max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    if return_indices or not _pays(input):
        pool: Any = F.max_pool2d
        return pool(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    with torch.no_grad():
        last = input.contiguous(memory_format=torch.channels_last)
        index = F.max_pool2d(last, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)[1].contiguous()
    return input.flatten(2).gather(2, index.flatten(2)).view(index.shape)


def _pays(input: Any) -> bool:
    return (
        isinstance(input, Tensor)
        and not torch.compiler.is_compiling()  # where sizes may be symbols
        and input.ndim == 4
        and input.device.type == "cpu"
        and input.dtype in (torch.float32, torch.float64)
        and input.is_contiguous()
        and input.numel() >= SMALLEST
        and _functorch.peek_interpreter_stack() is None
        and not _hooked()
    )


def _hooked() -> bool:
    """Whether hooks meet what operations save: checkpoints compare it with that of the same operations, run again."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


# Functions that do the same as others, in less time. Their graph is another one.
FASTER = {F.max_pool2d: _max_pool2d, torch.max_pool2d: _max_pool2d}
