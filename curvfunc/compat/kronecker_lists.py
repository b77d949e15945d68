"""Lists of Kronecker factors, parameter lists and sub-sampling, as BackPACK's utilities have them."""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

__all__ = [
    "all_tensors_of_order",
    "apply_inv_kfac_mat_prod",
    "apply_kfac_mat_prod",
    "inv_kfac_mat_prod",
    "inv_kfacs",
    "is_matrix",
    "is_tensor_of_order",
    "is_vector",
    "kfac_mat_prod",
    "kfacs_to_mat",
    "subsample",
    "two_kfacs_to_mat",
    "vector_to_parameter_list",
]

SMALLEST_EIGENVALUE = 1e-8  # inverses are cut off at its reciprocal


def is_tensor_of_order(order: int, tensor: Tensor) -> bool:
    """Whether a tensor has that many axes."""
    return tensor.ndim == order


def all_tensors_of_order(order: int, tensors: Iterable[Tensor]) -> bool:
    """Whether all tensors have that many axes."""
    return all(is_tensor_of_order(order, t) for t in tensors)


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has two axes."""
    return is_tensor_of_order(2, tensor)


def is_vector(tensor: Tensor) -> bool:
    """Whether a tensor has one axis."""
    return is_tensor_of_order(1, tensor)


def two_kfacs_to_mat(A: Tensor, B: Tensor) -> Tensor:
    """The Kronecker product A ⊗ B of two matrices."""
    assert all_tensors_of_order(2, (A, B)), "Kronecker factors are matrices"
    return torch.kron(A, B)


def kfacs_to_mat(factors: Sequence[Tensor]) -> Tensor:
    """The Kronecker product of all factors."""
    return reduce(two_kfacs_to_mat, factors)


def kfac_mat_prod(factors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The function v ↦ (A ⊗ B ⊗ ...) v, for vectors [d] and matrices [d, columns]."""
    assert all_tensors_of_order(2, factors), "Kronecker factors are matrices"
    columns = [f.shape[1] for f in factors]

    def multiply(mat: Tensor) -> Tensor:
        out = mat.reshape(*columns, -1)
        for axis, factor in enumerate(factors):
            out = torch.tensordot(factor, out, dims=([1], [axis])).movedim(0, axis)
        return out.reshape(-1) if mat.ndim == 1 else out.reshape(-1, mat.shape[1])

    return multiply


def apply_kfac_mat_prod(factors: Sequence[Tensor], mat: Tensor) -> Tensor:
    """(A ⊗ B ⊗ ...) mat."""
    return kfac_mat_prod(factors)(mat)


def inv_kfacs(factors: Sequence[Tensor], shift: float | Sequence[float] | None = None) -> list[Tensor]:
    """The inverses (A + λ₁ I)⁻¹, (B + λ₂ I)⁻¹, ... of symmetric factors, by their eigenvalues.

    Args:
        factors: Symmetric matrices.
        shift: λ, one for all or one per factor; none by default. Eigenvalues smaller than 1e-8 are cut off there.
    """
    shifts = [0.0 if shift is None else shift] * len(factors) if shift is None or isinstance(shift, float) else shift
    assert len(shifts) == len(factors), "one shift per factor is needed"

    def inverse(factor: Tensor, value: float) -> Tensor:
        eigenvalues, vectors = torch.linalg.eigh(factor)
        bound = 1 / SMALLEST_EIGENVALUE
        return (vectors * (1 / (eigenvalues + value)).clamp(-bound, bound)) @ vectors.mT

    return [inverse(f, s) for f, s in zip(factors, shifts, strict=True)]


def inv_kfac_mat_prod(factors: Sequence[Tensor], shift: float | Sequence[float] | None = None) -> Callable[[Tensor], Tensor]:
    """The function v ↦ ((A + λ₁ I)⁻¹ ⊗ (B + λ₂ I)⁻¹ ⊗ ...) v; see `inv_kfacs`."""
    return kfac_mat_prod(inv_kfacs(factors, shift))


def apply_inv_kfac_mat_prod(factors: Sequence[Tensor], mat: Tensor, shift: float | Sequence[float] | None = None) -> Tensor:
    """((A + λ₁ I)⁻¹ ⊗ (B + λ₂ I)⁻¹ ⊗ ...) mat; see `inv_kfacs`."""
    return inv_kfac_mat_prod(factors, shift)(mat)


def vector_to_parameter_list(vec: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Cut a vector into tensors of the parameters' shapes (views without graph); the parameters stay as they are.

    Raises:
        TypeError: If ``vec`` is not a tensor.
    """
    if not isinstance(vec, Tensor):
        raise TypeError(f"vec must be a tensor, got {type(vec).__name__}.")
    shapes = [p.shape for p in parameters]
    sizes = [s.numel() for s in shapes]
    pieces = vec.detach()[: sum(sizes)].split(sizes)
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def subsample(tensor: Tensor, dim: int = 0, subsampling: Sequence[int] | None = None) -> Tensor:
    """The entries of a tensor at the indices ``subsampling`` along ``dim``; all of them if None."""
    return tensor if subsampling is None else tensor.index_select(dim, torch.as_tensor(subsampling, device=tensor.device))
