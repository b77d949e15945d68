"""How a parameter's use at a layer, and a cotangent of the layer's output, turn into a result.

Every use of a parameter has one of two *forms*:

- `Outer`: the gradient is a sum of outer products, dW[v,n] = Σ_s g[v,n,s] x[n,s]ᵀ (linear, convolution, ...);
- `Direct`: the gradient is formed as such, [v, n, *shape] (biases, and everything without structure).

Every quantity is a contraction of forms. A new layer says which form it has; a new quantity adds a function here.

Axes: ``n`` sample, ``v`` backpropagated vector, ``q`` group, ``s`` shared position, ``o``/``k`` features out/in.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "Bound",
    "Direct",
    "Form",
    "Outer",
    "input_factor",
    "merge",
    "output_factor",
    "per_sample",
    "sample_norms",
    "sample_squares",
    "squares",
]

# Results that are larger than the cache are formed and reduced in blocks of samples of about this size.
BLOCK_BYTES = 1 << 21


@dataclass(frozen=True)
class Outer:
    """dW[v,n,q] = Σ_s g[v,n,q,s] x[n,q,s]ᵀ.

    Attributes:
        inputs: Gives x [n, q, s, k]; called at most once, and only when needed.
        cotangent: Maps the cotangent of the operation's output [v, n, ...] to g [v, n, q, s, o].
        shape: Shape of the parameter.
        arrange: Maps [..., q, o, k] to [..., *shape]; a reshape unless given.
        sum_positions: Whether the Kronecker output factor sums g over s first (the convention of convolutions).
    """

    inputs: Callable[[], Tensor]
    cotangent: Callable[[Tensor], Tensor]
    shape: torch.Size
    arrange: Callable[[Tensor], Tensor] | None = None
    sum_positions: bool = False


@dataclass(frozen=True)
class Direct:
    """A per-sample gradient [v, n, *shape], made by ``cotangent`` from the output's cotangent [v, n, ...]."""

    cotangent: Callable[[Tensor], Tensor]
    shape: torch.Size


Form = Outer | Direct


@dataclass(frozen=True)
class Bound:
    """A form with its tensors: g and, for `Outer`, x. For `Direct`, g is the per-sample gradient itself."""

    g: Tensor
    x: Tensor | None
    form: Form

    @property
    def outer(self) -> bool:
        """Whether the gradient is kept as a sum of outer products."""
        return self.x is not None

    def arranged(self, result: Tensor) -> Tensor:
        """[..., q, o, k] as [..., *shape]."""
        if isinstance(self.form, Outer) and self.form.arrange is not None:
            return self.form.arrange(result)
        return result.reshape(*result.shape[:-3], *self.form.shape)


def merge(parts: list[Bound]) -> Bound:
    """Several uses of one parameter as one: gradients add up before anything is squared.

    Uses with the same features join along the shared positions; others add their per-sample gradients.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if all(p.outer and p.form.arrange is None for p in parts) and len({_features(p) for p in parts}) == 1:
        form = replace(first.form, sum_positions=False)
        return Bound(torch.cat([p.g for p in parts], dim=3), torch.cat([p.x for p in parts], dim=2), form)
    return Bound(sum(per_sample(p) for p in parts), None, Direct(lambda g: g, first.form.shape))


def _features(b: Bound) -> tuple[int, int, int]:
    return b.x.shape[1], b.x.shape[3], b.g.shape[4]


def per_sample(b: Bound) -> Tensor:
    """The gradients themselves, [v, n, *shape]."""
    if not b.outer:
        return b.g
    if b.x.shape[2] == 1:
        return b.arranged(b.g.mT * b.x)
    v = b.g.shape[0]
    return b.arranged(torch.stack([b.g[i].mT @ b.x for i in range(v)]) if v > 1 else (b.g[0].mT @ b.x)[None])


def squares(b: Bound) -> Tensor:
    """Squared gradients summed over vectors and samples, Σ_vn g²: [*shape]."""
    if not b.outer:
        return b.g.flatten(0, 1).square().sum(0)
    if b.x.shape[2] == 1:  # (g xᵀ)² = g² (x²)ᵀ, so the sum over samples is one matrix product
        g, x = b.g.square().sum(0)[:, :, 0], b.x.square()[:, :, 0]
        return b.arranged(torch.einsum("nqo,nqk->qok", g, x))
    total = None
    for g, x in _blocks(b):
        part = (g.mT @ x).square().sum(0)
        total = part if total is None else total + part
    return b.arranged(total)


def sample_squares(b: Bound) -> Tensor:
    """Squared gradients summed over vectors, Σ_v g²: [n, *shape]."""
    if not b.outer:
        return b.g.square().sum(0)
    if b.x.shape[2] == 1:
        return b.arranged(b.g.square().sum(0).mT * b.x.square())
    total = (b.g[0].mT @ b.x).square()
    for g in b.g[1:]:
        total = total + (g.mT @ b.x).square()
    return b.arranged(total)


def sample_norms(b: Bound) -> Tensor:
    """Squared norms of the gradients summed over vectors, Σ_v ‖g‖²: [n]."""
    if not b.outer:
        return b.g.square().flatten(2).sum(2).sum(0)
    s, o, k = b.x.shape[2], b.g.shape[4], b.x.shape[3]
    if s == 1:
        return (b.g.square().sum((0, 4)) * b.x.square().sum(3)).sum((1, 2))
    if s * (o + k) < o * k:  # ‖Σ_s g xᵀ‖² = Σ_st (g gᵀ)(x xᵀ): the Gram matrices are smaller than the gradient
        gram = b.x @ b.x.mT
        return sum((g @ g.mT * gram).flatten(1).sum(1) for g in b.g)
    norms = [(g.mT @ x).square().flatten(1).sum(1) for g, x in _blocks(b)]
    return torch.cat(norms).view(b.g.shape[0], -1).sum(0)


def _blocks(b: Bound) -> list[tuple[Tensor, Tensor]]:
    """(g [m,q,s,o], x [m,q,s,k]) for each vector and block of samples, sized so that [m,q,o,k] stays in cache."""
    v, n, q, _, o = b.g.shape
    size = max(1, min(n, BLOCK_BYTES // max(1, q * o * b.x.shape[3] * b.g.element_size())))
    return [(b.g[i, j : j + size], b.x[j : j + size]) for i in range(v) for j in range(0, n, size)]


def output_factor(b: Bound) -> Tensor:
    """The Kronecker factor of the outputs, B [o, o]; for `Direct`, the exact block [numel, numel].

    B = Σ_vn (Σ_s g)(Σ_s g)ᵀ where positions sum first (convolutions), else B = Σ_vns g gᵀ.
    """
    if not b.outer:
        g = b.g.flatten(2).flatten(0, 1)
        return g.mT @ g
    g = b.g.sum(3, keepdim=True) if b.form.sum_positions else b.g
    g = g.transpose(2, 3).flatten(3).flatten(0, 2)  # [v n s, q o]
    return g.mT @ g


def input_factor(b: Bound) -> Tensor | None:
    """The Kronecker factor of the inputs, A [k, k]: the mean over samples of Σ_s x xᵀ; None for `Direct`.

    Where positions do not sum first in the output factor, it is the mean over positions as well. Over groups it is the mean.
    """
    if not b.outer:
        return None
    n, q, s, _ = b.x.shape
    x = b.x.flatten(0, 2)
    return x.mT @ x / (n * q if b.form.sum_positions else n * q * s)
