"""Where a module holds its tensors, and calls with others in these places."""

import os
import threading
from collections import deque
from collections.abc import Iterable
from operator import getitem, setitem
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Places", "Slots", "call", "holders", "places_of", "run", "turn"]

Holders = dict[str, tuple[Any, str]]
Places = dict[str, tuple[tuple[str, Any, str], ...]]


class Slots:
    """Where a module holds tensors of some names.

    Attributes:
        names: These names.
        held: For each place, a submodule's dictionary.
        keys: The key there.
        which: The name's number, where a tensor has several places; None where each has one.
    """

    def __init__(self, names: list[str], places: list[tuple[Any, str, int]]) -> None:
        self.names = names
        self.held, self.keys = [held for held, _, _ in places], [key for _, key, _ in places]
        self.which = None if len(places) == len(names) else [k for _, _, k in places]

    @classmethod
    def of(cls, places: "Places", names: Iterable[str]) -> "Slots":
        """All places of these names."""
        names = [*names]
        return cls(names, [(held, key, k) for k, name in enumerate(names) for _, held, key in places[name]])

    def spread(self, values: dict[str, Tensor]) -> list[Tensor]:
        """A tensor for each place."""
        given = [*values.values()]
        return given if self.which is None else [given[k] for k in self.which]

    def read(self) -> list[Tensor]:
        """The tensors that are there."""
        return [*map(getitem, self.held, self.keys)]

    def check(self) -> None:
        """Raise if there are none any more."""
        gone = sorted({self.names[k if self.which is None else self.which[k]] for k, t in enumerate(self.read()) if t is None})
        if gone:
            raise ValueError(
                f"params has {gone}, which the module holds no longer: they were set to None. Take params from "
                "functionalize(module) again, or remove these entries."
            )

    def write(self, tensors: list[Tensor]) -> None:
        """Put tensors there."""
        deque(map(setitem, self.held, self.keys, tensors), 0)


_LOCK = threading.Lock()
_TURNS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def turn(module: nn.Module) -> Any:
    """What a thread holds while a module has the tensors of its call, so that no other one runs with them or puts them back."""
    own = _TURNS.get(module)
    if own is None:
        with _LOCK:
            own = _TURNS.setdefault(module, threading.RLock())
    return own


if hasattr(os, "register_at_fork"):  # another thread may have had its turn
    os.register_at_fork(after_in_child=_TURNS.clear)


def run(module: nn.Module, slots: Slots, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As ``functional_call``, without what it looks up at each call, and also for scripted parts."""
    before = slots.read()
    optimized = torch._C._get_graph_executor_optimize(False)  # what scripted parts specialize on, transformations change
    try:
        slots.write(slots.spread(values))
        return module(*args, **kwargs)
    finally:
        torch._C._get_graph_executor_optimize(optimized)
        slots.write(before)


def call(module: nn.Module, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's result with these tensors in place of its own; ``functional_call``, also for scripted parts."""
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        return run(module, Slots.of(places_of(module), values), values, args, kwargs)
    return functional_call(module, values, args, kwargs)


class _Scripted:
    """Tensors of a scripted module, which are no entries of a dictionary, as if they were."""

    def __init__(self, module: Any) -> None:
        self._slots = module._c

    def __getitem__(self, key: str) -> Any:
        return self._slots.getattr(key)

    def __setitem__(self, key: str, t: Tensor) -> None:
        self._slots.setattr(key, t)


def _held(module: nn.Module, kind: str) -> tuple[Any, list[tuple[str, Tensor]]]:
    """Where a submodule itself holds its parameters or buffers, and these."""
    held = getattr(module, kind)
    found = [(key, t) for key, t in held.items() if t is not None]
    return _Scripted(module) if isinstance(module, torch.jit.ScriptModule) else held, found


def holders(module: nn.Module, kind: str) -> Holders:
    """Where each parameter or buffer is held, under the first of its names: a submodule's dictionary, and the key.

    Reading from there sees replaced tensors and, unlike a walk over the modules, can be traced for all of them.
    """
    found: dict[int, tuple[str, Any, str]] = {}
    for prefix, submodule in module.named_modules():
        held, tensors = _held(submodule, kind)
        for key, t in tensors:
            found.setdefault(id(t), (f"{prefix}.{key}" if prefix else key, held, key))
    return {name: (held, key) for name, held, key in found.values()}


def places_of(module: nn.Module) -> Places:
    """For each name of a tensor all places that hold it, each once: name, a submodule's dictionary, and the key.

    ``functional_call`` would find shared tensors by itself, but where a submodule has two names it fills the same place
    twice, and then cannot put back what was there.
    """
    places: dict[int, list[tuple[str, Any, str]]] = {}
    for prefix, submodule in module.named_modules():  # each submodule under one name
        for held, tensors in (_held(submodule, "_parameters"), _held(submodule, "_buffers")):
            for key, t in tensors:
                places.setdefault(id(t), []).append((f"{prefix}.{key}" if prefix else key, held, key))
    names = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tuple(places[id(t)]) for name, t in names}
