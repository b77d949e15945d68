"""The diagonal of the Hessian, H = Jᵀ(∇²L)J + Σ_m J_mᵀ R_m J_m.

The first term is the GGN, with weights in place of a root where the loss is not convex. In the second, m runs over the
operations that curve. If m is elementwise, a = φ(z), then R_m is diagonal with entries r = φ''(z) δ, where δ is the gradient
of the loss at a. The Hessian's diagonal is then that of weighted squares: the columns eᵢ go back from z to the sites before
it, and their squared gradients are added up with the weights rᵢ. Three shortcuts save columns:

- between z and the output of the layer before it, Jacobians are usually diagonal: that layer's parameters need none;
- behind that layer, if it is linear, start the rows of its weight: one matrix product less;
- and the layer before that, if only diagonal Jacobians follow, needs the sums Σ_o r_o W_oi² alone.

Products of two tensors that both depend on a parameter are such weighted squares as well (`curvfunc.hessian.pairs`), and so are
softmax and norms (`curvfunc.hessian.rows`). Parameters before any other operation that curves (`curvfunc.hessian.residuals`),
and those with which this costs less (`curvfunc.hessian.choice`), get the second term as a whole from Hessian-vector products
with respect to their sites' outputs, δ held fixed.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvfunc.engine.columns import over_columns
from curvfunc.engine.cotangents import together
from curvfunc.engine.passes import Prepared
from curvfunc.engine.sites import Site, Trace
from curvfunc.hessian.choice import columns_beside, uses_of
from curvfunc.hessian.products import HessianProducts, num_columns
from curvfunc.hessian.residuals import Curvature, Meeting, Residual
from curvfunc.hessian.rows import Rows
from curvfunc.tensors.precision import wide
from curvfunc.tensors.sizes import ranges
from curvfunc.uses.forms import Bound, Outer, bind, merge
from curvfunc.uses.squares import sample_squares, squared_inputs, squares, weighted_sample_squares, weighted_squares

__all__ = ["Columns", "diagonal", "root_columns"]


# From more columns than this on, for what is not elementwise, there is a warning.
MANY_COLUMNS = 10_000


@dataclass(frozen=True)
class Columns:
    """Columns of the output, ``get(start, stop)`` is [v, n, ...], and their weights [v, n], or None for ones."""

    num: int
    get: Callable[[int, int], Tensor]
    weights: Tensor | None


def diagonal(
    trace: Trace,
    leaves: Sequence[Tensor],
    curvature: Curvature,
    columns: Columns,
    gradient: Tensor,
    *,
    batched: bool,
    chunk_size: int | None,
    differentiable: bool,
) -> list[Tensor]:
    """The diagonal for each parameter.

    Args:
        trace: The forward pass.
        leaves: The parameters.
        curvature: Its analysis; nothing in it is split.
        columns: Columns and weights of the loss Hessian.
        gradient: Gradient of the loss at the output, [n, ...].
        batched: Whether to keep the samples apart.
        chunk_size: Number of columns that are backpropagated together.
        differentiable: Whether the results will be differentiated. Then ``gradient`` has a graph.

    Returns:
        [*shape] or [n, *shape] for each parameter.
    """
    curved = curvature.curved
    pairs = [pair for pair in curvature.pairs if pair.targets & ~curved]
    rows = [r for r in curvature.rows if r.targets]
    _warn(num_columns(trace, uses_of(trace, curved)) + (columns_beside(curvature) if pairs or rows else 0))
    run = _Diagonal(trace, chunk_size, differentiable, curvature.widest(), leaves=leaves, batched=batched)
    everything = (1 << len(leaves)) - 1
    # A gradient with a graph is not fixed: Hessian-vector products then contain the first term.
    run.contract(
        [trace.out],
        lambda a, b: [columns.get(a, b)],
        columns.num,
        columns.weights,
        everything & ~curved if differentiable else everything,
    )
    if curvature.residuals:
        for residual, r in run.weights(curvature.residuals, gradient):
            run.residual(curvature, residual, r)
    for pair, delta in zip(pairs, run.deltas([pair.output for pair in pairs], gradient), strict=True):
        if delta is not None:
            get = partial(pair.get, delta)
            run.contract(pair.sources, get, pair.columns, pair.weights(delta), pair.targets & ~curved, delta.numel())
    for row, delta in zip(rows, run.deltas([r.output for r in rows], gradient), strict=True):
        if delta is not None:
            run.rows(curvature, row, delta)
    if curved:
        products = HessianProducts(trace, gradient, run.prepared.of, run.chunks, differentiable)
        for i, part in products.diagonals(uses_of(trace, curved)):
            run.add_samples(i, part)
    return run.results()


def root_columns(
    trace: Trace, residuals: Sequence[Residual], columns: Columns, gradient: Tensor
) -> Iterator[tuple[int, Bound, Tensor, bool]]:
    """The Hessian as Σ_v w[v,n] P[v,n] P[v,n]ᵀ, with the gradients P that columns at a parameter's uses stand for.

    Args:
        trace: The forward pass.
        residuals: The elementwise operations; none curves otherwise.
        columns: Columns and weights of the loss Hessian.
        gradient: Gradient of the loss at the output, [n, ...], without a graph.

    Yields:
        Parameter, its uses with a part of its columns as cotangents, their weights w [v, n], and whether they are those
        of the second term, φ''(z) δ.
    """
    run = _Columns(trace, None, False)
    weights = gradient.new_ones(columns.num, gradient.shape[0]) if columns.weights is None else columns.weights
    for i, chunk, b in run.at_uses([trace.out], lambda a, b: [columns.get(a, b)], columns.num, -1):
        yield i, b, weights[chunk], False
    for residual, r in run.weights(residuals, gradient):
        num, weights = _by_sample(r, residual.axis)
        for i, chunk, b in run.at_uses([residual.input], _units(r, residual.axis), num, residual.targets, r.numel()):
            yield i, b, weights[chunk], True


@dataclass
class _Columns:
    """Columns that go back from a place in the graph to the uses of parameters."""

    trace: Trace
    chunk_size: int | None
    differentiable: bool
    widest: int = 1  # entries of the largest tensor between the sites
    prepared: Prepared = field(default_factory=Prepared)

    def chunks(self, total: int, widest: int) -> list[tuple[int, int]]:
        """Ranges of columns that go together."""
        size = self.chunk_size
        if size is None:
            size = together(self.trace.out, [widest], [self.widest], *[s.shape for s in self.trace.sites])
        return ranges(int(total), size)

    def at_uses(
        self,
        sources: Sequence[Tensor | GradientEdge],
        columns: Callable[[int, int], Sequence[Tensor]],
        num: int,
        targets: int,
        widest: int = 1,
    ) -> Iterator[tuple[int, slice, Bound]]:
        """Jᵀ c for columns c at the sources: parameter in ``targets``, columns of a chunk, and the parameter's uses."""
        uses = uses_of(self.trace, targets)
        wanted = sorted({j for sites in uses.values() for j in sites})
        if not wanted or not self.trace.out.requires_grad:
            return
        ranges = self.chunks(num, widest)
        self.prepared.whole |= len(ranges) > 1
        for start, stop in ranges:
            gs = self.pull(sources, columns(start, stop), wanted)
            for i, sites in uses.items():
                parts = [self.bind(j, i, gs[j], factors=False) for j in sites if j in gs]
                if parts:
                    yield i, slice(start, stop), merge(parts)

    def bind(self, j: int, i: int, g: Tensor, factors: bool = True) -> Bound:
        """Site j's use of parameter i with the cotangent g."""
        return bind(self.trace.sites[j].forms[i], g, self.prepared.of, factors)

    def pull(
        self, sources: Sequence[Tensor | GradientEdge], columns: Sequence[Tensor], wanted: Sequence[int]
    ) -> dict[int, Tensor]:
        """Cotangents [v, n, ...] of those sites' outputs that the sources depend on."""
        edges: list[Any] = [self.trace.sites[j].edge for j in wanted]
        reached: list[int] = []

        def backward(*column: Tensor) -> tuple[Tensor, ...]:
            outputs: Any = sources
            grads = torch.autograd.grad(
                outputs, edges, column, retain_graph=True, create_graph=self.differentiable, allow_unused=True
            )
            reached[:] = [j for j, g in zip(wanted, grads, strict=True) if g is not None]
            return tuple(g for g in grads if g is not None)

        if len(columns[0]) == 1:
            grads = tuple(g[None] for g in backward(*[c[0] for c in columns]))
        else:
            grads = over_columns(backward, *columns)
        return {j: _from_edge(self.trace.sites[j], g) for j, g in zip(reached, grads, strict=True)}

    def weights(self, residuals: Sequence[Residual], gradient: Tensor) -> Iterator[tuple[Residual, Tensor]]:
        """r = φ''(z) δ, of the shape of z, for each operation that the output depends on."""
        for residual, delta in zip(residuals, self.deltas([r.output for r in residuals], gradient), strict=True):
            if delta is not None:
                yield residual, self.second_derivative(residual) * delta

    def deltas(self, edges: Sequence[GradientEdge], gradient: Tensor) -> Sequence[Tensor | None]:
        """δ, the gradient of the loss, at each edge; None where the output does not depend on it."""
        given: dict[str, Any] = {"retain_graph": True, "create_graph": self.differentiable, "allow_unused": True}
        return torch.autograd.grad([self.trace.out], edges, [gradient], **given) if edges else ()

    def second_derivative(self, residual: Residual) -> Tensor:
        """φ''(z), by differentiating φ'(z) = the operation's VJP of ones."""
        ones = torch.ones(residual.shape, dtype=self.trace.out.dtype, device=self.trace.out.device)
        with torch.enable_grad():
            first = torch.autograd.grad([residual.output], [residual.input], [ones], create_graph=True)[0]
            if not first.requires_grad:
                return torch.zeros_like(first)
            second = torch.autograd.grad(
                [first],
                [residual.input],
                [ones.to(first.dtype)],
                retain_graph=True,
                create_graph=self.differentiable,
                allow_unused=True,
            )[0]
        return torch.zeros_like(first) if second is None else second


@dataclass
class _Diagonal(_Columns):
    """Sums up the diagonal; ``sums[i]`` is what parameter i has so far."""

    leaves: Sequence[Tensor] = ()
    batched: bool = False
    sums: dict[int, Tensor] = field(default_factory=dict)

    def add(self, i: int, part: Tensor) -> None:
        """A contribution to parameter i."""
        self.sums[i] = self.sums[i] + part if i in self.sums else part

    def add_samples(self, i: int, part: Tensor) -> None:
        """A contribution [n, *shape]."""
        self.add(i, part if self.batched else part.sum(0))

    def results(self) -> list[Tensor]:
        """What has been summed up."""
        lead = (self.trace.out.shape[0],) if self.batched else ()
        dtypes = [wide(p.dtype) for p in self.leaves]
        return [
            self.sums[i].to(dtype) if i in self.sums else p.new_zeros((*lead, *p.shape), dtype=dtype)
            for i, (p, dtype) in enumerate(zip(self.leaves, dtypes, strict=True))
        ]

    def contract(
        self,
        sources: Sequence[Tensor | GradientEdge],
        columns: Callable[[int, int], Sequence[Tensor]],
        num: int,
        weights: Tensor | None,
        targets: int,
        widest: int = 1,
    ) -> None:
        """Add Σ_v w[v,n] (Jᵀ c[v,n])² for columns c at the sources to the parameters in ``targets``."""
        for i, chunk, b in self.at_uses(sources, columns, num, targets, widest):
            self.add(i, self.square(b, None if weights is None else weights[chunk]))

    def square(self, b: Bound, weights: Tensor | None) -> Tensor:
        """Squares summed over columns, and over samples too unless these are kept."""
        if weights is None:
            return sample_squares(b) if self.batched else squares(b)
        weights = weights.to(b.g.dtype)
        return weighted_sample_squares(b, weights) if self.batched else weighted_squares(b, weights)

    def rows(self, curvature: Curvature, rows: Rows, delta: Tensor) -> None:
        """Add the term of a softmax or norm, from the gradient at it."""
        form = rows.form(rows, delta)
        r = rows.place(form.diagonal[None])[0]
        if rows.centers and not rows.spared(curvature.meeting(rows.input, r.numel()).own):
            weights = form.diagonal.flatten(1).mT
            get = partial(rows.get_centered, form, delta.dtype)
            self.contract([rows.input], get, len(weights), weights, rows.targets, r.numel())
            return
        self.residual(curvature, rows, r.to(delta.dtype))
        get = partial(rows.get, form, delta.dtype)
        self.contract([rows.input], get, rows.columns, rows.weights(form), rows.targets, r.numel())

    def residual(self, curvature: Curvature, residual: Residual | Rows, r: Tensor) -> None:
        """Add the term of one operation from r = φ''(z) δ, of the shape of z."""
        meeting = curvature.meeting(residual.input, r.numel())
        self.own(residual.input, r, meeting, residual.targets)
        targets = residual.targets & meeting.rest
        if not targets:
            return
        start = self.behind_linear(residual, r, meeting)
        if start is not None:
            source, weight, r, x_shape = start
            r_x = r @ weight.square()  # diagonal of Wᵀ diag(r) W
            before = curvature.meeting(source, r_x.numel())
            flat = Meeting(
                {j: mask for j, mask in before.own.items() if len(self.trace.sites[j].shape) == 2}, before.rest, False
            )
            self.own(source, r_x, flat, targets)
            targets &= ~_union(flat.own.values())
            rows: Callable[[int, int], Sequence[Tensor]] = lambda a, b: [weight[a:b, None].expand(-1, *x_shape)]
            self.contract([source], rows, len(weight), r.mT, targets, math.prod(x_shape))
            return
        self.contract([residual.input], _units(r, residual.axis), *_by_sample(r, residual.axis), targets, r.numel())

    def own(self, source: GradientEdge, r: Tensor, meeting: Meeting, targets: int) -> None:
        """Add the terms of layers from which ``source`` is reached through diagonal Jacobians: Σ_s r[n,s,o] x[n,s,k]²."""
        wanted = {j: mask & targets for j, mask in meeting.own.items() if mask & targets}
        if not wanted:
            return
        ones = torch.ones_like(r)
        edges = [self.trace.sites[j].edge for j in wanted]
        if len(edges) == 1 and _same(edges[0], source):
            scales: Sequence[Tensor] = [ones]
        else:
            scales = torch.autograd.grad([source], edges, [ones], retain_graph=True, create_graph=self.differentiable)
        for (j, mask), scale in zip(wanted.items(), scales, strict=True):
            site = self.trace.sites[j]
            at_site = r.reshape(scale.shape) * scale.square()
            for i in site.forms:
                if mask >> i & 1:
                    self.add(i, squared_inputs(self.bind(j, i, _from_edge(site, at_site[None])), self.batched))

    def behind_linear(
        self, residual: Residual | Rows, r: Tensor, meeting: Meeting
    ) -> tuple[GradientEdge, Tensor, Tensor, torch.Size] | None:
        """If z is made of a linear layer's output: the edge of its input, its weight, r at its output [n, o], and x's shape."""
        if not meeting.alone or len(meeting.own) != 1:
            return None
        (j,) = meeting.own
        site = self.trace.sites[j]
        matrices = [i for i, form in site.forms.items() if isinstance(form, Outer)]
        if site.name != "linear" or len(site.shape) != 2 or site.axis != 0 or len(matrices) != 1 or not site.inputs:
            return None
        x, weight = site.inputs[0][0], self.leaves[matrices[0]]
        form = site.forms[matrices[0]]
        if form.inputs_first or weight.shape != (site.shape[1], x.shape[-1]) or x.ndim != 2 or not x.requires_grad:  # type: ignore[union-attr]
            return None
        if not _same(residual.input, site.edge):
            ones = torch.ones_like(r)
            scale = torch.autograd.grad(
                [residual.input], [site.edge], [ones], retain_graph=True, create_graph=self.differentiable
            )[0]
            r = r.reshape(scale.shape) * scale.square()
        return get_gradient_edge(x), weight, r, x.shape


def _warn(columns: int) -> None:
    if columns > MANY_COLUMNS:
        warnings.warn(
            f"the exact diagonal of this model's Hessian takes {columns:,} columns, each of them a Hessian-vector product or a "
            "backward pass. With mc_samples=k, diag_hessian, batch_diag_hessian and their specs estimate it without bias "
            "from k products. Or leave parameters out of params (in modules, freeze them).",
            stacklevel=2,
        )


def _same(a: GradientEdge, b: GradientEdge) -> bool:
    return a.node is b.node and a.output_nr == b.output_nr


def _from_edge(site: Site, g: Tensor) -> Tensor:
    """A cotangent [v, *edge] as [v, n, ...]."""
    return g.reshape(len(g), *site.shape).movedim(site.axis + 1, 1)


def _units(r: Tensor, axis: int) -> Callable[[int, int], Sequence[Tensor]]:
    """The unit vectors of one sample's entries of z, the same for all samples."""
    samples, rest = r.shape[axis], [size for d, size in enumerate(r.shape) if d != axis]
    entries = r.numel() // max(1, samples)

    def get(start: int, stop: int) -> Sequence[Tensor]:
        places = torch.arange(start, stop, device=r.device)
        unit = (places.unsqueeze(1) == torch.arange(entries, device=r.device)).to(r.dtype)
        return [unit.reshape(-1, *rest).unsqueeze(axis + 1).expand(-1, *r.shape)]

    return get


def _by_sample(r: Tensor, axis: int) -> tuple[int, Tensor]:
    """The number of one sample's entries, and r as [entry, n]."""
    weights = r.movedim(axis, -1).flatten(0, -2) if r.ndim > 1 else r[None]
    return len(weights), weights


def _union(masks: Any) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total
