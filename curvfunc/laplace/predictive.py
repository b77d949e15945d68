"""What outputs are uncertain by: the covariance of the model, linearized in its parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
from torch import Tensor

from curvfunc import losses
from curvfunc.engine.cotangents import OutputEntries
from curvfunc.kronecker.metrics import MeasuredQuantity
from curvfunc.laplace.posterior import RAISED, SHARED, Posterior, covariance
from curvfunc.quantities.call import compute
from curvfunc.quantities.laws import Joined
from curvfunc.tensors.docstrings import documented
from curvfunc.uses.metrics import Measured, products

__all__ = ["FunctionalVariance", "functional_variance"]


@dataclass(frozen=True, eq=False)
class FunctionalVariance(MeasuredQuantity):
    """Jₙ (K + δ)⁻¹ Jₙᵀ, [N, C, C] per parameter for C output entries: the part of its block; a joined bias has zeros.

    Attributes:
        inverse: (K + δ)⁻¹, from `covariance`.
    """

    contractions = ("measured",)
    laws = (Joined(0),)
    cotangent = OutputEntries()

    def finish(self, samples: int, *parts: Measured) -> Tensor:
        """Products of the rows of each sample's Jacobian."""
        return products(parts[0])


@documented(SHARED, RAISED)
def functional_variance(
    model_fn: Callable[[Any, Any], Tensor],
    X: Any,
    posterior: Posterior,
    prior_precision: float | Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Covariance of the outputs of the linearized model, Jₙ (K + δ)⁻¹ Jₙᵀ, whose mean is the model's output.

    No Jacobian is formed where parameters are used at one position: with cotangents g̃ of the output's entries and inputs x̃,
    both in the eigenbasis, an entry is Σ_rc g̃_r g̃'_r x̃²_c / (Λ_rc + δ). Elsewhere it is, some of its rows at a time.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, that of the posterior.
        X: Input, a tensor [N, ...] or a pytree of tensors with leading sample axis N.
        chunk_size: Number of entries that are backpropagated together; by default chosen by memory.

    Returns:
        [N, C, C] for C entries of one sample's output, in the order of its flattened axes.

    Raises:
        ValueError: If the posterior is of another model.

    References:
        Immer, Korzepa, Bauer 2021, "Improving predictions of Bayesian neural nets via local linearization".

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> posterior = laplace.fit(model_fn, params, [(torch.randn(8, 4), torch.arange(8) % 3)])
        >>> laplace.functional_variance(model_fn, torch.randn(2, 4), posterior, prior_precision=1.0).shape
        torch.Size([2, 3, 3])
    """
    spec = FunctionalVariance(inverse=covariance(posterior, prior_precision))
    found = compute(model_fn, posterior.mean, X, X, spec, loss_fn=losses.no_loss, chunk_size=chunk_size)
    first, *others = optree.tree_leaves(found)
    total: Tensor = sum(others, first)
    return total
