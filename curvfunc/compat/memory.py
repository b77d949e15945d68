"""Results that replace a parameter's earlier ones, in the memory of these.

Memory that is new costs more than the arithmetic that fills it: the system hands out pages of zeros one by one. A training
loop replaces ``p.grad_batch`` at each step, and if nobody else can see the old tensor, the new one takes its place.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from curvfunc.quantities.quantity import Quantity

__all__ = ["earlier"]

# Smaller results come from memory that the process already has. On GPUs the caching allocator sees to it.
LEAST_BYTES = 1 << 20


def earlier(p: Tensor, field: str, spec: Quantity, columns: int, samples: int) -> dict[str, Tensor]:
    """The memory of a parameter's earlier result, for the contraction that forms the new one; it is taken off the parameter.

    Args:
        p: The parameter.
        field: Name of the attribute that has the result.
        spec: What it is a result of.
        columns: Number of columns of the output.
        samples: Number of samples.

    Returns:
        ``{contraction: memory}``, or nothing if the result is no large one, or somebody else may look at it.
    """
    lead = spec.lead(columns, samples)
    if lead is None or p.device.type != "cpu" or torch.is_grad_enabled():
        return {}
    shape = torch.Size((*lead, *p.shape))
    if shape.numel() * p.element_size() < LEAST_BYTES or type(p.__dict__.get(field)) is not Tensor:
        return {}
    only = [p.__dict__.pop(field)]
    if only[0].shape != shape or only[0].dtype != p.dtype or only[0].device != p.device or not _unseen(only):
        return {}
    (name,) = spec.contractions
    return {name: only[0][None] if name == "per_sample" and len(lead) == 1 else only[0]}


def _unseen(only: list[Tensor]) -> bool:
    """Whether a list holds the last reference to a tensor and to its memory, so that it is as good as a new tensor."""
    if not only[0].is_contiguous() or only[0].requires_grad or only[0].untyped_storage().is_shared():
        return False
    try:
        return _references(only) == _references([torch.empty(1)])
    except AttributeError:  # the counts are no public interface of torch: without them nothing is known
        return False


def _references(only: list[Tensor]) -> tuple[int, ...]:
    """To a tensor, in Python and in autograd, and to its memory, in Python and in tensors."""
    tensor: Any = only[0]
    storage = tensor.untyped_storage()
    in_autograd, in_tensors = tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)
    del tensor
    return sys.getrefcount(only[0]), in_autograd, sys.getrefcount(storage), in_tensors
