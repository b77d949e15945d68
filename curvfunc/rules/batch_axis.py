"""Proof of the sample axis: which axis of an intermediate tensor enumerates the samples.

A model runs once on the whole batch. Axis ``a`` of a tensor is its *sample axis* if entry ``n`` along ``a`` depends on
sample ``n`` of the input only. Sizes cannot tell (a sequence may be as long as the batch), so the axis is carried from
the input through every operation by a table: ``RULES[func]`` is a function of the call that returns the axis of its
result.

The table is sound, not complete. A rule answers ``None`` wherever it cannot prove the axis, and so does an operation
that has no rule. Most of the table is lists of names under one of three rules:

- *elementwise*: operands broadcast from the right, so a sample axis is compared and returned as a negative index;
- *kept*: the operation works within other axes (a linear layer, a softmax, a split) and the axis stays where it is;
- *reduced*: other axes disappear, and the axis moves to the left by those that were in front of it.

Throughout, ``n`` is the number of samples, and every rule verifies that the result has size ``n`` along the axis it
claims: a sample axis of size 1 that broadcasts against a constant of size 5 is thereby lost. Arguments without a sample
axis are constants; whatever their sizes, they bring no dependence on a sample with them.

The table is in `curvfunc.rules.axis_table`, and the rules of operations that fit none of the three in
`curvfunc.rules.axis_rules`. To add an operation, add its name to one of the lists of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

Args = Sequence[Any]
Kwargs = dict[str, Any]
AxisOf = Callable[[Tensor], "int | None"]
Axes = int | tuple[int | None, ...] | None
Rule = Callable[[Args, Kwargs, Any, AxisOf], Axes]
Check = Callable[[int, Tensor, Args, Kwargs], bool]

RULES: dict[Any, Rule] = {}


# The methods behind operators that write into their first operand.
WRITING = """
    __iadd__ __iand__ __idiv__ __ifloordiv__ __ilshift__ __imod__ __imul__ __ior__ __ipow__ __irshift__ __isub__
    __itruediv__ __ixor__"""
WRITING_DUNDERS = {*WRITING.split(), "__imatmul__", "__setitem__", "__delitem__", "__set__", "__setstate__"}
_HARMLESS = {Tensor.requires_grad_, Tensor.detach_}


def propagate(func: Any, args: Args, kwargs: Kwargs | None, out: Any, axis_of: AxisOf) -> Axes:
    """The sample axis of the result of one call.

    Args:
        func: The operation, as a ``TorchFunctionMode`` receives it.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: What the call returned; for an operation in place, its first argument.
        axis_of: Maps a tensor argument to its sample axis, or to ``None`` if it is a constant. At least one argument
            has a sample axis.

    Returns:
        The axis (counted from the front); for a tuple of tensors a tuple with one axis, or ``None``, for each; ``None``
        if nothing is proven. For an operation in place ``None`` says that the destination, and what shares memory with
        it, has lost its proof.
    """
    rule = RULES.get(func)
    return None if rule is None else rule(args, kwargs or {}, out, axis_of)


def mutates(func: Any) -> bool:
    """Whether ``func`` writes into an argument (``out=`` and ``inplace=True`` aside, which the name does not show)."""
    schema = getattr(func, "_schema", None)
    if schema is not None:  # torch.ops.namespace.name.overload
        return bool(schema.is_mutable)
    name = getattr(func, "__name__", "")
    if not name.endswith("_") or func in _HARMLESS:
        return False
    return not name.startswith("__") or name in WRITING_DUNDERS


# ---------------------------------------------------------------------------------------------------- reading a call


def argument(args: Args, kwargs: Kwargs, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or name; torch accepts ``axis`` wherever it has ``dim``."""
    if len(args) > position:
        return args[position]
    if name == "dim" and "axis" in kwargs:
        return kwargs["axis"]
    return kwargs.get(name, default)


def dimensions(value: Any, ndim: int) -> tuple[int, ...]:
    """Dimensions counted from the front; all of them if ``value`` is none, is empty, or is not made of plain integers.

    ``var(x, True)`` passes no dimension but ``unbiased``, hence ``type`` and not ``isinstance``.
    """
    values = (value,) if type(value) is int else value
    if isinstance(values, tuple | list) and values and all(type(d) is int for d in values):
        return tuple(d % ndim for d in values)
    return tuple(range(ndim))


def varargs(args: Args, kwargs: Kwargs, name: str) -> Any:
    """``x.permute(0, 2, 1)``, ``x.permute((0, 2, 1))`` and ``x.permute(dims=(0, 2, 1))``."""
    if len(args) < 2:
        return kwargs.get(name)
    return args[1] if isinstance(args[1], tuple | list) else tuple(args[1:])


def any_tagged(values: Iterable[Any], axis_of: AxisOf) -> bool:
    """Whether a tensor among ``values``, or in a list among them, has a sample axis."""
    for value in values:
        if isinstance(value, Tensor):
            if axis_of(value) is not None:
                return True
        elif isinstance(value, tuple | list) and any_tagged(value, axis_of):
            return True
    return False


def single(args: Args, kwargs: Kwargs, axis_of: AxisOf) -> tuple[Tensor, int] | None:
    """The first argument and its sample axis, if it has one and nothing else has."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or (axis := axis_of(x)) is None or any_tagged(args[1:], axis_of):
        return None
    if kwargs and any_tagged((v for k, v in kwargs.items() if args or k != "input"), axis_of):
        return None
    return x, axis


def kept(out: Any, axis: int, n: int) -> Axes:
    """``axis``, for every tensor of ``out`` that has size ``n`` there."""
    if isinstance(out, tuple | list):
        return tuple(_kept_one(o, axis, n) for o in out)
    return _kept_one(out, axis, n)


def _kept_one(out: Any, axis: int, n: int) -> int | None:
    return axis if isinstance(out, Tensor) and 0 <= axis < out.ndim and out.shape[axis] == n else None


# ------------------------------------------------------------------------------------------------ the three main rules


def aligned(tensors: Iterable[Any], axis_of: AxisOf) -> tuple[int, int] | None:
    """The negative index that the sample axes of all ``tensors`` share, and n."""
    shared = n = None
    for t in tensors:
        if isinstance(t, Tensor) and (axis := axis_of(t)) is not None:
            size = t.shape[axis]
            axis -= t.ndim
            if shared is None:
                shared, n = axis, size
            elif shared != axis or n != size:
                return None
    return None if shared is None or n is None else (shared, n)


def elementwise(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """An element of the result depends on the elements of the operands that broadcasting brings to its place."""
    found = aligned((*args, *kwargs.values()) if kwargs else args, axis_of)
    if found is None or not isinstance(out, Tensor):  # torch.where(condition) is a tuple: the places of the non-zeros
        return None
    return kept(out, found[0] + out.ndim, found[1])


def in_place(rule: Rule) -> Rule:
    """``rule`` for a destination that has the axis already.

    A constant destination may share memory with other constants, which would silently cease to be constant.
    """

    def in_place(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        if not args or (axis := axis_of(args[0])) is None:
            return None
        return axis if rule(args, kwargs, args[0], axis_of) == axis else None

    return in_place


def keep(check: Check) -> Rule:
    """The axis stays where it is if the call passes ``check``, and all but the first argument are constants."""

    def keep(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        found = single(args, kwargs, axis_of)
        if found is None or not check(found[1], found[0], args, kwargs):
            return None
        x, axis = found
        return kept(out, axis, x.shape[axis])

    return keep


def along(position: int, default: Any = None, name: str = "dim") -> Rule:
    """The operation works along the dimensions in argument ``name`` and leaves the others alone."""
    return keep(lambda axis, x, args, kw: axis not in dimensions(argument(args, kw, position, name, default), x.ndim))


def trailing(count: int) -> Rule:
    """The operation works within the last ``count`` dimensions."""
    return keep(lambda axis, x, args, kw: axis < x.ndim - count)


def batched(ndim: int) -> Rule:
    """The operation takes its samples along axis 0 of an input with ``ndim`` dimensions."""
    return keep(lambda axis, x, args, kw: axis == 0 and x.ndim == ndim)


def reduce(position: int, default: Any = None) -> Rule:
    """Other dimensions are reduced to size 1, or removed: whether ``keepdim`` was given shows in the result."""

    def reduce(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        found = single(args, kwargs, axis_of)
        if found is None:
            return None
        x, axis = found
        dims = dimensions(argument(args, kwargs, position, "dim", default), x.ndim)
        first = out[0] if isinstance(out, tuple | list) and out else out
        if axis in dims or not isinstance(first, Tensor):
            return None
        moved = axis if first.ndim == x.ndim else axis - sum(d < axis for d in dims)
        return kept(out, moved, x.shape[axis])

    return reduce


# -------------------------------------------------------------------------------------------------------------- shapes


def samples_first(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """An operation that is declared to keep samples apart, as the first axis of its inputs and outputs."""
    found = {axis_of(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)} - {None}
    return (0 if isinstance(out, Tensor) else (0,) * len(out)) if found == {0} else None


def of_self(move: Callable[[int, Tensor, Tensor, Args, Kwargs], int | None]) -> Rule:
    """A rearrangement of the first argument; other tensors (``view_as``, ``type_as``) give a shape or type, no value.

    A constant first argument has no claim: its result may share its memory.
    """

    def rearrange(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not isinstance(out, Tensor) or (axis := axis_of(x)) is None:
            return None
        moved = move(axis, x, out, args, kwargs)
        return None if moved is None else kept(out, moved, x.shape[axis])

    return rearrange
