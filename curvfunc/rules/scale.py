"""Elementwise use of parameters with broadcasting: z = x + p, x - p, x p, x / p, and PReLU."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.rules.kernels.elementwise import prelu
from curvfunc.rules.registry import DECOMPOSITIONS, Use, rule
from curvfunc.uses.forms import Direct, Form, sum_to_shape


def _spellings(*names: str) -> list[Any]:
    """The functions of these names in torch and torch.Tensor."""
    return [getattr(space, name) for name in names for space in (torch, Tensor) if hasattr(space, name)]


def _broadcast(p: Tensor, other: Tensor, use: Use, gradient: Callable[[Tensor, Tensor], Tensor], reads: bool) -> Form | None:
    """The form of a parameter that is broadcast against data; None where that reaches over the sample axis.

    ``gradient(g, x)`` gives dz/dp · g elementwise, with x aligned to g [v, n, ...].
    """
    own = other.ndim - (use.axis is None)
    shape = [1] * (own - p.ndim) + list(p.shape)
    if use.axis is not None and (p.ndim > own or shape.pop(use.axis) != 1):
        return None
    lead = torch.Size(shape)

    def cotangent(g: Tensor) -> Tensor:
        x = other.reshape(other.shape[0], *[1] * (g.ndim - 1 - other.ndim), *other.shape[1:])
        h = sum_to_shape(gradient(g, x), lead)
        return h.reshape(*h.shape[:2], *p.shape)

    return Direct(cotangent, p.shape, reads=reads)


def _both(
    input: Any,
    other: Any,
    use: Use,
    first: Callable[[Tensor, Tensor], Tensor],
    second: Callable[[Tensor, Tensor], Tensor],
    reads: bool = True,
) -> Any:
    """The form for whichever argument is the parameter, given its gradient in terms of g and the other argument."""
    name, p, x, gradient = ("input", input, other, first) if "input" in use.parameters else ("other", other, input, second)
    if not isinstance(x, Tensor) or len(use.parameters) > 1 or not use.sampled:
        return NotImplemented
    form = _broadcast(p, x, use, gradient, reads)
    return NotImplemented if form is None else {name: form}


@rule(
    *_spellings("add", "__add__", "__radd__", "add_", "__iadd__"),
    arguments="input other",
    parameters="input other",
)
def add(input: Any, other: Any, alpha: float = 1, *, use: Use) -> Any:
    """Z = x + α p."""
    return _both(input, other, use, lambda g, x: g, lambda g, x: alpha * g if alpha != 1 else g, reads=False)


@rule(
    *_spellings("sub", "subtract", "__sub__", "sub_", "__isub__"),
    arguments="input other",
    parameters="input other",
)
def sub(input: Any, other: Any, alpha: float = 1, *, use: Use) -> Any:
    """Z = x - α p."""
    return _both(input, other, use, lambda g, x: g, lambda g, x: -alpha * g, reads=False)


@rule(*_spellings("rsub", "__rsub__"), arguments="input other", parameters="input other")
def rsub(input: Any, other: Any, alpha: float = 1, *, use: Use) -> Any:
    """Z = p - α x, arguments in reverse."""
    return _both(input, other, use, lambda g, x: -alpha * g, lambda g, x: g, reads=False)


@rule(*_spellings("mul", "multiply", "__mul__", "__rmul__"), arguments="input other", parameters="input other")
def mul(input: Any, other: Any, *, use: Use) -> Any:
    """Z = x p."""
    return _both(input, other, use, lambda g, x: g * x, lambda g, x: g * x)


@rule(
    *_spellings("div", "divide", "true_divide", "__truediv__"),
    arguments="input other rounding_mode",
    parameters="input other",
)
def div(input: Any, other: Any, rounding_mode: str | None = None, *, use: Use) -> Any:
    """Z = x / p; as the numerator only, since the derivative by the denominator needs its value."""
    if rounding_mode is not None or "other" in use.parameters:
        return NotImplemented
    return _both(input, other, use, lambda g, x: g / x, lambda g, x: g)


DECOMPOSITIONS[torch.prelu] = DECOMPOSITIONS[F.prelu] = DECOMPOSITIONS[Tensor.prelu] = prelu
