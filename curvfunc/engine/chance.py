"""Whether a forward pass draws random numbers, as dropout does: then another one would be that of another function."""

import random
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Chance", "numpy_random"]


def numpy_random() -> Any:
    """``numpy.random``, or None; imported here, lest that happens between two looks at it: torch does so as it needs numpy."""
    return None if find_spec("numpy") is None else import_module("numpy").random


class Chance:
    """A context that notices draws: from the default generators of torch, from a generator of one's own, Python's and numpy's.

    Where torch only traces, no generator moves; there the operations say whether they draw.

    Attributes:
        drawn: Whether there were any, once the context is left.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Take the devices of ``tensors`` for those that the model runs on."""
        self.drawn = False
        self._devices = {t.device for t in tensors}
        self._modes = ExitStack()
        self._before: list[Any] = []

    def __enter__(self) -> "Chance":
        """Note where the generators stand."""
        self._before = [get() for get, _ in self._sources()]
        self._modes.enter_context(_OwnGenerators(self))
        if torch.compiler.is_compiling():
            self._modes.enter_context(_Draws(self))
        return self

    def __exit__(self, *_: Any) -> None:
        """Compare."""
        self._modes.close()
        now = [get() for get, _ in self._sources()]
        self.drawn |= not all(map(_same, self._before, now)) or len(now) > len(self._before)

    def undo(self) -> None:
        """Have the same numbers drawn again."""
        for (_, put), state in zip(self._sources(), self._before, strict=False):
            put(state)

    def _sources(self) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
        """How to read and to set the state of each generator; where torch only traces, these stand still."""
        if torch.compiler.is_compiling():
            return []
        found: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
            (torch.default_generator.get_state, torch.default_generator.set_state),
            (random.getstate, random.setstate),
        ]
        if (numpy := numpy_random()) is not None:
            found.append((numpy.get_state, numpy.set_state))
        for device in sorted(self._devices, key=str):
            if device.type == "cuda" and torch.cuda.is_initialized():
                generator = torch.cuda.default_generators[device.index or 0]
                found.append((generator.get_state, generator.set_state))
            elif device.type not in ("cpu", "meta", "cuda"):
                module = torch.get_device_module(device)
                found.append((module.get_rng_state, module.set_rng_state))
        return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


class _OwnGenerators(TorchFunctionMode):
    def __init__(self, chance: Chance) -> None:
        super().__init__()
        self.chance = chance

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, and note whether it has a generator."""
        if kwargs and kwargs.get("generator") is not None:
            self.chance.drawn = True
        return func(*args, **kwargs or {})


class _Draws(TorchDispatchMode):
    def __init__(self, chance: Chance) -> None:
        super().__init__()
        self.chance = chance

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, and note whether it draws."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.chance.drawn = True
        return func(*args, **kwargs or {})
