"""What is backpropagated to the layers, and how it gets there.

The cotangents of the output are columns [v, n, ...]: the loss gradient (one column), a square root of the loss Hessian,
exact or sampled, or the output's entries themselves. One backward pass carries a chunk of columns to every site at once and
forms no parameter gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge, Node

from curvfunc import losses
from curvfunc.engine.columns import over_columns
from curvfunc.engine.graph import edge_of, gradients
from curvfunc.engine.sites import Site, Trace
from curvfunc.tensors.inputs import check_used
from curvfunc.tensors.sizes import hint, ranges

__all__ = [
    "AveragedHessian",
    "EmpiricalRoot",
    "FullHessian",
    "LossGradient",
    "LossRoot",
    "OutputEntries",
    "chunks",
    "common",
    "is_at",
    "pull",
    "pull_one",
    "stream",
    "together",
]

# Columns travel together as long as the largest intermediate stays below this many bytes: on CPU, larger tensors come
# from fresh memory pages at each call, which costs more than a second pass.
CHUNK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}


@dataclass(frozen=True)
class LossGradient:
    """The gradient of the loss: one column, R ∇ℓₙ."""

    def root(self, loss: losses.Loss, out: Tensor, y: object, generator: Generator | None) -> losses.Root:
        """The column as a root of one vector."""
        g = losses.gradient(loss, out, y, create_graph=out.requires_grad)
        return losses.Root(1, lambda start, stop: g[None][start:stop], g)


@dataclass(frozen=True)
class LossRoot:
    """Columns S with S Sᵀ = R ∇²ℓₙ per sample: exact (``mc_samples`` = 0), or ``mc_samples`` draws equal in expectation.

    Exact columns are one for each output, or, for what depends on S Sᵀ only, as few as there can be.
    """

    mc_samples: int
    fewest: bool = False

    def root(self, loss: losses.Loss, out: Tensor, y: object, generator: Generator | None) -> losses.Root:
        """The columns, made on demand."""
        if self.mc_samples:
            return losses.sampled_root(loss, out, y, self.mc_samples, generator)
        return losses.exact_root(loss, out, y, fewest=self.fewest)


@dataclass(frozen=True)
class EmpiricalRoot:
    """The loss gradient on the scale of the loss Hessian's root, as if targets were a draw: one column, √R ∇ℓₙ."""

    def root(self, loss: losses.Loss, out: Tensor, y: object, generator: Generator | None) -> losses.Root:
        """The column as a root of one vector."""
        return losses.empirical_root(loss, out, y)


@dataclass(frozen=True)
class OutputEntries:
    """The entries of each sample's output, one column each, with which the Jacobian's rows are what arrives; no loss."""

    def root(self, loss: losses.Loss, out: Tensor, y: object, generator: Generator | None) -> losses.Root:
        """The columns of the identity, made on demand."""
        entries = torch.arange(out.shape[1:].numel(), device=out.device)

        def columns(start: int, stop: int) -> Tensor:
            units = (entries[start:stop, None] == entries).to(out.dtype)
            return units.reshape(stop - start, 1, *out.shape[1:]).expand(stop - start, *out.shape)

        return losses.Root(len(entries), columns)


def common(cotangents: Sequence[Any]) -> list[Any]:
    """The same, with the fewest columns replaced by the usual ones where these are backpropagated too."""
    fewest = [c for c in cotangents if type(c) is LossRoot and c.fewest and not c.mc_samples]
    return [LossRoot(0) if c in fewest else c for c in cotangents] if fewest and LossRoot(0) in cotangents else [*cotangents]


@dataclass(frozen=True)
class FullHessian:
    """Weighted columns of the loss Hessian, and those of every operation that curves; see `curvfunc.hessian`.

    With ``mc_samples``, that many products with random signs in their place.
    """

    mc_samples: int = 0


@dataclass(frozen=True)
class AveragedHessian:
    """The loss Hessian, averaged over samples at each step back; see `curvfunc.hessian.kfra`."""


def together(like: Tensor, *shapes: Sequence[Any]) -> int:
    """How many columns are backpropagated together, on the device of ``like`` and in its type, if they pass these shapes."""
    widest = max([1, *[hint(math.prod(shape)) for shape in shapes]])
    return max(1, CHUNK_BYTES.get(like.device.type, 1 << 28) // (widest * like.element_size()))


def chunks(total: int, trace: Trace, chunk_size: int | None) -> list[tuple[int, int]]:
    """Ranges of columns that are backpropagated together."""
    if chunk_size is None:
        if type(total) is int and total == 1:
            return [(0, 1)]
        chunk_size = together(trace.out, *[s.shape for s in trace.sites])
    return ranges(int(total), chunk_size)


def pull(
    trace: Trace,
    columns: Tensor,
    leaves: Sequence[Tensor] = (),
    *,
    sites: bool = True,
    create_graph: bool,
    retain_graph: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Backpropagate columns [v, n, ...] of the output.

    Args:
        trace: The forward pass.
        columns: What to backpropagate.
        leaves: Parameters whose total gradient is wanted too (for one column).
        sites: Whether the cotangents of the sites are wanted.
        create_graph: Whether the results will be differentiated.
        retain_graph: Whether another backward pass follows.

    Returns:
        Per site the cotangent of its output [v, n, ...], and per leaf the gradient. Zeros where the output does not
        depend on it.
    """
    if len(columns) == 1:
        found, totals = pull_one(trace, columns[0], leaves, sites=sites, create_graph=create_graph, retain_graph=retain_graph)
        return [g.unsqueeze(0) for g in found], totals
    wanted = trace.sites if sites else []
    if not trace.out.requires_grad:
        check_used(trace.out, not leaves or bool(trace.sites))
        return [_zeros(s, trace, columns) for s in wanted], [torch.zeros_like(p) for p in leaves]
    end = edge_of(trace.out)
    inner = [s for s in wanted if not is_at(s, end)]
    targets: list[Any] = [s.edge for s in inner] + list(leaves)
    reached: list[bool] = []

    def reached_only(column: Tensor) -> tuple[Tensor, ...]:
        # vmap may run the backward of an operation column by column
        grads = gradients(trace.out, targets, column, retain_graph=True, create_graph=create_graph)
        reached[:] = [g is not None for g in grads]
        return tuple(g for g in grads if g is not None)

    grads: list[Tensor | None] = []
    if targets:
        arrived = iter(over_columns(reached_only, columns))
        grads = [next(arrived) if r else None for r in reached]
    pulled = dict(zip(inner, grads, strict=False))
    at_sites = [(s, pulled.get(s, columns)) for s in wanted]  # at the output, nothing is to be done
    found = [_zeros(s, trace, columns) if g is None else _samples_first(g, s) for s, g in at_sites]
    return found, _totals(trace, leaves, grads[len(inner) :], grads)


def pull_one(
    trace: Trace,
    column: Tensor,
    leaves: Sequence[Tensor] = (),
    *,
    sites: bool = True,
    create_graph: bool,
    retain_graph: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """As `pull`, of one column [n, ...], to cotangents [n, ...]."""
    wanted = trace.sites if sites else []
    if not trace.out.requires_grad:
        check_used(trace.out, not leaves or bool(trace.sites))
        return [_zeros(s, trace, column[None])[0] for s in wanted], [torch.zeros_like(p) for p in leaves]
    end = edge_of(trace.out)
    at_end = [is_at(s, end) for s in wanted]  # where nothing is to be done
    targets: list[Any] = [s.edge for s, there in zip(wanted, at_end, strict=True) if not there]
    inner = len(targets)
    targets += leaves
    grads: Sequence[Tensor | None] = ()
    if targets:
        grads = gradients(trace.out, targets, column, retain_graph=retain_graph, create_graph=create_graph)
    arrived = iter(grads)
    found: list[Tensor] = []
    for s, there in zip(wanted, at_end, strict=True):
        g = column if there else next(arrived)
        if g is None:
            found.append(_zeros(s, trace, column[None])[0])
        elif g.shape != s.shape or s.axis:
            found.append(_samples_first(g[None], s)[0])
        else:
            found.append(g)
    return found, _totals(trace, leaves, grads[inner:], grads)


def is_at(site: Site, edge: GradientEdge) -> bool:
    """Whether a site's output is what has this edge."""
    return site.edge.node is edge.node and site.edge.output_nr == edge.output_nr


def _totals(
    trace: Trace, leaves: Sequence[Tensor], totals: Sequence[Tensor | None], all_of_them: Sequence[Tensor | None]
) -> list[Tensor]:
    """The gradients of the leaves, zeros where there are none."""
    if leaves and not trace.sites:
        check_used(trace.out, any(g is not None for g in all_of_them))
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, totals, strict=True)]


def stream(
    trace: Trace, column: Tensor, leaves: Sequence[Tensor], receive: Callable[[Site, Tensor], None], *, retain_graph: bool
) -> list[Tensor]:
    """Backpropagate one column [n, ...] of the output, and keep no cotangent: ``receive`` has each as soon as it is there.

    Args:
        trace: The forward pass. If its sites are held by nobody else, their inputs go as the pass goes on.
        column: What to backpropagate.
        leaves: Parameters whose total gradient is wanted too.
        receive: Called for each site with the cotangent of its output [1, n, ...]; zeros where the output does not depend
            on it. It runs inside of the backward pass.
        retain_graph: Whether another backward pass follows.

    Returns:
        Per leaf the gradient.
    """
    if not trace.out.requires_grad:
        for site in trace.sites:
            receive(site, _zeros(site, trace, column[None]))
        return [torch.zeros_like(p) for p in leaves]
    end = edge_of(trace.out)
    at: dict[Node, list[Site]] = {}
    for site in trace.sites:
        at.setdefault(site.edge.node, []).append(site)
    inner = _lead_on(end.node, {*at, *(edge_of(p).node for p in leaves)})  # a backward pass to the others runs these
    last = [s for node, sites in at.items() if node not in inner for s in sites]
    asked = [s for s in last if not is_at(s, end)]

    def arrive(site: Site, g: Tensor | None) -> None:
        if g is not None:
            at[site.edge.node].remove(site)
            receive(site, _samples_first(g[None], site))

    def before(node: Node, grads: Sequence[Tensor | None]) -> None:
        for site in list(at[node]):
            arrive(site, grads[site.edge.output_nr])

    handles = [node.register_prehook(partial(before, node)) for node in inner & at.keys()]
    try:
        targets: list[Any] = [*[site.edge for site in asked], *leaves]
        grads: list[Tensor | None] = []
        if targets:
            grads += gradients(trace.out, targets, column, retain_graph=retain_graph)
    finally:
        for handle in handles:
            handle.remove()
    found_at = dict(zip(asked, grads, strict=False))
    for site in last:
        arrive(site, found_at.get(site, column))
    for site in [s for sites in at.values() for s in sites]:
        receive(site, _zeros(site, trace, column[None]))
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads[len(asked) :], strict=True)]


def _lead_on(end: Node, wanted: set[Node]) -> set[Node]:
    """The nodes, among those before ``end``, that a wanted one lies before: a backward pass to the wanted ones runs them."""
    inner: set[Node] = set()
    seen: set[Node] = set()
    stack = [(end, False)]
    while stack:
        node, done = stack.pop()
        before = [n for n, _ in node.next_functions if n is not None]
        if done:
            if any(n in wanted or n in inner for n in before):
                inner.add(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend([(n, False) for n in before])
    return inner


def _samples_first(g: Tensor, site: Site) -> Tensor:
    if g.shape[1:] != site.shape:
        g = g.reshape(len(g), *site.shape)
    return g.movedim(site.axis + 1, 1) if site.axis else g


def _zeros(site: Site, trace: Trace, columns: Tensor) -> Tensor:
    shape = list(site.shape)
    shape.insert(0, shape.pop(site.axis))
    return trace.out.new_zeros(()).expand(len(columns), *shape)
