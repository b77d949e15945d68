"""Elementwise functions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

__all__ = ["angle", "hardsigmoid", "i1", "precise_hardsigmoid", "prelu", "prelu_of_levels", "sgn", "sinc"]


def precise_hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """In double precision, the kernel's slope is 1/6 in single precision."""
    return hardsigmoid(input, inplace) if input.dtype == torch.float64 else F.hardsigmoid(input, inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """The backward kernel has no derivative."""
    out = F.relu6(input + 3) / 6
    return input.copy_(out) if inplace else out


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """x where x > 0, else w x: at 0 the kernel's second derivatives are those of x, its first ones those of w x."""
    if weight.numel() > 1:
        weight = weight.reshape(-1, *[1] * (input.ndim - 2))
    return torch.where(input > 0, input, weight * input)


def prelu_of_levels(input: Tensor, weight: Tensor) -> Tensor:
    """The kernel's backward pass mixes up weights and gradients that are batched at different levels of `torch.vmap`."""
    return F.prelu(input, weight) if _functorch.peek_interpreter_stack() is None else prelu(input, weight)


def sinc(input: Tensor) -> Tensor:
    """The second derivative is nan at 0."""
    if input.is_complex():
        return torch.sinc(input)
    x = torch.pi * input
    near = x.abs() < 0.5
    far = torch.where(near, 1.0, x)
    return torch.where(near, _series(torch.where(near, x, 0.0).square(), SINC), far.sin() / far)


def angle(input: Tensor) -> Tensor:
    """At a complex zero, the derivative of the backward pass by the cotangent is nan; the value is that of its signs."""
    if not input.is_complex():
        return torch.angle(input)
    zero = input == 0
    return torch.where(zero, torch.angle(input.detach()), torch.angle(torch.where(zero, 1.0, input)))


def sgn(input: Tensor) -> Tensor:
    """At a complex zero, the derivative of the backward pass by the cotangent is nan."""
    if not input.is_complex():
        return torch.sgn(input)
    zero = input == 0
    return torch.where(zero, 0.0, torch.sgn(torch.where(zero, 1.0, input)))


SINC = [1 / 1, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800, -1 / 1307674368000]


def i1(input: Tensor) -> Tensor:
    """The third derivative is wrong at 0."""
    near = input.abs() < 0.1
    x = torch.where(near, input, 0.0)
    close = x / 2 * _series(x.square() / 4, I1) + 0.0  # the kernel has no negative zeros
    return torch.where(near, close, torch.special.i1(torch.where(near, 1.0, input)))


I1 = [1.0, 1 / 2, 1 / 12, 1 / 144, 1 / 2880, 1 / 86400]


def _series(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    out = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        out = out * x + c
    return out
