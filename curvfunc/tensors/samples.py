"""Trees of samples, as X and y may be: what holds tensors, and how to make the same of others.

Besides what optree and torch know (tuples, namedtuples, lists, dictionaries, None, registered classes), these are mappings such
as ``collections.UserDict``, which tokenizers return, and dataclasses; neither has to be registered.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import optree
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["check_crosses", "flatten", "hidden_tensors", "leaves", "tensors_of", "tree_map"]

Rebuild = Callable[[Sequence[Any]], Any]


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree."""
    return [tree] if isinstance(tree, Tensor) else flatten(tree)[0]


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of a tree."""
    return [t for t in leaves(tree) if isinstance(t, Tensor)]


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree of the function's values at its leaves."""
    if isinstance(tree, Tensor):
        return function(tree)
    found, rebuild = flatten(tree)
    return rebuild([function(t) for t in found])


def flatten(tree: Any) -> tuple[list[Any], Rebuild]:
    """The leaves of a tree, and what makes such a tree of others."""
    node = None if isinstance(tree, Tensor) else _node(tree)
    if node is None:
        return [tree], lambda values: values[0]
    children, build = node
    parts = [flatten(child) for child in children]

    def rebuild(values: Sequence[Any]) -> Any:
        start, made = 0, []
        for found, again in parts:
            made.append(again(values[start : start + len(found)]))
            start += len(found)
        return build(made)

    return [t for found, _ in parts for t in found], rebuild


def _node(tree: Any) -> tuple[Sequence[Any], Rebuild] | None:
    """What a tree consists of, and how to make one of others; None for a leaf."""
    if not optree.tree_is_leaf(tree):
        children, structure = optree.tree_flatten(tree, is_leaf=lambda t: t is not tree)
        return children, structure.unflatten
    if (known := pytree.SUPPORTED_NODES.get(type(tree))) is not None:
        children, context = known.flatten_fn(tree)
        return list(children), lambda values: known.unflatten_fn(values, context)
    if isinstance(tree, Mapping) and not hidden_tensors(tree):
        keys = list(tree)
        return [tree[key] for key in keys], lambda values: _mapping(tree, keys, values)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type) and not hidden_tensors(tree):
        names = [field.name for field in dataclasses.fields(tree)]
        return [getattr(tree, name) for name in names], lambda values: _dataclass(tree, names, values)
    return None


def _mapping(like: Mapping[Any, Any], keys: Sequence[Any], values: Sequence[Any]) -> Any:
    if not isinstance(like, MutableMapping):
        return type(like)(dict(zip(keys, values, strict=True)))  # type: ignore[call-arg]
    made = copy.copy(like)
    for key, value in zip(keys, values, strict=True):
        made[key] = value
    return made


def _dataclass(like: Any, names: Sequence[str], values: Sequence[Any]) -> Any:
    """Without a call of ``__init__``, which may compute anything from the fields."""
    made = object.__new__(type(like))
    for name, value in [*_state(like).items(), *zip(names, values, strict=True)]:
        object.__setattr__(made, name, value)
    return made


def _state(of: Any) -> dict[str, Any]:
    """What an object has besides its fields; cached properties will be computed anew."""
    fields = {field.name for field in dataclasses.fields(of)} if dataclasses.is_dataclass(of) else set()
    cached = functools.cached_property
    state = vars(of) if hasattr(of, "__dict__") else {}
    return {k: v for k, v in state.items() if k not in fields and not isinstance(getattr(type(of), k, None), cached)}


def hidden_tensors(of: Any) -> list[str]:
    """Names of tensors that a mapping or dataclass has besides its items or fields; no subset could be taken of these."""
    items = list(of.values()) if isinstance(of, Mapping) else []
    return [k for k, v in _state(of).items() if isinstance(v, Tensor) and not any(v is item for item in items)]


def check_crosses(argument: str, tree: Any) -> None:
    """Raise if a tree cannot be an argument of compiled code."""
    for leaf in pytree.tree_leaves(tree):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{argument} holds a {type(leaf).__name__}, which torch.compile cannot take apart. Pass a tensor, a tuple or a "
                f"dictionary of tensors such as dict({argument}), or register the class: torch.export.register_dataclass, "
                "torch.utils._pytree.register_pytree_node."
            )
