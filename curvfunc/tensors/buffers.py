"""Results in memory that the caller provides: tensors that are reused from step to step."""

from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from curvfunc.tensors.inputs import in_order

__all__ = ["copied", "deliver", "parameter_buffers", "read_buffers"]


def read_buffers(tree: Any, out: Any) -> list[Any]:
    """What ``out`` has for each spec of a tree: a result of an earlier call, or None."""
    try:
        return list(tree.flatten_up_to(out))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"out must be like what an earlier call with the same specs returned, with None for new results: {error}"
        ) from error


def parameter_buffers(
    quantity: str, params: Any, names: Sequence[str], leaves: Sequence[Tensor], buffer: Any, lead: tuple[int, ...]
) -> list[Tensor]:
    """The buffers [*lead, *shape] of a result that has one tensor for each parameter."""
    tree = optree.tree_structure(params)
    if optree.tree_structure(buffer) != tree:
        raise ValueError(f"out for {quantity} must be a tree like params, {tree}, got {optree.tree_structure(buffer)}.")
    found = in_order(params, buffer)
    for name, p, b in zip(names, leaves, found, strict=True):
        _check(f"{quantity}, parameter {name!r}", b, torch.Size((*lead, *p.shape)), p)
    return found


def deliver(quantity: str, result: Any, buffer: Any) -> Any:
    """The result in the caller's buffer."""
    if buffer is None:
        return result
    results, tree = optree.tree_flatten(result)
    try:
        buffers: list[Any] = tree.flatten_up_to(buffer)
    except (ValueError, TypeError) as error:
        raise ValueError(f"out for {quantity} does not have the structure of its result: {error}") from error
    for r, b in zip(results, buffers, strict=True):
        _check(quantity, b, r.shape, r)
        if b.dtype != r.dtype:
            raise ValueError(f"out for {quantity} has dtype {b.dtype}, and its result {r.dtype}. Pass an earlier result.")
        if b.data_ptr() != r.data_ptr():
            b.copy_(r)
    return buffer


def copied(quantity: str, result: Tensor, buffer: Any) -> Tensor:
    """A copy of the result in the caller's buffer, which compiled code cannot compare by address."""
    _check(quantity, buffer, result.shape, result)
    return buffer.copy_(result)


def _check(what: str, buffer: Any, shape: torch.Size, like: Tensor) -> None:
    if not isinstance(buffer, Tensor):
        raise TypeError(f"out for {what} must be a tensor, got {type(buffer).__name__}.")
    if buffer.shape != shape or buffer.device != like.device or buffer.requires_grad:
        raise ValueError(
            f"out for {what} has shape {tuple(buffer.shape)} on {buffer.device}"
            f"{' and requires grad' if buffer.requires_grad else ''}; a tensor of shape {tuple(shape)} on {like.device} "
            "without gradient is needed, such as the result of an earlier call."
        )
