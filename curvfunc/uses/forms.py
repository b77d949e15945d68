"""How a parameter's use at a layer, and a cotangent of the layer's output, give its gradient.

Every use of a parameter has one of three *forms*:

- `Outer`: the gradient is a sum of outer products, dW[v,n] = Σ_s g[v,n,s] x[n,s]ᵀ (linear, convolution, ...);
- `Rows`: as `Outer` with one-hot x, which selects rows (embeddings);
- `Direct`: the gradient is formed as such, [v, n, *shape] (biases, norms, and everything without structure).

A new layer says which form it has. Every quantity is a contraction of forms: their sums of squares are in
`curvfunc.uses.squares`, their products with each other in `curvfunc.uses.second_moments`.

Axes: ``n`` sample, ``v`` backpropagated vector, ``q`` group, ``s`` shared position, ``o``/``k`` features out/in.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvfunc.tensors import pages
from curvfunc.tensors.pages import may_overwrite
from curvfunc.tensors.precision import at_least_float32
from curvfunc.tensors.sizes import hint, ranges, room

__all__ = [
    "Bound",
    "Direct",
    "Form",
    "Outer",
    "Parts",
    "Products",
    "Rows",
    "Through",
    "adapted",
    "arranged",
    "at_samples",
    "bind",
    "bind_products",
    "direct",
    "flat_vectors",
    "inputs_of",
    "is_flat",
    "join",
    "merge",
    "outer",
    "per_sample",
    "reads",
    "sample_blocks",
    "scatter",
    "squeezed_all",
    "sum_to_shape",
    "sums_positions",
    "total",
]

BLOCK_BYTES = 1 << 22  # of results that are larger than the cache: they are formed and reduced in blocks of about this size
PATCHES_BYTES = 1 << 24  # inputs that have to be made are made for as many samples as take this much


@dataclass(eq=False)  # by identity, and quicker to make than if it were frozen
class Outer:
    """dW[v,n,q] = Σ_s g[v,n,q,s] x[n,q,s]ᵀ.

    Attributes:
        inputs: Gives x [n, q, s, k]; called at most once, and only when needed.
        cotangent: Maps the cotangent of the operation's output [v, n, ...] to g [v, n, q, s, o].
        shape: Shape of the parameter.
        arrange: Maps [..., q, o, k] to [..., *shape]; a reshape unless given.
        inputs_first: Whether the parameter's axes are those of x before those of g, as in x @ W.
        sum_positions: Whether the Kronecker output factor sums g over s first (the convention of convolutions).
        moment: Gives Σ_nqs x xᵀ [k, k], where that takes less than x.
        sums: Gives Σ_nqs x [k], where that takes less than x.
        part: Gives x of some samples, where x is larger than what it is made of, and no wider than the output.
        instead: A form of the same use that takes less work, where no Kronecker factors are wanted.
        alone: As ``instead``, for a vector that is the only one: nothing is prepared for others.
        vectors: x [n, k], where there is one group and one position, and the cotangent [v, n, o] needs no mapping.
    """

    inputs: Callable[[], Tensor]
    cotangent: Callable[[Tensor], Tensor]
    shape: torch.Size
    arrange: Callable[[Tensor], Tensor] | None = None
    inputs_first: bool = False
    sum_positions: bool = False
    moment: Callable[[], Tensor] | None = None
    sums: Callable[[], Tensor] | None = None
    part: Callable[[slice], Tensor] | None = None
    instead: "Outer | Direct | None" = None
    alone: "Direct | None" = None
    vectors: Tensor | None = None


@dataclass(eq=False)  # by identity, and quicker to make than if it were frozen
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


@dataclass(eq=False)  # by identity, and quicker to make than if it were frozen
class Direct:
    """A per-sample gradient [v, n, *shape], made by ``cotangent`` from the output's cotangent [v, n, ...].

    Attributes:
        cotangent: Maps the cotangent of the operation's output [v, n, ...] to the gradient [v, n, *shape].
        shape: Shape of the parameter.
        sums: The use at the same operation for which it is Σ_s g, with the features [q o] in their order: a bias and its
            weight share a Kronecker factor.
        reads: Whether ``cotangent`` takes values of the operation's inputs, which must then stay as they are.
    """

    cotangent: Callable[[Tensor], Tensor]
    shape: torch.Size
    sums: Outer | None = None
    reads: bool = True


@dataclass(eq=False)  # by identity, and quicker to make than if it were frozen
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


@dataclass(eq=False)  # by identity, and quicker to make than if it were frozen
class Products:
    """The use of a parameter of which no more than products are wanted: Σ_nqs x xᵀ takes the place of x."""

    form: Outer


Form = Outer | Rows | Direct | Through


class Parts:
    """x of an `Outer` use that is made when it is needed, and only once as a whole."""

    def __init__(self, form: Outer) -> None:
        self._form = form
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """All of it."""
        if self._whole is None:
            self._whole = self._form.inputs()
        return self._whole

    def of(self, samples: slice) -> Tensor:
        """That of some samples."""
        part = self._form.part
        return self.whole()[samples] if self._whole is not None or part is None else part(samples)


@dataclass(eq=False)  # by identity, and quicker to make than if it were frozen
class Bound:
    """A form with its tensors: g and x for `Outer`, g and i for `Rows`; for `Direct`, g is the gradient itself.

    Attributes:
        form: The form.
        g: What the cotangent is mapped to.
        inputs: x or i, or where to get it.
    """

    form: Form | Products
    g: Tensor
    inputs: Tensor | Parts

    @property
    def x(self) -> Tensor:
        """What the form takes from the forward pass."""
        return self.inputs.whole().to(self.g.dtype) if isinstance(self.inputs, Parts) else self.inputs

    def part(self, samples: slice) -> Tensor:
        """x of some samples; if all of it is small, it is made at once."""
        if isinstance(self.inputs, Tensor):
            return self.inputs[samples]
        if hint(math.prod(self.g.shape[1:4])) * self.features * self.g.element_size() <= room(PATCHES_BYTES, self.g):
            return self.x[samples]
        return self.inputs.of(samples).to(self.g.dtype)

    @property
    def positions(self) -> int:
        """Number of shared positions s of an `Outer` use."""
        return self.g.shape[3]

    @property
    def features(self) -> int:
        """Number of input features k of an `Outer` use."""
        if isinstance(self.inputs, Tensor):
            return self.inputs.shape[3]
        return self.form.shape.numel() // max(1, self.g.shape[2] * self.g.shape[4])  # type: ignore[union-attr]


def bind(form: Form, cotangent: Tensor, inputs: Callable[[Form], Tensor | Parts], factors: bool = True) -> Bound:
    """The form with its tensors, in at least single precision: low precision is not enough for sums of squares.

    Args:
        form: The form.
        cotangent: Of the operation's output, [v, n, ...].
        inputs: Gives what a form takes from the forward pass.
        factors: Whether Kronecker factors may be wanted. Else another form may take the place of an `Outer` one.
    """
    if isinstance(form, Through):
        return direct(form.pullback(per_sample(bind(form.form, cotangent, inputs, factors=False))))
    if not factors and isinstance(form, Outer) and form.instead is not None:
        return bind(form.instead, at_least_float32(cotangent), inputs)
    g = at_least_float32(form.cotangent(cotangent))
    if isinstance(form, Direct):
        return Bound(form, g, g)
    x = inputs(form)
    if isinstance(x, Parts):
        return Bound(form, g, x)
    if isinstance(form, Rows):
        none = x < 0  # these positions get a row of their own, which is dropped
        return Bound(form, g.masked_fill(none.unsqueeze(-1), 0), x.masked_fill(none, form.shape[0]))
    if x.dtype != g.dtype:
        dtype = torch.promote_types(g.dtype, x.dtype)
        g, x = g.to(dtype), at_least_float32(x.to(dtype))
    return Bound(form, g, x)


def inputs_of(form: Any) -> Tensor | Parts:
    """What a form takes from the forward pass, for `bind`."""
    return Parts(form) if isinstance(form, Outer) and form.part is not None else form.inputs()


def bind_products(form: Outer, cotangent: Tensor, moment: Tensor) -> Bound:
    """The form with g and Σ_nqs x xᵀ."""
    g = at_least_float32(form.cotangent(cotangent))
    return Bound(Products(form), g, moment.to(torch.promote_types(g.dtype, moment.dtype)))


def at_samples(b: Bound, index: Tensor) -> Bound:
    """The use at some of the samples, which may repeat."""
    g = b.g[:, index.to(b.g.device)]
    return replace(b, g=g, inputs=g if isinstance(b.form, Direct) else b.x[index.to(b.x.device)])


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
            form = replace(form, sum_positions=all(sums_positions(p) for p in parts))
            return Bound(form, torch.cat([p.g for p in parts], dim=3), torch.cat([p.x for p in parts], dim=2))
        if isinstance(form, Rows):
            return Bound(form, torch.cat([p.g for p in parts], dim=2), torch.cat([p.x for p in parts], dim=1))
    return direct(sum([per_sample(p) for p in parts[1:]], per_sample(parts[0])))


def _features(b: Bound) -> tuple[object, ...]:
    if isinstance(b.form, Outer):
        return Outer, b.form.arrange, b.form.inputs_first, b.g.shape[2], b.features, b.g.shape[4]
    return (type(b.form),)


def join(parts: list[Bound]) -> Bound:
    """Chunks of the same use, with different vectors, as one."""
    return parts[0] if len(parts) == 1 else replace(parts[0], g=torch.cat([p.g for p in parts]))


def arranged(b: Bound, result: Tensor) -> Tensor:
    """[..., q, o, k] as [..., *shape]."""
    form = b.form
    assert isinstance(form, Outer)
    if form.arrange is not None:
        return form.arrange(result)
    if form.inputs_first:
        result = result.mT
    return result.reshape(result.shape[:-3] + form.shape)


def per_sample(b: Bound, out: Tensor | None = None) -> Tensor:
    """The gradients themselves, [v, n, *shape]; written to ``out`` if given."""
    if isinstance(b.form, Outer) and (out is None or is_flat(b)):
        v, n, q, s, o = b.g.shape
        if s == 1:
            result = outer(b.g.contiguous().mT, b.x, out)  # the layout of g, from vmap, would be that of the result
        elif out is None and (torch.compiler.is_compiling() or not may_overwrite() or _is_one_product(b)):
            result = torch.stack([g.mT @ b.x for g in b.g]) if v > 1 else (b.g[0].mT @ b.x)[None]
        else:
            shape = (v, n, q, o, b.features)
            result = pages.empty(b.g, *shape) if out is None else out.view(shape)
            for samples in sample_blocks(b, 1):
                x = b.part(samples)
                for g, to in zip(b.g[:, samples], result[:, samples], strict=True):
                    torch.matmul(g.mT, x, out=to)
        return arranged(b, result) if out is None else out
    if isinstance(b.form, Rows):
        result = scatter(b.g, b.x.expand(b.g.shape[:-1]), b.form.shape[0])
    else:
        result = b.g if isinstance(b.form, Direct) else per_sample(b)
    return result if out is None else out.copy_(result)


def _is_one_product(b: Bound) -> bool:
    """Whether the gradients are one matrix product, in memory that the process has."""
    v, n, q, _, o = b.g.shape
    return v == 1 and isinstance(b.inputs, Tensor) and not pages.is_large((n, q, o, b.features), b.g)


def sample_blocks(b: Bound, each: int) -> Iterator[slice]:
    """Samples that go together, so that ``each`` entries for each of them stay in cache, and their inputs small."""
    n, q, s = b.g.shape[1:4]
    one = b.g.element_size()
    size = room(BLOCK_BYTES, b.g) // max(1, hint(each) * one)
    if isinstance(b.inputs, Parts):
        size = min(size, room(PATCHES_BYTES, b.g) // max(1, hint(q * s * b.features) * one))
    for start, stop in ranges(n, size):
        yield slice(start, stop)


def is_flat(b: Bound) -> bool:
    """Whether what is formed, [..., q, o, k], is [..., *shape] in memory."""
    return isinstance(b.form, Outer) and b.form.arrange is None and not b.form.inputs_first


def outer(g: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    """g x for columns g [..., o, 1] and rows x [n, q, 1, k]."""
    shape = (*g.shape[:-1], x.shape[-1])
    if out is None and not may_overwrite():
        return g * x
    if out is None and torch.compiler.is_compiling():  # which brings memory of its own, except for an opaque operation
        return _large_outer(g, x) if pages.is_large(shape, g) else g * x
    return torch.mul(g, x, out=pages.empty(g, *shape) if out is None else out.view(shape))


@torch.library.custom_op("curvfunc::large_outer", mutates_args=())
def _large_outer(g: Tensor, x: Tensor) -> Tensor:
    return torch.mul(g, x, out=pages.empty(g, *g.shape[:-1], x.shape[-1]))


@_large_outer.register_fake
def _(g: Tensor, x: Tensor) -> Tensor:
    return g.new_empty((*g.shape[:-1], x.shape[-1]))


def total(b: Bound) -> Tensor:
    """The gradient, Σ_n of the only vector: all samples are treated as one."""
    if isinstance(b.form, Outer):
        g, x = b.g.transpose(1, 2).flatten(2, 3).unsqueeze(1), b.x.transpose(0, 1).flatten(1, 2).unsqueeze(0)
        return per_sample(replace(b, g=g, inputs=x))[0, 0]
    if isinstance(b.form, Rows):
        return per_sample(replace(b, g=b.g.flatten(1, 2).unsqueeze(1), inputs=b.x.flatten().unsqueeze(0)))[0, 0]
    return b.g[0].sum(0)


def flat_vectors(g: Tensor) -> Tensor:
    """[v, n, *shape] as [v, n, numel]; a parameter without axes has one entry."""
    return g.reshape(*g.shape[:2], g.shape[2:].numel())


def scatter(values: Tensor, rows: Tensor, size: int) -> Tensor:
    """Sums values [..., s, d] into rows [..., s] of [..., size, d]; the row ``size`` is dropped."""
    lead, d = values.shape[:-2], values.shape[-1]
    first = torch.arange(math.prod(lead), device=rows.device).reshape(*lead, 1) * size
    last = math.prod(lead) * size  # one row for all that is dropped, so that the others stay together
    places = torch.where(rows < size, first + rows, last).reshape(-1, 1)
    sums = values.new_zeros(last + 1, d).scatter_add(0, places.expand(-1, d), values.reshape(-1, d))
    return sums[:last].reshape(*lead, size, d)


def sums_positions(b: Bound) -> bool:
    """Whether the Kronecker factor of the outputs sums the shared positions unless it is asked otherwise."""
    form = b.form.form if isinstance(b.form, Products) else b.form
    return isinstance(form, Outer) and form.sum_positions


def adapted(form: Form, **given: Any) -> Any:
    """The form with other functions, without what was made for its own."""
    if isinstance(form, Outer):
        given = {"instead": None, "alone": None, "vectors": None} | given
    return replace(form, **given)


def squeezed_all(forms: dict[str, Any]) -> dict[str, Any]:
    """The forms of one operation, for cotangents with an axis of their own for each sample's batch of one."""
    of = {id(form): _squeezed(form) for form in forms.values()}
    found = {name: of[id(form)] for name, form in forms.items()}
    for form in found.values():
        if isinstance(form, Direct) and form.sums is not None:
            form.sums = of.get(id(form.sums), form.sums)
    return found


def _squeezed(form: Any) -> Any:
    """One of them, and what may take its place."""
    if form is None:
        return None
    if isinstance(form, Through):
        return replace(form, form=_squeezed(form.form))
    inner, given = form.cotangent, {}
    if isinstance(form, Outer):
        given = {"instead": _squeezed(form.instead), "alone": _squeezed(form.alone)}
    return adapted(form, cotangent=lambda g: inner(g.squeeze(2)), **given)


def reads(form: Form) -> bool:
    """Whether a form takes values of the operation's inputs."""
    if isinstance(form, Through):
        return reads(form.form)
    return not isinstance(form, Direct) or form.reads


def sum_to_shape(g: Tensor, shape: torch.Size) -> Tensor:
    """Gradients [v, n, *broadcast] summed to [v, n, *shape], where ``shape`` was broadcast from the right."""
    extra = g.ndim - 2 - len(shape)
    axes = [*range(2, 2 + extra), *[2 + extra + d for d, size in enumerate(shape) if size == 1]]
    return (g.sum(axes) if axes else g).reshape(*g.shape[:2], *shape)
