"""Linear systems with a symmetric positive definite matrix that is known by its products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["conjugate_gradients"]


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    tol: float,
    max_iterations: int,
    precondition: Callable[[Tensor], Tensor] | None,
    strict: bool,
) -> Tensor:
    """X with A X = B by preconditioned conjugate gradients, the columns of B [P, K] side by side.

    A column rests once its residual is at most ``tol`` times the norm of its right-hand side. Where the recursion says so of
    all columns, the residual is computed anew: what rounding has lost is found then, and the iteration starts again from there.

    Args:
        product: V ↦ A V on [P, K].
        b: Right-hand sides, [P, K].
        tol: Relative residual.
        max_iterations: Most products in all.
        precondition: An approximation of A⁻¹ on [P, K], symmetric positive definite.
        strict: Whether directions of negative curvature, and an end before convergence, are errors; else a column rests
            where it is.

    Raises:
        ArithmeticError: If A is not positive definite, the iteration does not converge, or numbers are not finite.
    """
    x, target = torch.zeros_like(b), tol * b.norm(dim=0)
    if not target.isfinite().all():
        raise ArithmeticError("solve: the right-hand side is not finite.")
    left, worst = max_iterations, float("inf")
    residual, stopped = b, torch.zeros_like(target, dtype=torch.bool)
    while True:
        active = (residual.norm(dim=0) > target) & ~stopped
        if not active.any():
            return x
        before, worst = worst, float((residual.norm(dim=0) / b.norm(dim=0))[active].max())
        stalled = worst > before / 2
        if left <= 0 or stalled:
            if not strict:
                return x
            why = (
                f"in {max_iterations} iterations. Raise max_iterations, the damping or tol, or pass a preconditioner"
                if left <= 0
                else f"to tol={tol:g}, which rounding in {b.dtype} does not allow here. Raise tol or the damping"
            )
            raise ArithmeticError(
                f"solve: conjugate gradients did not converge {why}; the residual is {worst:.1e} times the right-hand side. "
                "With strict=False the last iterate is returned."
            )
        used, negative = _iterate(product, x, residual, target, active, left, precondition, strict)
        left, stopped = left - used, stopped | negative
        residual = b - product(x)
        if not residual.isfinite().all():
            raise ArithmeticError("solve: a product with the matrix is not finite.")


def _iterate(
    product: Callable[[Tensor], Tensor],
    x: Tensor,
    residual: Tensor,
    target: Tensor,
    active: Tensor,
    steps: int,
    precondition: Callable[[Tensor], Tensor] | None,
    strict: bool,
) -> tuple[int, Tensor]:
    """Change x in place until the columns in ``active`` rest; number of steps, and the columns with negative curvature."""
    columns, negative = active.nonzero()[:, 0], torch.zeros_like(active)
    r = residual[:, columns]
    z = r if precondition is None else precondition(r)
    direction, inner = z, _inner(r, z, precondition)
    for step in range(steps):
        image = product(direction)
        curvature = (direction * image).sum(0)
        # by Cauchy and Schwarz at most this norm, of which rounding spoils a part
        bound = torch.finfo(r.dtype).eps * direction.norm(dim=0) * image.norm(dim=0)
        if not curvature.isfinite().all():
            raise ArithmeticError("solve: a product with the matrix is not finite.")
        good = curvature > bound
        if not good.all():
            if strict:
                quotient = float((curvature / direction.square().sum(0))[~good].min())
                raise ArithmeticError(
                    f"solve: the matrix, with its damping, is not positive definite: along a direction its curvature is "
                    f"{quotient:.3g}. Pass a larger damping, or take ggn_operator, which has no negative curvature for convex "
                    "losses. With strict=False the iterate before is returned."
                )
            negative[columns[~good]] = True
        length = torch.where(good, inner / torch.where(good, curvature, 1.0), 0.0)
        x[:, columns] += length * direction
        r = r - length * image
        going = (r.norm(dim=0) > target[columns]) & good
        if not going.any():
            return step + 1, negative
        columns, r, direction, inner = columns[going], r[:, going], direction[:, going], inner[going]
        z = r if precondition is None else precondition(r)
        before, inner = inner, _inner(r, z, precondition)
        direction = z + (inner / before) * direction
    return steps, negative


def _inner(r: Tensor, z: Tensor, precondition: Any) -> Tensor:
    inner: Tensor = (r * z).sum(0)
    if precondition is not None and not (inner > 0).all():
        raise ArithmeticError(
            "solve: the preconditioner is not positive definite; it has to be a symmetric positive definite approximation of "
            "the inverse of the matrix."
        )
    return inner
