"""A run that is stopped goes on from a file: its state, what it was a run of, and where the random numbers stood."""

import ctypes
import functools
import hashlib
import os
import random
import sys
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from curvfunc import losses
from curvfunc.engine.model import ModelFunction

__all__ = ["Digest", "RandomState", "check_same", "described", "description", "load", "save"]

VERSION = 1


class Digest:
    """A hash of tensors, one after the other."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, tensors: Iterable[Tensor]) -> "Digest":
        """Go on with these tensors."""
        for t in tensors:
            dense = t.detach() if t.layout is torch.strided else t.detach().to_dense()
            own = dense.resolve_conj().resolve_neg().cpu().contiguous()
            self._hash.update(f"{own.dtype}{tuple(own.shape)}".encode())
            if own.numel():
                self._hash.update((ctypes.c_char * own.nbytes).from_address(own.data_ptr()))
        return self

    def text(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


class RandomState:
    """Where the generators stand: of torch, on the CPU and on these devices, of Python and numpy, and one of the caller's."""

    def __init__(self, generator: Generator | None, devices: Iterable[torch.device]) -> None:
        """Of these generators."""
        self.generator = generator
        self.cuda = sorted({d.index or 0 for d in devices if d.type == "cuda"})

    def read(self) -> dict[str, Any]:
        """The states, as tensors and numbers."""
        found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        for index in self.cuda:
            found[f"cuda:{index}"] = torch.cuda.get_rng_state(index)
        if self.generator is not None:
            found["generator"] = self.generator.get_state()
        if "numpy" in sys.modules:
            name, keys, *rest = sys.modules["numpy"].random.get_state()
            found["numpy"] = (name, keys.tolist(), *rest)
        return found

    def write(self, states: dict[str, Any]) -> None:
        """Have the same numbers drawn again as after `read`."""
        torch.set_rng_state(states["torch"].cpu())
        random.setstate(states["python"])
        for index in self.cuda:
            if f"cuda:{index}" in states:
                torch.cuda.set_rng_state(states[f"cuda:{index}"].cpu(), index)
        if self.generator is not None:
            self.generator.set_state(states["generator"].cpu())
        if "numpy" in states:
            import numpy

            numpy.random.set_state(states["numpy"])


def description(
    model_fn: Any, params: Any, named: dict[str, Tensor], specs: Any, loss: losses.Loss, options: dict[str, Any]
) -> dict[str, str]:
    """What has to be the same for a run to go on, as text."""
    found = {
        "specs": str(specs),
        "parameters": f"{list(named)} {Digest().add(named.values()).text()}",
        "loss": described(loss),
        **{name: described(value) for name, value in options.items()},
    }
    if isinstance(model_fn, ModelFunction):
        modes = "".join(str(int(m.training)) for m in model_fn.module.modules())
        found["model"] = f"{described(model_fn.state(params))}, training {modes}"
    else:
        found["model"] = described(model_fn)
    return found


def described(value: Any) -> str:
    """A value, as far as it is told by its name, its code and the numbers and tensors that it holds."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, Tensor):
        return Digest().add([value]).text()
    if isinstance(value, losses.Loss):
        return described((value.name or value.fn, dict(value.options), value.tensors))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {described(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(described, value)) + ")"
    if isinstance(value, functools.partial):
        return described((value.func, value.args, value.keywords))
    if isinstance(value, types.FunctionType):
        captured = [cell.cell_contents for cell in value.__closure__ or ()]
        held = described((value.__code__, captured, value.__defaults__, value.__kwdefaults__))
        return f"{value.__module__}.{value.__qualname__} {held}"
    if isinstance(value, types.CodeType):
        code = hashlib.blake2b(value.co_code, digest_size=8).hexdigest()
        return f"{code} {described((value.co_names, value.co_consts))}"
    if isinstance(value, nn.Module):
        plain = {k: v for k, v in vars(value).items() if isinstance(v, bool | int | float | str)}
        children = dict(value.named_children())
        return type(value).__qualname__ + described((plain, dict(value.state_dict()), children))
    return type(value).__qualname__ + str(getattr(value, "__qualname__", ""))


def check_same(path: Any, before: dict[str, str], now: dict[str, str]) -> None:
    """Raise unless a checkpoint is of this run."""
    for name in now:
        if before.get(name) != now[name]:
            raise ValueError(
                f"checkpoint {os.fspath(path)} is of another run: {name} differ, {before.get(name)!r} there and {now[name]!r} "
                "here. Take another path, or remove the file to start anew."
            )


def save(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a checkpoint: at each time there is a whole one at ``path``, the last or the one before."""
    path = os.fspath(path)
    with open(f"{path}.tmp", "wb") as file:
        torch.save({"version": VERSION, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def load(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """A checkpoint, None where there is no file."""
    if not os.path.exists(path):
        return None
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
        known = content["version"] == VERSION
    except Exception as error:  # whatever a file of another kind makes torch raise
        raise ValueError(
            f"{os.fspath(path)} is no checkpoint of accumulate: {error} Take another path, or remove the file."
        ) from error
    if not known:
        raise ValueError(f"checkpoint {os.fspath(path)} is of another version of curvfunc. Remove it to start anew.")
    return content
