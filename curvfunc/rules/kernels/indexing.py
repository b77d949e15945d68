"""Entries that are looked up, moved, or written to other places."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

from curvfunc.tensors.sizes import has_symbols

__all__ = [
    "as_strided_scatter",
    "embedding",
    "embedding_bag",
    "embedding_of_any_size",
    "index_fill",
    "roll",
    "scatter_reduce",
    "select_scatter",
]


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """Its backward pass is wrong under vmap."""
    start = index % input.shape[dim]
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, start, start + 1)


def as_strided_scatter(
    input: Tensor, src: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Tensor:
    """Its backward pass is wrong, everywhere."""
    if not input.is_contiguous() or (storage_offset is None and input.storage_offset()):
        raise NotImplementedError(
            "as_strided_scatter has a wrong gradient in torch, and curvfunc can do without its kernel only where the input is "
            "contiguous and storage_offset is given. Use scatter, slice_scatter or index_put."
        )
    places = torch.arange(input.numel(), device=input.device).as_strided(size, stride, storage_offset or 0)
    return input.reshape(-1).scatter(0, places.reshape(-1), src.expand(size).reshape(-1)).view(input.shape)


def scatter_reduce(input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True) -> Tensor:
    """The forward-mode derivative of products is wrong."""
    stack = _functorch.get_interpreter_stack() or ()
    if reduce == "prod" and any(level.key() == _functorch.TransformType.Jvp for level in stack):
        raise NotImplementedError(
            'scatter_reduce with reduce="prod" has a wrong forward-mode derivative in torch. Use torch.func.grad or vjp in '
            "place of jvp."
        )
    return torch.scatter_reduce(input, dim, index, src, reduce, include_self=include_self)


def roll(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Under vmap, a scalar's samples are rolled."""
    return torch.roll(input, *args, **kwargs) if input.ndim else input.clone()


def index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """Under vmap, the samples of a scalar are filled."""
    if input.ndim or not index.numel():
        return torch.index_fill(input, dim, index, value)
    return torch.as_tensor(value, dtype=input.dtype, device=input.device) + input * 0


def embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Under vmap the row of padding gets a gradient."""
    if padding_idx is None or _functorch.peek_interpreter_stack() is None:
        return F.embedding(input, weight, padding_idx, *args, **kwargs)
    out = F.embedding(input, weight, None, *args, **kwargs)
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), out.detach(), out)


def embedding_of_any_size(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Where sizes are symbols, rows by their numbers: the second derivative of the kernel asks for sizes as numbers."""
    unusual = max_norm is not None or scale_grad_by_freq or sparse
    if unusual or not has_symbols() or _functorch.peek_interpreter_stack() is not None:
        return embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    out = weight.index_select(0, input.reshape(-1)).reshape(*input.shape, weight.shape[1])
    if padding_idx is None:
        return out
    return torch.where((input == padding_idx % weight.shape[0]).unsqueeze(-1), out.detach(), out)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """The backward kernels have no derivatives."""
    unusual = input.is_floating_point() or sparse or scale_grad_by_freq or max_norm is not None
    if unusual or offsets is not None or input.ndim != 2 or input.shape[1] == 0:
        rest = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset)
        return F.embedding_bag(input, weight, *rest, padding_idx)
    rows = F.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    count: Any = input.shape[1]
    if padding_idx is not None:
        padding = (input == padding_idx % len(weight)).unsqueeze(-1)
        rows = rows.masked_fill(padding, float("-inf") if mode == "max" else 0.0)
        count = (~padding).sum(1)
        if mode == "max":
            return torch.where(count == 0, 0.0, rows.max(1).values)
    if mode == "max":
        return rows.max(1).values
    return rows.sum(1) if mode == "sum" else rows.sum(1) / (count if padding_idx is None else count.clamp_min(1))
