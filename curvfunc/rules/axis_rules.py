"""Where operations take the sample axis that are neither elementwise, nor leave it alone, nor reduce others.

Views and indices move it, joins and products bring two together, and some layers have axes of their own. See
`curvfunc.rules.batch_axis` for what a rule is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from curvfunc.rules.batch_axis import (
    Args,
    Axes,
    AxisOf,
    Kwargs,
    Rule,
    aligned,
    any_tagged,
    argument,
    dimensions,
    elementwise,
    kept,
    of_self,
    reduce,
    single,
    varargs,
)

REDUCED = reduce(1)
aligned_self = of_self(lambda axis, x, out, args, kw: axis - x.ndim + out.ndim)  # expand, repeat

# -------------------------------------------------------------------------------------------------------------- shapes


def reshape(axis: int, x: Tensor, out: Tensor, args: Args, kwargs: Kwargs) -> int | None:
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


def unsqueeze(axis: int, x: Tensor, out: Tensor, args: Args, kwargs: Kwargs) -> int | None:
    """An axis in front of it moves it to the right."""
    dim = argument(args, kwargs, 1, "dim")
    return axis + (dim % out.ndim <= axis) if type(dim) is int else None


def permute(axis: int, x: Tensor, out: Tensor, args: Args, kwargs: Kwargs) -> int | None:
    """Where the axis stands among those named; all must be, each once."""
    dims = dimensions(varargs(args, kwargs, "dims"), x.ndim)
    return dims.index(axis) if len(set(dims)) == x.ndim and varargs(args, kwargs, "dims") else None


def swap(first: str, second: str) -> Rule:
    """Two axes, named by these arguments, change places."""

    def swap(axis: int, x: Tensor, out: Tensor, args: Args, kwargs: Kwargs) -> int | None:
        pair = (argument(args, kwargs, 1, first), argument(args, kwargs, 2, second))
        if not all(type(d) is int for d in pair):
            return None
        i, j = dimensions(pair, x.ndim)
        return j if axis == i else i if axis == j else axis

    return of_self(swap)


def movedim(axis: int, x: Tensor, out: Tensor, args: Args, kwargs: Kwargs) -> int | None:
    """The axes named go to their places, the others fill what is left."""
    source, target = (argument(args, kwargs, 1, "source"), argument(args, kwargs, 2, "destination"))
    if source is None or target is None:
        return None
    source, target = dimensions(source, x.ndim), dimensions(target, x.ndim)
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
    if any(p is not None and type(p) is not int for p in (item.start, item.stop, item.step)):
        return False
    if type(n) is not int:  # a symbol, which ``indices`` would bind
        return item.start in (None, 0) and item.step in (None, 1) and (item.stop is None or bool(item.stop >= n))
    return item.indices(n) == (0, n, 1)


def getitem(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """Taken whole, the axis stays; a constant table has that of the index that looks up in it."""
    x, index = args
    axis = axis_of(x)
    labels = _layout(x, axis, index)
    if labels is None or not isinstance(out, Tensor) or len(labels) != out.ndim:
        return None
    if axis is not None:
        constant = not any_tagged((index,), axis_of)
        return kept(out, labels.index(axis), x.shape[axis]) if constant and axis in labels else None
    lookup = [i for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, Tensor | list)]
    if len(lookup) != 1 or not isinstance(lookup[0], Tensor) or (axis := axis_of(lookup[0])) is None:
        return None
    return kept(out, labels.index("index") + axis, lookup[0].shape[axis])


def setitem(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """The axis of the destination stays if what is written there has it in the same place."""
    x, index, value = args
    axis = axis_of(x)
    if axis is None:
        return None
    value_axis = axis_of(value) if isinstance(value, Tensor) else None
    if any_tagged((index,), axis_of):  # x[mask] = number is masked_fill_
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and axis_of(index) == axis
        return axis if is_mask and isinstance(value, int | float) else None
    if value_axis is None:  # constants may go anywhere
        return axis
    labels = _layout(x, axis, index)
    if labels is None or axis not in labels or value.shape[value_axis] != x.shape[axis]:
        return None
    return axis if labels.index(axis) - len(labels) == value_axis - value.ndim else None


def join(new_dim: bool) -> Rule:
    """``cat`` or ``stack`` of tensors with one sample axis, and of constants that have one entry per sample."""

    def join(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        tensors = args[0] if args else kwargs.get("tensors")
        dim = argument(args, kwargs, 1, "dim", 0)
        if not isinstance(tensors, tuple | list) or type(dim) is not int:
            return None
        found = aligned(tensors, axis_of)
        if found is None or any(t.ndim != tensors[-1].ndim for t in tensors):
            return None
        if any(t.shape[found[0]] != found[1] for t in tensors):
            return None
        dim, axis = dim % out.ndim, found[0] + tensors[-1].ndim
        if new_dim:
            return kept(out, axis + (dim <= axis), found[1])
        return None if dim == axis else kept(out, axis, found[1])

    return join


def gather(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """out[.., j, ..] = x[.., index[.., j, ..], ..]; with dim != axis both stay within their sample."""
    return _within(args, kwargs, ("input", "index"), out, axis_of)


def scatter(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """The reverse of ``gather``: out[.., index[.., j, ..], ..] = source[.., j, ..]."""
    return _within(args, kwargs, ("input", "index", "src"), out, axis_of)


def _within(args: Args, kwargs: Kwargs, names: Sequence[str], out: Tensor, axis_of: AxisOf) -> Axes:
    """Tensors of one number of dimensions that correspond element by element but for dimension ``dim``."""
    dim = argument(args, kwargs, 1, "dim")
    tensors = [t for k, name in enumerate(names) if isinstance(t := argument(args, kwargs, k + (k > 0), name), Tensor)]
    found = aligned(tensors, axis_of)
    if found is None or type(dim) is not int or any(t.ndim != out.ndim for t in tensors):
        return None
    axis = found[0] + out.ndim
    return None if axis == dim % out.ndim else kept(out, axis, found[1])


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


def matmul(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """``a @ b`` in all its spellings."""
    operands = (*args, *(kwargs[k] for k in ("input", "other", "mat2", "vec") if k in kwargs))
    if len(operands) != 2:
        return None
    found = _product_axis(operands[0], operands[1], axis_of)
    return None if found is None else kept(out, found[0] + out.ndim, found[1])


def rmatmul(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """As `matmul`, operands in reverse."""
    return matmul(args[::-1], kwargs, out, axis_of)


def addmm(first: str, second: str) -> Rule:
    """``beta * bias + alpha * (a @ b)``, the bias broadcast."""

    def addmm(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        a, b = argument(args, kwargs, 1, first), argument(args, kwargs, 2, second)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return None
        product, bias = _product_axis(a, b, axis_of), aligned([argument(args, kwargs, 0, "input")], axis_of)
        known = axis_of(a) is None and axis_of(b) is None
        if (product is None and not known) or (None not in (product, bias) and product != bias):
            return None
        found = product or bias
        return None if found is None else kept(out, found[0] + out.ndim, found[1])

    return addmm


def einsum(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
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
    return kept(out, spelled.index(label), n)


def _spell(term: str, ndim: int) -> list[Any]:
    """The letters of an einsum term; what an ellipsis stands for is numbered from its right end, where it aligns."""
    before, dots, after = term.partition("...")
    hidden = ndim - len(before) - len(after) if dots else 0
    return [*before, *range(-hidden, 0), *after]


def distance(position: int, default: int) -> Rule:
    """Two operands broadcast, then one dimension is reduced."""

    def distance(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
        pair = (*args[:2], *(kwargs[k] for k in ("x1", "x2") if k in kwargs))
        found, dim = aligned(pair, axis_of), argument(args, kwargs, position, "dim", default)
        ndim = max(t.ndim for t in pair)
        if found is None or type(dim) is not int or len(pair) != 2:
            return None
        axis, dim = found[0] + ndim, dim % ndim
        return None if axis == dim else kept(out, axis - (dim < axis and out.ndim < ndim), found[1])

    return distance


def bilinear(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """Both inputs, aligned, with constant weights for the last dimension."""
    found = aligned(args[:2], axis_of)
    if found is None or found[0] == -1 or any_tagged((*args[2:], *kwargs.values()), axis_of):
        return None
    return kept(out, found[0] + out.ndim, found[1])


# --------------------------------------------------------------------------------------------------- particular layers


def attention(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """softmax(q k^T + mask) v with everything, the mask included, broadcast in front of the last two dimensions."""
    found = aligned((*args, *kwargs.values()), axis_of)
    heads = bool(argument(args, kwargs, 7, "enable_gqa", False))  # then dimension -3 of q and k differ in size
    if found is None or found[0] > -3 - heads:
        return None
    return kept(out, found[0] + out.ndim, found[1])


def padding(axis: int, x: Tensor, args: Args, kwargs: Kwargs) -> bool:
    """``pad`` lists (before, after) from the last dimension on; (1, -1) would shift the samples."""
    pad = argument(args, kwargs, 1, "pad")
    return isinstance(pad, tuple | list) and not any(pad[2 * (x.ndim - 1 - axis) :][:2])


def frozen_statistics(axis: int, x: Tensor, args: Args, kwargs: Kwargs) -> bool:
    """A batch normalization by running statistics."""
    return axis == 0 and argument(args, kwargs, 5, "training", False) is False


def plain_lookup(args: Args, kwargs: Kwargs) -> bool:
    """``max_norm`` rewrites the rows that the batch uses, and counting their use in the batch mixes samples."""
    counts = kwargs.get("scale_grad_by_freq", any(a is True for a in args))
    return argument(args, kwargs, 3, "max_norm") is None and not counts


def normalized(axis: int, x: Tensor, args: Args, kwargs: Kwargs) -> bool:
    """The last dimensions are normalized, as many as are named."""
    shape = argument(args, kwargs, 1, "normalized_shape")
    return isinstance(shape, tuple | list) and axis < x.ndim - len(shape)


def extremum(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """``max(x, other)`` is elementwise, ``max(x, dim)`` a reduction."""
    pairwise = isinstance(argument(args, kwargs, 1, "other"), Tensor)
    return (elementwise if pairwise else REDUCED)(args, kwargs, out, axis_of)


def fresh(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """``x.new_zeros(n, 3)``: no dependence at all, so any axis of size n holds; models put samples first."""
    found = single(args, kwargs, axis_of)
    if found is None or not isinstance(out, Tensor):
        return None
    n = found[0].shape[found[1]]
    return next((axis for axis, size in enumerate(out.shape) if size == n), None)


def expand_as(args: Args, kwargs: Kwargs, out: Any, axis_of: AxisOf) -> Axes:
    """As ``expand``; a constant that is repeated along the sample axis of the other has it, each sample the same."""
    x, other = args[0], args[1] if len(args) > 1 else kwargs["other"]
    if axis_of(x) is not None or (axis := axis_of(other)) is None:
        return aligned_self(args, kwargs, out, axis_of)
    inner = axis - out.ndim  # counted from the right, as shapes are broadcast
    repeated = -inner > x.ndim or (x.shape[inner] == 1 and out.shape[axis] > 1)
    return axis if repeated else None
