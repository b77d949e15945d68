"""The eigenvalues that fit best in K-FAC's eigenbasis: second moments of gradients there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Generator, Tensor

from curvfunc.engine.cotangents import LossGradient, LossRoot
from curvfunc.kronecker.decomposition import Block, Decomposition, check_of, hidden, key_of, of_key
from curvfunc.quantities.call import compute
from curvfunc.quantities.laws import Law, Summed
from curvfunc.quantities.quantity import GaussNewton
from curvfunc.tensors.docstrings import documented
from curvfunc.uses.rotations import Rotation

__all__ = ["EKFAC", "correct", "ekfac"]


@dataclass(frozen=True, eq=False)
class EKFAC(GaussNewton):
    """Second moments in the eigenbasis of a `Decomposition`, [rows, columns] or [numel] per parameter; see `ekfac`.

    Attributes:
        mc_samples: 0 for the exact loss Hessian, else the number of Monte-Carlo draws per sample.
        empirical: Whether the loss gradient takes the place of the loss Hessian's root.
        decomposition: From `decompose`, mostly of an earlier batch.
    """

    mc_samples: int = 1
    empirical: bool = False
    decomposition: Decomposition = field(kw_only=True)

    contractions = ("rotated_squares",)

    @property
    def laws(self) -> tuple[Law, ...]:  # type: ignore[override]
        """Sums over samples, in a fixed basis."""
        return (Summed(2 if self.empirical else 1),)

    @property
    def cotangent(self) -> LossGradient | LossRoot:  # type: ignore[override]
        """The loss gradient, or columns of a root of the loss Hessian."""
        return LossGradient() if self.empirical else super().cotangent

    def operands(self, names: Sequence[str]) -> dict[str, Sequence[Any]]:
        """The bases of each parameter; None for a bias that is part of its weight's block."""
        d = self.decomposition
        check_of(d, names)
        if not all(d.bases):
            raise ValueError(
                "the decomposition is that of a diagonal, which has no eigenbasis but its own. Use that of factors."
            )
        found = {block.names[0]: _rotation(block, bases) for block, bases in zip(d.blocks, d.bases, strict=True)}
        return {"rotated_squares": [found.get(name) for name in names]}

    def tensors(self) -> Any:
        """The bases."""
        return self.decomposition.bases

    def key(self) -> tuple[Any, ...]:
        """All but the bases, in numbers and names, of which constants of compiled code are made."""
        return self.mc_samples, self.empirical, *key_of(self.decomposition)

    @classmethod
    def of(cls, key: tuple[Any, ...], tensors: Any) -> "EKFAC":
        """From both."""
        mc_samples, empirical, *own = key
        return cls(mc_samples, empirical, decomposition=of_key(tuple(own), tensors, ()))


def _rotation(block: Block, bases: tuple[Tensor, ...]) -> Rotation:
    matrix = partial(block.weight.matrix, rows=len(bases[0]))
    return Rotation(bases, block.bias is not None, matrix, block.weight.name)


@documented()
def ekfac(
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    X: Any,
    y: Any,
    decomposition: Decomposition,
    *,
    loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    mc_samples: int = 1,
    empirical: bool = False,
    subsampling: Sequence[int] | Tensor | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Second moments of the gradients in K-FAC's eigenbasis: the diagonal of the GGN there, Λ_ij = Σ_vn (U_Bᵀ G[v,n] U_A)²_ij.

    G[v,n] are the columns of the GGN's root for sample n as matrices, as in `curvfunc.sqrt_ggn`, or the per-sample
    gradients. Among all diagonal matrices in this basis, diag Λ is the closest to the GGN's block in Frobenius norm. With
    cotangents g of the outputs, inputs x and positions s, U_Bᵀ G U_A = Σ_s (U_Bᵀ g)(U_Aᵀ x)ᵀ, so that no gradient is formed
    where there is one position, and a few samples' at a time elsewhere.

    Args:
        decomposition: From `decompose`, mostly of an earlier batch: bases (U_B [o, o], U_A [k, k]) per block.
        empirical: Whether the loss gradient takes the place of the loss Hessian's root: the empirical Fisher.

    Returns:
        A tree like ``params``, [rows, columns] for each weight, with its bias as the last column where it is joined (the bias
        itself then has [0]); [numel] for each exact block. `correct` puts them into the decomposition, `interpolate` averages
        them.

    Raises:
        ValueError: If the decomposition is of other parameters, or that of a diagonal.

    References:
        George, Laurent, Bouthillier, Ballas, Vincent 2018, "Fast approximate natural gradient descent in a Kronecker-factored
        eigenbasis", eq. 8 and 9.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> K = kronecker.decompose(kflr(model_fn, params, X, y), kronecker.structure(model_fn, params, X))
        >>> K = kronecker.correct(K, kronecker.ekfac(model_fn, params, X, y, K, mc_samples=0))
        >>> torch.allclose(kronecker.trace(K)[("weight",)].float(), diag_ggn(model_fn, params, X, y)["weight"].sum())
        True
    """
    spec = EKFAC(mc_samples, empirical, decomposition=decomposition)
    given: dict[str, Any] = {"subsampling": subsampling, "generator": generator, "chunk_size": chunk_size}
    return compute(model_fn, params, X, y, spec, loss_fn=loss_fn, **given)


def correct(decomposition: Decomposition, moments: Any) -> Decomposition:
    """The same bases with `ekfac`'s eigenvalues.

    Args:
        decomposition: From `decompose`, with eigenvalues [rows, columns] or [numel] per block.
        moments: From `ekfac` or `EKFAC` with this decomposition, or averages of them over batches: [rows, columns] or [numel].

    Returns:
        A `Decomposition` with these eigenvalues; it can be damped by ``split="exact"`` only.

    Raises:
        ValueError: If the moments are of other parameters or bases, negative or not finite.

    References:
        George, Laurent, Bouthillier, Ballas, Vincent 2018, "Fast approximate natural gradient descent in a Kronecker-factored
        eigenbasis", eq. 8 and 9.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> K = kronecker.decompose(kfac(model_fn, params, X, y), kronecker.structure(model_fn, params, X))
        >>> kronecker.correct(K, kronecker.ekfac(model_fn, params, X, y, K))
        Decomposition(weight: Kronecker 3 x 4, bias: exact 3)
    """
    structure = decomposition.structure
    given = dict(zip(structure.names, structure.flatten("moments", moments), strict=True))
    values = []
    for block, old in zip(decomposition.blocks, decomposition.values, strict=True):
        own = given[block.names[0]]
        if own.shape != old.shape:
            raise ValueError(
                f"moments has shape {tuple(own.shape)} for parameter {block.names[0]!r}, and its eigenvalues have "
                f"{tuple(old.shape)}. Compute them with this decomposition."
            )
        good = own.isfinite() & (own >= 0)
        if not hidden(own) and not good.all():
            raise ValueError(f"the moments of parameter {block.names[0]!r} have entries that are negative or not finite.")
        values.append(own.to(old.dtype).where(good, float("nan")))
    return replace(decomposition, values=tuple(values), spectra=())
