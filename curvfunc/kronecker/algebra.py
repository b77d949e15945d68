"""Functions of Kronecker-factored matrices, by their eigenvalues: powers, products, determinants, samples.

Every function takes a `curvfunc.kronecker.Decomposition`, K = U diag(Λ) Uᵀ for each block, and none changes it. Trees are like
the parameters.
"""

from typing import Any

import torch
from torch import Generator, Tensor

from curvfunc.kronecker.decomposition import Block, Decomposition, hidden
from curvfunc.tensors.docstrings import ARGUMENTS, documented, entries
from curvfunc.tensors.inputs import check_generator

__all__ = ["dense", "diagonal", "inverse", "logdet", "matmul", "power", "sample", "solve", "trace"]

# Eigenvalues that are inverted must be known to this relative error, so that residuals are below 1e-3.
TRUSTED = 5e-4

_SHARED = ARGUMENTS | entries(
    """
    decomposition: K, from `decompose`, `correct`, `of_diagonal` or, but for "pi", `power`: per block, bases (U_B [o, o],
        U_A [k, k]) and eigenvalues Λ [o, k].
    vectors: A tree like the parameters, [*shape] or with leading axes [..., *shape].
    damping: δ, a number or a tensor without axes.
    split: "exact", where eigenvalues are λ_B λ_A + δ; or "pi", where δ goes into the factors, (B + π √δ) ⊗ (A + √δ / π).
    """
)
_told = documented(_SHARED, {})
_damped = documented(_SHARED, entries("TypeError: If the damping is no number."))


@_damped
def power(
    decomposition: Decomposition, exponent: float, *, damping: float | Tensor = 0.0, split: str = "exact"
) -> Decomposition:
    """Powers of damped matrices, (K + δ)ᵖ; -1 gives inverses, -1/2 whitens, 1 is the damped matrix itself.

    - ``split="exact"``: the eigenvalues are (λ_B λ_A + δ)ᵖ.
    - ``split="pi"``: δ goes into the factors, (B + π √δ) ⊗ (A + √δ / π), with π² = (tr B / dim B) / (tr A / dim A), so
      that the inverse is a Kronecker product, too. Exact blocks have K + δ.

    Args:
        exponent: p. Where it is no integer, eigenvalues that are negative by rounding count as zero.

    Returns:
        A `Decomposition` with other eigenvalues, of the same shapes.

    Raises:
        ValueError: If the damping is negative or not finite; if p is negative, and K + δ is singular or so close to it
            that rounding could change the result by more than 0.05 percent, or δ is less than twice what an eigenvalue is below
            zero. The message names the parameter and the damping that would do. In compiled code and under vmap, such
            eigenvalues are NaN.

    References:
        Martens and Grosse 2015, sec. 6.3 (π); appendix B (the inverse by eigenvalues).

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> K = kronecker.decompose(kfac(model_fn, params, X, y), kronecker.structure(model_fn, params, X))
        >>> whitened = kronecker.matmul(kronecker.power(K, -0.5, damping=0.1), params)
        >>> whitened["weight"].shape
        torch.Size([3, 4])
    """
    damping = _damping(decomposition, damping)
    blocks = zip(decomposition.blocks, decomposition.values, _spectra(decomposition, split), strict=True)
    values = []
    for block, own, spectra in blocks:
        shifted, good, needed = _split(spectra, damping) if split == "pi" and len(spectra) == 2 else _exact(own, damping)
        if exponent < 0:
            if not hidden(shifted) and not good.all():
                raise ValueError(_singular(block, own, damping.detach(), needed.detach(), split))
            shifted = torch.where(good, shifted, torch.nan)
        values.append((shifted if float(exponent).is_integer() else shifted.clamp_min(0)) ** exponent)
    d = decomposition
    return Decomposition(d.bases, tuple(values), (), d.structure, d.blocks)


@_damped
def inverse(decomposition: Decomposition, *, damping: float | Tensor = 0.0, split: str = "exact") -> Decomposition:
    """Damped inverses, (K + δ)⁻¹: `power` with -1.

    Returns:
        A `Decomposition` with other eigenvalues, of the same shapes.

    Raises:
        ValueError: If the damping is negative or not finite; if K + δ is singular, or so close to it that rounding could spoil
            the result. The message names the parameter and the damping that would do.

    References:
        Martens and Grosse 2015, sec. 6.3 (π); appendix B (the inverse by eigenvalues).

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> K = kronecker.decompose(kfac(model_fn, params, X, y), kronecker.structure(model_fn, params, X))
        >>> step = kronecker.matmul(kronecker.inverse(K, damping=0.1), params)
        >>> step["bias"].shape
        torch.Size([3])
    """
    return power(decomposition, -1, damping=damping, split=split)


@_told
def matmul(decomposition: Decomposition, vectors: Any) -> Any:
    """Products K v, as U (Λ ∘ (Uᵀ v)); with a vector as a matrix V, U_B (Λ ∘ (U_Bᵀ V U_A)) U_Aᵀ.

    Args:
        decomposition: From `decompose`, `power` or `inverse`.
        vectors: A tree like the parameters, [*shape] or with leading axes [..., *shape].

    Returns:
        A tree like ``vectors``, [*shape] or [..., *shape], in its types.

    Raises:
        ValueError: If the vectors are of other parameters, or of other shapes.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> grad, factors = compute(model_fn, params, X, y, (Grad(), KFAC()))
        >>> K = kronecker.decompose(factors, kronecker.structure(model_fn, params, X))
        >>> step = kronecker.matmul(kronecker.inverse(K, damping=0.1), grad)
        >>> step["weight"].shape
        torch.Size([3, 4])
    """
    structure = decomposition.structure
    given = dict(zip(structure.names, structure.flatten("vectors", vectors), strict=True))
    for layout in structure.layouts:
        v = given[layout.name]
        if not isinstance(v, Tensor) or tuple(v.shape[v.ndim - len(layout.shape) :]) != layout.shape:
            found = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"vectors has {found} for parameter {layout.name!r}; [..., *{layout.shape}] is needed.")
    results: dict[str, Tensor] = {}
    for block, bases, values in zip(decomposition.blocks, decomposition.bases, decomposition.values, strict=True):
        leads = {
            n: given[n].shape[: given[n].ndim - len(layout.shape)] for n, layout in zip(block.names, block.layouts, strict=True)
        }
        if len({tuple(lead) for lead in leads.values()}) > 1:
            raise ValueError(f"vectors has different leading axes for parameters that are one block: {leads}.")
        V = block.matrix(given, len(bases), len(values)).to(values.dtype)
        results |= block.parameters(_out(bases, _in(bases, V) * values), len(bases))
    return structure.unflatten([results[name].to(given[name].dtype) for name in structure.names])


@_damped
def solve(decomposition: Decomposition, vectors: Any, *, damping: float | Tensor = 0.0, split: str = "exact") -> Any:
    """(K + δ)⁻¹ v: `matmul` with the `inverse`.

    Returns:
        A tree like ``vectors``, [*shape] or [..., *shape], in its types.

    Raises:
        ValueError: If the damping is negative or not finite, or K + δ too close to singular, as for `inverse`; if the vectors
            are of other parameters, or of other shapes.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> grad, factors = compute(model_fn, params, X, y, (Grad(), KFAC()))
        >>> K = kronecker.decompose(factors, kronecker.structure(model_fn, params, X))
        >>> kronecker.solve(K, grad, damping=0.1)["weight"].shape
        torch.Size([3, 4])
    """
    return matmul(inverse(decomposition, damping=damping, split=split), vectors)


@_told
def trace(decomposition: Decomposition) -> dict[tuple[str, ...], Tensor]:
    """Traces tr K = Σ Λ.

    Returns:
        A scalar for each block, ``{names of its parameters: tensor}``.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> K = kronecker.decompose(kflr(model_fn, params, X, y), kronecker.structure(model_fn, params, X))
        >>> torch.allclose(kronecker.trace(K)[("bias",)].float(), diag_ggn(model_fn, params, X, y)["bias"].sum())
        True
    """
    return {b.names: values.sum() for b, values in zip(decomposition.blocks, decomposition.values, strict=True)}


@_damped
def logdet(
    decomposition: Decomposition, *, damping: float | Tensor = 0.0, split: str = "exact"
) -> dict[tuple[str, ...], Tensor]:
    """Log-determinants log det (K + δ) = Σ log (Λ + δ).

    Returns:
        A scalar for each block, ``{names of its parameters: tensor}``.

    Raises:
        ValueError: If the damping is negative or not finite; if K + δ is singular, or so close to it that rounding could spoil
            the result. The message names the parameter and the damping that would do.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> K = kronecker.decompose(kfac(model_fn, params, X, y), kronecker.structure(model_fn, params, X))
        >>> kronecker.logdet(K, damping=0.1)[("bias",)].shape
        torch.Size([])
    """
    d = inverse(decomposition, damping=damping, split=split)
    return {b.names: -values.log().sum() for b, values in zip(d.blocks, d.values, strict=True)}


@_told
def diagonal(decomposition: Decomposition) -> Any:
    """Diagonals, diag K = (U ∘ U) Λ.

    Returns:
        A tree like the parameters, [*shape] per parameter.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> K = kronecker.decompose(kflr(model_fn, params, X, y), kronecker.structure(model_fn, params, X))
        >>> torch.allclose(kronecker.diagonal(K)["bias"], diag_ggn(model_fn, params, X, y)["bias"])
        True
    """
    results: dict[str, Tensor] = {}
    for block, bases, values in zip(decomposition.blocks, decomposition.bases, decomposition.values, strict=True):
        squared = tuple([U.square() for U in bases])
        results |= block.parameters(_out(squared, values), len(bases))
    return _typed(decomposition, results)


@_told
def dense(decomposition: Decomposition) -> dict[tuple[str, ...], Tensor]:
    """The matrices themselves.

    Rows and columns are the entries of ``p.flatten()``; of a weight and its bias, those of the weight first.

    Returns:
        [P, P] for each block with P entries in all its parameters, ``{names of its parameters: tensor}``.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> K = kronecker.decompose(kfac(model_fn, params, X, y, joined=True), kronecker.structure(model_fn, params, X))
        >>> kronecker.dense(K)[("weight", "bias")].shape
        torch.Size([15, 15])
    """
    results = {}
    for block, bases, values in zip(decomposition.blocks, decomposition.bases, decomposition.values, strict=True):
        sizes = [layout.numel for layout in block.layouts]
        rows = torch.eye(sum(sizes), dtype=values.dtype, device=values.device).split(sizes, dim=1)
        unit = {layout.name: t.reshape(sum(sizes), *layout.shape) for layout, t in zip(block.layouts, rows, strict=True)}
        V = block.matrix(unit, len(bases), len(values))
        found = block.parameters(_out(bases, _in(bases, V) * values), len(bases))
        columns = [found[name].reshape(sum(sizes), size) for name, size in zip(block.names, sizes, strict=True)]
        results[block.names] = torch.cat(columns, dim=1)
    return results


@_damped
def sample(
    decomposition: Decomposition,
    num: int = 1,
    *,
    damping: float | Tensor = 0.0,
    split: str = "exact",
    generator: Generator | None = None,
) -> Any:
    """Draws from N(0, (K + δ)⁻¹), as U (Λ + δ)^(-1/2) ε with ε ~ N(0, I).

    Args:
        num: Number of draws.

    Returns:
        A tree like the parameters, [num, *shape] per parameter.

    Raises:
        ValueError: If the damping is negative or not finite; if K + δ is singular, or so close to it that rounding could spoil
            the result. The message names the parameter and the damping that would do.

    References:
        Ritter, Botev, Barber 2018, "A scalable Laplace approximation for neural networks", sec. 3.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> K = kronecker.decompose(kfac(model_fn, params, X, y), kronecker.structure(model_fn, params, X))
        >>> kronecker.sample(K, 5, damping=0.1)["weight"].shape
        torch.Size([5, 3, 4])
    """
    check_generator(generator)
    d = power(decomposition, -0.5, damping=damping, split=split)
    results: dict[str, Tensor] = {}
    for block, bases, values in zip(d.blocks, d.bases, d.values, strict=True):
        noise = torch.randn(num, *values.shape, dtype=values.dtype, device=values.device, generator=generator)
        results |= block.parameters(_out(bases, noise * values), len(bases))
    return _typed(d, results)


def _in(bases: tuple[Tensor, ...], V: Tensor) -> Tensor:
    """Uᵀ v: [..., rows, columns] or [..., numel] in the eigenbasis."""
    if len(bases) < 2:
        return V @ bases[0] if bases else V
    return bases[0].mT @ V @ bases[1]


def _out(bases: tuple[Tensor, ...], V: Tensor) -> Tensor:
    """U v: back from the eigenbasis."""
    if len(bases) < 2:
        return V @ bases[0].mT if bases else V
    return bases[0] @ V @ bases[1].mT


def _typed(decomposition: Decomposition, results: dict[str, Tensor]) -> Any:
    """Results by parameter, in the parameters' types."""
    structure = decomposition.structure
    return structure.unflatten([results[layout.name].to(layout.dtype) for layout in structure.layouts])


def _damping(decomposition: Decomposition, damping: float | Tensor) -> Tensor:
    like = decomposition.values[0]
    if isinstance(damping, Tensor):
        if damping.ndim:
            raise ValueError(f"damping must be a number or a tensor without axes, got shape {tuple(damping.shape)}.")
        value = damping.to(like)
        if hidden(damping):
            return torch.where(value >= 0, value, torch.nan)
    else:
        if isinstance(damping, bool) or not isinstance(damping, (int, float)):
            raise TypeError(f"damping must be a number or a tensor without axes, got {damping!r}.")
        value = torch.full((), float(damping), dtype=like.dtype, device=like.device)
    number = float(damping.detach()) if isinstance(damping, Tensor) else float(damping)
    if not 0 <= number < float("inf"):
        raise ValueError(f"damping must be finite and not negative, got {number}.")
    return value


def _spectra(decomposition: Decomposition, split: str) -> list[tuple[Tensor, ...]]:
    """Per block the eigenvalues of its factors, or where these are unknown, none."""
    if split not in ("exact", "pi"):
        raise ValueError(f'split must be "exact" or "pi", got {split!r}.')
    if split == "pi" and not decomposition.spectra:
        raise ValueError(
            'split="pi" damps the factors of a Kronecker product, and these eigenvalues are none: they were corrected, or a '
            'power was taken. Use split="exact", or the decomposition from decompose.'
        )
    return list(decomposition.spectra or [()] * len(decomposition.values))


def _exact(values: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Λ + δ, where it can be inverted, and the least δ with which all of it could be."""
    shifted = values + damping
    if not values.numel():
        return shifted, shifted > 0, damping
    ratio = _least_ratio(values)
    good = _invertible(shifted, ratio) & (shifted >= damping / 2)
    return shifted, good, _needed(values, ratio)


def _split(spectra: tuple[Tensor, ...], damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(λ_B + π √δ)(λ_A + √δ / π), where it can be inverted, and a δ with which all of it could be."""
    B, A = spectra
    pi = (B.mean() / A.mean()).sqrt()
    shifts = pi * damping.sqrt(), damping.sqrt() / pi
    rows, columns = B + shifts[0], A + shifts[1]
    shifted = torch.outer(rows, columns)
    if not shifted.numel():
        return shifted, shifted > 0, damping
    ratio = _least_ratio(shifted)
    good = _invertible(shifted, ratio)
    good &= torch.outer((rows > 0) & (rows >= shifts[0] / 2), (columns > 0) & (columns >= shifts[1] / 2))
    return shifted, good, torch.maximum(_needed(B, ratio**0.5) / pi, _needed(A, ratio**0.5) * pi).square()


def _least_ratio(values: Tensor) -> float:
    """How small an eigenvalue may be beside the largest one, so that rounding of products leaves of it what is trusted."""
    return sum([size**0.5 for size in values.shape]) * torch.finfo(values.dtype).eps / TRUSTED


def _invertible(shifted: Tensor, ratio: float) -> Tensor:
    return (shifted > 0) & (shifted >= ratio * shifted.amax())


def _needed(values: Tensor, ratio: float) -> Tensor:
    """The least shift with which all values have that ratio to the largest one, and none is less than half of the shift."""
    low, high = values.amin(), values.amax()
    return torch.maximum((ratio * high - low) / (1 - ratio), -2 * low).clamp_min(0)


def _singular(block: Block, values: Tensor, damping: Tensor, needed: Tensor, split: str) -> str:
    """What to say of a block that cannot be inverted."""
    what = "parameter " + " and ".join(map(repr, block.names))
    low, high = float(values.min()), float(values.max())
    found = f"the block of {what} has eigenvalues from {low:.2g} to {high:.2g}; with damping {float(damping):.2g}"
    if low == high == 0:
        remedy = 'Any positive damping with split="exact" would do' if split == "pi" else "Any positive damping would do"
        return f"the block of {what} is zero, so with damping {float(damping):.2g} it has no inverse. {remedy}."
    if not needed.isfinite():
        return f'{found} it has no inverse by split="pi", since a factor is zero or not finite. Use split="exact".'
    least = 1.1 * float(needed)
    precise = "" if values.dtype == torch.float64 else ", or a decomposition with dtype=torch.float64 less"
    return f"{found} its inverse would be lost to rounding. A damping of at least {least:.1e} would do{precise}."
