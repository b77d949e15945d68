"""Decompositions as what the gradients of parameters are measured by."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from curvfunc.kronecker.decomposition import Decomposition, check_of, hidden, key_of, of_key
from curvfunc.quantities.quantity import Quantity
from curvfunc.uses.metrics import Metric

__all__ = ["MeasuredQuantity", "metrics"]


def metrics(decomposition: Decomposition, names: Sequence[str]) -> list[Metric | None]:
    """The metric of each parameter; None for a bias that is part of its weight's block."""
    d = decomposition
    check_of(d, names)
    found = {
        block.names[0]: Metric(bases, values, block.bias is not None, block.weight)
        for block, bases, values in zip(d.blocks, d.bases, d.values, strict=True)
    }
    return [found.get(name) for name in names]


@dataclass(frozen=True, eq=False)
class MeasuredQuantity(Quantity):
    """A quantity of gradients in the metric of an inverse."""

    inverse: Decomposition = field(kw_only=True)

    def metrics(self, names: Sequence[str]) -> list[Metric | None]:
        """The metric of each parameter."""
        found = metrics(self.inverse, names)
        for block, values in zip(self.inverse.blocks, self.inverse.values, strict=True):
            if not hidden(values) and not (values > 0).all():
                raise ValueError(
                    f"inverse has eigenvalues that are not positive for parameter {block.names[0]!r}, which the inverse of a "
                    "damped curvature has not. Pass curvfunc.kronecker.inverse(decomposition, damping=...)."
                )
        return found

    def operands(self, names: Sequence[str]) -> dict[str, Sequence[Any]]:
        """The metric of each parameter."""
        return {self.contractions[0]: self.metrics(names)}

    def tensors(self) -> Any:
        """Bases and eigenvalues."""
        return self.inverse.bases, self.inverse.values

    def key(self) -> tuple[Any, ...]:
        """All but these."""
        return key_of(self.inverse)

    @classmethod
    def of(cls, key: tuple[Any, ...], tensors: Any) -> "MeasuredQuantity":
        """From both."""
        return cls(inverse=of_key(key, *tensors))
