"""How results of disjoint sets of samples become that of their union.

The loss is L = R Σₙ ℓₙ, and a result is homogeneous in R: `Summed.degree` is 1 for a gradient, 2 for its square, 1/2 for a root
of the GGN. With a mean, R = 1/W, where W is what the mean divides by: the number of samples, of their outputs' entries, or the
total weight of the labels. So results of parts have other scales than that of the union, and each part counts with (W_part /
W)^degree in it. With a sum, R = 1 for all of them.
"""

from dataclasses import dataclass

__all__ = ["Averaged", "Joined", "Law", "Refused", "Summed"]


@dataclass(frozen=True)
class Summed:
    """Σ over samples, homogeneous in R: Σ_parts (W_part / W)^degree part."""

    degree: float


@dataclass(frozen=True)
class Averaged:
    """(1/N) Σ over samples, without R: Σ_parts (N_part / N) part."""


@dataclass(frozen=True)
class Joined:
    """Results for each sample, homogeneous in R: (W_part / W)^degree part, one behind the other along ``axis``."""

    degree: float
    axis: int = 0


@dataclass(frozen=True)
class Refused:
    """No function of the parts' results, and why."""

    why: str


Law = Summed | Averaged | Joined | Refused
