"""Random projections of per-sample gradients, from both sides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from curvfunc.quantities.call import compute
from curvfunc.quantities.laws import Joined
from curvfunc.quantities.quantity import Quantity
from curvfunc.tensors.docstrings import documented
from curvfunc.tensors.inputs import check_generator
from curvfunc.uses.projections import Sketch

__all__ = ["BatchProjection", "batch_projection"]


@dataclass(frozen=True)
class BatchProjection(Quantity):
    """P gₙ Qᵀ with random P and Q, [N, r_o * r_i] per parameter; see `batch_projection`.

    The matrices are those of this spec, for all batches and calls: what is to be compared takes the same one, or one with
    the same ``seed``.

    Attributes:
        rank: Rows of P and of Q, or one number for both; no more than the sides of the parameter have.
        generator: Source of the seed; the default generator if None. It is not kept.
        seed: What the matrices are made of, if it is known.
    """

    rank: int | tuple[int, int]
    generator: Generator | None = None
    seed: int | None = None

    contractions = ("projected",)
    laws = (Joined(1),)

    def __post_init__(self) -> None:
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank, self.rank)
        if len(ranks) != 2 or not all(isinstance(r, int) and not isinstance(r, bool) and r > 0 for r in ranks):
            raise ValueError(f"rank must be a positive int, or a pair of them, got {self.rank!r}.")
        check_generator(self.generator)
        if self.seed is None:
            device = "cpu" if self.generator is None else self.generator.device
            drawn = torch.randint(2**63 - 1, (), device=device, generator=self.generator)
            object.__setattr__(self, "seed", int(drawn))
        object.__setattr__(self, "rank", ranks)
        object.__setattr__(self, "generator", None)

    def operands(self, names: Sequence[str]) -> dict[str, Sequence[Any]]:
        """What each parameter's matrices are made of; the same, whichever others there are."""
        assert isinstance(self.rank, tuple)
        assert self.seed is not None
        return {"projected": [Sketch(self.rank, self.seed, crc32(name.encode())) for name in names]}

    def finish(self, samples: int, *parts: Tensor) -> Tensor:
        """Of the only column."""
        return parts[0][0]


@documented()
def batch_projection(
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    X: Any,
    y: Any,
    rank: int | tuple[int, int],
    *,
    loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    subsampling: Sequence[int] | Tensor | None = None,
    generator: Generator | None = None,
) -> Any:
    """Per-sample gradients between random matrices, P gₙ Qᵀ with E[Pᵀ P] = I and E[Qᵀ Q] = I: inner products are unbiased.

    gₙ is a matrix of the first axis of a parameter and all others; where that is a sum of outer products, so is the result, and
    the gradient is not formed. P and Q have random signs over the root of their number of rows. A side no longer than the
    rank is left as it is, and a parameter with one axis or none is projected from one side, to at most r_o * r_i entries.

    Args:
        rank: Rows r_o of P and r_i of Q, or one number for both.
        generator: Source of the seed. Results of different seeds cannot be compared: see `BatchProjection`.

    Returns:
        A pytree like ``params``, [N, r_o * r_i] per parameter.

    References:
        Choe et al. 2024, "What is your data worth to GPT? LLM-scale data valuation with influence functions", sec. 3 (LoGra).

    Example:
        >>> model_fn, params = functionalize(nn.Linear(40, 30))
        >>> influence.batch_projection(model_fn, params, torch.randn(8, 40), torch.arange(8), (3, 4))["weight"].shape
        torch.Size([8, 12])
    """
    spec = BatchProjection(rank, generator)
    return compute(model_fn, params, X, y, spec, loss_fn=loss_fn, subsampling=subsampling)
