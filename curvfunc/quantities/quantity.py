"""What can be asked for: a cotangent, contractions, and how the parts become the result."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar

from curvfunc.engine.clipping import ClippedLossGradient
from curvfunc.engine.cotangents import (
    AveragedHessian,
    EmpiricalRoot,
    FullHessian,
    LossGradient,
    LossRoot,
    OutputEntries,
)
from curvfunc.quantities.laws import Law

__all__ = ["GaussNewton", "Quantity", "Sampled"]

Cotangent = LossGradient | ClippedLossGradient | LossRoot | EmpiricalRoot | OutputEntries | FullHessian | AveragedHessian

LOSS_GRADIENT = LossGradient()


@dataclass(frozen=True)
class Quantity:
    """What `compute` can be asked for; results are one per parameter unless ``forward`` is set.

    ``laws`` says how results of disjoint sets of samples merge; where there are several contractions, how those of each do,
    from which ``finish`` makes the result of the union.
    """

    contractions: ClassVar[tuple[str, ...]] = ()
    laws: ClassVar[tuple[Law, ...]] = ()
    forward: ClassVar[str | None] = None
    whole_batch: ClassVar[bool] = False
    averages: ClassVar[bool] = False  # over samples, so that there has to be one
    entrywise: ClassVar[bool] = False  # whether ``finish`` makes each entry of its parts' entries there, so that shards will do
    of_one_column: ClassVar[bool] = False  # whether ``finish`` takes the only column from gradients of samples, by index
    of_entries: ClassVar[bool] = False  # of each sample's output: axis 1 of a result, which gets the shape of the output

    @property
    def cotangent(self) -> Cotangent:
        """What is backpropagated."""
        return LOSS_GRADIENT

    def lead(self, columns: int, samples: int) -> tuple[int, ...] | None:
        """Axes before the parameter's in a result that is formed in the caller's memory; None where it is copied there."""
        return None

    def finish(self, samples: int, *parts: Any) -> Any:
        """The result for one parameter from its contractions, for that many samples."""
        return parts[0]

    def finish_all(self, samples: int, *parts: Sequence[Any]) -> list[Any]:
        """The results for all parameters."""
        if type(self).finish is Quantity.finish:
            return [*parts[0]]
        return [self.finish(samples, *own) for own in zip(*parts, strict=True)]

    def operands(self, names: Sequence[str]) -> dict[str, Sequence[Any]]:
        """Data for each of the named parameters, of contractions that take some."""
        return {}

    def tensors(self) -> Any:
        """Tensors that the quantity depends on besides the `key`, a pytree; they enter compiled code as arguments."""
        return None

    def key(self) -> tuple[Any, ...]:
        """The constructor's arguments."""
        return tuple([getattr(self, f.name) for f in fields(self)])

    @classmethod
    def of(cls, key: tuple[Any, ...], tensors: Any) -> "Quantity":
        """The quantity from its `key` and its `tensors`."""
        return cls(*key)


@dataclass(frozen=True)
class Sampled(Quantity):
    """A quantity that is exact or an estimate from draws."""

    mc_samples: int = 0

    def __post_init__(self) -> None:
        m = self.mc_samples
        if isinstance(m, bool) or not isinstance(m, int):
            raise TypeError(f"{type(self).__name__}: mc_samples must be an int, got {m!r} of type {type(m).__name__}.")
        if m < 0:
            raise ValueError(f"{type(self).__name__}: mc_samples must be 0 (exact) or positive, got {m}.")


@dataclass(frozen=True)
class GaussNewton(Sampled):
    """A quantity of the generalized Gauss-Newton matrix."""

    @property
    def cotangent(self) -> LossRoot:
        """Columns of a root of the loss Hessian."""
        return _root(self.mc_samples)


@cache
def _root(mc_samples: int) -> LossRoot:
    return LossRoot(mc_samples, fewest=not mc_samples)
