"""Determinants and solutions of linear equations.

Without a graph of its own, a backward pass solves by `torch.linalg.lu_solve`, which takes the wrong factors where those
of several matrices meet an axis of right-hand sides between them: two levels of vmap, or leading axes of size one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

__all__ = [
    "cholesky_inverse",
    "det",
    "det_by_lu",
    "logdet",
    "lu_solve",
    "slogdet",
    "solve",
    "solve_ex",
    "tensorsolve",
    "triangular_solve",
]


def _levels() -> int:
    """How many transformations of torch.func are active."""
    return len(_functorch.get_interpreter_stack() or ())


def det(input: Tensor) -> Tensor:
    """Of several levels, by its factors."""
    return det_by_lu(input) if _levels() > 1 else torch.linalg.det(input)


def det_by_lu(input: Tensor) -> Tensor:
    """The product of the diagonal of U, whose derivatives need no solution."""
    lu, pivots = torch.linalg.lu_factor(input)
    return _parity(pivots).to(lu.dtype) * lu.diagonal(dim1=-2, dim2=-1).prod(-1)


def _parity(pivots: Tensor) -> Tensor:
    swaps = (pivots != torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)).sum(-1)
    return 1 - 2 * (swaps % 2)


def slogdet(input: Tensor) -> Any:
    """By its factors, as `det`."""
    if _levels() < 2 or input.is_complex():
        return torch.linalg.slogdet(input)
    lu, pivots = torch.linalg.lu_factor(input)
    diagonal = lu.diagonal(dim1=-2, dim2=-1)
    sign = _parity(pivots) * diagonal.detach().sign().prod(-1)
    return torch.return_types.linalg_slogdet((sign, diagonal.abs().log().sum(-1)))  # type: ignore[attr-defined]


def logdet(input: Tensor) -> Tensor:
    """By `slogdet`."""
    if _levels() < 2 or input.is_complex():
        return torch.logdet(input)
    sign, value = slogdet(input)
    return torch.where(sign < 0, float("nan"), value)


def solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    """Of several levels, by the inverse."""
    if _levels() < 2:
        return torch.linalg.solve(A, B, left=left)
    inverse = torch.linalg.inv(A)
    if B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1]):
        return (inverse @ B.unsqueeze(-1)).squeeze(-1)
    return inverse @ B if left else B @ inverse


def solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    """As `solve`."""
    if _levels() < 2:
        return torch.linalg.solve_ex(A, B, left=left, check_errors=check_errors)
    info = torch.linalg.inv_ex(A.detach(), check_errors=check_errors).info
    return torch.return_types.linalg_solve_ex((solve(A, B, left=left), info))  # type: ignore[attr-defined]


def tensorsolve(A: Tensor, B: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """As `solve`."""
    if _levels() < 2:
        return torch.linalg.tensorsolve(A, B, dims)
    if dims is not None:
        A = A.movedim(tuple(dims), tuple(range(-len(dims), 0)))
    return (torch.linalg.inv(A.reshape(B.numel(), -1)) @ B.flatten()).reshape(A.shape[B.ndim :])


def lu_solve(LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    """By triangular solutions."""
    if not left:
        return lu_solve(LU, pivots, B.mH, adjoint=not adjoint).mH
    P, L, U = torch.lu_unpack(LU, pivots)
    solve: Any = torch.linalg.solve_triangular
    if adjoint:
        return P @ solve(L.mH, solve(U.mH, B, upper=False), upper=True, unitriangular=True)
    return solve(U, solve(L, P.mH @ B, upper=False, unitriangular=True), upper=True)


def triangular_solve(b: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False) -> Any:
    """Its forward-mode derivative is wrong."""
    solution = torch.linalg.solve_triangular(A.mT if transpose else A, b, upper=upper != transpose, unitriangular=unitriangular)
    return torch.return_types.triangular_solve((solution, A.clone()))


def cholesky_inverse(L: Tensor, upper: bool = False) -> Tensor:
    """Its forward-mode derivative is wrong."""
    return torch.cholesky_solve(torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L), L, upper)
