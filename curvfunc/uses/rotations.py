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

__all__ = ["Rotation", "rotated_squares", "with_ones"]


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
        return _of_outer(with_ones(b) if rotation.joined else b, *bases)
    if rotation.joined:
        raise ValueError(
            f"parameter {rotation.name!r} was joined with its bias when the factors were computed, and is used in another way "
            "here. Compute factors and structure of this model function."
        )
    if isinstance(b.form, Rows):
        return _of_rows(b, *bases)
    U, V = bases
    return squares(direct(U.mT @ rotation.matrix(per_sample(b)) @ V))


def _of_outer(b: Bound, rows: Tensor, columns: Tensor) -> Tensor:
    """Of outer products: groups become positions, for each has rows of its own in the basis of them all."""
    assert isinstance(b.form, Outer)
    outputs, inputs = (columns, rows) if b.form.inputs_first else (rows, columns)
    own = outputs.unflatten(0, (b.g.shape[2], b.g.shape[4]))  # [q, o, r]
    g = (b.g @ own).flatten(2, 3).unsqueeze(2)  # [v, n, 1, (q s), r]
    x = (b.x @ inputs).flatten(1, 2).unsqueeze(1)  # [n, 1, (q s), k]
    found = squares(_plain(g, x))
    return found.mT if b.form.inputs_first else found


def _of_rows(b: Bound, rows: Tensor, columns: Tensor) -> Tensor:
    """Of a table: the rotation of a one-hot input is a row of the basis. The row after the last stands for none."""
    x = F.pad(rows, (0, 0, 0, 1))[b.x].unsqueeze(1)  # [n, 1, s, rows]
    return squares(_plain((b.g @ columns).unsqueeze(2), x)).mT


def _plain(g: Tensor, x: Tensor) -> Bound:
    return Bound(Outer(lambda: x, lambda g: g, torch.Size((g.shape[4], x.shape[3]))), g, x)
