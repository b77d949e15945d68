"""Products with the matrix of several processes' samples: each has that of its own, and they are summed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvfunc import losses
from curvfunc.operators.linear_operators import LinearOperator, Source
from curvfunc.operators.matrices import Space
from curvfunc.tensors.inputs import flatten_params
from curvfunc.tensors.processes import Processes, checksum
from curvfunc.tensors.samples import tensors_of

__all__ = ["Union", "union"]


@dataclass(frozen=True, eq=False)
class Union:
    """Products that are the sums of those of all processes.

    Attributes:
        processes: All of them.
        source: This one's matrix; None if it has no samples that count.
        weight: Its share in the scale of the union.
    """

    processes: Processes
    source: Source | None
    weight: float

    def multiply(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The product with the vectors, which have to be the same in all processes, as estimators with one seed draw them."""
        with self.processes.phase():
            told = ", ".join(f"{tuple(v.shape)} with checksum {checksum(v)}" for v in vectors)
        self.processes.agree({"the vector that is multiplied": told}, lambda name: "Seed what draws it in all of them alike.")
        with self.processes.phase():
            own = [torch.zeros_like(v) for v in vectors]
            if self.source is not None:
                own = [t * self.weight for t in self.source.multiply(vectors)]
        self.processes.exchange({})
        self.processes.sum(own)
        return own


def union(
    caller: str, group: Any, matrix: Any, params: Any, y: Any, loss_fn: Any, run: Callable[[], LinearOperator]
) -> LinearOperator:
    """The operator of all processes' samples.

    Args:
        caller: Function that makes it.
        group: All of them.
        matrix: What is multiplied with, linear in the scale of the loss.
        params: Its parameters.
        y: This process's targets.
        loss_fn: The loss, whose mean has to divide by something known.
        run: Makes the operator of this process's samples; not called if nothing of them counts.

    Raises:
        ValueError: If the processes do not ask for the same.
        NotImplementedError: If the scale of the union is not known.
        GroupError: If another process has failed.
    """
    processes = Processes(group)
    with processes.phase():
        loss, space = losses.normalize(loss_fn), Space.of(caller, params)
        leaves = flatten_params(params)[1]
        if not losses.has_normalizer(loss):
            raise NotImplementedError(
                "operators with group= know the scale of the union for cross-entropy, squared error and BCE with logits only. "
                "Use such a loss, or add up the products of the processes with weights of your own."
            )
        held = {name: checksum(t) for name, t in loss.tensors.items()}
        about = {"matrix": f"{matrix}", "loss_fn": f"{loss.name} {dict(loss.options)} {held}"}
        for name, p in zip(space.names, leaves, strict=True):
            about[f"parameter {name!r}"] = f"{p.dtype} {tuple(p.shape)} on {p.device.type} with checksum {checksum(p)}"
        some = any(len(t) for t in tensors_of(y)[:1] if t.ndim)
        mass = float(losses.normalizer(loss, y)) if some else 0.0
    processes.agree(about)
    masses = [answer["mass"] for answer in processes.exchange({"mass": mass})]
    if not any(masses):
        raise ValueError("no process of the group has samples that count; at least one is needed.")
    with processes.phase():
        source = run()._source if mass else None
    processes.exchange({})
    return LinearOperator.of(space, Union(processes, source, 1.0 if losses.is_sum(loss) else mass / sum(masses)))
