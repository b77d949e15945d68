"""Inner products of per-sample gradients and of the columns of the GGN's root.

With the per-sample gradients as the rows of a matrix, these are its Gram matrices. They are small where the parameters
are many, and they have the non-zero eigenvalues of the matrices that are large: `ggn_gram` those of the GGN,
`batch_dot` those of the empirical Fisher Σₙ gₙ gₙᵀ. Arguments are those of `curvfunc.quantities`.

A layer's gradients are sums of outer products, ⟨Σ_s g_s x_sᵀ, Σ_t h_t y_tᵀ⟩ = Σ_st ⟨g_s, h_t⟩ ⟨x_s, y_t⟩, so they need
not be formed; where forming them takes fewer operations, it happens for a part of the parameter at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch.nn.functional as F
from torch import Generator, Tensor

from curvfunc.engine.cotangents import LossRoot
from curvfunc.quantities.call import compute
from curvfunc.quantities.laws import Refused
from curvfunc.quantities.quantity import GaussNewton, Quantity

__all__ = ["BatchDot", "GGNGram", "batch_dot", "batch_dot_total", "ggn_gram", "ggn_gram_total"]

Model = Callable[[Any, Any], Tensor]
LossFunction = Callable[[Tensor, Any], Tensor]
Indices = Sequence[int] | Tensor

_PAIRS = Refused(
    "it holds inner products of samples with each other, of which those between two batches are in neither. Use BatchGrad or "
    "SqrtGGN, and multiply"
)


@dataclass(frozen=True)
class BatchDot(Quantity):
    """Inner products ⟨gₙ, gₘ⟩ of the per-sample gradients, [N, N]."""

    contractions = ("gram",)
    laws = (_PAIRS,)

    def finish(self, samples: int, *parts: Tensor) -> Tensor:
        """Of the only column."""
        return parts[0][0, :, 0]


@dataclass(frozen=True)
class GGNGram(GaussNewton):
    """Inner products of the columns of the GGN's root, [V, N, V, N]."""

    contractions = ("gram",)
    laws = (_PAIRS,)

    @property
    def cotangent(self) -> LossRoot:
        """All columns, since the matrix has a row for each."""
        return LossRoot(self.mc_samples)


def batch_dot(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Inner products of the per-sample gradients, ⟨gₙ, gₘ⟩ with gₙ = R ∇ℓ(fₙ, yₙ), for each parameter.

    The diagonal is `curvfunc.batch_l2`. Over all parameters: `batch_dot_total`.

    Returns:
        [N, N] per parameter. Arguments: see `curvfunc.quantities`.
    """
    return compute(model_fn, params, X, y, BatchDot(), loss_fn=loss_fn, subsampling=subsampling, chunk_size=chunk_size)


def batch_dot_total(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Inner products of the per-sample gradients with respect to all parameters together: the sum of `batch_dot`.

    Returns:
        [N, N]. Arguments: see `curvfunc.quantities`.
    """
    return _sum(batch_dot(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling, chunk_size=chunk_size))


def ggn_gram(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Gram matrix of the GGN's root, ⟨s[v,n], s[w,m]⟩ with s = `curvfunc.sqrt_ggn`, for each parameter.

    As a matrix [V N, V N] it has the non-zero eigenvalues of the parameter's diagonal block. For those of the whole GGN
    use `ggn_gram_total`. The outputs' cotangents of all V columns are held at once; ``chunk_size`` bounds what else is.

    Returns:
        [V, N, V, N] per parameter; V is the number of outputs of one sample, or ``mc_samples``. Arguments: see
        `curvfunc.quantities`.

    Raises:
        ValueError: As `curvfunc.diag_ggn`.

    References:
        Dangel, Tatzel, Hennig 2022, "ViViT: Curvature access through the generalized Gauss-Newton's low-rank
        structure".
    """
    return compute(
        model_fn,
        params,
        X,
        y,
        GGNGram(mc_samples),
        loss_fn=loss_fn,
        subsampling=subsampling,
        generator=generator,
        chunk_size=chunk_size,
    )


def ggn_gram_total(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Gram matrix of the root of the whole GGN: the sum of `ggn_gram`, with the non-zero eigenvalues of the GGN.

    Returns:
        [V, N, V, N]. Arguments: see `curvfunc.quantities`.

    Raises:
        ValueError: As `curvfunc.diag_ggn`.
    """
    return _sum(
        ggn_gram(
            model_fn,
            params,
            X,
            y,
            loss_fn=loss_fn,
            mc_samples=mc_samples,
            subsampling=subsampling,
            generator=generator,
            chunk_size=chunk_size,
        )
    )


def _sum(tree: Any) -> Tensor:
    first, *others = optree.tree_leaves(tree)
    total: Tensor = sum(others, first)
    return total
