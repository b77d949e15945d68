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

To add an operation, add its name to one of the lists at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Args = Sequence[Any]
Kwargs = dict[str, Any]
AxisOf = Callable[[Tensor], "int | None"]
Axes = int | tuple[int | None, ...] | None
Rule = Callable[[Args, Kwargs, Any, AxisOf], Axes]
Check = Callable[[int, Tensor, Args, Kwargs], bool]

RULES: dict[Any, Rule] = {}


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
    return not name.startswith("__") or name in _WRITING_DUNDERS


# ---------------------------------------------------------------------------------------------------- reading a call


def _get(args: Args, kwargs: Kwargs, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or name; torch accepts ``axis`` wherever it has ``dim``."""
    if len(args) > position:
        return args[position]
    if name == "dim" and "axis" in kwargs:
        return kwargs["axis"]
    return kwargs.get(name, default)


def _dims(value: Any, ndim: int) -> tuple[int, ...]:
    """Dimensions counted from the front; all of them if ``value`` is none, is empty, or is not made of plain integers.

    ``var(x, True)`` passes no dimension but ``unbiased``, hence ``type`` and not ``isinstance``.
    """
    values = (value,) if type(value) is int else value
    if isinstance(values, tuple | list) and values and all(type(d) is int for d in values):
        return tuple(d % ndim for d in values)
    return tuple(range(ndim))


def _varargs(args: Args, kwargs: Kwargs, name: str) -> Any:
    """``x.permute(0, 2, 1)``, ``x.permute((0, 2, 1))`` and ``x.permute(dims=(0, 2, 1))``."""
    if len(args) < 2:
        return kwargs.get(name)
    return args[1] if isinstance(args[1], tuple | list) else tuple(args[1:])


def _any_tagged(values: Iterable[Any], axis_of: AxisOf) -> bool:
    """Whether a tensor among ``values``, or in a list among them, has a sample axis."""
    for value in values:
        if isinstance(value, Tensor):
            if axis_of(value) is not None:
                return True
        elif isinstance(value, tuple | list) and _any_tagged(value, axis_of):
            return True
    return False


def _single(args: Args, kwargs: Kwargs, axis_of: AxisOf) -> tuple[Tensor, int] | None:
    """The first argument and its sample axis, if it has one and nothing else has."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or (axis := axis_of(x)) is None or _any_tagged(args[1:], axis_of):
        return None
    if kwargs and _any_tagged((v for k, v in kwargs.items() if args or k != "input"), axis_of):
        return None
    return x, axis


def _kept(out: Any, axis: int, n: int) -> Axes:
    """``axis``, for every tensor of ``out`` that has size ``n`` there."""
    if isinstance(out, tuple | list):
        return tuple(_kept_one(o, axis, n) for o in out)
    return _kept_one(out, axis, n)


def _kept_one(out: Any, axis: int, n: int) -> int | None:
    return axis if isinstance(out, Tensor) and 0 <= axis < out.ndim and out.shape[axis] == n else None


# ------------------------------------------------------------------------------------------------ the three main rules


def _aligned(tensors: Iterable[Any], axis_of: AxisOf) -> tuple[int, int] | None:
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


def _elementwise(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """An element of the result depends on the elements of the operands that broadcasting brings to its place."""
    found = _aligned((*args, *kwargs.values()) if kwargs else args, axis_of)
    if found is None or not isinstance(out, Tensor):  # torch.where(condition) is a tuple: the places of the non-zeros
        return None
    return _kept(out, found[0] + out.ndim, found[1])


def _in_place(rule: Rule) -> Rule:
    """``rule`` for a destination that has the axis already.

    A constant destination may share memory with other constants, which would silently cease to be constant.
    """

    def in_place(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        if not args or (axis := axis_of(args[0])) is None:
            return None
        return axis if rule(args, kwargs, args[0], axis_of) == axis else None

    return in_place


def _keep(check: Check) -> Rule:
    """The axis stays where it is if the call passes ``check``, and all but the first argument are constants."""

    def keep(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        found = _single(args, kwargs, axis_of)
        if found is None or not check(found[1], found[0], args, kwargs):
            return None
        x, axis = found
        return _kept(out, axis, x.shape[axis])

    return keep


def _along(position: int, default: Any = None, name: str = "dim") -> Rule:
    """The operation works along the dimensions in argument ``name`` and leaves the others alone."""
    return _keep(lambda axis, x, args, kw: axis not in _dims(_get(args, kw, position, name, default), x.ndim))


def _trailing(count: int) -> Rule:
    """The operation works within the last ``count`` dimensions."""
    return _keep(lambda axis, x, args, kw: axis < x.ndim - count)


def _batched(ndim: int) -> Rule:
    """The operation takes its samples along axis 0 of an input with ``ndim`` dimensions."""
    return _keep(lambda axis, x, args, kw: axis == 0 and x.ndim == ndim)


def _reduce(position: int, default: Any = None) -> Rule:
    """Other dimensions are reduced to size 1, or removed: whether ``keepdim`` was given shows in the result."""

    def reduce(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        found = _single(args, kwargs, axis_of)
        if found is None:
            return None
        x, axis = found
        dims = _dims(_get(args, kwargs, position, "dim", default), x.ndim)
        first = out[0] if isinstance(out, tuple | list) and out else out
        if axis in dims or not isinstance(first, Tensor):
            return None
        moved = axis if first.ndim == x.ndim else axis - sum(d < axis for d in dims)
        return _kept(out, moved, x.shape[axis])

    return reduce


# -------------------------------------------------------------------------------------------------------------- shapes


def samples_first(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """An operation that is declared to keep samples apart, as the first axis of its inputs and outputs."""
    found = {axis_of(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)} - {None}
    return (0 if isinstance(out, Tensor) else (0,) * len(out)) if found == {0} else None


def _of_self(move: Callable[[int, Tensor, Tensor, Args, Kwargs], int | None]) -> Rule:
    """A rearrangement of the first argument; other tensors (``view_as``, ``type_as``) give a shape or type, no value.

    A constant first argument has no claim: its result may share its memory.
    """

    def rearrange(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not isinstance(out, Tensor) or (axis := axis_of(x)) is None:
            return None
        moved = move(axis, x, out, args, kwargs)
        return None if moved is None else _kept(out, moved, x.shape[axis])

    return rearrange


def _reshape(axis: int, x: Tensor, out: Tensor, args: Args, kwargs: Kwargs) -> int | None:
    """Axis b of the result with as many elements in front of it as ``axis`` has, and of the same size n.

    Both shapes number the elements alike, as (before, sample, after). For n > 1 there is at most one such b; for n = 1
    there may be several, all of them right, and the one nearest to the old place is taken.
    """
    old, new = x.shape, out.shape
    if axis == 0 and new and new[0] == old[0] and old[0] != 0:
        return 0
    before, n, size = prod(old[:axis]), old[axis], x.numel()
    if size == 0 or size != out.numel():
        return None
    matches = [b for b in range(len(new)) if new[b] == n and prod(new[:b]) == before]
    return min(matches, key=lambda b: abs(b - axis), default=None)


def _unsqueeze(axis: int, x: Tensor, out: Tensor, args: Args, kwargs: Kwargs) -> int | None:
    dim = _get(args, kwargs, 1, "dim")
    return axis + (dim % out.ndim <= axis) if type(dim) is int else None


def _permute(axis: int, x: Tensor, out: Tensor, args: Args, kwargs: Kwargs) -> int | None:
    dims = _dims(_varargs(args, kwargs, "dims"), x.ndim)
    return dims.index(axis) if len(set(dims)) == x.ndim and _varargs(args, kwargs, "dims") else None


def _swap(first: str, second: str) -> Rule:
    def swap(axis: int, x: Tensor, out: Tensor, args: Args, kwargs: Kwargs) -> int | None:
        pair = (_get(args, kwargs, 1, first), _get(args, kwargs, 2, second))
        if not all(type(d) is int for d in pair):
            return None
        i, j = _dims(pair, x.ndim)
        return j if axis == i else i if axis == j else axis

    return _of_self(swap)


def _movedim(axis: int, x: Tensor, out: Tensor, args: Args, kwargs: Kwargs) -> int | None:
    source, target = (_get(args, kwargs, 1, "source"), _get(args, kwargs, 2, "destination"))
    if source is None or target is None:
        return None
    source, target = _dims(source, x.ndim), _dims(target, x.ndim)
    if axis in source:
        return target[source.index(axis)]
    rest = (d for d in range(x.ndim) if d not in source)  # they fill the places left over, in order
    return dict(zip(rest, (d for d in range(x.ndim) if d not in target), strict=True))[axis]


def _layout(x: Tensor, axis: int | None, index: Any) -> list[Any] | None:
    """What stands at each dimension of ``x[index]``: a dimension of x, "index", or ``None``. ``None`` if in doubt.

    Several index tensors must be neighbours, or their dimensions move to the front. Sample axis ``axis`` stands only
    where all of it was taken.
    """
    items = index if isinstance(index, tuple) else (index,)
    hidden = x.ndim - sum(item is not None and item is not Ellipsis for item in items)
    labels: list[Any] = []
    dim, start, width, has_int, previous = 0, -1, 0, False, False
    for item in items:
        advanced = False
        if item is None:
            labels.append(None)
        elif item is Ellipsis:
            labels.extend(range(dim, dim + hidden))
            dim += hidden
        elif type(item) is slice:
            labels.append(dim if dim != axis or _is_full(item, x.shape[dim]) else None)
            dim += 1
        elif type(item) is int:
            dim, has_int = dim + 1, True
        else:
            if isinstance(item, Tensor) and item.dtype in (torch.int64, torch.int32):
                width = max(width, item.ndim)
            elif isinstance(item, list) and item and all(type(i) is int for i in item):
                width = max(width, 1)
            else:  # a mask, whose size depends on its values, or something unknown
                return None
            if start >= 0 and not previous:
                return None
            start, dim, advanced = (len(labels) if start < 0 else start), dim + 1, True
        previous = advanced
    if start >= 0:
        if has_int:
            return None
        labels[start:start] = ["index"] * width
    return labels + list(range(dim, x.ndim))


def _is_full(item: slice, n: int) -> bool:
    plain = all(p is None or type(p) is int for p in (item.start, item.stop, item.step))
    return plain and item.indices(n) == (0, n, 1)


def _getitem(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    x, index = args
    axis = axis_of(x)
    labels = _layout(x, axis, index)
    if labels is None or not isinstance(out, Tensor) or len(labels) != out.ndim:
        return None
    if axis is not None:
        constant = not _any_tagged((index,), axis_of)
        return _kept(out, labels.index(axis), x.shape[axis]) if constant and axis in labels else None
    lookup = [i for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, Tensor | list)]
    if len(lookup) != 1 or not isinstance(lookup[0], Tensor) or (axis := axis_of(lookup[0])) is None:
        return None
    return _kept(out, labels.index("index") + axis, lookup[0].shape[axis])


def _setitem(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    x, index, value = args
    axis = axis_of(x)
    if axis is None:
        return None
    value_axis = axis_of(value) if isinstance(value, Tensor) else None
    if _any_tagged((index,), axis_of):  # x[mask] = number is masked_fill_
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and axis_of(index) == axis
        return axis if is_mask and isinstance(value, int | float) else None
    if value_axis is None:  # constants may go anywhere
        return axis
    labels = _layout(x, axis, index)
    if labels is None or axis not in labels or value.shape[value_axis] != x.shape[axis]:
        return None
    return axis if labels.index(axis) - len(labels) == value_axis - value.ndim else None


def _join(new_dim: bool) -> Rule:
    """``cat`` or ``stack`` of tensors with one sample axis, and of constants that have one entry per sample."""

    def join(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        tensors = args[0] if args else kwargs.get("tensors")
        dim = _get(args, kwargs, 1, "dim", 0)
        if not isinstance(tensors, tuple | list) or type(dim) is not int:
            return None
        found = _aligned(tensors, axis_of)
        if found is None or any(t.ndim != tensors[-1].ndim for t in tensors):
            return None
        if any(t.shape[found[0]] != found[1] for t in tensors):
            return None
        dim, axis = dim % out.ndim, found[0] + tensors[-1].ndim
        if new_dim:
            return _kept(out, axis + (dim <= axis), found[1])
        return None if dim == axis else _kept(out, axis, found[1])

    return join


def _gather(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """out[.., j, ..] = x[.., index[.., j, ..], ..]; with dim != axis both stay within their sample."""
    return _within(args, kwargs, ("input", "index"), out, axis_of)


def _scatter(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """The reverse of ``gather``: out[.., index[.., j, ..], ..] = source[.., j, ..]."""
    return _within(args, kwargs, ("input", "index", "src"), out, axis_of)


def _within(args: Args, kwargs: Kwargs, names: Sequence[str], out: Tensor, axis_of: AxisOf) -> Axes:
    """Tensors of one number of dimensions that correspond element by element but for dimension ``dim``."""
    dim = _get(args, kwargs, 1, "dim")
    tensors = [t for k, name in enumerate(names) if isinstance(t := _get(args, kwargs, k + (k > 0), name), Tensor)]
    found = _aligned(tensors, axis_of)
    if found is None or type(dim) is not int or any(t.ndim != out.ndim for t in tensors):
        return None
    axis = found[0] + out.ndim
    return None if axis == dim % out.ndim else _kept(out, axis, found[1])


# ------------------------------------------------------------------------------------------- products of two operands


def _product_axis(a: Tensor, b: Tensor, axis_of: AxisOf) -> tuple[int, int] | None:
    """Negative index of the sample axis in ``a @ b`` (a batch dimension, the rows of a, or the columns of b), and n."""
    ka, kb = axis_of(a), axis_of(b)
    if ka is None and kb is None:
        return None
    if kb is None:
        ka, n = ka - a.ndim, a.shape[ka]  # type: ignore[operator]
        return None if ka == -1 else (ka + (b.ndim == 1), n)  # against a vector the last dimension disappears
    n = b.shape[kb]
    kb -= b.ndim
    if ka is None:
        if b.ndim == 1 or kb == -2:
            return None
        return (kb + (a.ndim == 1 and kb < -2), n)
    return (kb, n) if ka - a.ndim == kb < -2 and a.shape[ka] == n else None


def _matmul(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    operands = (*args, *(kwargs[k] for k in ("input", "other", "mat2", "vec") if k in kwargs))
    if len(operands) != 2:
        return None
    found = _product_axis(operands[0], operands[1], axis_of)
    return None if found is None else _kept(out, found[0] + out.ndim, found[1])


def _rmatmul(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    return _matmul(args[::-1], kwargs, out, axis_of)


def _addmm(first: str, second: str) -> Rule:
    """``beta * bias + alpha * (a @ b)``, the bias broadcast."""

    def addmm(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        a, b = _get(args, kwargs, 1, first), _get(args, kwargs, 2, second)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return None
        product, bias = _product_axis(a, b, axis_of), _aligned([_get(args, kwargs, 0, "input")], axis_of)
        known = axis_of(a) is None and axis_of(b) is None
        if (product is None and not known) or (None not in (product, bias) and product != bias):
            return None
        found = product or bias
        return None if found is None else _kept(out, found[0] + out.ndim, found[1])

    return addmm


def _einsum(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """The letter of the sample axis must be one for all operands and stand in the result."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
    if not args or not isinstance(args[0], str) or "->" not in args[0]:
        return None
    left, right = args[0].replace(" ", "").split("->")
    labels: set[Any] = set()
    n = 0
    for term, x in zip(left.split(","), operands, strict=True):
        if (axis := axis_of(x)) is not None:
            labels.add(_spell(term, x.ndim)[axis])
            n = x.shape[axis]
    spelled = _spell(right, out.ndim)
    if len(labels) != 1 or (label := labels.pop()) not in spelled:
        return None
    return _kept(out, spelled.index(label), n)


def _spell(term: str, ndim: int) -> list[Any]:
    """The letters of an einsum term; what an ellipsis stands for is numbered from its right end, where it aligns."""
    before, dots, after = term.partition("...")
    hidden = ndim - len(before) - len(after) if dots else 0
    return [*before, *range(-hidden, 0), *after]


def _distance(position: int, default: int) -> Rule:
    """Two operands broadcast, then one dimension is reduced."""

    def distance(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        pair = (*args[:2], *(kwargs[k] for k in ("x1", "x2") if k in kwargs))
        found, dim = _aligned(pair, axis_of), _get(args, kwargs, position, "dim", default)
        ndim = max(t.ndim for t in pair)
        if found is None or type(dim) is not int or len(pair) != 2:
            return None
        axis, dim = found[0] + ndim, dim % ndim
        return None if axis == dim else _kept(out, axis - (dim < axis and out.ndim < ndim), found[1])

    return distance


def _bilinear(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    found = _aligned(args[:2], axis_of)
    if found is None or found[0] == -1 or _any_tagged((*args[2:], *kwargs.values()), axis_of):
        return None
    return _kept(out, found[0] + out.ndim, found[1])


# --------------------------------------------------------------------------------------------------- particular layers


def _attention(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """softmax(q k^T + mask) v with everything, the mask included, broadcast in front of the last two dimensions."""
    found = _aligned((*args, *kwargs.values()), axis_of)
    heads = bool(_get(args, kwargs, 7, "enable_gqa", False))  # then dimension -3 of q and k differ in size
    if found is None or found[0] > -3 - heads:
        return None
    return _kept(out, found[0] + out.ndim, found[1])


def _padding(axis: int, x: Tensor, args: Args, kwargs: Kwargs) -> bool:
    """``pad`` lists (before, after) from the last dimension on; (1, -1) would shift the samples."""
    pad = _get(args, kwargs, 1, "pad")
    return isinstance(pad, tuple | list) and not any(pad[2 * (x.ndim - 1 - axis) :][:2])


def _frozen_statistics(axis: int, x: Tensor, args: Args, kwargs: Kwargs) -> bool:
    return axis == 0 and _get(args, kwargs, 5, "training", False) is False


def _plain_lookup(args: Args, kwargs: Kwargs) -> bool:
    """``max_norm`` rewrites the rows that the batch uses, and counting their use in the batch mixes samples."""
    counts = kwargs.get("scale_grad_by_freq", any(a is True for a in args))
    return _get(args, kwargs, 3, "max_norm") is None and not counts


def _normalized(axis: int, x: Tensor, args: Args, kwargs: Kwargs) -> bool:
    shape = _get(args, kwargs, 1, "normalized_shape")
    return isinstance(shape, tuple | list) and axis < x.ndim - len(shape)


def _extremum(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """``max(x, other)`` is elementwise, ``max(x, dim)`` a reduction."""
    pairwise = isinstance(_get(args, kwargs, 1, "other"), Tensor)
    return (_elementwise if pairwise else _REDUCE_1)(args, kwargs, out, axis_of)


def _fresh(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """``x.new_zeros(n, 3)``: no dependence at all, so any axis of size n holds; models put samples first."""
    found = _single(args, kwargs, axis_of)
    if found is None or not isinstance(out, Tensor):
        return None
    n = found[0].shape[found[1]]
    return next((axis for axis, size in enumerate(out.shape) if size == n), None)


_REDUCE_1 = _reduce(1)

# ----------------------------------------------------------------------------------------------------------- the table


def _register(rule: Rule, names: str, *spaces: Any) -> None:
    """Enter ``rule`` for each of ``names`` in each namespace that has it."""
    for space in spaces or (torch, Tensor, F, torch.special, torch.linalg):
        for name in names.split():
            func = getattr(space, name, None)
            if callable(func):  # torch.float is a dtype
                RULES[func] = rule


def _underscored(names: str) -> str:
    return " ".join(name + "_" for name in names.split())


_ELEMENTWISE = """
    abs absolute acos acosh arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh ceil conj conj_physical
    cos cosh deg2rad digamma entr erf erfc erfcx erfinv exp exp2 expit expm1 fix floor frac gammaln i0 i0e i1 i1e
    isfinite isinf isnan isneginf isposinf lgamma log log10 log1p log2 log_ndtr logit multigammaln mvlgamma nan_to_num
    ndtr ndtri neg negative polygamma positive psi rad2deg reciprocal resolve_conj resolve_neg round rsqrt sgn sigmoid
    sign signbit sin sinc sinh sqrt square tan tanh trunc bernoulli
    add addcdiv addcmul arctan2 atan2 clamp clamp_max clamp_min clip copysign div divide eq float_power floor_divide
    fmax fmin fmod ge greater greater_equal gt heaviside hypot isclose ldexp le lerp less less_equal logaddexp
    logaddexp2 lt masked_fill maximum minimum mul multiply ne nextafter not_equal pow remainder rsub sub subtract
    true_divide where xlog1py xlogy zeta complex polar
    bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor logical_and logical_not
    logical_or logical_xor
    celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 rrelu selu silu
    softplus softshrink softsign tanhshrink threshold
    __abs__ __add__ __and__ __div__ __eq__ __floordiv__ __ge__ __gt__ __invert__ __le__ __lshift__ __lt__ __mod__
    __mul__ __ne__ __neg__ __or__ __pos__ __pow__ __radd__ __rand__ __rdiv__ __rfloordiv__ __rlshift__ __rmod__
    __rmul__ __ror__ __rpow__ __rrshift__ __rshift__ __rsub__ __rtruediv__ __rxor__ __sub__ __truediv__ __xor__"""
_WRITING = """
    __iadd__ __iand__ __idiv__ __ifloordiv__ __ilshift__ __imod__ __imul__ __ior__ __ipow__ __irshift__ __isub__
    __itruediv__ __ixor__"""
_WRITING_DUNDERS = {*_WRITING.split(), "__imatmul__", "__setitem__", "__delitem__", "__set__", "__setstate__"}
_DROPOUT = "alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout feature_dropout"
_HARMLESS = {Tensor.requires_grad_, Tensor.detach_}

_unary = _of_self(lambda axis, x, out, args, kw: axis)
_aligned_self = _of_self(lambda axis, x, out, args, kw: axis - x.ndim + out.ndim)  # expand, repeat


def _expand_as(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """As ``expand``; a constant that is repeated along the sample axis of the other has it, each sample the same."""
    x, other = args[0], args[1] if len(args) > 1 else kwargs["other"]
    if axis_of(x) is not None or (axis := axis_of(other)) is None:
        return _aligned_self(args, kwargs, out, axis_of)
    inner = axis - out.ndim  # counted from the right, as shapes are broadcast
    repeated = -inner > x.ndim or (x.shape[inner] == 1 and out.shape[axis] > 1)
    return axis if repeated else None


_any_axis = _keep(lambda axis, x, args, kw: True)
_first_axis = _keep(lambda axis, x, args, kw: axis == 0 and x.ndim >= 2)
_reverse = _of_self(lambda axis, x, out, args, kw: x.ndim - 1 - axis)
_swap_last = _of_self(lambda axis, x, out, args, kw: axis if axis < x.ndim - 2 else 2 * x.ndim - 3 - axis)

_register(_elementwise, _ELEMENTWISE)
_register(_in_place(_elementwise), _underscored(_ELEMENTWISE) + _WRITING)
_register(_in_place(_elementwise), "copy_ fill_ zero_ normal_ uniform_ exponential_ random_", Tensor)
_register(_any_axis, _DROPOUT + " prelu one_hot bucketize")
_register(_in_place(_any_axis), _underscored(_DROPOUT))
_register(
    _unary,
    "to type type_as float double half bfloat16 int long short bool byte char cfloat cdouble cpu cuda clone contiguous "
    "detach detach_ requires_grad_ zeros_like ones_like full_like empty_like rand_like randn_like",
    torch,
    Tensor,
)
_register(_fresh, "new_zeros new_ones new_empty new_full", Tensor)

_register(_trailing(1), "linear", F)
for _k in (1, 2, 3):
    _register(_batched(_k + 2), f"conv{_k}d conv_transpose{_k}d", F)
    for _pool in (f"max_pool{_k}d", f"adaptive_max_pool{_k}d"):
        _register(_trailing(_k), f"{_pool} {_pool}_with_indices", torch, F)
    _register(_trailing(_k), f"avg_pool{_k}d adaptive_avg_pool{_k}d lp_pool{_k}d", torch, F)
_register(_trailing(2), "tril triu", torch, Tensor)
_register(_trailing(3), "pixel_shuffle pixel_unshuffle", F)
_register(_keep(lambda axis, x, args, kw: axis < 2), "interpolate upsample upsample_nearest upsample_bilinear", F)
_register(_batched(4), "unfold", F)
_register(_batched(3), "fold affine_grid", F)
_register(_keep(_padding), "pad", F)
_register(_keep(_frozen_statistics), "batch_norm", torch, F)
_register(_keep(_normalized), "layer_norm rms_norm", torch, F)
_register(_keep(lambda axis, x, args, kw: axis == 0 and x.ndim >= 3), "instance_norm local_response_norm", F)
_register(_first_axis, "group_norm channel_shuffle native_channel_shuffle", torch, F)
_register(_keep(lambda axis, x, args, kw: _plain_lookup(args, kw)), "embedding", F)
_register(_keep(lambda axis, x, args, kw: x.ndim == 2 and axis == 0 and _plain_lookup(args, kw)), "embedding_bag", F)
_register(_bilinear, "bilinear", F)
_register(_attention, "scaled_dot_product_attention", F)

_register(_along(1), "softmax log_softmax softmin cumsum cumprod logcumsumexp cummax cummin narrow index_select")
_register(_along(1, -1), "glu sort argsort")
_register(_along(2, -1), "topk diff")
_register(_along(2, 1), "normalize", F)
_register(_along(4, -1), "gumbel_softmax", F)
_register(_along(2, 0), "chunk split tensor_split split_with_sizes unsafe_chunk unsafe_split", torch, Tensor)
_register(_along(2, name="dims"), "roll", torch, Tensor)
_register(_along(2), "repeat_interleave", torch, Tensor)
_register(_along(1, name="dimension"), "unfold", Tensor)
_register(_along(2, -1), "fft ifft rfft irfft hfft ihfft", torch.fft)
_register(_along(2, (-2, -1)), "fft2 ifft2 rfft2 irfft2", torch.fft)
_register(_along(2), "fftn ifftn rfftn irfftn", torch.fft)
_register(_keep(lambda axis, x, args, kw: axis not in _dims(_varargs(args, kw, "dims"), x.ndim)), "flip", torch, Tensor)

_register(
    _REDUCE_1,
    "sum nansum mean nanmean prod amax amin aminmax var std var_mean std_mean logsumexp argmax argmin all any "
    "count_nonzero median nanmedian select",
)
_register(_reduce(1, -1), "mode")
_register(_reduce(1, 0), "unbind")
_register(_reduce(2, -1), "kthvalue")
_register(_reduce(2), "norm vector_norm")
_register(_reduce(2, (-2, -1)), "matrix_norm")
_register(_extremum, "max min", torch, Tensor)

_register(_of_self(_reshape), "flatten unflatten view reshape view_as reshape_as ravel squeeze", torch, Tensor)
_register(_of_self(_unsqueeze), "unsqueeze")
_register(_aligned_self, "expand broadcast_to repeat tile", torch, Tensor)
_register(_expand_as, "expand_as", Tensor)
_register(_of_self(_permute), "permute", torch, Tensor)
_register(_swap("dim0", "dim1"), "transpose swapdims", torch, Tensor)
_register(_swap("axis0", "axis1"), "swapaxes", torch, Tensor)
_register(_of_self(_movedim), "movedim moveaxis", torch, Tensor)
_register(_reverse, "t", torch, Tensor)
_register(_swap_last, "adjoint", torch, Tensor)
_register(_any_axis, "view_as_real real imag angle", torch, Tensor)
_register(_keep(lambda axis, x, args, kw: axis < x.ndim - 1), "view_as_complex", torch)
for _name in ("real", "imag"):
    RULES[getattr(Tensor, _name).__get__] = _any_axis
for _name, _rule in (("T", _reverse), ("H", _reverse), ("mT", _swap_last), ("mH", _swap_last)):
    RULES[getattr(Tensor, _name).__get__] = _rule
_register(_getitem, "__getitem__", Tensor)
_register(_setitem, "__setitem__", Tensor)
_register(_join(new_dim=False), "cat concat concatenate", torch)
_register(_join(new_dim=True), "stack", torch)
_register(_gather, "gather", torch, Tensor)
_register(_scatter, "scatter scatter_add", torch, Tensor)
_register(_in_place(_scatter), "scatter_ scatter_add_", Tensor)

_register(_matmul, "matmul __matmul__ mm bmm mv", torch, Tensor, torch.linalg)
_register(_rmatmul, "__rmatmul__", Tensor)
_register(_addmm("mat1", "mat2"), "addmm", torch, Tensor)
_register(_addmm("batch1", "batch2"), "baddbmm", torch, Tensor)
_register(_addmm("mat", "vec"), "addmv", torch, Tensor)
_register(_einsum, "einsum", torch)
_register(_distance(2, 1), "cosine_similarity", F)
_register(_distance(99, -1), "pairwise_distance", F)
