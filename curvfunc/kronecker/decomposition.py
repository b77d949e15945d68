"""Blocks of curvature in their eigenbases: K = U diag(Λ) Uᵀ with U = U_B ⊗ U_A and Λ = λ_B λ_Aᵀ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from curvfunc.kronecker.structure import Layout, Structure, listed
from curvfunc.tensors.inputs import is_traced

__all__ = ["Block", "Decomposition", "blocks_of", "check_of", "decompose", "hidden", "key_of", "of_diagonal", "of_key"]

# What counts as rounding of factors: an asymmetry, or a negative eigenvalue, of this many units in the last place. Sums over
# 1e5 positions, as in the input factors of convolutions, leave some hundred.
ROUNDING = 512


@dataclass(frozen=True)
class Block:
    """The parameters of a block: one, or a weight and its bias as [weight | bias].

    Attributes:
        weight: Layout of the parameter.
        bias: Layout of the bias that is joined to it.
    """

    weight: Layout
    bias: Layout | None = None

    def __repr__(self) -> str:
        return f"Block({', '.join([f'{layout.name} {list(layout.shape)}' for layout in self.layouts])})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its parameters."""
        return tuple([layout.name for layout in self.layouts])

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Layouts of its parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def matrix(self, tensors: dict[str, Tensor], factors: int, rows: int) -> Tensor:
        """Its parameters' tensors [..., *shape] as [..., rows, columns], or, for less than two factors, [..., numel]."""
        t = tensors[self.weight.name]
        if factors < 2:
            return t.reshape((*t.shape[: t.ndim - len(self.weight.shape)], self.weight.numel))
        t = self.weight.matrix(t, rows)
        if self.bias is None:
            return t
        b = tensors[self.bias.name]
        return torch.cat([t, b.reshape(*t.shape[:-1], 1).to(t.dtype)], dim=-1)

    def parameters(self, t: Tensor, factors: int) -> dict[str, Tensor]:
        """The reverse of `matrix`."""
        if factors < 2:
            return {self.weight.name: t.reshape(t.shape[:-1] + self.weight.shape)}
        if self.bias is None:
            return {self.weight.name: self.weight.parameter(t)}
        bias = t[..., -1].reshape(t.shape[:-2] + self.bias.shape)
        return {self.weight.name: self.weight.parameter(t[..., :-1]), self.bias.name: bias}


@dataclass(frozen=True)
class Decomposition:
    """Symmetric matrices in their eigenbases, one per block; a pytree of tensors for torch and optree, never changed.

    A block K = Σ_ij Λ_ij (u_i ⊗ v_j)(u_i ⊗ v_j)ᵀ, with u_i and v_j the columns of the bases of rows and columns.
    ``optree.tree_map(lambda t: t.to(device), decomposition)`` moves it.

    Attributes:
        bases: Per block, (U [rows, rows], V [columns, columns]), (U [numel, numel],) for an exact block, or () for a diagonal.
        values: Per block, the eigenvalues Λ [rows, columns] or [numel].
        spectra: Per block, the eigenvalues of the factors, as long as Λ is their outer product; else empty.
        structure: Of the parameters.
        blocks: What the blocks are of.
    """

    bases: tuple[tuple[Tensor, ...], ...]
    values: tuple[Tensor, ...]
    spectra: tuple[tuple[Tensor, ...], ...]
    structure: Structure
    blocks: tuple[Block, ...]

    def __repr__(self) -> str:
        kinds = ("diagonal", "exact", "Kronecker")
        parts = []
        for block, bases, values in zip(self.blocks, self.bases, self.values, strict=True):
            sizes = getattr(values, "shape", "?")  # whatever a tree_map has made of it
            parts.append(f"{' + '.join(block.names)}: {kinds[len(bases)]} {' x '.join(map(str, sizes))}")
        return f"Decomposition({listed(parts)})"


def _flatten(d: Decomposition) -> tuple[list[Any], Any]:
    return [d.bases, d.values, d.spectra], (d.structure, d.blocks)


def _unflatten(children: Any, context: Any) -> Decomposition:
    bases, values, spectra = children
    return Decomposition(tuple(bases), tuple(values), tuple(spectra), *context)


pytree.register_pytree_node(
    Decomposition,
    _flatten,
    _unflatten,
    serialized_type_name="curvfunc.kronecker.Decomposition",
)
_register: Any = optree.register_pytree_node  # its types are those of collections
_register(
    Decomposition,
    lambda d: (*_flatten(d), None),
    lambda context, children: _unflatten(children, context),
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)
torch.serialization.add_safe_globals([Block, Decomposition, Layout, Structure])


def decompose(factors: Any, structure: Structure, *, dtype: torch.dtype = torch.float64) -> Decomposition:
    """Eigendecompositions of all factors, B = U_B diag(λ_B) U_Bᵀ, so that B ⊗ A = (U_B ⊗ U_A) diag(λ_B ⊗ λ_A) (U_B ⊗ U_A)ᵀ.

    A weight whose input factor has one row more than it has inputs (``joined=True``) makes one block with its bias.
    Eigenvalues that are negative by rounding are kept, so that all that follows is of the matrices that were given.

    Args:
        factors: What `curvfunc.kfac`, `curvfunc.kflr` or `curvfunc.kfra` returned, or averages of it: a tree like the
            parameters of tuples (B [o, o], A [k, k]), (A, B), or (B [numel, numel],).
        structure: From `structure`, for the same model and parameters.
        dtype: In which to decompose, and to compute with the result. In single precision, a decomposition that fails is
            done again in double precision.

    Returns:
        A `Decomposition`: per block, bases (U_B [o, o], U_A [k, k]) and eigenvalues Λ [o, k].

    Raises:
        TypeError: If the structure is none, or what the tree of factors holds.
        ValueError: If the factors are of other parameters, not finite, not symmetric or not positive semi-definite. In
            compiled code and under vmap, where values cannot be looked at, such factors give NaN.

    References:
        Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature", sec. 4.2.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> factors = kfac(model_fn, params, X, y, joined=True)
        >>> decomposition = kronecker.decompose(factors, kronecker.structure(model_fn, params, X))
        >>> [(block.names, tuple(values.shape)) for block, values in zip(decomposition.blocks, decomposition.values)]
        [(('weight', 'bias'), (3, 5))]
    """
    if not isinstance(structure, Structure):
        raise TypeError(
            f"structure must come from curvfunc.kronecker.structure(model_fn, params, X), got {type(structure).__name__}."
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}.")
    blocks, of = blocks_of(factors, structure)
    bases, spectra = [], []
    for block, matrices in zip(blocks, of, strict=True):
        found = [_eigh(block.names[0], i, F, dtype) for i, F in enumerate(matrices)]
        bases.append(tuple([U for U, _ in found]))
        spectra.append(tuple([values for _, values in found]))
    values = tuple([s[0] if len(s) == 1 else torch.outer(s[0], s[1]) for s in spectra])
    return Decomposition(tuple(bases), values, tuple(spectra), structure, tuple(blocks))


def of_diagonal(diagonal: Any, structure: Structure, *, dtype: torch.dtype = torch.float64) -> Decomposition:
    """A diagonal matrix, which is its own eigendecomposition: all that is done with factors can be done with it.

    Args:
        diagonal: What `curvfunc.diag_ggn` and its like returned, or averages of it: [*shape] per parameter.
        structure: From `structure`, for the same model and parameters.
        dtype: In which to compute with the result.

    Returns:
        A `Decomposition` without bases, a block for each parameter.

    Raises:
        ValueError: If the diagonal is of other parameters, negative or not finite. In compiled code and under vmap, where
            values cannot be looked at, such entries are NaN.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> grad, diagonal = compute(model_fn, params, X, y, (Grad(), DiagGGN()))
        >>> D = kronecker.of_diagonal(diagonal, kronecker.structure(model_fn, params, X))
        >>> step = kronecker.solve(D, grad, damping=0.1)
        >>> torch.allclose(step["bias"], grad["bias"] / (diagonal["bias"] + 0.1))
        True
    """
    values = []
    for layout, d in zip(structure.layouts, structure.flatten("diagonal", diagonal), strict=True):
        if not isinstance(d, Tensor) or tuple(d.shape) != layout.shape or not d.is_floating_point():
            found = f"{d.dtype} {tuple(d.shape)}" if isinstance(d, Tensor) else type(d).__name__
            raise ValueError(
                f"the diagonal of parameter {layout.name!r} is {found}; real numbers of shape {layout.shape} are needed. "
                "Compute diagonal and structure with the same model and params."
            )
        good = d.isfinite() & (d >= 0)
        if not hidden(d) and not good.all():
            raise ValueError(
                f"the diagonal of parameter {layout.name!r} has entries that are negative or not finite. That of a Hessian may "
                "have: take diag_ggn, or clamp it."
            )
        values.append(d.to(dtype).where(good, torch.nan).flatten())
    blocks = tuple([Block(layout) for layout in structure.layouts])
    return Decomposition(((),) * len(blocks), tuple(values), (), structure, blocks)


def check_of(decomposition: Any, names: Sequence[str]) -> None:
    """Raise unless it is a decomposition, and of these parameters."""
    if not isinstance(decomposition, Decomposition):
        raise TypeError(
            "a decomposition is needed, from curvfunc.kronecker.decompose(factors, structure), inverse or of_diagonal; got "
            f"{type(decomposition).__name__}."
        )
    own = decomposition.structure.names
    if tuple(names) != own:
        raise ValueError(f"the decomposition is of the parameters {list(own)}, and params has {list(names)}.")


def key_of(d: Decomposition) -> tuple[Any, ...]:
    """All but the tensors, in numbers and names, of which constants of compiled code are made."""
    blocks = tuple([tuple([_key(layout) for layout in block.layouts]) for block in d.blocks])
    return tuple([_key(layout) for layout in d.structure.layouts]), blocks


def of_key(key: tuple[Any, ...], bases: Any, values: Any) -> Decomposition:
    """From the key and the tensors."""
    layouts, blocks = key
    structure = Structure(tuple([Layout(*layout) for layout in layouts]))
    of = tuple([Block(*[Layout(*layout) for layout in block]) for block in blocks])
    return Decomposition(bases, values, (), structure, of)


def _key(layout: Layout) -> tuple[Any, ...]:
    return layout.name, layout.shape, layout.dtype, layout.bias, layout.split, layout.order


def blocks_of(factors: Any, structure: Structure) -> tuple[list[Block], list[tuple[Tensor, ...]]]:
    """The blocks that factors are of, and the factors of each.

    Raises:
        ValueError: If their sizes are not those of the parameters.
    """
    own = structure.flatten("factors", factors)
    given = {layout.name: _read(layout, f) for layout, f in zip(structure.layouts, own, strict=True)}
    named = {layout.name: layout for layout in structure.layouts}
    joined = {name: named[named[name].bias or name] for name, f in given.items() if _is_joined(named[name], f)}
    biases = {bias.name for bias in joined.values()}
    blocks = [Block(layout, joined.get(layout.name)) for layout in structure.layouts if layout.name not in biases]
    return blocks, [given[block.weight.name] for block in blocks]


def _read(layout: Layout, factors: Any) -> tuple[Tensor, ...]:
    """The factors of one parameter."""
    own = f"the factors of parameter {layout.name!r}"
    if not isinstance(factors, (tuple, list)) or len(factors) not in (1, 2) or not all(isinstance(F, Tensor) for F in factors):
        raise TypeError(f"{own} must be a tuple of one or two tensors, as curvfunc.kfac returns them, got {factors!r}.")
    shapes = [tuple(F.shape) for F in factors]
    square = all(F.ndim == 2 and F.shape[0] == F.shape[1] for F in factors)
    if square and (_sizes(factors) in layout.sizes() or _is_joined(layout, factors)):
        return tuple(factors)
    beside = f", and no bias that is only beside it could be joined ({layout.bias})" if len(factors) == 2 else ""
    raise ValueError(
        f"{own} have the shapes {shapes}, which are not those of a parameter of shape {layout.shape}{beside}. Compute factors "
        "and structure with the same model and params."
    )


def _sizes(factors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([F.shape[0] for F in factors])


def _is_joined(layout: Layout, factors: Sequence[Tensor]) -> bool:
    """Whether the factors are those of the parameter and its bias together."""
    sizes = _sizes(factors)
    return layout.bias is not None and len(sizes) == 2 and (sizes[0], sizes[1] - 1) in layout.sizes()


def _eigh(name: str, number: int, F: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Basis and eigenvalues of a factor; NaN where it has none and that cannot be raised."""
    if not F.is_floating_point():
        raise TypeError(f"factor {number} of parameter {name!r} has dtype {F.dtype}; a real floating-point one is needed.")
    if not F.numel():
        return F.to(dtype), F.new_zeros(len(F), dtype=dtype)
    S = F.to(dtype)
    rounding = ROUNDING * len(F) ** 0.5 * max(torch.finfo(F.dtype).eps, torch.finfo(dtype).eps)
    usable = S.isfinite().all() & ((S - S.mT).abs().max() <= rounding * S.abs().max())
    S = torch.where(usable, (S + S.mT) / 2, torch.zeros_like(S))
    if not hidden(F) and not usable:
        raise ValueError(_unusable(f"factor {number} of parameter {name!r}, of shape {tuple(F.shape)},", F))
    values, U = _retried(S)
    positive = values[0] >= -rounding * values[-1].abs()
    if not hidden(F) and not positive:
        low, high = float(values[0]), float(values[-1])
        raise ValueError(
            f"factor {number} of parameter {name!r} is not positive semi-definite: its eigenvalues are between {low:.2g} and "
            f"{high:.2g}, and rounding would explain no more than {-rounding * abs(high):.1g}. If it is what it should be, add "
            f"a damping of at least {-1.1 * low:.1e} to its diagonal."
        )
    return U, torch.where(usable & positive, values, torch.nan)


def _unusable(factor: str, F: Tensor) -> str:
    if F.isfinite().all():
        return f"{factor} is not symmetric: it differs from its transpose by up to {float((F - F.mT).abs().max()):.2g}."
    return (
        f"{factor} has entries that are not finite, and no damping would help. Look at the loss, the outputs and the learning "
        "rate, or leave this batch out of the average."
    )


def _retried(S: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and basis; in double precision where single precision fails."""
    if S.dtype == torch.float64 or hidden(S):
        return torch.linalg.eigh(S)
    try:
        values, U = torch.linalg.eigh(S)
        if values.isfinite().all() and U.isfinite().all():
            return values, U
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    values, U = torch.linalg.eigh(S.double())
    return values.to(S.dtype), U.to(S.dtype)


def hidden(*tensors: Tensor) -> bool:
    """Whether the values of some tensor cannot be looked at, in compiled code or under a transformation."""
    return torch.compiler.is_compiling() or any(is_traced(t) for t in tensors)
