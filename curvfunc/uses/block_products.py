"""Products with a diagonal block of JᵀHJ whose root is at hand at the uses of the block's parameter.

Columns S of a root of the loss Hessian, H = S diag(w) Sᵀ, go back to the uses once. There they stand for gradients
P[c,n] = Jₙᵀ S[c,n], and the block is Σ_cn w[c,n] P[c,n] P[c,n]ᵀ. A product takes the inner products ⟨P[c,n], v⟩ and a
weighted sum of the P: work at the uses alone, without the network after them, and without a graph that would have to be
kept. Where a use has at least as many positions as there are columns, products with P itself take less work; elsewhere it is
not formed.

Axes as in `curvfunc.uses.forms`, with ``c`` for the columns and ``v`` for the vectors that are multiplied.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.uses.forms import Bound, Direct, Outer, Rows, adapted, arranged, direct, flat_vectors, per_sample, scatter

__all__ = ["Block", "condensed"]

VECTORS_BYTES = 1 << 26  # what a product may hold besides its vectors


def condensed(b: Bound, columns: int) -> Bound:
    """A use in the form in which products take least work, if there are that many columns in all."""
    if isinstance(b.form, Outer) and b.positions >= max(2, columns):
        return direct(per_sample(b))
    return b


@dataclass(frozen=True)
class Block:
    """v ↦ Σ_cn w[c,n] P[c,n] ⟨P[c,n], v⟩.

    Attributes:
        root: The uses of the parameter, merged, with the columns as cotangents.
        weights: w [c, n]; None stands for ones.
    """

    root: Bound
    weights: Tensor | None = None

    @classmethod
    def of(cls, b: Bound, weights: Tensor | None) -> "Block":
        """Of uses that may be `condensed`, without anything of the forward pass but its inputs."""
        given: dict[str, Any] = {"inputs": _gone}
        if isinstance(b.form, Direct):
            given = {"sums": None}
        elif isinstance(b.form, Outer):
            given |= dict.fromkeys(("part", "moment", "sums"))
        form: Any = adapted(b.form, cotangent=_gone, **given)  # type: ignore[arg-type]
        g = b.g.detach()
        return cls(Bound(form, g, g if b.x is b.g else b.x.detach()), weights)

    def __call__(self, v: Tensor) -> Tensor:
        """Multiply vectors [v, *shape]."""
        form, g = self.root.form, self.root.g
        if not isinstance(form, (Outer, Rows)):
            return self._direct(v)
        width = g.shape[1:].numel() * g.element_size()
        parts = v.split(max(1, VECTORS_BYTES // max(1, width)))
        parts = [self._outer(part) if isinstance(form, Outer) else self._rows(part) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _weighted(self, inner: Tensor) -> Tensor:
        """w t for inner products t [..., n, c]."""
        return inner if self.weights is None else inner * self.weights.mT

    def _outer(self, v: Tensor) -> Tensor:
        b = self.root
        g, x = b.g, b.x  # [c, n, q, s, o], [n, q, s, k]
        like = v.new_zeros(()).expand(len(v), x.shape[1], g.shape[4], x.shape[3])
        _, transpose = torch.func.vjp(lambda t: arranged(b, t), like)  # type: ignore[misc]
        (matrices,) = transpose(v)  # [v, q, o, k]
        outputs = torch.einsum("nqsk,vqok->nvqso", x, matrices)
        inner = self._weighted(torch.einsum("nvqso,cnqso->vnc", outputs, g))
        outputs = torch.einsum("vnc,cnqso->nvqso", inner, g)
        return arranged(b, torch.einsum("nvqso,nqsk->vqok", outputs, x))

    def _rows(self, v: Tensor) -> Tensor:
        g, rows = self.root.g, self.root.x  # [c, n, s, d], [n, s]
        outputs = F.pad(v, (0, 0, 0, 1))[:, rows]  # the row after the last stands for none
        inner = self._weighted(torch.einsum("vnsd,cnsd->vnc", outputs, g))
        outputs = torch.einsum("vnc,cnsd->vnsd", inner, g)
        return scatter(outputs.flatten(1, 2), rows.flatten().expand(len(v), -1), v.shape[1])

    def _direct(self, v: Tensor) -> Tensor:
        g = flat_vectors(self.root.g)  # [c, n, p]
        flat = g.reshape(-1, g.shape[2])
        inner = self._weighted((v.reshape(len(v), -1) @ flat.mT).unflatten(1, g.shape[:2]).mT).mT
        return (inner.reshape(len(v), -1) @ flat).reshape(v.shape)


def _gone(*_: object) -> Tensor:
    raise AssertionError("a use that is bound already")
