"""Parameters as the leaves of a graph that belongs to one call."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

__all__ = ["leaf", "leaves_of", "will_be_differentiated"]


_REQUIRES_GRAD = attrgetter("requires_grad")
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def leaf(p: Tensor) -> Tensor:
    """A parameter's values as a leaf of this call's own graph."""
    return leaves_of([p])[0]


def leaves_of(params: Sequence[Tensor]) -> list[Tensor]:
    """`leaf` of each."""
    if _PLAIN.issuperset(map(type, params)):
        found = [*map(Tensor.requires_grad_, map(Tensor.detach, params))]
    else:  # classes of their own may have methods of their own
        found = [p.detach().requires_grad_() for p in params]
    for t in found:
        t._curvfunc_leaf = True  # type: ignore[attr-defined]  # to be told from others where a model keeps it
    return found


def will_be_differentiated(tensors: list[Tensor]) -> bool:
    """Whether results need a graph: under torch.func's grad and jvp, or with tensors that require grad."""
    stack = _functorch.get_interpreter_stack() or ()
    if not stack and forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "params or X have tangents (torch.autograd.forward_ad), which results would silently lack. Differentiate the call "
            "by torch.func.jvp, which takes the same tangents."
        )
    if any(level.key() in (_functorch.TransformType.Grad, _functorch.TransformType.Jvp) for level in stack):
        return True
    return torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors))
