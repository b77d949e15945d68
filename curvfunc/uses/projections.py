"""Gradients as matrices between two random ones, P G Qᵀ, without forming G where its use allows.

A use with G[n] = Σ_qs g[n,q,s] x[n,q,s]ᵀ gives Σ_s (P g)(Q x)ᵀ. The random matrices belong to the parameter, as a matrix of its
first axis and all others, and not to the form of its use: whichever way a batch goes, they are the same.

Axes as in `curvfunc.uses.forms`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvfunc.uses.forms import Bound, Outer, Products, flat_vectors, per_sample

__all__ = ["Sketch", "projected"]

# Of the finalizer of SplitMix64 (Steele, Lea, Flood 2014), as signed numbers
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_ROWS, _COLUMNS = 0, 1


@dataclass(frozen=True)
class Sketch:
    """What the random matrices of a parameter are made of.

    Attributes:
        rank: Most rows of P and of Q.
        seed: Of the call.
        place: A number of the parameter.
    """

    rank: tuple[int, int]
    seed: int
    place: int

    def sizes(self, shape: torch.Size) -> tuple[int, int]:
        """Rows of P and of Q; a side that is no longer than the rank stays as it is."""
        if len(shape) < 2:
            return min(math.prod(self.rank), shape.numel()), 1
        return min(self.rank[0], shape[0]), min(self.rank[1], shape[1:].numel())

    def matrix(self, side: int, rows: int, columns: int, like: Tensor) -> Tensor | None:
        """Random signs over √rows, [rows, columns], with E[Pᵀ P] = I; None for the identity."""
        if rows == columns:
            return None
        signs = _compiled_signs if torch.compiler.is_compiling() else _signs
        found = signs(self.seed, 2 * self.place + side + 1, rows * columns, like.device)
        return found.reshape(rows, columns).to(like.dtype) / rows**0.5


def _signs(seed: int, place: int, num: int, device: torch.device) -> Tensor:
    start = _mixed(torch.tensor(seed, device=device) + _STEP * torch.tensor(place, device=device))
    return 1 - 2 * (_mixed(start + _STEP * torch.arange(num, device=device)) & 1)


@torch.library.custom_op("curvfunc::signs", mutates_args=())
def _compiled_signs(seed: int, place: int, num: int, device: torch.device) -> Tensor:
    """An opaque operation: compiled code may have other numbers where products overflow."""
    return _signs(seed, place, num, device)


@_compiled_signs.register_fake
def _(seed: int, place: int, num: int, device: torch.device) -> Tensor:
    return torch.empty(num, dtype=torch.int64, device=device)


def _mixed(z: Tensor) -> Tensor:
    """A pseudorandom number for each integer: the same on all devices and under vmap, where a generator could not be used."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Zeros come in from the left, also for negative numbers."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def projected(b: Bound, sketch: Sketch) -> Tensor:
    """P G Qᵀ, flat: [v, n, r_o * r_i]; for a parameter of one axis or none, P g."""
    assert not isinstance(b.form, Products)
    shape = b.form.shape
    rows, columns = sketch.sizes(shape)
    if len(shape) < 2:
        flat = flat_vectors(per_sample(b))
        return _times(flat, sketch.matrix(_ROWS, rows, flat.shape[-1], flat))
    first, others = shape[0], shape[1:].numel()
    P, Q = sketch.matrix(_ROWS, rows, first, b.g), sketch.matrix(_COLUMNS, columns, others, b.g)
    if _fits(b, first):
        g, x = b.g[:, :, 0], b.x[:, 0]
        if b.form.inputs_first:  # type: ignore[union-attr]
            return (_times(x, P).mT @ _times(g, Q)).flatten(2)
        return (_times(g, P).mT @ _times(x, Q)).flatten(2)
    G = per_sample(b).reshape(*b.g.shape[:2], first, others)
    return _times(_times(G, Q).mT, P).mT.flatten(2)


def _fits(b: Bound, first: int) -> bool:
    """Whether the features of a use are the first axis of its parameter, and all others."""
    if not isinstance(b.form, Outer) or b.form.arrange is not None or b.g.shape[2] != 1:
        return False
    return first == (b.features if b.form.inputs_first else b.g.shape[4])


def _times(t: Tensor, P: Tensor | None) -> Tensor:
    return t if P is None else t @ P.mT
