"""Norms, by the statistics of what they take and by running ones."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.tensors.sizes import has_symbols

__all__ = [
    "batch_norm",
    "batch_norm_of_any_size",
    "group_norm",
    "in_order_of_torch",
    "instance_norm",
    "layer_norm",
    "rms_norm",
    "running_instance_norm",
    "standardized",
    "torch_batch_norm",
    "weight_norm",
    "weight_norm_of_any_size",
]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """On CPU, the backward pass with running statistics reads strided vectors as if they were dense.

    With axes of size one, which make layouts ambiguous, it does the same with a gradient whose axes have another order; as
    sequences, images have a single one.
    """
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    vectors: list[Any] = [t if t is None else t.contiguous() for t in (running_mean, running_var, weight, bias)]
    mean, var, weight, bias = vectors
    if input.ndim > 3 and 1 in (input.shape[0], *input.shape[2:]):
        out = F.batch_norm(input.flatten(2), mean, var, weight, bias, False, momentum, eps)
        return torch.ops.aten._unsafe_view(out, input.shape)  # of a view, the graph does not tell what changes it in place
    return F.batch_norm(input, mean, var, weight, bias, False, momentum, eps)


def batch_norm_of_any_size(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `batch_norm`; where sizes are symbols, written out: second derivatives of the kernel ask for them as numbers."""
    if training or running_mean is None or running_var is None or not has_symbols():
        return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    own = (-1, *[1] * (input.ndim - 2))
    out = (input - running_mean.reshape(own)) * (running_var + eps).rsqrt().reshape(own)
    out = out if weight is None else out * weight.reshape(own)
    return (out if bias is None else out + bias.reshape(own)).to(input.dtype)


def torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """As `batch_norm`, in the order of `torch.batch_norm`."""
    if training or running_mean is None:
        return torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def running_instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """By running statistics it is a batch normalization of all samples' channels as those of one sample."""
    if use_input_stats or running_mean is None or running_var is None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """In the third derivative of norms, the statistics are taken for constants."""
    return _affine(_normalized(input, [*range(-len(normalized_shape), 0)], eps), weight, bias).contiguous()


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """As `layer_norm`, for the groups of channels."""
    channels = [-1] + [1] * (input.ndim - 2)
    out = _normalized(input.reshape(input.shape[0], num_groups, -1), [2], eps).reshape(input.shape)
    return _affine(out, *(None if p is None else p.reshape(channels) for p in (weight, bias)))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `group_norm`, for each channel."""
    if not use_input_stats:
        return running_instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        with torch.no_grad():  # for the update of the running statistics alone
            F.instance_norm(input, running_mean, running_var, None, None, True, momentum, eps)
    return group_norm(input, input.shape[1], weight, bias, eps)


def in_order_of_torch(instance_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.instance_norm`, which has the arguments of ``F.instance_norm`` in another order."""

    @wraps(instance_norm)
    def reordered(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_input_stats: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        return instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    return reordered


def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """As `layer_norm`, without the mean."""
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    axes = [*range(-len(normalized_shape), 0)]
    return _affine(input * (input.square().mean(axes, keepdim=True) + eps).rsqrt(), weight, None).contiguous()


def standardized(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` in training mode, of weights: its kernel's derivatives are wrong under vmap."""
    if running_mean is not None:
        with torch.no_grad():  # for the update of the running statistics alone
            F.batch_norm(input, running_mean, running_var, None, None, True, momentum, eps)
    channels = [-1] + [1] * (input.ndim - 2)
    out = _normalized(input, [0, *range(2, input.ndim)], eps)
    return _affine(out, *(None if p is None else p.reshape(channels) for p in (weight, bias)))


def _normalized(x: Tensor, axes: list[int], eps: float) -> Tensor:
    centered = x - x.mean(axes, keepdim=True)
    return centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The derivative of the backward kernel is wrong."""
    others = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]
    return (v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))).contiguous()


def weight_norm_of_any_size(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Written out where sizes are symbols, so that as many gradients as there are samples go together."""
    return weight_norm(v, g, dim) if has_symbols() else torch._weight_norm(v, g, dim)
