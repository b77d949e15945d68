"""Known losses in disguise: losses of one's own that only move entries of the output before one that has a closed form.

Such are ``lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten())``, shifted tokens (``out[:, :-1]``) and positions
chosen by a mask. The loss is run once, watched operation by operation, with a note on what each axis consists of. If nothing
but moves (and scaling by numbers) lies between the output and one call of a known loss, whose value is returned, then with A
the moves and K the known loss L = K(A f, B y), so that the gradient is Aᵀ ∇K and the Hessian Aᵀ ∇²K A. What K sees are *rows*,
[R, C]: its Hessian has a block for each, and each belongs to one position of one sample. Any other operation that takes the
output, or something made of it, ends the proof. Nothing is remembered: each call looks again.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from curvfunc.losses.custom import autodiff_gradient
from curvfunc.losses.normal_form import CLOSED_FORMS, Loss, Root, normalize, tolerance, values_visible
from curvfunc.tensors.precision import at_least_float32

__all__ = ["Disguise", "unmasked"]


@dataclass(frozen=True)
class Disguise:
    """A known loss K of moved outputs.

    Attributes:
        loss: K.
        y: Its targets, one or C for each row.
        moved: The moves, from the output [N, ...] to rows [R, C].
        place: The position of each row in its sample, [R]; no two rows of a sample have the same.
        positions: The number P of positions.
    """

    loss: Loss
    y: Tensor
    moved: "_Moved"
    place: Tensor
    positions: int

    def back(self, out: Tensor, columns: Tensor) -> Tensor:
        """Aᵀ of columns [v, R, C]: [v, N, *out]."""
        rows, pullback = torch.func.vjp(self.moved, out.detach())  # type: ignore[misc]
        found: Tensor = torch.vmap(lambda c: pullback(c)[0])(columns.to(rows.dtype))
        return found

    def gradient(self, work: Tensor) -> Tensor:
        """That of the loss, [N, *out]."""
        return self.back(work, self._form.gradient(self.loss, self.moved(work), self.y)[None])[0]

    def root(self, work: Tensor, dtype: torch.dtype, fewest: bool) -> Root:
        """Columns (c, p) for each column c of K's root, at position p only, with p fastest."""
        rows, positions = self._form.root(self.loss, self.moved(work), self.y, work.dtype, fewest), self.positions

        def columns(start: int, stop: int) -> Tensor:
            first = start // positions
            column = torch.arange(start, stop, device=work.device)
            own = rows.columns(first, (stop - 1) // positions + 1)[column // positions - first]
            here = self.place == (column % positions).unsqueeze(1)
            return self.back(work, torch.where(here.unsqueeze(2), own, 0.0)).to(dtype)

        return Root(rows.num * positions, columns)

    def sampled(self, work: Tensor, mc_samples: int, generator: torch.Generator | None) -> Callable[[int, int], Tensor]:
        """Columns that are a root in expectation: rows have draws of their own."""
        columns = self._form.sampled(self.loss, self.moved(work), self.y, mc_samples, generator)
        return lambda start, stop: self.back(work, columns(start, stop))

    @property
    def _form(self) -> Any:
        assert self.loss.name is not None
        return CLOSED_FORMS[self.loss.name]


def unmasked(loss: Loss, out: Tensor, y: Any) -> Disguise | None:
    """What a loss without a name turns out to be; None for what is not proven, and where it could not be evaluated.

    Where values can be seen, the gradient is compared with that of autodiff, and what the loss does is looked at twice,
    since it must not depend on chance.

    Args:
        loss: The loss.
        out: Output of the model, [N, ...].
        y: Targets.
    """
    if loss.name is not None or not out.is_floating_point() or out.ndim < 2 or out.numel() == 0:
        return None
    disguise = _watched(loss, out, y)
    if disguise is None or not values_visible(out, y):
        return disguise
    again = _watched(loss, out, y)
    if again is None or not _same(disguise, again):
        return None
    truth = autodiff_gradient(loss, out.detach(), y)
    mine = disguise.gradient(at_least_float32(out.detach()))
    close = (mine - truth).abs().max() <= tolerance(disguise.moved.dtype) * truth.abs().max()
    return disguise if close else None


def _same(a: Disguise, b: Disguise) -> bool:
    """Whether two looks at a loss saw the same."""
    pairs = [(a.y, b.y), (a.place, b.place), *((t, b.loss.tensors.get(key)) for key, t in a.loss.tensors.items())]
    same = (a.loss.name, a.loss.options, a.loss.tensors.keys()) == (b.loss.name, b.loss.options, b.loss.tensors.keys())
    return same and all(s is not None and torch.equal(t, s) for t, s in pairs)


def _watched(loss: Loss, out: Tensor, y: Any) -> Disguise | None:
    out = out.detach().view_as(out)
    watch = _Watch(out)
    try:
        with torch.enable_grad(), watch:
            value = loss.fn(out, y, **dict(loss.options), **loss.tensors)
    except _UnknownError:
        return None
    except Exception:  # whoever evaluates the loss as it is will meet the same
        return None
    return watch.found if value is watch.value else None


# -- what each axis of a moved output consists of


@dataclass(frozen=True, eq=False)
class _Axis:
    """An axis that was there, the whole of it or what a slice or a mask has left.

    ``place`` is the position in the sample of each entry of an axis that runs over samples and positions, of which there are
    ``positions``; None for an axis of either samples or positions.
    """

    size: int
    samples: bool = False
    place: Tensor | None = None
    positions: int = 1


Axes = tuple[tuple[_Axis, ...], ...]  # each axis of a tensor is the product of such


@dataclass(frozen=True)
class _Moved:
    """A tensor that consists of entries of the output: what its axes are, and how it is had from the output."""

    axes: Axes
    dtype: torch.dtype  # the coarsest on the way
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    def __call__(self, out: Tensor) -> Tensor:
        for step in self.steps:
            out = step(out)
        return out


class _UnknownError(BaseException):
    """The loss does something else; no ``except Exception`` of its own is to catch this."""


def _either(*names: str) -> frozenset[Any]:
    """Functions and methods of these names, and what reads properties."""
    found = [getattr(owner, name) for owner in (Tensor, torch) for name in names if hasattr(owner, name)]
    return frozenset(getattr(f, "__get__", f) if inspect.isgetsetdescriptor(f) else f for f in found)


PERMUTED = _either("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT")
REGROUPED = _either("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel")
SAME = _either("contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type_as")
SCALED = _either("mul", "div", "multiply", "divide", "true_divide", "__mul__", "__rmul__", "__truediv__")
# none of these looks at values
READ = _either("shape", "dtype", "device", "ndim", "is_cuda", "layout", "size", "dim", "numel", "nelement", "is_floating_point")
READ |= _either(
    "__len__", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zeros_like", "ones_like", "full_like"
)
READ |= _either("is_contiguous", "get_device", "element_size", "stride", "ndimension", "is_complex", "full_like")


class _Watch(TorchFunctionMode):
    """Follows the output through a loss."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        axes = [(_Axis(size, samples=i == 0),) for i, size in enumerate(out.shape)]
        self.known: dict[int, tuple[Tensor, _Moved]] = {
            id(out): (out, _Moved(tuple(axes), out.dtype))
        }  # which keeps them alive
        self.found: Disguise | None = None
        self.value: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, and note what becomes of the output in it."""
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t is self.value for t in given):
            raise _UnknownError
        mine = [self.known[id(t)] for t in given if id(t) in self.known]
        if not mine or func in READ:
            return func(*args, **kwargs)
        if len(mine) > 1 or self.found is not None or not torch.is_grad_enabled():
            raise _UnknownError  # without graph in the forward pass of an autograd.Function, and where outputs are constants
        tensor, moved = mine[0]
        if func in _functions():
            return self._end(func, moved, args, kwargs)
        if not args or args[0] is not tensor:
            raise _UnknownError
        result = func(*args, **kwargs)
        axes = _after(func, moved.axes, args, kwargs, result)
        step = lambda t: func(t, *args[1:], **kwargs)
        dtype = max(moved.dtype, result.dtype, key=lambda d: torch.finfo(d).eps)
        self.known[id(result)] = result, _Moved(axes, dtype, (*moved.steps, step))
        return result

    def _end(self, func: Any, moved: _Moved, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The known loss."""
        named = _parameters(func).bind(*args, **kwargs).arguments
        (_, input), (_, target), *rest = named.items()
        known = normalize(functools.partial(func, **dict(rest)))
        if known.name is None or dict(known.options)["reduction"] not in ("mean", "sum") or id(input) not in self.known:
            raise _UnknownError
        CLOSED_FORMS[known.name].check(known, input, target)
        self.found = _rows(known, moved, input, target)
        self.value = torch.zeros((), dtype=input.dtype, device=input.device)  # in its place: it only has to be returned
        return self.value


def _functions() -> dict[Any, str]:
    return {form.function: name for name, form in CLOSED_FORMS.items() if name in ROWS}


@functools.cache
def _parameters(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _after(func: Any, axes: Axes, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Axes:
    """What the axes of a result consist of."""
    if not isinstance(result, Tensor) or not result.is_floating_point():
        raise _UnknownError
    if func not in SAME and any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):  # a view of the same bits
        raise _UnknownError
    if func in PERMUTED:  # as it moves axes of other sizes
        with _disable_current_modes():
            order = func(torch.empty([*range(len(axes))], device="meta"), *args[1:], **kwargs).shape
        return tuple(axes[i] for i in order)
    if func in REGROUPED:
        return _regrouped(axes, result.shape)
    if func in SAME:
        return axes
    if func in SCALED and len(args) == 2 and not kwargs and type(args[1]) in (int, float) and 0 < abs(args[1]) < math.inf:
        return axes
    if func == Tensor.__getitem__:
        return _indexed(axes, args[1], result.shape)
    raise _UnknownError


def _regrouped(axes: Axes, shape: Sequence[int]) -> Axes:
    """Axes merged and taken apart where they were merged, in their order."""
    left = [a for axis in axes for a in axis]
    made = []
    for size in shape:
        mine, product = [], 1
        while product != size:
            if not left or product > size:
                raise _UnknownError
            mine.append(left.pop(0))
            product *= mine[-1].size
        made.append(tuple(mine))
    return tuple(made)


def _indexed(axes: Axes, key: Any, shape: Sequence[int]) -> Axes:
    """Slices and integers on any axes but that of the samples, or one mask."""
    keys = list(key) if isinstance(key, tuple) else [key]
    masks = [k for k in keys if isinstance(k, Tensor)]
    taken = sum(k.ndim if isinstance(k, Tensor) else k is not None and k is not Ellipsis for k in keys)
    whole = [slice(None)] * (len(axes) - taken)
    if Ellipsis in [k for k in keys if not isinstance(k, Tensor)]:
        i = next(i for i, k in enumerate(keys) if k is Ellipsis)
        keys[i : i + 1] = whole
    else:
        keys += whole
    if len(masks) > 1 or (masks and any(k is not None and k != slice(None) for k in keys if not isinstance(k, Tensor))):
        raise _UnknownError
    before = list(axes)
    made: list[tuple[_Axis, ...]] = []
    for k in keys:
        if k is None:
            made.append(())
        elif isinstance(k, Tensor):
            if k.dtype != torch.bool or k.ndim == 0:
                raise _UnknownError
            chosen, before = before[: k.ndim], before[k.ndim :]
            made.append(_chosen([a for axis in chosen for a in axis], k, shape[len(made)]))
        elif isinstance(k, slice):
            axis = before.pop(0)
            if shape[len(made)] != math.prod(a.size for a in axis) or k.step not in (None, 1):
                axis = _shortened(axis, shape[len(made)])
            made.append(axis)
        elif isinstance(k, int | torch.SymInt) and not isinstance(k, bool):
            _shortened(before.pop(0), 1)
        else:
            raise _UnknownError
    return tuple(made)


def _shortened(axis: tuple[_Axis, ...], size: int) -> tuple[_Axis, ...]:
    """What a slice leaves of positions; of samples, all have to be there."""
    if any(_holds_samples(a) for a in axis):
        raise _UnknownError
    return (_Axis(size),)


def _chosen(axes: list[_Axis], mask: Tensor, size: int) -> tuple[_Axis, ...]:
    """What a mask leaves."""
    if not any(_holds_samples(a) for a in axes):
        return (_Axis(size),)
    place, positions = _places(axes, mask.device)
    return (_Axis(size, True, place.reshape(mask.shape)[mask], positions),)


def _holds_samples(axis: _Axis) -> bool:
    """Whether different samples are along the axis."""
    return axis.samples and (axis.size != 1 or axis.place is not None)


def _places(axes: Sequence[_Axis], device: torch.device) -> tuple[Tensor, int]:
    """The position of each entry in its sample, over these axes one after another, and how many there may be."""
    place, positions = torch.zeros((), dtype=torch.int64, device=device), 1
    for a in axes:
        own = a.place
        if own is None:
            own = torch.zeros(a.size, dtype=torch.int64, device=device)
            own = own if a.samples else torch.arange(a.size, device=device)
        place = place.unsqueeze(-1) + own * positions
        positions *= a.positions if a.place is not None else 1 if a.samples else a.size
    return place.reshape(-1), positions


# -- the rows that known losses see


def _rows(loss: Loss, moved: _Moved, input: Tensor, target: Tensor) -> Disguise:
    """A known loss on ``input`` as one on rows."""
    assert loss.name is not None
    step, y, tensors, classes = ROWS[loss.name](loss, input, target)
    axes = [axis for i, axis in enumerate(moved.axes) if i != classes]
    if classes is not None and any(_holds_samples(a) for a in moved.axes[classes]):
        raise _UnknownError
    place, positions = _places([a for axis in axes for a in axis], input.device)
    return Disguise(replace(loss, tensors=tensors), y, replace(moved, steps=(*moved.steps, step)), place, positions)


def _rows_of_classes(loss: Loss, input: Tensor, target: Tensor) -> Any:
    """Positions by classes; axis 1 of the input has the classes."""
    step = lambda t: t.movedim(1, -1).reshape(-1, t.shape[1])
    return step, step(target) if target.is_floating_point() else target.reshape(-1), loss.tensors, 1


def _rows_of_entries(loss: Loss, input: Tensor, target: Tensor) -> Any:
    """Entries, each a row."""
    step = lambda t: t.reshape(-1, 1)
    return step, step(target), {key: step(t.expand(input.shape)) for key, t in loss.tensors.items()}, None


ROWS: dict[str, Callable[[Loss, Tensor, Tensor], Any]] = {
    "cross_entropy": _rows_of_classes,
    "mse_loss": _rows_of_entries,
    "bce_with_logits": _rows_of_entries,
}
