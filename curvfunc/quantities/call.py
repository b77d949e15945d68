"""Specs in, results out: what is checked, which samples have which forward pass, and whose memory results are in."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._C import _functorch
from torch.utils import _pytree as pytree

from curvfunc import losses
from curvfunc.engine import compiled
from curvfunc.engine.company import Entangled
from curvfunc.engine.leaves import will_be_differentiated
from curvfunc.engine.model import check_function
from curvfunc.quantities.quantity import Quantity
from curvfunc.quantities.run import DrawnError, Run
from curvfunc.tensors.buffers import copied, read_buffers
from curvfunc.tensors.inputs import check_generator, flatten_params, read_batch
from curvfunc.tensors.ownership import check_apart, own
from curvfunc.tensors.samples import check_crosses, tensors_of, tree_map

__all__ = ["compute"]


def compute(
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    X: Any,
    y: Any,
    specs: Any,
    *,
    loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    subsampling: Sequence[int] | Tensor | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
    out: Any = None,
) -> Any:
    """`curvfunc.compute`, in one process."""
    if torch.compiler.is_compiling():
        compiled.refuse_export()
        return _compiled(model_fn, params, X, y, specs, loss_fn, subsampling, generator, chunk_size, out)
    if torch.is_inference_mode_enabled():  # it forbids graphs; tensors that were made in it are copied out of it
        with torch.inference_mode(False):
            params = optree.tree_map(_out_of_inference, params)
            X, y = (tree_map(_out_of_inference, tree) for tree in (X, y))
            given: dict[str, Any] = {"loss_fn": loss_fn, "generator": generator, "chunk_size": chunk_size, "out": out}
            return compute(model_fn, params, X, y, specs, subsampling=subsampling, **given)
    leaves, tree = optree.tree_flatten(specs, is_leaf=lambda s: isinstance(s, Quantity))
    outs = None if out is None else read_buffers(tree, out)
    evaluate = compiled.uncompiled(_results)
    results = evaluate(model_fn, params, X, y, leaves, losses.normalize(loss_fn), subsampling, generator, chunk_size, outs)
    return optree.tree_unflatten(tree, results)


def _results(
    model_fn: Callable[..., Any],
    params: Any,
    X: Any,
    y: Any,
    specs: Sequence[Any],
    loss: losses.Loss,
    subsampling: Sequence[int] | Tensor | None,
    generator: Generator | None,
    chunk_size: int | None,
    outs: list[Any] | None = None,
    held: Sequence[Tensor] = (),
) -> list[Any]:
    """One result per spec. With a subset, the specs of the whole batch have a forward pass of their own, unless it draws."""
    check_function(model_fn)
    for spec in specs:
        if not isinstance(spec, Quantity):
            raise TypeError(f"specs must hold quantities such as BatchGrad() or DiagGGN(), got {spec!r}.")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive int or None, got {chunk_size!r}.")
    check_generator(generator)
    names, leaves, rebuild = flatten_params(params)
    batch = read_batch(X, y, subsampling, may_be_empty=losses.is_sum(loss))
    differentiable = will_be_differentiated([*leaves, *tensors_of(X)])
    if outs is not None and (differentiable or _functorch.peek_interpreter_stack() is not None):
        raise ValueError(
            "out= takes results without a graph, and this call is differentiated or under a torch.func transformation. Leave "
            "out away, or detach params and X."
        )
    if outs is not None:
        _check_outs(specs, outs, {"X": X, "y": y} | {f"parameter {n!r}": p for n, p in zip(names, leaves, strict=True)})
    given = (loss, generator, chunk_size, differentiable, params)
    mixed = batch.index is not None and any(s.whole_batch for s in specs)
    results: list[Any] = [None] * len(specs)
    drawn = entangled = False
    for whole in (True, False) if mixed else (None,):
        mine = [i for i, s in enumerate(specs) if whole is None or s.whole_batch == whole]
        if not mine:
            continue
        samples = batch.whole() if whole else batch
        watched = len(mine) < len(specs) or (not whole and batch.has_repeats())
        buffers = None if outs is None else [outs[i] for i in mine]
        try:
            found = Run(model_fn, names, rebuild, samples, *given, buffers, watched).evaluate(leaves, [specs[i] for i in mine])
        except (DrawnError, Entangled) as error:
            drawn, entangled = True, isinstance(error, Entangled)
            break
        for i, result in zip(mine, found, strict=True):
            results[i] = result
    if drawn:  # each sample is to have its own draws, and its company: what is of the subset is chosen from one pass
        samples, places = (batch.whole(), batch.index) if mixed or entangled else batch.distinct()
        results = Run(model_fn, names, rebuild, samples, *given, outs, chosen=places).evaluate(leaves, list(specs))
    results = _own(results, outs, lambda: [*leaves, *tensors_of(X), *tensors_of(y), *loss.tensors.values(), *held])
    given_back = outs or [None] * len(specs)
    return [r if out is not None or s.forward else rebuild(r) for s, r, out in zip(specs, results, given_back, strict=True)]


def _check_outs(specs: Sequence[Any], outs: list[Any], others: dict[str, Any]) -> None:
    """Raise if the caller's memory for a result is that of something else, too."""
    given = [(f"out for {type(s).__name__}", t) for s, out in zip(specs, outs, strict=True) for t in tensors_of(out)]
    named = [(name, t) for name, tree in others.items() for t in tensors_of(tree)]
    check_apart(given, named)


def _own(results: list[Any], outs: list[Any] | None, given: Callable[[], list[Any]]) -> list[Any]:
    """The results, but for those in the caller's memory, as tensors that share memory with nothing."""
    new = results if outs is None else [r if out is None else () for r, out in zip(results, outs, strict=True)]
    mine = iter(own(chain.from_iterable(map(_flat, new)), given))
    found = [_put(r, mine) for r in new]
    return found if outs is None else [r if out is None else out for r, out in zip(found, outs, strict=True)]


def _flat(result: Any) -> list[Tensor]:
    """The tensors of a result: one, or those of a list of values per parameter."""
    if isinstance(result, Tensor):
        return [result]
    if _TENSORS.issuperset(map(type, result)):
        return result
    return [t for r in result for t in ((r,) if isinstance(r, Tensor) else r if _is_row(r) else optree.tree_leaves(r))]


def _put(result: Any, tensors: Iterator[Tensor]) -> Any:
    """The same result with other tensors."""
    if isinstance(result, Tensor):
        return next(tensors)
    if _TENSORS.issuperset(map(type, result)):
        return [*islice(tensors, len(result))]
    return [
        next(tensors)
        if isinstance(r, Tensor)
        else (*islice(tensors, len(r)),)
        if _is_row(r)
        else optree.tree_map(lambda _: next(tensors), r)
        for r in result
    ]


def _is_row(value: Any) -> bool:
    """Whether a value is a tuple of tensors, as Kronecker factors are."""
    return type(value) is tuple and _TENSORS.issuperset(map(type, value))


_TENSORS = frozenset({Tensor})


def _out_of_inference(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    return t.clone() if t.is_inference() else t.detach()  # either way results have no graph


# -- torch.compile


def _compiled(
    model_fn: Any, params: Any, X: Any, y: Any, specs: Any, loss_fn: Any, subsampling: Any, generator: Any, chunk: Any, out: Any
) -> Any:
    leaves, tree = pytree.tree_flatten(specs, is_leaf=lambda s: isinstance(s, Quantity))
    keys = tuple([(type(s), s.key()) for s in leaves])
    tensors: dict[str, Any] = {"subsampling": subsampling} if isinstance(subsampling, Tensor) else {}
    operands = [s.tensors() for s in leaves]
    if any(data is not None for data in operands):
        tensors["operands"] = [() if data is None else data for data in operands]  # None cannot cross
    constants = (keys, None if subsampling is None or "subsampling" in tensors else tuple(subsampling), chunk)
    loss = losses.normalize(loss_fn)
    check_crosses("X", X)
    check_crosses("y", y)
    results = compiled.call(_of_constants, model_fn, params, X, y, loss, constants, tensors, generator)
    if out is not None:
        for i, (spec, buffer) in enumerate(zip(leaves, tree.flatten_up_to(out), strict=True)):
            if buffer is not None:
                results[i] = pytree.tree_map(partial(copied, type(spec).__name__), results[i], buffer)
    return pytree.tree_unflatten(results, tree)


def _of_constants(
    model_fn: Callable[..., Any],
    params: Any,
    X: Any,
    y: Any,
    loss: losses.Loss,
    held: Sequence[Tensor],
    keys: tuple[Any, ...],
    indices: tuple[int, ...] | None,
    chunk_size: int | None,
    subsampling: Tensor | None = None,
    operands: Sequence[Any] | None = None,
) -> list[Any]:
    specs = [cls.of(key, data) for (cls, key), data in zip(keys, operands or [None] * len(keys), strict=True)]
    index = indices if subsampling is None else subsampling
    return _results(model_fn, params, X, y, specs, loss, index, None, chunk_size, held=held)
