"""Scores of samples as quantities, which `curvfunc.compute` and `curvfunc.accumulate` take."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from curvfunc.kronecker.metrics import MeasuredQuantity
from curvfunc.quantities.laws import Joined, Refused
from curvfunc.uses.metrics import Measured

__all__ = ["Influence", "Queries", "SelfInfluence"]


@dataclass(frozen=True, eq=False)
class SelfInfluence(MeasuredQuantity):
    """gₙᵀ (B + δ)⁻¹ gₙ, [N] per parameter: the part of its block; a bias that is joined to its weight has zeros.

    Attributes:
        inverse: (B + δ)⁻¹, from `curvfunc.kronecker.inverse`.
    """

    contractions = ("metric_norms",)
    laws = (Joined(2),)


@dataclass(frozen=True, eq=False)
class Queries(MeasuredQuantity):
    """Gradients in the eigenbasis, as what they are sums of outer products of: g [M, s, r] and x [M, s, c] per parameter.

    Attributes:
        inverse: (B + δ)⁻¹, from `curvfunc.kronecker.inverse`.
    """

    contractions = ("measured",)
    laws = (Refused("they are the gradients of a few samples, which fit into one. Pass all of them to influence.queries"),)

    def finish(self, samples: int, *parts: Measured) -> tuple[Tensor, Tensor]:
        """Both, of the only column."""
        (m,) = parts
        return m.g[0, :, 0].clone(), m.x[:, 0].clone()


@dataclass(frozen=True, eq=False)
class Influence(MeasuredQuantity):
    """gₙᵀ (B + δ)⁻¹ qₘ with the gradients qₘ of a query, [N, M] per parameter, as `SelfInfluence`.

    Attributes:
        inverse: (B + δ)⁻¹, from `curvfunc.kronecker.inverse`.
        queries: From `queries`, with the same inverse: (g [M, s, r], x [M, s, c]) per parameter.
    """

    queries: Any = field(kw_only=True, repr=False)

    contractions = ("metric_products",)
    laws = (Joined(1),)

    def operands(self, names: Sequence[str]) -> dict[str, Sequence[Any]]:
        """Metric and query of each parameter."""
        found = self.metrics(names)
        pairs = self._pairs()
        sizes = {(len(g), len(x)) for g, x in pairs}
        fit = len(sizes) == 1 and all(
            m is None or g.shape[2] * x.shape[2] == m.values.numel() for m, (g, x) in zip(found, pairs, strict=True)
        )
        if not fit:
            raise ValueError(
                "queries do not fit the inverse: they are of other samples for each parameter, or in another eigenbasis. Make "
                "them by influence.queries with this inverse."
            )
        return {"metric_products": [(m, g, x) for m, (g, x) in zip(found, pairs, strict=True)]}

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(g, x) for g, x in self.inverse.structure.flatten("queries", self.queries)]

    def tensors(self) -> Any:
        """Those of the inverse, and the query's."""
        return *super().tensors(), tuple(self._pairs())

    @classmethod
    def of(cls, key: tuple[Any, ...], tensors: Any) -> "Influence":
        """From both."""
        *own, pairs = tensors
        plain = MeasuredQuantity.of(key, tuple(own))
        return cls(inverse=plain.inverse, queries=dict(zip(plain.inverse.structure.names, pairs, strict=True)))
