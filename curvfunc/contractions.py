"""How a parameter's use at a layer, and a cotangent of the layer's output, turn into a result.

Every use of a parameter has one of three *forms*:

- `Outer`: the gradient is a sum of outer products, dW[v,n] = Σ_s g[v,n,s] x[n,s]ᵀ (linear, convolution, ...);
- `Rows`: as `Outer` with one-hot x, which selects rows (embeddings);
- `Direct`: the gradient is formed as such, [v, n, *shape] (biases, norms, and everything without structure).

Every quantity is a contraction of forms. A new layer says which form it has; a new quantity adds a function here.

Axes: ``n`` sample, ``v`` backpropagated vector, ``q`` group, ``s`` shared position, ``o``/``k`` features out/in.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

from curvfunc import pages

__all__ = [
    "Bound",
    "Direct",
    "Form",
    "InputFactor",
    "Outer",
    "Rows",
    "Through",
    "arranged",
    "bind",
    "condensed",
    "condenses",
    "direct",
    "formed",
    "gram",
    "input_factor",
    "join",
    "may_overwrite",
    "merge",
    "output_factor",
    "per_sample",
    "rows_of",
    "sample_norms",
    "sample_squares",
    "second_moment",
    "squared_inputs",
    "squares",
    "sum_to_shape",
    "total",
    "transposed",
    "weighted_sample_squares",
    "weighted_squares",
]

# Results that are larger than the cache are formed and reduced in blocks of samples of about this size.
BLOCK_BYTES = 1 << 22


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
    if x.dtype != g.dtype:
        dtype = torch.promote_types(g.dtype, x.dtype)
        g, x = g.to(dtype), _wide(x.to(dtype))
    return Bound(form, g, x)


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def direct(gradient: Tensor) -> Bound:
    """Per-sample gradients [v, n, *shape] as a bound form."""
    return Bound(Direct(lambda g: g, gradient.shape[2:]), gradient, gradient)


def merge(parts: list[Bound]) -> Bound:
    """Several uses of one parameter as one: gradients add up before anything is squared.

    Uses with the same features join along the shared positions; others add their per-sample gradients.
    """
    if len(parts) == 1:
        return parts[0]
    form = parts[0].form
    if all(_features(p) == _features(parts[0]) for p in parts):
        if isinstance(form, Outer) and form.arrange is None:
            form = replace(form, sum_positions=all(_sums_positions(p) for p in parts))
            return Bound(form, torch.cat([p.g for p in parts], dim=3), torch.cat([p.x for p in parts], dim=2))
        if isinstance(form, Rows):
            return Bound(form, torch.cat([p.g for p in parts], dim=2), torch.cat([p.x for p in parts], dim=1))
    return direct(sum([per_sample(p) for p in parts[1:]], per_sample(parts[0])))


def _features(b: Bound) -> tuple[object, ...]:
    if isinstance(b.form, Outer):
        return Outer, b.form.arrange, b.form.inputs_first, b.x.shape[1], b.x.shape[3], b.g.shape[4]
    return (type(b.form),)


def arranged(b: Bound, result: Tensor) -> Tensor:
    """[..., q, o, k] as [..., *shape]."""
    form = b.form
    assert isinstance(form, Outer)
    if form.arrange is not None:
        return form.arrange(result)
    if form.inputs_first:
        result = result.mT
    return result.reshape(*result.shape[:-3], *form.shape)


def per_sample(b: Bound, out: Tensor | None = None) -> Tensor:
    """The gradients themselves, [v, n, *shape]; written to ``out`` if given."""
    if isinstance(b.form, Outer) and (out is None or _is_flat(b)):
        v, n, q, s, o = b.g.shape
        if s == 1:
            result = _outer(b.g.contiguous().mT, b.x, out)  # the layout of g, from vmap, would be that of the result
        elif out is None and not may_overwrite():
            result = torch.stack([g.mT @ b.x for g in b.g]) if v > 1 else (b.g[0].mT @ b.x)[None]
        else:
            k = b.x.shape[3]
            result = pages.empty(b.g, v, n, q, o, k) if out is None else out.view(v, n, q, o, k)
            for g, to in zip(b.g, result, strict=True):
                torch.matmul(g.mT, b.x, out=to)
        return arranged(b, result) if out is None else out
    if isinstance(b.form, Rows):
        result = _scatter(b.g, b.x.expand(b.g.shape[:-1]), b.form.shape[0])
    else:
        result = b.g if isinstance(b.form, Direct) else per_sample(b)
    return result if out is None else out.copy_(result)


def _is_flat(b: Bound) -> bool:
    """Whether what is formed, [..., q, o, k], is [..., *shape] in memory."""
    return isinstance(b.form, Outer) and b.form.arrange is None and not b.form.inputs_first


def _outer(g: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    """g x for columns g [..., o, 1] and rows x [n, q, 1, k]."""
    if out is None and not may_overwrite():
        return g * x
    shape = (*g.shape[:-1], x.shape[-1])
    return torch.mul(g, x, out=pages.empty(g, *shape) if out is None else out.view(shape))


def total(b: Bound) -> Tensor:
    """The gradient, Σ_n of the only vector: all samples are treated as one."""
    if isinstance(b.form, Outer):
        g, x = b.g.transpose(1, 2).flatten(2, 3).unsqueeze(1), b.x.transpose(0, 1).flatten(1, 2).unsqueeze(0)
        return per_sample(replace(b, g=g, x=x))[0, 0]
    if isinstance(b.form, Rows):
        return per_sample(replace(b, g=b.g.flatten(1, 2).unsqueeze(1), x=b.x.flatten().unsqueeze(0)))[0, 0]
    return b.g[0].sum(0)


def squares(b: Bound) -> Tensor:
    """Squared gradients summed over vectors and samples, Σ_vn g²: [*shape]."""
    if isinstance(b.form, Direct):
        return b.g.flatten(0, 1).square().sum(0)
    if isinstance(b.form, Rows):
        part = (b.g * _same_row(b)).sum(0)  # [n, s, d]
        return _scatter(part.flatten(0, 1), b.x.flatten(), b.form.shape[0])
    if b.x.shape[2] == 1:  # (g xᵀ)² = g² (x²)ᵀ, so the sum over samples is one matrix product
        g, x = b.g.square().sum(0)[:, :, 0], b.x.square()[:, :, 0]
        return arranged(b, _matmul(g.permute(1, 2, 0), x.transpose(0, 1)))
    return formed(b, ["squares"])["squares"]


def sample_squares(b: Bound, out: Tensor | None = None) -> Tensor:
    """Squared gradients summed over vectors, Σ_v g²: [n, *shape]; written to ``out`` if given."""
    into = out if _is_flat(b) else None
    if isinstance(b.form, Direct):
        result = b.g.square().sum(0)
    elif isinstance(b.form, Rows):
        result = _scatter((b.g * _same_row(b)).sum(0), b.x, b.form.shape[0])
    elif b.x.shape[2] > 1:
        result = formed(b, ["sample_squares"], out=into)["sample_squares"]
    else:
        g, x = b.g.square().sum(0).contiguous().mT, b.x.square()
        result = arranged(b, _outer(g, x, into))
    return result if out is None else out if into is not None else out.copy_(result)


def weighted_squares(b: Bound, weights: Tensor) -> Tensor:
    """Squared gradients, each vector of each sample with its weight of any sign: Σ_vn w[v,n] g², [*shape]."""
    if isinstance(b.form, Direct):
        return torch.einsum("vn,vnp->p", weights, _vectors(b.g).square()).reshape(b.form.shape)
    if isinstance(b.form, Rows):
        return weighted_sample_squares(b, weights).sum(0)
    if b.x.shape[2] > 1:
        return formed(b, ["squares"], weights)["squares"]
    g = torch.einsum("vn,vnqo->nqo", weights, b.g[:, :, :, 0].square())
    return arranged(b, g.permute(1, 2, 0) @ b.x[:, :, 0].square().transpose(0, 1))


def weighted_sample_squares(b: Bound, weights: Tensor) -> Tensor:
    """As `weighted_squares` for each sample, Σ_v w[v,n] g²: [n, *shape]."""
    if isinstance(b.form, Direct):
        return torch.einsum("vn,vnp->np", weights, _vectors(b.g).square()).reshape(b.g.shape[1:])
    if isinstance(b.form, Rows):
        return _scatter(torch.einsum("vn,vnsd->nsd", weights, b.g * _same_row(b)), b.x, b.form.shape[0])
    if b.x.shape[2] > 1:
        return formed(b, ["sample_squares"], weights)["sample_squares"]
    g = torch.einsum("vn,vnqo->nqo", weights, b.g[:, :, :, 0].square())
    return arranged(b, g.unsqueeze(-1) * b.x.square())


def formed(b: Bound, names: Sequence[str], weights: Tensor | None = None, out: Tensor | None = None) -> dict[str, Tensor]:
    """Contractions of an `Outer` use for which its gradients have to be formed, in blocks that stay in cache.

    Args:
        b: The use.
        names: Any of "squares", "sample_squares", "sample_norms", and for one vector "total", its sum over samples.
        weights: Weights [v, n] of the squares.
        out: Memory for "sample_squares".

    Returns:
        ``{name: result}``.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for vectors, samples in _blocks(b):
        g = b.g[vectors, samples].permute(1, 2, 0, 4, 3)  # [m, q, v, o, s]
        block = (g.flatten(2, 3) @ b.x[samples]).unflatten(2, g.shape[2:4])  # [m, q, v, o, k]
        if "total" in found:
            _add(found["total"], block.sum((0, 2)))
        squared = block.square_() if may_overwrite() else block.square()
        if weights is not None:
            w = weights[vectors, samples].mT[:, None, None]  # [m, 1, 1, v]
            squared = (w @ squared.flatten(3)).unflatten(3, squared.shape[3:])
        if "squares" in found:
            _add(found["squares"], squared.sum((0, 2)))
        if "sample_squares" in found:
            _place(found["sample_squares"], squared.sum(2), vectors, samples, b.g.shape[1], out)
        if "sample_norms" in found:
            _place(found["sample_norms"], squared.flatten(1).sum(1), vectors, samples, b.g.shape[1])
    results = {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}
    return {name: r if name == "sample_norms" else arranged(b, r) for name, r in results.items()}


def _add(parts: list[Tensor], part: Tensor) -> None:
    """Add to the only entry of a list, in place where no graph needs the old value."""
    if not parts:
        parts.append(part)
    elif may_overwrite():
        parts[0] += part
    else:
        parts[0] = parts[0] + part


def _place(parts: list[Tensor], part: Tensor, vectors: slice, samples: slice, num: int, out: Tensor | None = None) -> None:
    """Put the results of a block of ``num`` samples in their place, or add them to those of the vectors before."""
    if not may_overwrite():
        if vectors.start == 0:
            parts.append(part)
        else:  # blocks of samples are the same for all vectors
            k = samples.start // (samples.stop - samples.start) if samples.stop < num else -1
            parts[k] = parts[k] + part
        return
    if not parts:
        if out is None and len(part) == num:
            parts.append(part)
            return
        parts.append(pages.empty(part, num, *part.shape[1:]) if out is None else out.view(num, *part.shape[1:]))
    if vectors.start == 0:
        parts[0][samples] = part
    else:
        parts[0][samples] += part


def squared_inputs(b: Bound, batched: bool) -> Tensor:
    """Σ_s g x² of one vector, [*shape] or [n, *shape]; for a bias, where `Direct` sums g, Σ_s g."""
    if not isinstance(b.form, Outer):
        return b.g[0] if batched else b.g[0].sum(0)
    equation = "nqso,nqsk->nqok" if batched else "nqso,nqsk->qok"
    return arranged(b, torch.einsum(equation, b.g[0], b.x.square()))


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
    return formed(b, ["sample_norms"])["sample_norms"]


def gram(b: Bound) -> Tensor:
    """Inner products of the gradients, [v, n, v, n]."""
    v, n = b.g.shape[:2]
    if isinstance(b.form, Outer):
        s, o, k = b.x.shape[2], b.g.shape[4], b.x.shape[3]
        # ⟨Σ_s g xᵀ, Σ_t h yᵀ⟩ = Σ_st (g hᵀ)(x yᵀ) costs v² n² s² o + n² s² k, the gradients themselves v n s o k + v² n² o k
        if s * s * (v * v * o + k) * n <= (s + v * n) * v * o * k:
            return _gram_of_positions(b)
        return _gram_of_gradients(b)
    flat = _vectors(per_sample(b)).flatten(0, 1)
    return (flat @ flat.mT).view(v, n, v, n)


def _gram_of_positions(b: Bound) -> Tensor:
    """Inner products at all pairs of positions, in blocks of samples; no gradient is formed."""
    v, n, q, s, _ = b.g.shape
    g, x = b.g.permute(2, 0, 1, 3, 4), b.x.transpose(0, 1)  # [q, v, n, s, o], [q, n, s, k]
    everything, inputs = g.flatten(1, 3), x.flatten(1, 2)
    size = max(1, BLOCK_BYTES // (v * v * n * q * s * s * b.g.element_size()))
    rows = []
    for j in range(0, n, size):
        m = min(size, n - j)
        outer = g[:, :, j : j + m].flatten(1, 3) @ everything.mT  # [q, v m s, v n s]
        inner = x[:, j : j + m].flatten(1, 2) @ inputs.mT  # [q, m s, n s]
        product = outer.view(q, v, m, s, v, n, s) * inner.view(q, 1, m, s, 1, n, s)
        rows.append(product.sum((0, 3, 6)))
    return torch.cat(rows, dim=1)


def _gram_of_gradients(b: Bound) -> Tensor:
    """Inner products of the gradients, formed for one block of output features at a time."""
    v, n, q, s, o = b.g.shape
    size = max(1, 8 * BLOCK_BYTES // (v * n * q * b.x.shape[3] * b.g.element_size()))
    total = None
    for j in range(0, o, size):
        g = b.g[..., j : j + size].mT  # [v, n, q, j, s]
        part = g @ b.x if s > 1 else g * b.x
        flat = part.flatten(2).flatten(0, 1)
        total = flat @ flat.mT if total is None else total + flat @ flat.mT
    assert total is not None
    return total.view(v, n, v, n)


def join(parts: list[Bound]) -> Bound:
    """Chunks of the same use, with different vectors, as one."""
    return parts[0] if len(parts) == 1 else replace(parts[0], g=torch.cat([p.g for p in parts]))


def may_overwrite() -> bool:
    """Whether values can be overwritten: no graph and no transformation may ask for them again."""
    return not torch.is_grad_enabled() and _functorch.peek_interpreter_stack() is None


def condenses(b: Bound) -> bool:
    """Whether sums of squares need no more of the vectors than `condensed` leaves."""
    return isinstance(b.form, Outer) and b.x.shape[2] == 1 and may_overwrite()


def condensed(b: Bound) -> Bound:
    """The same sums of squares from one vector: (g xᵀ)² = g² (x²)ᵀ, so only Σ_v g² counts."""
    return replace(b, g=b.g.square().sum(0, keepdim=True).sqrt())


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b for a [q, n, m], b [q, m, k]."""
    return torch.matmul(a, b, out=pages.empty(a, *a.shape[:2], b.shape[2])) if may_overwrite() else a @ b


def _blocks(b: Bound) -> Iterator[tuple[slice, slice]]:
    """Vectors and samples whose gradients [m, q, v, o, k] are formed together, so that they stay in cache."""
    v, n, q, _, o = b.g.shape
    one = max(1, q * o * b.x.shape[3] * b.g.element_size())
    vectors = max(1, min(v, BLOCK_BYTES // one))
    samples = max(1, min(n, BLOCK_BYTES // (one * vectors)))
    for i in range(0, v, vectors):
        for j in range(0, n, samples):
            yield slice(i, min(i + vectors, v)), slice(j, min(j + samples, n))


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


def output_factor(b: Bound, approximation: str | None = None) -> Tensor:
    """The Kronecker factor of the outputs, B [o, o]; for `Direct`, the exact block [numel, numel].

    B = Σ_vns g gᵀ in the expand approximation, B = Σ_vn (Σ_s g)(Σ_s g)ᵀ in the reduce approximation and, if none is
    given, for convolutions.
    """
    if isinstance(b.form, Direct):
        g = _vectors(b.g).flatten(0, 1)
        return g.mT @ g
    g = b.g.transpose(2, 3).flatten(3) if isinstance(b.form, Outer) else b.g  # [v, n, s, q o]
    if approximation == "reduce" or (approximation is None and _sums_positions(b)):
        g = g.sum(2, keepdim=True)
    return second_moment(g.flatten(0, 2).mT)


class InputFactor(NamedTuple):
    """A Kronecker factor, and whether it comes before the one of the outputs."""

    factor: Tensor
    first: bool


def input_factor(b: Bound, approximation: str | None = None) -> InputFactor | None:
    """The Kronecker factor of the inputs, A [k, k]; None for `Direct`. Groups are averaged.

    A = 1/(N S) Σ_ns x xᵀ in the expand approximation, A = 1/N Σ_n (1/S Σ_s x)(1/S Σ_s x)ᵀ in the reduce approximation;
    if none is given, A = 1/N Σ_ns x xᵀ for convolutions.
    """
    if isinstance(b.form, Direct):
        return None
    if isinstance(b.form, Rows):
        weight = b.g.new_full((*b.x.shape, 1), 1 / b.x.shape[1])
        x = _scatter(weight, b.x, b.form.shape[0]).squeeze(2)  # [n, rows]: how often each row occurs
        return InputFactor(x.mT @ x / len(x) if approximation == "reduce" else x.mean(0).diag(), True)
    assert isinstance(b.form, Outer)
    n, q, s, _ = b.x.shape
    x = b.x.mean(2, keepdim=True) if approximation == "reduce" else b.x
    positions = s if approximation == "expand" or (approximation is None and not _sums_positions(b)) else 1
    # features first, as patches are stored, or last, as all other inputs are
    x = x.flatten(0, 2).mT if x.stride(3) == 1 else x.permute(3, 1, 0, 2).flatten(1)
    return InputFactor(second_moment(x, 1 / (n * q * positions)), b.form.inputs_first)


def second_moment(x: Tensor, scale: float = 1.0) -> Tensor:
    """``scale`` x xᵀ for x [k, m]. Where it is large, only what lies on one side of the diagonal is computed."""
    k, m = x.shape
    if not may_overwrite():
        return x @ x.mT * scale
    zero = x.new_zeros(1)
    if k < 256 or m < 512 or x.device.type != "cpu":
        return torch.addmm(zero, x, x.mT, beta=0, alpha=scale, out=pages.empty(x, k, k))
    edges = [*range(0, k, -(-k // 4)), k]
    if torch.compiler.is_compiling():  # where slices are not written in place
        return _mirrored([scale * (x[a:b] @ x[a:].mT) for a, b in pairwise(edges)], edges)
    result = pages.empty(x, k, k)
    for start, stop in pairwise(edges):
        torch.addmm(zero, x[start:stop], x[start:].mT, beta=0, alpha=scale, out=result[start:stop, start:])
        result[stop:, start:stop] = result[start:stop, stop:].mT
    return result


def _mirrored(upper: list[Tensor], edges: list[int]) -> Tensor:
    """A symmetric matrix from its rows in blocks, each from the diagonal on."""
    rows = []
    for i, block in enumerate(upper):
        a, b = edges[i], edges[i + 1]
        left = [above[:, a - edges[j] : b - edges[j]].mT for j, above in enumerate(upper[:i])]
        rows.append(torch.cat([*left, block], dim=1))
    return torch.cat(rows)


def _sums_positions(b: Bound) -> bool:
    return isinstance(b.form, Outer) and b.form.sum_positions


def transposed(form: Form) -> Form | None:
    """The form of the use of a matrix's transpose; None if it has to be formed."""
    if isinstance(form, Outer) and form.arrange is None and len(form.shape) == 2:
        return replace(form, inputs_first=not form.inputs_first, shape=torch.Size(form.shape[::-1]))
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
