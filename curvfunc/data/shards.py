"""Parameters that are DTensors: whole while a model runs with them, and results in shards like theirs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvfunc.engine.model import ModelFunction
from curvfunc.tensors.inputs import flatten_params
from curvfunc.tensors.processes import Processes

__all__ = ["Shards", "is_sharded"]


def is_sharded(p: Any) -> bool:
    """Whether it is a DTensor."""
    return isinstance(p, Tensor) and hasattr(p, "full_tensor") and hasattr(p, "placements")


class Shards:
    """How the parameters are sharded over the processes of a group."""

    def __init__(self, model_fn: Any, params: Any, processes: Processes) -> None:
        """Look at the parameters, and at those that stay fixed.

        Raises:
            ValueError: If they are sharded over other processes than those of the group.
        """
        self.leaves: list[Any]
        self.names, self.leaves, self.rebuild = flatten_params(params, sharded=processes.group is not None)
        self.model_fn, self.params, self.processes = model_fn, params, processes
        self.fixed: dict[str, Any] = {}
        if processes.group is not None and isinstance(model_fn, ModelFunction) and isinstance(params, dict):
            model_fn.refresh()
            self.fixed = {name: p for name, p in model_fn.frozen(params).items() if is_sharded(p)}
        self.any = bool(self.fixed) or any(map(is_sharded, self.leaves))
        for name, p in [*zip(self.names, self.leaves, strict=True), *self.fixed.items()]:
            if is_sharded(p):
                self._check(name, p)

    def _check(self, name: str, p: Any) -> None:
        over = sorted(p.device_mesh.mesh.flatten().tolist())
        ours = [] if self.processes.group is None else sorted(dist.get_process_group_ranks(self.processes.group))
        if over != ours:
            raise ValueError(
                f"parameter {name!r} is sharded over ranks {over}, and the group has {ours}. Pass as group the processes that "
                "it is sharded over, each with samples of its own."
            )
        if any(place.is_partial() for place in p.placements):
            raise ValueError(f"parameter {name!r} is a DTensor of partial sums. Pass p.redistribute(placements=...) of it.")

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The parameters with all entries on each process, and those that stay fixed in their places in the module."""
        if not self.any:
            yield self.params
            return
        with self.processes.others():
            leaves: list[Any] = [p.detach().full_tensor() if is_sharded(p) else p for p in self.leaves]
            fixed = {name: p.full_tensor() for name, p in self.fixed.items()}
        with self.model_fn.holding(fixed) if fixed else nullcontext():
            yield self.rebuild(leaves)

    def plain(self, like: Any, whole: Sequence[int]) -> bool:
        """Whether a parameter is in shares of its first axis, in the order of ranks, which sums can be scattered into."""
        return (
            is_sharded(like)
            and tuple(whole) == tuple(like.shape)
            and like.device_mesh.ndim == 1
            and like.placements[0].is_shard(0)
            and type(like.placements[0]).__name__ == "Shard"
            and like.device_mesh.mesh.tolist() == dist.get_process_group_ranks(self.processes.group)
        )

    def placed(self, like: Any, value: Tensor) -> Tensor:
        """A result, or this process's share of it where it was scattered, as a DTensor in shards like the parameter's."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        mesh, placements = like.device_mesh, like.placements
        if self.plain(like, like.shape):
            stride = torch.empty(like.shape, device="meta").stride()
            return DTensor.from_local(value, mesh, placements, run_check=False, shape=like.shape, stride=stride)
        return distribute_tensor(value, mesh, placements, src_data_rank=None)
