"""Where the samples are: each tensor that a forward pass makes is marked with its sample axis, operation by operation."""

from typing import Any
from weakref import ref

from torch import Tensor
from torch._C import _functorch
from torch.overrides import TorchFunctionMode

from curvfunc.engine.calls import DROPS, holds_tensor, name_of
from curvfunc.rules.batch_axis import propagate

__all__ = ["CONSTANT", "MIXED", "UNSEEN", "Follower"]

MIXED = -1  # a tensor whose sample axis is not known
UNSEEN = -3  # a tensor that the mode did not see made
CONSTANT = -2  # a tensor that requires grad and depends on no sample: parameters, and what is made of them alone


class Follower(TorchFunctionMode):
    """Follows the sample axis from tensor to tensor, and notes where samples may meet."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[int | None, str] = {}
        self.entangled: str | None = None  # what may make a sample's output depend on the data of others
        self.counts = False  # whether Python asked for the shape of a batch
        self.random = False
        self.foreign: dict[int, Tensor] = {}  # constants that it did not see made: captured, or made where calls are hidden
        self.marks: dict[int, tuple[Any, int | None, bool]] = {}

    # -- from call to call

    def _follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], out: Any, writes: bool
    ) -> None:
        """Mark each tensor of ``out`` with its sample axis."""
        if writes:  # its views keep their marks, so the axis must not change
            target = args[0] if args else next(iter(kwargs.values()))
            known = self._marked_axis(target)
            axis = self._propagated(func, args, kwargs, tensors, target)
            if axis is None:
                return
            others = any(self.axis_of(t) not in (None, CONSTANT) for t in tensors if t is not target)
            # where the axis of a view is lost, it may be one sample's: what is written there reaches the others
            if known is not None and (axis != known or (axis == MIXED and others and target._base is not None)):
                self.reasons.setdefault(None, f"{name_of(func)} changes a tensor in place and mixes samples")
            self.mark(target, axis)
        elif isinstance(out, Tensor):
            axis = self._propagated(func, args, kwargs, tensors, out)
            if axis is not None or not any(out is t for t in tensors):  # what is returned as it came was made elsewhere
                self.mark(out, axis)
        elif isinstance(out, (tuple, list)) and holds_tensor(out):
            axes = self._propagated(func, args, kwargs, tensors, out)
            if isinstance(axes, tuple):
                axes = tuple([MIXED if axis is None else axis for axis in axes])
            else:
                axes = (axes,) * len(out)
            for t, axis in zip(out, axes, strict=True):
                if isinstance(t, Tensor):
                    self.mark(t, axis)

    def _propagated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], out: Any) -> Any:
        """Sample axis of ``out``: an axis, MIXED, CONSTANT; None for a constant without gradient."""
        sampled = constant_with_grad = mixed = unknown = False
        for t in tensors:
            axis = self.axis_of(t)
            if axis is None:
                constant_with_grad |= t.requires_grad
                self.doubt(t)
            elif axis >= 0:
                sampled = True
            elif axis == CONSTANT:
                constant_with_grad = True
            elif t.requires_grad:
                mixed = True
            else:
                unknown = True
        if mixed or (unknown and not sampled):
            return MIXED
        if sampled:
            found = propagate(func, args, kwargs, out, self.axis_or_none)
            if found is None and self.entangled is None:
                self.entangled = f"{name_of(func)} is not known to keep samples apart"
            return MIXED if found is None else found
        return CONSTANT if constant_with_grad else None

    def doubt(self, t: Tensor) -> None:
        """Note a constant that was not seen to be made."""
        if self._marked_axis(t, UNSEEN) == UNSEEN:
            self.foreign[id(t)] = t

    def _escapes(self, what: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        """Note what the model asks of tensors that the sample axis cannot tell."""
        if what == "random":
            self.random |= func not in DROPS or DROPS[func](args, kwargs)
        elif any(self.axis_of(t) not in (None, CONSTANT) for t in tensors):
            if what == "shape":
                self.counts = True
            elif self.entangled is None:
                self.entangled = f"{name_of(func)} gives Python a value that depends on samples"

    # -- marks

    def mark(self, t: Tensor, axis: int | None) -> None:
        """Note the sample axis of a tensor that the forward pass made; nothing is left on the tensor itself."""
        self.marks[id(t)] = (ref(t), axis, t.requires_grad)

    def marked(self, x: Tensor) -> Tensor:
        """A view of ``x`` whose first axis is known to be that of the samples."""
        x = x.view_as(x)
        self.mark(x, 0)
        return x

    def axis_of(self, t: Tensor) -> int | None:
        """The sample axis, MIXED or CONSTANT; None for a constant without gradient."""
        found = self.marks.get(id(t))
        if found is not None and found[0]() is t and found[2] == t.requires_grad:
            return found[1]
        # what has a gradient now and had none then was made where the mode cannot see it
        return MIXED if t.grad_fn is not None else None

    def axis_or_none(self, t: Tensor) -> int | None:
        """The sample axis if it is known."""
        axis = self.axis_of(t)
        return None if axis is None or axis < 0 else axis

    def _marked_axis(self, t: Tensor, default: int | None = None) -> int | None:
        found = self.marks.get(id(t))
        return found[1] if found is not None and found[0]() is t else default

    def _is_made(self, t: Tensor) -> bool:
        """Whether a tensor is known to be made in this forward pass; those of a transformation do not outlive it."""
        if _functorch.is_functorch_wrapped_tensor(t):
            return True
        if (base := t._base) is not None:
            t = base
        found = self.marks.get(id(t))
        return t.grad_fn is not None or (found is not None and found[0]() is t)
