"""Convolutions whose second derivatives leave symbolic sizes what they are.

Torch's own asks for sizes as numbers, so that code compiled for batches of any size would hold for one alone. A convolution
is linear in its input x and its weight w. So with any cotangent g, ⟨g, x * w⟩ is a form of three tensors, whose gradient by
each is a bilinear function of the other two, with derivatives of the same kind.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

from curvfunc.tensors.sizes import has_symbols

__all__ = ["CONVOLUTIONS"]

aten = torch.ops.aten
Options = tuple[Any, ...]  # stride, padding, dilation, whether it is transposed, output padding, groups


class Convolution(torch.autograd.Function):
    """The gradient by g: x * w itself. Its node has the name of torch's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, options: Options) -> Tensor:
        """Run torch's kernel."""
        ctx.save_for_backward(x, w)
        ctx.options = options
        out: Tensor = aten.convolution(x, w, None, *options)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """By both."""
        x, w = ctx.saved_tensors
        by_x = ByInput.apply(g, w, x.shape, ctx.options) if ctx.needs_input_grad[0] else None
        by_w = ByWeight.apply(g, x, w.shape, ctx.options) if ctx.needs_input_grad[1] else None
        return by_x, by_w, None


class ByInput(torch.autograd.Function):
    """The gradient by x."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, shape: torch.Size, options: Options) -> Tensor:
        """Run torch's kernel."""
        ctx.save_for_backward(g, w)
        ctx.options = options
        x = g.new_empty(()).expand(shape)  # its values are not read
        out: Tensor = aten.convolution_backward(g, x, w, None, *options, [True, False, False])[0]
        return out

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        """By both."""
        g, w = ctx.saved_tensors
        by_g = Convolution.apply(x, w, ctx.options) if ctx.needs_input_grad[0] else None
        by_w = ByWeight.apply(g, x, w.shape, ctx.options) if ctx.needs_input_grad[1] else None
        return by_g, by_w, None, None


class ByWeight(torch.autograd.Function):
    """The gradient by w."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, shape: torch.Size, options: Options) -> Tensor:
        """Run torch's kernel."""
        ctx.save_for_backward(g, x)
        ctx.options = options
        w = g.new_empty(()).expand(shape)  # its values are not read
        out: Tensor = aten.convolution_backward(g, x, w, None, *options, [False, True, False])[1]
        return out

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Any:
        """By both."""
        g, x = ctx.saved_tensors
        by_g = Convolution.apply(x, w, ctx.options) if ctx.needs_input_grad[0] else None
        by_x = ByInput.apply(g, w, x.shape, ctx.options) if ctx.needs_input_grad[1] else None
        return by_g, by_x, None, None


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _convolution(function: Callable[..., Tensor], dims: int) -> Callable[..., Tensor]:
    def run(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if _unusual(input, padding, dims):
            return function(input, weight, bias, stride, padding, dilation, groups)
        padding = [0] * dims if padding == "valid" else _each(padding, dims)
        options = (_each(stride, dims), padding, _each(dilation, dims), False, [0] * dims, groups)
        return _biased(Convolution.apply(input, weight, options), bias, dims)

    return run


def _transposed(function: Callable[..., Tensor], dims: int) -> Callable[..., Tensor]:
    def run(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        if _unusual(input, padding, dims):
            return function(input, weight, bias, stride, padding, output_padding, groups, dilation)
        sizes: Sequence[Any] = [_each(value, dims) for value in (stride, padding, dilation, output_padding)]
        return _biased(Convolution.apply(input, weight, (*sizes[:3], True, sizes[3], groups)), bias, dims)

    return run


def _unusual(input: Tensor, padding: Any, dims: int) -> bool:
    """Where torch's own function runs: where no sizes are symbols, and where they cannot stay symbols anyway."""
    return not has_symbols() or input.ndim != dims + 2 or padding == "same" or _functorch.peek_interpreter_stack() is not None


def _biased(out: Tensor, bias: Tensor | None, dims: int) -> Tensor:
    return out if bias is None else out + bias.reshape(-1, *[1] * dims)


CONVOLUTIONS: dict[Any, Callable[..., Any]] = {
    **{f: _convolution(f, d) for d, f in enumerate((F.conv1d, F.conv2d, F.conv3d), 1)},
    **{f: _transposed(f, d) for d, f in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1)},
}
