"""Gradients beside curvature."""

from typing import Any

import optree
import torch
from torch import Tensor

from curvfunc.diagnostics.moments import check_number, check_samples, listed, scale, total, with_shared
from curvfunc.tensors.precision import at_least_float32

__all__ = ["alignment", "effective_dimension", "trace_ratio"]


def effective_dimension(eigenvalues: Any, damping: float) -> Tensor:
    """How many directions the data determines, Σᵢ λᵢ / (λᵢ + α) = tr(A (A + α)⁻¹).

    Args:
        eigenvalues: λ ≥ 0, a tensor [k], or a pytree of tensors of any shapes which all count: those of `curvfunc.eigsh` or
            ``torch.linalg.eigvalsh`` of `ggn_gram`'s matrix (which has all that are not zero), or a diagonal in their place.
        damping: α > 0, the precision of a prior on the scale of the curvature.

    Returns:
        A scalar from 0 to the number of eigenvalues.

    Raises:
        TypeError: If the damping is no number.
        ValueError: For eigenvalues that are negative beyond rounding (the Hessian's, say: take the GGN's), or none; for a
            damping that is not positive.

    References:
        MacKay 1992, "Bayesian interpolation"; Maddox, Benton, Wilson 2020, "Rethinking parameter counting in deep
        models: effective dimensionality revisited".

    Example:
        >>> diagnostics.effective_dimension(torch.tensor([0.0, 1.0, 3.0]), damping=1.0)
        tensor(1.2500)
    """
    check_number("damping", damping)
    leaves = [at_least_float32(t).reshape(-1) for t in optree.tree_leaves(eigenvalues)]
    if not leaves:
        raise ValueError("eigenvalues holds no tensor.")
    found = torch.cat([t.to(leaves[0].device) for t in leaves])
    rounding = -(torch.finfo(found.dtype).eps ** 0.5) * found.abs().amax() if found.numel() else 0.0
    if bool((found < rounding).any()):
        raise ValueError(
            f"the smallest eigenvalue is {float(found.min()):.3g}; an effective dimension is that of a matrix without negative "
            "ones, such as the GGN."
        )
    found = found.clamp(min=0)
    return (found / (found + damping)).sum()


@with_shared
def trace_ratio(second_moment: Any, diagonal: Any, samples: int, *, reduction: str = "mean") -> Tensor:
    """Gradient noise over curvature, tr(C) / tr(H) with C = (1/N) Σₙ ∇ℓₙ ∇ℓₙᵀ and H that of the mean loss.

    About 1 where the model is the one that made the data; larger where it overfits or is another.

    Args:
        second_moment: Result of `SumGradSquared`, [*shape], or of `BatchL2`, [N], per parameter.
        diagonal: Result of `DiagGGN` or `DiagHessian`, [*shape] per parameter.

    Returns:
        A scalar.

    References:
        Thomas et al. 2020, "On the interplay between noise and curvature and its effect on optimization and generalization",
        as an estimate of Takeuchi's criterion.

    Example:
        >>> diagnostics.trace_ratio({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 3.0])}, samples=4)
        tensor(2.)
    """
    check_samples("samples", samples)
    names, (moment,) = listed(second_moment=second_moment)
    own, (curvature,) = listed(diagonal=diagonal)
    if own != names:
        raise ValueError(f"diagonal has {own}, and second_moment has {names}; both need the same parameters in the same order.")
    rate = scale(samples, reduction)  # of C rate² / N, of H rate / N
    return rate * total([t.sum() for t in moment]) / total([t.sum() for t in curvature])


@with_shared
def alignment(grad: Any, eigenvectors: Tensor) -> Tensor:
    """How much of the gradient lies along each eigenvector, ⟨g, uᵢ⟩² / ‖g‖².

    The sum is the part of it in the space of all of them: of the top eigenvectors of the Hessian, as many as classes, it is
    soon close to 1 in training.

    Args:
        eigenvectors: u, [P, k], orthonormal columns, as `curvfunc.eigsh` returns them.

    Returns:
        [k]; NaN for a gradient of zero.

    References:
        Gur-Ari, Roberts, Dyer 2018, "Gradient descent happens in a tiny subspace".

    Example:
        >>> diagnostics.alignment({"w": torch.tensor([3.0, 4.0])}, torch.eye(2))
        tensor([0.3600, 0.6400])
    """
    _, (leaves,) = listed(grad=grad)
    g = torch.cat([t.reshape(-1).to(leaves[0]) for t in leaves])
    if not isinstance(eigenvectors, Tensor) or eigenvectors.ndim != 2 or len(eigenvectors) != len(g):
        got = tuple(eigenvectors.shape) if isinstance(eigenvectors, Tensor) else type(eigenvectors).__name__
        raise ValueError(f"eigenvectors must be [P, k] with P = {len(g)}, the number of the gradient's entries; got {got}.")
    return (g @ eigenvectors.to(g)).square() / g.square().sum()
