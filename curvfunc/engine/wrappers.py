"""Modules that talk to other processes while they run, without what they say: a pass of ours is one process's own."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Talkers", "unwrapped"]

SHARDING = "torch.distributed.fsdp"


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that ``DistributedDataParallel`` wraps; one of ``fully_shard`` with its shards in place.

    Raises:
        TypeError: For parameters that are flattened together, of which no one knows what they are here.
    """
    while isinstance(module, DistributedDataParallel):
        module = module.module
    if SHARDING in sys.modules:
        for name, m in module.named_modules():
            kind = type(m)
            if kind.__name__ == "FullyShardedDataParallel" and kind.__module__.startswith(SHARDING):
                raise TypeError(
                    f"{name or 'the module'} is wrapped in FullyShardedDataParallel, which flattens parameters together. Use "
                    "torch.distributed.fsdp.fully_shard instead, which keeps each parameter."
                )
            if isinstance(m, sys.modules[SHARDING].FSDPModule):  # its own forward pass may have left the whole ones there
                m.reshard()
    return module


class Talkers:
    """What talks to other processes in a model: inner ``DistributedDataParallel``, and hooks of ``fully_shard``."""

    def __init__(self, modules: list[nn.Module]) -> None:
        """Look through ``modules``."""
        self.inner = [m for m in modules if isinstance(m, DistributedDataParallel)]
        self.hooked = []
        if SHARDING in sys.modules:
            self.hooked = [
                held
                for m in modules
                if isinstance(m, sys.modules[SHARDING].FSDPModule)
                for held in (m._forward_pre_hooks, m._forward_hooks)
            ]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.inner or self.hooked)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Have them only compute."""
        hooks: list[tuple[dict[int, Callable[..., Any]], dict[int, Callable[..., Any]]]] = []
        try:
            for m in self.inner:
                m.__dict__["forward"] = m.module.__call__
            for held in self.hooked:
                hooks.append((held, dict(held)))
                for key, hook in hooks[-1][1].items():
                    if getattr(hook, "__module__", "").startswith(SHARDING):
                        del held[key]
            yield
        finally:
            for m in self.inner:
                m.__dict__.pop("forward", None)
            for held, before in reversed(hooks):
                held.clear()
                held.update(before)
