"""How a parameter's use at a layer, and a cotangent of the layer's output, turn into a result.

Every use of a parameter has one of three *forms*:

- `Outer`: the gradient is a sum of outer products, dW[v,n] = Σ_s g[v,n,s] x[n,s]ᵀ (linear, convolution, ...);
- `Rows`: as `Outer` with one-hot x, which selects rows (embeddings);
- `Direct`: the gradient is formed as such, [v, n, *shape] (biases, norms, and everything without structure).

Every quantity is a contraction of forms. A new layer says which form it has; a new quantity adds a function here.

Axes: ``n`` sample, ``v`` backpropagated vector, ``q`` group, ``s`` shared position, ``o``/``k`` features out/in.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Bound",
    "Direct",
    "Form",
    "Outer",
    "Rows",
    "Through",
    "bind",
    "direct",
    "input_factor",
    "merge",
    "output_factor",
    "per_sample",
    "rows_of",
    "sample_norms",
    "sample_squares",
    "squares",
    "sum_to_shape",
    "transposed",
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
        inputs_first: Whether the parameter's axes are those of x before those of g, as in x @ W.
        sum_positions: Whether the Kronecker output factor sums g over s first (the convention of convolutions).
    """

    inputs: Callable[[], Tensor]
    cotangent: Callable[[Tensor], Tensor]
    shape: torch.Size
    arrange: Callable[[Tensor], Tensor] | None = None
    inputs_first: bool = False
    sum_positions: bool = False


@dataclass(frozen=True)
class Rows:
    """dW[v,n,r] = Σ_{s: i[n,s] = r} g[v,n,s].

    Attributes:
        inputs: Gives the rows i [n, s], integers; a negative entry selects none.
        cotangent: Maps the cotangent of the operation's output [v, n, ...] to g [v, n, s, d].
        shape: Shape of the parameter, (rows, d).
    """

    inputs: Callable[[], Tensor]
    cotangent: Callable[[Tensor], Tensor]
    shape: torch.Size


@dataclass(frozen=True)
class Direct:
    """A per-sample gradient [v, n, *shape], made by ``cotangent`` from the output's cotangent [v, n, ...]."""

    cotangent: Callable[[Tensor], Tensor]
    shape: torch.Size


@dataclass(frozen=True)
class Through:
    """The use of a parameter p that enters as W = h(p).

    Attributes:
        form: Of the use of W.
        pullback: Takes per-sample gradients [v, n, *W.shape] through h's VJP to [v, n, *shape].
        shape: Shape of p.
    """

    form: "Form"
    pullback: Callable[[Tensor], Tensor]
    shape: torch.Size


Form = Outer | Rows | Direct | Through


@dataclass(frozen=True)
class Bound:
    """A form with its tensors: g and x for `Outer`, g and i for `Rows`; for `Direct`, g is the gradient itself."""

    form: Form
    g: Tensor
    x: Tensor


def bind(form: Form, cotangent: Tensor, inputs: Callable[[Form], Tensor]) -> Bound:
    """The form with its tensors, in at least single precision: low precision is not enough for sums of squares."""
    if isinstance(form, Through):
        return direct(form.pullback(per_sample(bind(form.form, cotangent, inputs))))
    g = _wide(form.cotangent(cotangent))
    if isinstance(form, Direct):
        return Bound(form, g, g)
    x = inputs(form)
    if isinstance(form, Rows):
        none = x < 0  # these positions get a row of their own, which is dropped
        return Bound(form, g.masked_fill(none.unsqueeze(-1), 0), x.masked_fill(none, form.shape[0]))
    dtype = torch.promote_types(g.dtype, x.dtype)
    return Bound(form, g.to(dtype), _wide(x.to(dtype)))


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def direct(gradient: Tensor) -> Bound:
    """Per-sample gradients [v, n, *shape] as a bound form."""
    return Bound(Direct(lambda g: g, gradient.shape[2:]), gradient, gradient)


def merge(parts: list[Bound]) -> Bound:
    """Several uses of one parameter as one: gradients add up before anything is squared.

    Uses with the same features join along the shared positions; others add their per-sample gradients. Kronecker
    factors of joined uses follow the expand convention.
    """
    if len(parts) == 1:
        return parts[0]
    form = parts[0].form
    if len({_features(p) for p in parts}) == 1:
        if isinstance(form, Outer) and form.arrange is None:
            form = replace(form, sum_positions=False)
            return Bound(form, torch.cat([p.g for p in parts], dim=3), torch.cat([p.x for p in parts], dim=2))
        if isinstance(form, Rows):
            return Bound(form, torch.cat([p.g for p in parts], dim=2), torch.cat([p.x for p in parts], dim=1))
    return direct(sum([per_sample(p) for p in parts[1:]], per_sample(parts[0])))


def _features(b: Bound) -> tuple[object, ...]:
    if isinstance(b.form, Outer):
        return Outer, b.form.arrange, b.form.inputs_first, b.x.shape[1], b.x.shape[3], b.g.shape[4]
    return (type(b.form),)


def _arranged(b: Bound, result: Tensor) -> Tensor:
    """[..., q, o, k] as [..., *shape]."""
    form = b.form
    assert isinstance(form, Outer)
    if form.arrange is not None:
        return form.arrange(result)
    if form.inputs_first:
        result = result.mT
    return result.reshape(*result.shape[:-3], *form.shape)


def per_sample(b: Bound) -> Tensor:
    """The gradients themselves, [v, n, *shape]."""
    if isinstance(b.form, Direct):
        return b.g
    if isinstance(b.form, Rows):
        return _scatter(b.g, b.x.expand(b.g.shape[:-1]), b.form.shape[0])
    if b.x.shape[2] == 1:
        return _arranged(b, b.g.mT * b.x)
    v = b.g.shape[0]
    return _arranged(b, torch.stack([g.mT @ b.x for g in b.g]) if v > 1 else (b.g[0].mT @ b.x)[None])


def squares(b: Bound) -> Tensor:
    """Squared gradients summed over vectors and samples, Σ_vn g²: [*shape]."""
    if isinstance(b.form, Direct):
        return b.g.flatten(0, 1).square().sum(0)
    if isinstance(b.form, Rows):
        part = (b.g * _same_row(b)).sum(0)  # [n, s, d]
        return _scatter(part.flatten(0, 1), b.x.flatten(), b.form.shape[0])
    if b.x.shape[2] == 1:  # (g xᵀ)² = g² (x²)ᵀ, so the sum over samples is one matrix product
        g, x = b.g.square().sum(0)[:, :, 0], b.x.square()[:, :, 0]
        return _arranged(b, torch.einsum("nqo,nqk->qok", g, x))
    parts = [(g.mT @ x).square().sum(0) for g, x in _blocks(b)]
    return _arranged(b, sum(parts[1:], parts[0]))


def sample_squares(b: Bound) -> Tensor:
    """Squared gradients summed over vectors, Σ_v g²: [n, *shape]."""
    if isinstance(b.form, Direct):
        return b.g.square().sum(0)
    if isinstance(b.form, Rows):
        return _scatter((b.g * _same_row(b)).sum(0), b.x, b.form.shape[0])
    if b.x.shape[2] == 1:
        return _arranged(b, b.g.square().sum(0).mT * b.x.square())
    total = (b.g[0].mT @ b.x).square()
    for g in b.g[1:]:
        total = total + (g.mT @ b.x).square()
    return _arranged(b, total)


def sample_norms(b: Bound) -> Tensor:
    """Squared norms of the gradients summed over vectors, Σ_v ‖g‖²: [n]."""
    if isinstance(b.form, Direct):
        return _vectors(b.g).square().sum((0, 2))
    if isinstance(b.form, Rows):
        return (b.g * _same_row(b)).sum((0, 2, 3))
    s, o, k = b.x.shape[2], b.g.shape[4], b.x.shape[3]
    if s == 1:
        return (b.g.square().sum((0, 4)) * b.x.square().sum(3)).sum((1, 2))
    if s * (o + k) < o * k:  # ‖Σ_s g xᵀ‖² = Σ_st (g gᵀ)(x xᵀ): the Gram matrices are smaller than the gradient
        gram = b.x @ b.x.mT
        parts = [(g @ g.mT * gram).flatten(1).sum(1) for g in b.g]
        return sum(parts[1:], parts[0])
    norms = [(g.mT @ x).square().flatten(1).sum(1) for g, x in _blocks(b)]
    return torch.cat(norms).view(b.g.shape[0], -1).sum(0)


def _blocks(b: Bound) -> list[tuple[Tensor, Tensor]]:
    """(g [m,q,s,o], x [m,q,s,k]) for each vector and block of samples, sized so that [m,q,o,k] stays in cache."""
    v, n, q, _, o = b.g.shape
    size = max(1, min(n, BLOCK_BYTES // max(1, q * o * b.x.shape[3] * b.g.element_size())))
    return [(b.g[i, j : j + size], b.x[j : j + size]) for i in range(v) for j in range(0, n, size)]


def _vectors(g: Tensor) -> Tensor:
    """[v, n, *shape] as [v, n, numel]; a parameter without axes has one entry."""
    return g.reshape(*g.shape[:2], g.shape[2:].numel())


def _same_row(b: Bound) -> Tensor:
    """At each position the sum of g over the sample's positions with the same row, [v, n, s, d]."""
    same = (b.x.unsqueeze(2) == b.x.unsqueeze(1)).to(b.g.dtype)
    return same @ b.g


def _scatter(values: Tensor, rows: Tensor, size: int) -> Tensor:
    """Sums values [..., s, d] into rows [..., s] of [..., size, d]; the row ``size`` is dropped."""
    zeros = values.new_zeros(*values.shape[:-2], size + 1, values.shape[-1])
    return zeros.scatter_add(-2, rows.unsqueeze(-1).expand(values.shape), values)[..., :size, :]


def output_factor(b: Bound) -> Tensor:
    """The Kronecker factor of the outputs, B [o, o]; for `Direct`, the exact block [numel, numel].

    B = Σ_vn (Σ_s g)(Σ_s g)ᵀ where positions sum first (convolutions), else B = Σ_vns g gᵀ.
    """
    if isinstance(b.form, Outer):
        g = b.g.sum(3, keepdim=True) if b.form.sum_positions else b.g
        g = g.transpose(2, 3).flatten(3).flatten(0, 2)  # [v n s, q o]
    elif isinstance(b.form, Rows):
        g = b.g.flatten(0, 2)
    else:
        g = _vectors(b.g).flatten(0, 1)
    return g.mT @ g


def input_factor(b: Bound) -> Tensor | None:
    """The Kronecker factor of the inputs, A [k, k]: the mean over samples of Σ_s x xᵀ; None for `Direct`.

    Where positions do not sum first in the output factor, it is the mean over positions as well, and over groups.
    """
    if isinstance(b.form, Direct):
        return None
    if isinstance(b.form, Rows):
        weight = b.g.new_full((b.x.numel(), 1), 1 / b.x.numel())
        return _scatter(weight, b.x.flatten(), b.form.shape[0]).flatten().diag()
    n, q, s, _ = b.x.shape
    x = b.x.flatten(0, 2)
    return x.mT @ x / (n * q if b.form.sum_positions else n * q * s)


def transposed(form: Form) -> Form | None:
    """The form of the use of a matrix's transpose; None if it has to be formed."""
    if isinstance(form, Outer) and form.arrange is None and len(form.shape) == 2:
        return replace(form, inputs_first=not form.inputs_first, shape=form.shape[::-1])
    return None


def rows_of(form: Form, start: int, shape: torch.Size) -> Form | None:
    """The form of a matrix of that shape, of which the rows from ``start`` are used; None if it has to be formed."""
    if not isinstance(form, Outer) or form.arrange is not None or form.inputs_first:
        return None
    after = shape[0] - start - form.shape[0]
    return replace(form, cotangent=lambda g: F.pad(form.cotangent(g), (start, after)), shape=shape)


def sum_to_shape(g: Tensor, shape: torch.Size) -> Tensor:
    """Gradients [v, n, *broadcast] summed to [v, n, *shape], where ``shape`` was broadcast from the right."""
    extra = g.ndim - 2 - len(shape)
    axes = [*range(2, 2 + extra), *[2 + extra + d for d, size in enumerate(shape) if size == 1]]
    return (g.sum(axes) if axes else g).reshape(*g.shape[:2], *shape)
