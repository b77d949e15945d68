"""Hooks that a model registers in its forward pass: they may look at gradients, and not change them.

A backward pass to the edges of a graph sees some gradients before their hooks and some after them, and starts at the output
behind the output's own. And what a hook makes of the gradients of a batch need not be what it makes of each sample's. So hooks
are watched when they run. They do not run with nodes at which such a pass ends, or which it jumps over: where a hook is
registered with one of these, parameters are generic, so that it passes all nodes.
"""

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd.graph import Node
from torch.utils.hooks import BackwardHook

from curvfunc.engine.sites import Parameter
from curvfunc.tensors.ownership import base

__all__ = ["register_unchanging", "watched_node"]

# Parts of torch that register hooks of users with nodes. All others get these as they are: they may hand them to the engine.
REGISTERING = {"torch.nn.modules.module", "torch.utils.hooks"}
PASSING = {"torch.overrides", "torch.utils._device"}  # modes that pass calls on
EDGES = {"torch.autograd.graph"}  # which users ask for the edges of tensors, and their nodes


def register_unchanging(t: Tensor, hook: Callable[[Tensor], Any], known: Parameter | None = None) -> Any:
    """``t.register_hook(hook)``, where a hook may look at gradients and not change them.

    Args:
        t: The tensor.
        hook: The hook.
        known: What is known of the tensor, if it is a parameter, or made of parameters alone.

    Raises:
        ValueError: For parameters, their transposes and blocks, which a backward pass to the uses of parameters does not reach.
    """
    if known is not None and (known.leaf is not None or known.transposed_of is not None or known.block_of is not None):
        raise ValueError(
            f"a hook of the model ({_name_of(hook)}) is registered with a parameter, whose gradient is not formed for each "
            "sample. Register it with the result of an operation on samples, or leave it out."
        )

    def look(g: Tensor) -> None:
        _look(hook, (g,), (g,))

    return t.register_hook(look)


def watched_node(t: Tensor, hooked: set[Node]) -> Any:
    """``t.grad_fn``, asked for by the caller's caller, whose hooks may look at gradients and not change them.

    Args:
        t: The tensor.
        hooked: Gets the nodes with which hooks are registered.
    """
    node, asking = t.grad_fn, _outside(sys._getframe(2), PASSING)
    if node is None or _name(asking) in REGISTERING or not _name(asking).startswith("torch."):
        return None if node is None else _watched(node, hooked)
    if not _name(_outside(asking, EDGES)).startswith("torch."):
        hooked.add(node)  # it may be, and nobody sees it
    return node


def _name(frame: Any) -> str:
    """The module whose code runs in a frame."""
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def _outside(frame: Any, modules: Collection[str]) -> Any:
    """The first of the frames around it whose code is of none of these modules."""
    while _name(frame) in modules:
        frame = frame.f_back
    return frame


class _Watched:
    """A node of autograd's graph, as it is but for the hooks that it takes."""

    def __init__(self, node: Any, hooked: set[Node]) -> None:
        object.__setattr__(self, "_node", node)
        object.__setattr__(self, "_hooked", hooked)

    def register_hook(self, hook: Callable[..., Any]) -> Any:
        def look(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
            _look(hook, (inputs, outputs), inputs)

        self._hooked.add(self._node)
        return self._node.register_hook(look)

    def register_prehook(self, hook: Callable[..., Any]) -> Any:
        def look(outputs: Sequence[Tensor | None]) -> None:
            _look(hook, (outputs,), outputs)

        self._hooked.add(self._node)
        return self._node.register_prehook(look)

    @property
    def next_functions(self) -> tuple[tuple[Any, int], ...]:
        return tuple((None if node is None else _watched(node, self._hooked), k) for node, k in self._node.next_functions)

    @property  # type: ignore[misc]  # which is no method of objects
    def __class__(self) -> Any:
        return type(self._node)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._node, name, value)

    def __eq__(self, other: object) -> bool:
        return self._node is (object.__getattribute__(other, "_node") if issubclass(type(other), _Watched) else other)

    def __hash__(self) -> int:
        return hash(self._node)

    def __call__(self, *args: Any) -> Any:
        return self._node(*args)

    def __repr__(self) -> str:
        return repr(self._node)


_KINDS: dict[str, type[_Watched]] = {}


def _watched(node: Any, hooked: set[Node]) -> _Watched:
    """A node that is watched, of a class with the name of its own."""
    name = type(node).__name__
    if name not in _KINDS:
        _KINDS[name] = type(name, (_Watched,), {})
    return _KINDS[name](node, hooked)


def _look(hook: Callable[..., Any], given: Sequence[Any], gradients: Sequence[Tensor | None]) -> None:
    """Call a hook; raise if it changes gradients, in place or by what it returns."""
    seen = [g for arguments in given for g in ((arguments,) if isinstance(arguments, Tensor) else arguments) if g is not None]
    versions = [g._version for g in seen]
    found = hook(*given)
    same = versions == [g._version for g in seen]
    if same and found is not None:
        results = (found,) if isinstance(found, Tensor) else tuple(found)
        same = len(results) == len(gradients) and all(map(_is_same, results, gradients))
    if not same:
        raise ValueError(
            f"a hook of the model ({_name_of(hook)}) changes gradients, which those of samples and curvature cannot follow. "
            "Leave it out, or change gradients in the backward of a torch.autograd.Function, as an operation of the model."
        )


def _name_of(hook: Any) -> str:
    """A hook as messages call it; torch puts full backward hooks of a module into one of its own."""
    name = getattr(hook, "__qualname__", type(hook).__name__)
    if name.startswith(BackwardHook.__name__ + "."):
        owners = [cell.cell_contents for cell in hook.__closure__]
        name = next((f"a full backward hook of {type(o.module).__name__}" for o in owners if isinstance(o, BackwardHook)), name)
    return str(name)


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two gradients have the same values."""
    if a is b:
        return True
    if a is None or b is None:  # which stands for zeros
        return not base(b if a is None else a).any()  # type: ignore[arg-type]
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    wrapped = [*map(_functorch.is_functorch_wrapped_tensor, (a, b))]
    if any(wrapped):
        alike = all(wrapped) and _functorch.maybe_get_level(a) == _functorch.maybe_get_level(b)
        alike = alike and _functorch.maybe_get_bdim(a) == _functorch.maybe_get_bdim(b)
        return alike and _is_same(_functorch.get_unwrapped(a), _functorch.get_unwrapped(b))
    return bool(torch.equal(a, b) or ((a == b) | ((a != a) & (b != b))).all())
