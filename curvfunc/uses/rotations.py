"""Gradients in another basis, without forming them in the parameter's own.

With G[v,n] = Σ_qs g[v,n,q,s] x[n,q,s]ᵀ a sample's gradient as a matrix, Uᵀ G V = Σ_qs (Uᵀ g)(Vᵀ x)ᵀ: outputs and inputs are
rotated, and the result is a use of the same kind.

Axes as in `curvfunc.uses.forms`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.uses.forms import Bound, Outer, Rows, direct, flat_vectors, per_sample
from curvfunc.uses.squares import squares

__all__ = ["Rotation", "rotated_outer", "rotated_rows", "rotated_squares", "with_ones"]


@dataclass(frozen=True)
class Rotation:
    """Orthonormal bases for a parameter's gradient as a matrix.

    Attributes:
        bases: (U of the rows, V of the columns), or (U,) for the flat gradient.
        joined: Whether the last column is the gradient of the bias beside a weight.
        matrix: Gradients [..., *shape] as matrices [..., rows, columns], without the bias.
        name: Of the parameter.
    """

    bases: tuple[Tensor, ...]
    joined: bool
    matrix: Callable[[Tensor], Tensor]
    name: str


def with_ones(b: Bound) -> Bound:
    """An `Outer` use with a one appended to its inputs: the last column of the gradient is Σ_s g, the bias's."""
    return replace(b, inputs=F.pad(b.x, (0, 1), value=1.0))


def rotated_squares(b: Bound, rotation: Rotation | None) -> Tensor:
    """Σ_vn (Uᵀ G V)², [rows, columns]; for one basis Σ_vn (Uᵀ g)², [numel]; nothing, [0], where there is none."""
    if rotation is None:
        return b.g.new_zeros(0)
    bases = [u.to(b.g.dtype) for u in rotation.bases]
    if len(bases) == 1:
        return squares(direct(flat_vectors(per_sample(b)) @ bases[0]))
    if isinstance(b.form, Outer):
        found = squares(_plain(*rotated_outer(with_ones(b) if rotation.joined else b, *bases)))
        return found.mT if b.form.inputs_first else found
    if rotation.joined:
        raise ValueError(
            f"parameter {rotation.name!r} was joined with its bias when the factors were computed, and is used in another way "
            "here. Compute factors and structure of this model function."
        )
    if isinstance(b.form, Rows):
        return squares(_plain(*rotated_rows(b, *bases))).mT
    U, V = bases
    return squares(direct(U.mT @ rotation.matrix(per_sample(b)) @ V))


def rotated_outer(b: Bound, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """g and x of outer products in bases: groups become positions, for each has rows of its own in the basis of them all.

    Returns:
        g [v, n, 1, (q s), r] and x [n, 1, (q s), k]; of parameters whose inputs come first, for the transpose.
    """
    assert isinstance(b.form, Outer)
    outputs, inputs = (columns, rows) if b.form.inputs_first else (rows, columns)
    groups = b.g.shape[2]
    own = outputs if groups == 1 else outputs.unflatten(0, (groups, b.g.shape[4]))  # [q, o, r]; a matrix makes one product
    return (b.g @ own).flatten(2, 3).unsqueeze(2), (b.x @ inputs).flatten(1, 2).unsqueeze(1)


def rotated_rows(b: Bound, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """g and x of a table, for its transpose: the rotation of a one-hot input is a row of the basis.

    The row after the last stands for none.
    """
    x = F.pad(rows, (0, 0, 0, 1))[b.x].unsqueeze(1)  # [n, 1, s, rows]
    return (b.g @ columns).unsqueeze(2), x


def _plain(g: Tensor, x: Tensor) -> Bound:
    return Bound(Outer(lambda: x, lambda g: g, torch.Size((g.shape[4], x.shape[3]))), g, x)
