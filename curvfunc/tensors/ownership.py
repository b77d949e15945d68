"""Results are tensors of their own: dense, and sharing memory neither with each other nor with anything else.

What autograd and the rules return may be a cotangent itself, which several parameters have in common; an expanded tensor; or
the model's input. Whoever changes such a result in place, or passes it as memory for later ones, would change others too.
"""

from collections.abc import Callable, Iterable
from itertools import repeat
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

__all__ = ["apart", "base", "check_apart", "own"]


def own(results: Iterable[Tensor], given: Callable[[], Iterable[Any]] = tuple) -> list[Tensor]:
    """The results, where needed as copies, so that each is dense and the only one with its memory.

    Args:
        results: Tensors that nothing but their receiver will hold; see `apart`.
        given: What the caller holds, among it what is no tensor. Asked for only where torch.func transforms or traces;
            elsewhere the number of those that hold a memory tells whether somebody else does.
    """
    if _functorch.peek_interpreter_stack() is not None or torch.compiler.is_compiling():
        return _own_within(results, [t for t in given() if isinstance(t, Tensor)])
    results = [*results]
    if _are_alone(results):
        return results
    taken: set[int] = set()
    found, strided, holders = [], torch.strided, _holders
    for t in results:
        if t.layout is not strided:
            t = t.to_dense()
        storage = t.untyped_storage()._cdata
        known = 2 if t._base is None else 3  # itself, this look at it, and what it is a view of
        if holders(storage) > known or storage in taken or not (t.is_contiguous() or _is_dense(t)):
            t = t.clone()
            storage = t.untyped_storage()._cdata
        taken.add(storage)
        found.append(t)
    return found


def _are_alone(results: list[Tensor]) -> bool:
    """Whether it is plain that all are dense and have memory that nobody else holds; no loop in Python for many of them."""
    if _address is None or not _LAYOUTS.issuperset(map(_layout_of, results)) or any(map(is_not, map(_base_of, results), _NONE)):
        return False
    storages = [*map(_address, results)]
    return len({*storages}) == len(storages) and {*map(_holders, storages)} <= {1} and all(map(Tensor.is_contiguous, results))


def _own_within(results: Iterable[Tensor], given: list[Tensor]) -> list[Tensor]:
    """As `own`, within transformations, which put tensors around tensors, and in traces."""
    levels = _functorch.get_interpreter_stack() or ()
    dual = any(level.key() == _functorch.TransformType.Jvp for level in levels)
    mapped = any(level.key() == _functorch.TransformType.Vmap for level in levels)
    taken = {storage for t in given for storage in _storages(t, dual)}
    zero = _batched_zero(given) if mapped else None
    found = []
    for t in results:
        if t.layout is not torch.strided:
            t = t.to_dense()
        if zero is not None and not _batches(zero) <= _batches(t):
            t = t + zero.to(t.device, t.dtype)  # vmap would expand it
        storages = _storages(t, dual)
        inner = base(t)
        if not taken.isdisjoint(storages) or not (inner.is_contiguous() or _is_dense(inner)):
            t = t.clone()
            storages = _storages(t, dual)
        taken.update(storages)
        found.append(t)
    return found


def base(t: Tensor) -> Tensor:
    """The values below all levels of torch.func."""
    while _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.get_unwrapped(t)
    return t


def apart(results: Iterable[Any], *, views: bool = False) -> list[Any]:
    """The same values in the same memory, without what they are views of: who else has either shows in the memory then.

    Args:
        results: Tensors, and what is none and stays as it is.
        views: Whether it is only for those that are views.
    """
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None:
        return [*results]
    if views:
        results = [*results]
        if _TENSORS.issuperset(map(type, results)) and not any(map(is_not, map(_base_of, results), _NONE)):
            return results
        return [t.detach() if isinstance(t, Tensor) and t._base is not None and _is_plain(t) else t for t in results]
    results = [*results]
    if _LAYOUTS.issuperset(map(_layout_of, results)) and not any(map(_requires_grad, results)):
        return [*map(Tensor.detach, results)]
    return [t.detach() if _is_plain(t) else t for t in results]


def _is_plain(t: Tensor) -> bool:
    return not t.requires_grad and t.layout is torch.strided


def _everybody(storage: int) -> int:
    """Where torch does not say how many hold a memory, it may be anybody."""
    return 1 << 30


# How many hold a memory, and which it is: no public interface of torch.
_holders: Callable[[int], int] = getattr(torch._C, "_storage_Use_Count", _everybody)
_address: Callable[[Tensor], int] | None = getattr(torch._C, "_storage_address", None)
_layout_of, _base_of, _requires_grad = attrgetter("layout"), attrgetter("_base"), attrgetter("requires_grad")
_LAYOUTS, _NONE, _TENSORS = frozenset({torch.strided}), repeat(None), frozenset({Tensor})


def _storages(t: Tensor, dual: bool) -> list[int]:
    """The memory of a tensor, and of its tangent."""
    found = [base(t).untyped_storage()._cdata]
    if dual and (tangent := forward_ad.unpack_dual(t).tangent) is not None:
        found.append(base(tangent).untyped_storage()._cdata)
    return found


def _is_dense(t: Tensor) -> bool:
    """Whether each entry has a place of its own, and there are no places between."""
    expected = 1
    for stride, size in _axes(t):
        if stride != expected:
            return False
        expected *= size
    return True


def _axes(t: Tensor) -> list[tuple[int, int]]:
    """Stride and size of each axis with more than one entry, the smallest stride first."""
    return sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1)


def _batches(t: Tensor) -> set[int]:
    """The levels of vmap at which a tensor is batched."""
    found = set()
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            found.add(_functorch.maybe_get_level(t))
        t = _functorch.get_unwrapped(t)
    return found


def _batched_zero(tensors: list[Tensor]) -> Tensor | None:
    """Zero, batched at each level of vmap at which one of the tensors is."""
    batched = [t for t in tensors if _batches(t)]
    return sum([t.new_zeros(()) for t in batched[1:]], batched[0].new_zeros(())) if batched else None


def check_apart(buffers: Iterable[tuple[str, Tensor]], others: Iterable[tuple[str, Tensor]]) -> None:
    """Raise if writing to one of the named buffers would change another one, itself in another place, or another tensor."""
    memory = []
    for own, named in ((True, buffers), (False, others)):
        for name, t in named:
            if own and not _is_injective(t):
                raise ValueError(
                    f"{name} has strides {t.stride()} for shape {tuple(t.shape)}, so that entries share memory (as after "
                    "expand). Pass a tensor of its own, such as torch.empty of this shape or the result of an earlier call."
                )
            if t.numel():
                memory.append((t.data_ptr(), t.data_ptr() + _extent(t, t.element_size()), own, name, t))
    before: list[Any] = []
    for place in sorted(memory, key=lambda place: place[:2]):
        before = [other for other in before if other[1] > place[0]]
        for other in before:
            if (place[2] or other[2]) and not _interleave(place[4], other[4]):
                first, second = (place, other) if place[2] else (other, place)
                raise ValueError(
                    f"{first[3]} shares memory with {second[3]}, so that one would overwrite the other. Pass tensors with "
                    "memory of their own, such as the results of an earlier call."
                )
        before.append(place)


def _extent(t: Tensor, scale: int, below: float = float("inf")) -> int:
    """The distance from the first to behind the last entry, along those axes whose strides are smaller than ``below``."""
    return scale * (1 + sum((size - 1) * stride for stride, size in _axes(t) if stride < below))


def _is_injective(t: Tensor) -> bool:
    """Whether each entry has memory of its own: each stride leads past all that smaller ones reach."""
    extent = 1
    for stride, size in _axes(t):
        if stride < extent:
            return False
        extent += (size - 1) * stride
    return True


def _interleave(a: Tensor, b: Tensor) -> bool:
    """Whether tensors in one range of memory are different columns of rows of the same length, with nothing in common."""
    scale = a.element_size()
    if b.element_size() != scale:
        return False
    offset = (b.data_ptr() - a.data_ptr()) // scale
    for length in {*a.stride()} & {*b.stride()} - {0}:
        rows = all(stride < length or stride % length == 0 for t in (a, b) for stride, _ in _axes(t))
        start = offset % length
        if rows and _extent(a, 1, length) <= start and start + _extent(b, 1, length) <= length:
            return True
    return False
