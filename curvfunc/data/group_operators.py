"""Matrices of the samples of several processes: each multiplies with that of its own, and the products are summed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Generator, Tensor
from torch._C import _functorch

from curvfunc import losses
from curvfunc.data.passes import passes
from curvfunc.data.scales import Reduction, check_reduction, mass, observed
from curvfunc.data.unions import about, remedy
from curvfunc.operators.linear_operators import LinearOperator, Source
from curvfunc.operators.linearization import EmpiricalFisher, check_eager, eager
from curvfunc.operators.matrices import Space
from curvfunc.operators.one_batch import OneBatch
from curvfunc.tensors.inputs import flatten_params, read_batch
from curvfunc.tensors.precision import at_least_float32
from curvfunc.tensors.processes import Processes, hashed
from curvfunc.tensors.samples import tensors_of

__all__ = ["Part", "batch_part", "data_part", "group_operator"]


@dataclass(frozen=True, eq=False)
class Part:
    """What one process has.

    Attributes:
        source: The matrix of its samples, at their own scale; None if nothing of them counts.
        samples: How many they are.
        mass: What the loss divides by for them.
        kind: "sum" or "mean" for a loss of one's own, of which this is not known.
    """

    source: Source | None
    samples: int
    mass: float
    kind: Any = None


@dataclass(frozen=True, eq=False)
class Union:
    """Products that are the sums of those of all processes.

    Attributes:
        caller: Function that made the operator.
        processes: All of them.
        source: This one's matrix, if it has one.
        weight: What it is multiplied by to have the scale of the union.
    """

    caller: str
    processes: Processes
    source: Source | None
    weight: float

    @eager
    def multiply(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The product with vectors [K, *shape], which have to be the same in all processes."""
        with self.processes.phase():
            if _functorch.peek_interpreter_stack() is not None:
                raise NotImplementedError(
                    "an operator over a group sends messages to other processes, which torch.func cannot transform. Multiply "
                    "with all vectors at once: operator @ matrix [P, K]."
                )
            told = ", ".join(f"{tuple(v.shape)} with hash {hashed(v)}" for v in vectors)
            if self.source is None or not self.weight:
                own = [torch.zeros_like(at_least_float32(v)) for v in vectors]
            else:
                own = [at_least_float32(t) * self.weight for t in self.source.multiply(vectors)]
        self.processes.agree({"the vector that is multiplied": told}, lambda name: _SAME)
        self.processes.sum(own)
        return [t.to(v.dtype) for t, v in zip(own, vectors, strict=True)]

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.caller}: an operator over a group cannot be pickled or copied. Make it anew in its processes.")


_SAME = (
    "Seed what draws it in all of them alike; if they compute it on machines that round differently, broadcast it from one "
    "(torch.distributed.broadcast)."
)


@eager
def group_operator(
    caller: str,
    group: Any,
    make: Callable[[], Any],
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    loss_fn: Any,
    reduction: Reduction | None,
    part_of: Callable[[Any, Processes], Part],
) -> LinearOperator:
    """The operator of a matrix at all processes' samples.

    Args:
        caller: Function that makes it.
        group: All of them.
        make: Makes the matrix, or raises.
        model_fn: The model.
        params: Its parameters.
        loss_fn: The loss.
        reduction: How it reduces, if that is not known of it.
        part_of: What this process has of a matrix; called when all have asked for the same.

    Raises:
        ValueError: If they do not ask for the same, or there are no samples.
        GroupError: If another process has failed.
    """
    processes = Processes(group)
    with processes.phase():
        check_eager(caller)
        matrix, loss = make(), losses.normalize(loss_fn)
        check_reduction(loss, reduction)
        space = Space.of(caller, params)
        what = {"the matrix": f"{matrix}", "parameters' containers": f"{space.tree}"}
        same = about(what, loss, model_fn, params, *flatten_params(params)[:2], {"reduction": reduction})
    processes.agree(same, remedy)
    with processes.phase():
        part = part_of(matrix, processes)
    said = processes.exchange({"samples": part.samples, "mass": part.mass, "kind": part.kind})
    if not any(answer["samples"] for answer in said):
        raise ValueError(f"{caller}: there are no samples in any process of the group; at least one is needed.")
    kinds = {answer["kind"] for answer in said if answer["kind"] is not None}
    if len(kinds) > 1:
        raise ValueError(f"{caller}: loss_fn is a sum in some processes, and a mean in others. Pass reduction=.")
    whole = part.mass if losses.is_sum(loss) or "sum" in kinds else sum(answer["mass"] for answer in said)
    weight = (part.mass / whole) ** (2 if isinstance(matrix, EmpiricalFisher) else 1) if part.mass else 0.0
    return LinearOperator.of(space, Union(caller, processes, part.source, weight))


def data_part(given: tuple[Any, ...]) -> Part:
    """That of a data set, which may have no batches; ``given`` are the arguments of `passes`."""
    source = passes(*given)
    kind = source.reduction
    return Part(source, source.samples, sum(source.masses), kind if isinstance(kind, str) else None)


def batch_part(given: tuple[Any, ...], generator: Generator | None, reduction: Reduction | None) -> Part:
    """That of one batch, which may have no samples; ``given`` are the arguments of `OneBatch`."""
    X, y, loss_fn = given[4:7]
    loss, samples = losses.normalize(loss_fn), read_batch(X, y, None, may_be_empty=True).total
    known = losses.has_normalizer(loss)
    if not samples or (known and not losses.normalizer(loss, y)):
        return Part(None, samples, 0.0)
    source = OneBatch.of(given, generator)
    out = source.kept.out.detach()
    kind = reduction if known or reduction is not None else observed(loss, out, y, None, None)[0]
    total = float(mass(loss, kind, samples, out, y, tensors_of(y)[0]))
    return Part(source, samples, total, kind if isinstance(kind, str) else None)
