"""Numbers about a matrix that is known by its products: trace, diagonal, spectrum.

Every function takes a symmetric ``operator``: a `curvfunc.operators.LinearOperator`, a dense tensor [P, P], or any
object with ``shape``, ``dtype``, ``device`` and ``@`` on matrices [P, K]. Vectors are multiplied together, in the
chunks that the operator was made with. Random vectors come from ``generator``, or from the default generator of the
operator's device. An operator over a data set goes through all of it for each product, of however many vectors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from curvfunc.operators.matrices import as_scipy, scipy_linalg, watched
from curvfunc.operators.matrices import size_of as _size
from curvfunc.tensors.docstrings import documented, entries
from curvfunc.tensors.inputs import check_generator
from curvfunc.tensors.signs import random_signs

__all__ = ["Spectrum", "eigsh", "hutchinson_diag", "hutchinson_trace", "hutchpp_trace", "spectral_density", "xdiag"]

_documented = documented(
    entries(
        """
        operator: Symmetric matrix [P, P]: a `LinearOperator`, a dense tensor, or any object with ``shape``, ``dtype``,
            ``device`` and ``@`` on matrices [P, K].
        generator: Source of random vectors, on the operator's device; torch's default generator if None.
        progress: Whether to show a bar of the products, where there are a terminal and tqdm.
        """
    ),
    entries(
        """
        TypeError: If the operator is no matrix with ``dtype`` and ``device``, or the generator is none.
        ValueError: If the operator is not square.
        """
    ),
)


@_documented
def hutchinson_trace(operator: Any, num_products: int, *, generator: Generator | None = None, progress: bool = False) -> Tensor:
    """Trace of the matrix, (1/K) Σ_k zₖᵀ A zₖ with random signs z. Unbiased, with an error of order 1/√K.

    Args:
        num_products: Number K of products.

    Returns:
        A scalar.

    Raises:
        ValueError: If the number of products is not positive.

    References:
        Girard 1989; Hutchinson 1989.

    Example:
        >>> hutchinson_trace(torch.diag(torch.tensor([1.0, 2.0, 4.0])), 1)  # exact for a diagonal matrix
        tensor(7.)
    """
    z = _signs(operator, _positive("hutchinson_trace", num_products), generator)
    with watched("hutchinson_trace", operator, 1, progress) as operator:
        return (z * _times(operator, z)).sum() / num_products


@_documented
def hutchpp_trace(operator: Any, num_products: int, *, generator: Generator | None = None, progress: bool = False) -> Tensor:
    """Trace of the matrix by Hutch++: exact on a random subspace Q, by random signs G on its complement.

        tr(Qᵀ A Q) + (1/K) tr(Gᵀ (I - Q Qᵀ) A (I - Q Qᵀ) G),    Q = orth(A S),

    S, Q and G having K = ``num_products`` / 3 columns each. Unbiased; for positive semi-definite matrices the error is
    of order 1/K, and it is small where few eigenvalues dominate.

    Args:
        num_products: Number of products, at least 3; rounded down to a multiple of 3. Exact if
            the rank is at most a third of it (and the random vectors are in general position).

    Returns:
        A scalar.

    Raises:
        ValueError: If there are less than 3 products.

    References:
        Meyer, Musco, Musco, Woodruff 2021, "Hutch++: optimal stochastic trace estimation", algorithm 1.

    Example:
        >>> u = torch.ones(9, 1, dtype=torch.float64)
        >>> torch.allclose(hutchpp_trace(u @ u.mT, 3), torch.tensor(9.0, dtype=torch.float64))  # rank 1
        True
    """
    if num_products < 3:
        raise ValueError(f"hutchpp_trace: num_products must be at least 3, got {num_products}.")
    count, start = num_products // 3, _signs(operator, min(num_products // 3, _size(operator)), generator)
    with watched("hutchpp_trace", operator, 2, progress) as operator:
        Q = torch.linalg.qr(_times(operator, start)).Q
        G = _signs(operator, count, generator)
        G = G - Q @ (Q.mT @ G)
        both = torch.cat([Q, G], dim=1)
        traces = (both * _times(operator, both)).sum(0)
    return traces[: Q.shape[1]].sum() + traces[Q.shape[1] :].sum() / count


@_documented
def hutchinson_diag(operator: Any, num_products: int, *, generator: Generator | None = None, progress: bool = False) -> Tensor:
    """Diagonal of the matrix, (1/K) Σ_k zₖ ⊙ A zₖ with random signs z. Unbiased.

    The variance of entry i is Σ_{j≠i} A_ij² / K.

    Args:
        num_products: Number K of products.

    Returns:
        [P]; a `LinearOperator`'s ``unflatten`` gives it the shape of the parameters.

    Raises:
        ValueError: If the number of products is not positive.

    References:
        Bekas, Kokiopoulou, Saad 2007, "An estimator for the diagonal of a matrix".

    Example:
        >>> hutchinson_diag(torch.diag(torch.tensor([1.0, 2.0, 4.0])), 1)
        tensor([1., 2., 4.])
    """
    z = _signs(operator, _positive("hutchinson_diag", num_products), generator)
    with watched("hutchinson_diag", operator, 1, progress) as operator:
        return (z * _times(operator, z)).mean(1)


@_documented
def xdiag(operator: Any, num_products: int, *, generator: Generator | None = None, progress: bool = False) -> Tensor:
    """Diagonal of the matrix by XDiag: a low-rank approximation, and random signs for the rest, each used for both.

    With signs Z [P, K], Q R = A Z and the rank K-1 basis Q₋ₖ that arises without zₖ,

        diag(A) ≈ (1/K) Σ_k diag(Q₋ₖ Q₋ₖᵀ A) + zₖ ⊙ (I - Q₋ₖ Q₋ₖᵀ) A zₖ.

    Unbiased, and far more precise than `hutchinson_diag` where few eigenvalues dominate; exact below rank K.

    Args:
        num_products: Number 2 K of products, at least 4 and at most 2 P; rounded down to an even number.

    Returns:
        [P]; a `LinearOperator`'s ``unflatten`` gives it the shape of the parameters.

    Raises:
        ValueError: If the number of products is less than 4 or more than 2 P.

    References:
        Epperly, Tropp, Webber 2024, "XTrace: making the most of every sample in stochastic trace estimation".

    Example:
        >>> u = 2.0 ** torch.arange(5, dtype=torch.float64)[:, None]
        >>> torch.allclose(xdiag(u @ u.mT, 4), u.flatten() ** 2)  # rank 1
        True
    """
    size = _size(operator)
    if not 4 <= num_products <= 2 * size:
        raise ValueError(f"xdiag: num_products must be from 4 to 2 P = {2 * size}, got {num_products}.")
    count = num_products // 2
    Z = _signs(operator, count, generator)
    with watched("xdiag", operator, 2, progress) as operator:
        Q, R = torch.linalg.qr(_times(operator, Z))
        B = _times(operator, Q)
    # Q₋ₖ Q₋ₖᵀ = Q (I - sₖ sₖᵀ) Qᵀ: sₖ is the unit vector with sₖᵀ R[:, j] = 0 for all j ≠ k, a column of R⁻ᵀ
    S = _inverse_transposed(R)
    S = S / S.norm(dim=0)
    low_rank: Tensor = (Q * B).sum(1) - ((Q @ S) * (B @ S)).sum(1) / count
    # (I - Q₋ₖ Q₋ₖᵀ) A zₖ = Q sₖ sₖᵀ R[:, k], since A zₖ = Q R[:, k] lies in the range of Q
    rest = (Z * (Q @ (S * (S * R).sum(0)))).mean(1)
    return low_rank + rest


def _inverse_transposed(R: Tensor) -> Tensor:
    """R⁻ᵀ, of a triangular matrix that is singular where the operator has low rank: tiny pivots are raised."""
    diagonal = R.diagonal()
    floor: Tensor = diagonal.abs().max().clamp(min=torch.finfo(R.dtype).tiny) * torch.finfo(R.dtype).eps
    raised = torch.where(diagonal.abs() < floor, torch.where(diagonal < 0, -floor, floor), diagonal)
    identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
    result: Tensor = torch.linalg.solve_triangular((R + (raised - diagonal).diag()).mT, identity, upper=False)
    return result


@dataclass(frozen=True)
class Spectrum:
    """A spectral density as a quadrature: point masses at ``nodes`` with ``weights`` that add up to 1.

    Attributes:
        nodes: Ritz values [K, T] of T Lanczos steps from each of K random vectors.
        weights: [K, T].
        size: Number P of eigenvalues.
    """

    nodes: Tensor
    weights: Tensor
    size: int

    def __repr__(self) -> str:
        return f"Spectrum(nodes {list(self.nodes.shape)}, of {self.size} eigenvalues)"

    def density(self, x: Tensor, width: float) -> Tensor:
        """The density at points x [...], each mass spread out by a Gaussian of standard deviation ``width``: [...]."""
        distance = (x[..., None, None] - self.nodes) / width
        gaussian = (-distance.square() / 2).exp() / (width * math.sqrt(2 * math.pi))
        return (self.weights * gaussian).sum((-2, -1)) / len(self.nodes)

    def trace(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """An estimate of tr f(A) = Σ_i f(λ_i), for instance ``spectrum.trace(lambda x: (x + damping).log())``."""
        return self.size * (self.weights * function(self.nodes)).sum() / len(self.nodes)


@_documented
def spectral_density(
    operator: Any,
    *,
    num_steps: int = 50,
    num_vectors: int = 5,
    generator: Generator | None = None,
    progress: bool = False,
) -> Spectrum:
    """Spectral density of the matrix by stochastic Lanczos quadrature.

    For random unit vectors q, qᵀ f(A) q = Σ_t w_t f(θ_t) with θ the eigenvalues of the tridiagonal matrix of T Lanczos
    steps and w the squares of the first entries of its eigenvectors. All vectors run together; they are kept (P T K
    numbers) and orthogonalized against each other's own predecessors in full.

    Args:
        num_steps: Number T of Lanczos steps; at most P count.
        num_vectors: Number K of random vectors. The cost is T products with K vectors.

    Returns:
        The density as a `Spectrum`, with nodes and weights [K, T].

    Raises:
        ValueError: If a number of steps or vectors is not positive.

    References:
        Lin, Saad, Yang 2016, "Approximating spectral densities of large matrices"; Ghorbani, Krishnan, Xiao
        2019, "An investigation into neural net optimization via Hessian eigenvalue density".

    Example:
        >>> spectrum = spectral_density(torch.diag(torch.tensor([1.0, 2.0, 4.0])), num_steps=3)
        >>> spectrum.density(torch.linspace(0, 5, 100), width=0.1).shape
        torch.Size([100])
    """
    steps = min(_positive("spectral_density", num_steps), _size(operator))
    count = _positive("spectral_density", num_vectors)
    check_generator(generator)
    q = torch.randn(_size(operator), count, generator=generator, dtype=operator.dtype, device=operator.device)
    with watched("spectral_density", operator, steps, progress) as operator:
        alphas, betas = _lanczos(operator, q / q.norm(dim=0), steps)
    tridiagonal = torch.diag_embed(alphas) + torch.diag_embed(betas, 1) + torch.diag_embed(betas, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return Spectrum(nodes, vectors[:, 0].square(), _size(operator))


def _lanczos(operator: Any, q: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Diagonals [K, T] and off-diagonals [K, T-1] for start vectors q [P, K]."""
    basis = [q]
    alphas, betas = [], []
    scale = torch.zeros(q.shape[1], dtype=q.dtype, device=q.device)
    for step in range(steps):
        w = _times(operator, basis[-1])
        scale = torch.maximum(scale, w.norm(dim=0))
        alphas.append((w * basis[-1]).sum(0))
        if step == steps - 1:
            break
        V = torch.stack(basis)  # [t, P, K]
        for _ in range(2):  # twice is enough for orthogonality to rounding
            w = w - torch.einsum("tpk,tk->pk", V, torch.einsum("tpk,pk->tk", V, w))
        beta = w.norm(dim=0)
        # An invariant subspace: the vector stays zero from here on, and what follows has no weight.
        going = beta > 10 * torch.finfo(q.dtype).eps * scale * math.sqrt(len(q))
        betas.append(torch.where(going, beta, 0.0))
        basis.append(torch.where(going, w / torch.where(going, beta, 1.0), 0.0))
    return torch.stack(alphas, dim=1), torch.stack(betas, dim=1) if betas else q.new_zeros(q.shape[1], 0)


@_documented
def eigsh(
    operator: Any,
    k: int = 6,
    *,
    which: str = "LM",
    tol: float = 0.0,
    generator: Generator | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Extremal eigenvalues and their eigenvectors, by scipy's ``eigsh`` (implicitly restarted Lanczos, ARPACK).

    Args:
        k: Number of eigenvalues, less than P.
        which: "LM" largest magnitude, "LA" largest, "SA" smallest, "BE" half from each end.
        tol: Relative precision of the eigenvalues; 0 is machine precision.

    Returns:
        Eigenvalues [k] in ascending order and eigenvectors [P, k], of the operator's dtype and device.

    Raises:
        ImportError: If scipy is not installed.
        ValueError: If k is not from 1 to P - 1.

    References:
        Lehoucq, Sorensen, Yang 1998, "ARPACK Users' Guide".

    Example:
        >>> values, vectors = eigsh(torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)), k=1)
        >>> round(values.item(), 6), vectors.shape
        (4.0, torch.Size([3, 1]))
    """
    size = _size(operator)
    if not 0 < k < size:
        raise ValueError(f"eigsh: k must be from 1 to P - 1 = {size - 1}, got {k}.")
    check_generator(generator)
    linalg = scipy_linalg()
    start = torch.randn(size, generator=generator, dtype=operator.dtype, device=operator.device)
    with watched("eigsh", operator, None, progress) as operator:
        values, vectors = linalg.eigsh(as_scipy(operator), k, which=which, tol=tol, v0=start.cpu().numpy())
    order = values.argsort()
    return _tensor(values[order], operator), _tensor(vectors[:, order], operator)


def _times(operator: Any, vectors: Tensor) -> Tensor:
    result: Tensor = operator @ vectors
    return result


def _tensor(values: Any, operator: Any) -> Tensor:
    return torch.tensor(values, dtype=operator.dtype, device=operator.device)


def _signs(operator: Any, count: int, generator: Generator | None) -> Tensor:
    """Random signs, [P, count]."""
    check_generator(generator)
    return random_signs((_size(operator), count), torch.empty(0, dtype=operator.dtype, device=operator.device), generator)


def _positive(caller: str, number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{caller}: the numbers of products, steps and vectors must be positive ints, got {number!r}.")
    return number
