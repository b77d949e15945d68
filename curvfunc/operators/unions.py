"""Products with the matrix of several processes' samples: each has that of its own, and they are summed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvfunc import losses
from curvfunc.operators.linearization import Product
from curvfunc.tensors.inputs import flatten_params
from curvfunc.tensors.processes import Processes, checksum
from curvfunc.tensors.samples import tensors_of

__all__ = ["Union", "union"]

Linearized = tuple[list[str], list[Tensor], Callable[[Sequence[Any]], Any], Product]


@dataclass(frozen=True)
class Union:
    """How a product is made of those of all processes; ``weight`` is this one's share in the scale of the union."""

    processes: Processes
    weight: float

    def __call__(self, vectors: Sequence[Tensor], product: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The product with the vectors, which have to be the same in all processes, as estimators with one seed draw them."""
        with self.processes.phase():
            told = ", ".join(f"{tuple(v.shape)} with checksum {checksum(v)}" for v in vectors)
        self.processes.agree({"the vector that is multiplied": told}, lambda name: "Seed what draws it in all of them alike.")
        with self.processes.phase():
            own = [t * self.weight for t in product()] if self.weight else [torch.zeros_like(v) for v in vectors]
        self.processes.exchange({})
        self.processes.sum(own)
        return own


def union(
    group: Any, matrix: Any, params: Any, y: Any, loss: losses.Loss, run: Callable[[], Linearized]
) -> tuple[Linearized, Union]:
    """What `linearize` returns, and how products are made of it together with the other processes.

    Args:
        group: All of them.
        matrix: What is multiplied with, linear in the scale of the loss.
        params: Its parameters.
        y: This process's targets.
        loss: The loss, whose mean has to divide by something known.
        run: Linearizes the model for this process's samples; not called if nothing of them counts.

    Raises:
        ValueError: If the processes do not ask for the same.
        NotImplementedError: If the scale of the union is not known.
        GroupError: If another process has failed.
    """
    processes = Processes(group)
    with processes.phase():
        names, leaves, rebuild = flatten_params(params)
        if not losses.has_normalizer(loss):
            raise NotImplementedError(
                "operators with group= know the scale of the union for cross-entropy, squared error and BCE with logits only. "
                "Use such a loss, or add up the products of the processes with weights of your own."
            )
        held = {name: checksum(t) for name, t in loss.tensors.items()}
        about = {"matrix": f"{matrix}", "loss_fn": f"{loss.name} {dict(loss.options)} {held}"}
        for name, p in zip(names, leaves, strict=True):
            about[f"parameter {name!r}"] = f"{p.dtype} {tuple(p.shape)} on {p.device.type} with checksum {checksum(p)}"
        some = any(len(t) for t in tensors_of(y)[:1] if t.ndim)
        mass = float(losses.normalizer(loss, y)) if some else 0.0
    processes.agree(about)
    masses = [answer["mass"] for answer in processes.exchange({"mass": mass})]
    if not any(masses):
        raise ValueError("no process of the group has samples that count; at least one is needed.")
    with processes.phase():
        found = run() if mass else (names, leaves, rebuild, _nothing)
    processes.exchange({})
    return found, Union(processes, (1.0 if losses.is_sum(loss) else mass / sum(masses)) if mass else 0.0)


def _nothing(indices: Sequence[int], vectors: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    raise AssertionError("there is nothing to multiply with")
