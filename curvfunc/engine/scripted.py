"""Scripted functions and modules, where torch has their derivatives wrong: under the caller's vmap, grad and jvp."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["refused"]

_KINDS: tuple[Any, ...] = (torch._C.ScriptFunction, torch._C.ScriptMethod)
_CALLS = [kind.__call__ for kind in _KINDS]
_LOCK, _DEPTH = threading.Lock(), [0]


class _Here(threading.local):
    refuses = 0


_HERE = _Here()


@contextmanager
def refused() -> Iterator[None]:
    """Have scripted and traced code raise in this thread.

    A backward pass through what the interpreter specialized under several levels of torch.func may be that of another one.
    """
    with _LOCK:
        _DEPTH[0] += 1
        for kind, call in zip(_KINDS, _CALLS, strict=True):
            kind.__call__ = _watched(call)
    _HERE.refuses += 1
    try:
        yield
    finally:
        _HERE.refuses -= 1
        with _LOCK:
            _DEPTH[0] -= 1
            if not _DEPTH[0]:
                for kind, call in zip(_KINDS, _CALLS, strict=True):
                    kind.__call__ = call


def _watched(call: Any) -> Any:
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _HERE.refuses:
            raise ValueError(
                f"the model calls scripted or traced code ({self.name!r}), whose derivatives are not reliable under "
                "torch.vmap, torch.func.grad and jvp. Use the function or module that it was made of, or loop over parameters "
                "and differentiate by torch.autograd."
            )
        return call(self, *args, **kwargs)

    return watched
