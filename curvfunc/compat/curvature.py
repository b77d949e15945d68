"""Second-order quantities, evaluated when a backward pass reaches an extended loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvfunc import hessian, losses
from curvfunc.block_products import Block, condensed
from curvfunc.compat.context import CHAIN, paused
from curvfunc.compat.delivery import _FREED, check_repeated, repeat, select, store
from curvfunc.compat.extensions import GGNMP, HMP, PCHMP, BackpropExtension, MatrixProduct
from curvfunc.compat.memory import earlier
from curvfunc.compat.notes import LossCall, ModuleUse, NodeLayouts, Region, RegionOutput, notes
from curvfunc.compute import Quantity, compute
from curvfunc.cotangents import AveragedHessian, FullHessian, LossRoot, chunks, common, pull
from curvfunc.forms import Bound, Form, Outer, Rows, merge
from curvfunc.kfra import Chain, factors
from curvfunc.linearization import check_vector
from curvfunc.passes import CONTRACTIONS, Prepared, check_block, combine, contracted, keep, takes_products
from curvfunc.residuals import Curvature, curvature
from curvfunc.sites import Site, Trace

__all__ = ["evaluate"]

BLOCKS_BYTES = 1 << 28  # what products with blocks may keep; otherwise they keep a graph of their own


def evaluate(call: LossCall, exts: Sequence[BackpropExtension]) -> None:
    """Compute second-order quantities and put them on the parameters."""
    create_graph = torch.is_grad_enabled()
    losses.check(call.loss, call.out, call.y)
    if not call.out.requires_grad:
        return
    pulled: dict[LossRoot, list[tuple[BackpropExtension, Quantity]]] = {}
    others: list[BackpropExtension] = []
    with paused():
        graph = _Graph.upstream(call, create_graph)
        specs = [None if isinstance(ext, MatrixProduct) else ext.quantity() for ext in exts]
        cotangents = [None if spec is None else spec.cotangent for spec in specs]
        hessian_products = [ext for ext in exts if isinstance(ext, (HMP, PCHMP))]
        curved = graph.curvature() if FullHessian() in cotangents or hessian_products else None
        is_ggn = curved is not None and curved.is_ggn(call)
        if is_ggn:
            cotangents = [LossRoot(0, fewest=True) if c == FullHessian() else c for c in cotangents]
        diagonals: list[BackpropExtension] = []
        blocks: list[BackpropExtension] = []
        for ext, spec, cotangent in zip(exts, specs, common(cotangents), strict=True):
            if spec is not None and isinstance(cotangent, LossRoot):
                pulled.setdefault(cotangent, []).append((ext, spec))
            elif isinstance(cotangent, AveragedHessian) and (chain := graph.chain()) is not None:
                _averaged(call, graph, ext, chain, create_graph)
            elif isinstance(cotangent, FullHessian) and curved is not None and curved.suffices(call, create_graph):
                diagonals.append(ext)
            elif (isinstance(ext, GGNMP) or (is_ggn and ext in hessian_products)) and graph.has_small_root(call):
                blocks.append(ext)
            else:
                others.append(ext)
        for cotangent, group in pulled.items():
            _pulled(call, graph, cotangent, group, create_graph)
        if curved is not None and diagonals:
            _diagonals(call, curved, diagonals, create_graph)
        if blocks:
            _block_products(call, graph, blocks)
        if others:
            _rerun(call, others)


# -- on the graph of the forward pass


@dataclass
class _Graph:
    """The uses of parameters before a loss.

    Attributes:
        trace: The recorded operations, and the outputs of calls that have to be repeated.
        repeated: By the position of such an output, the repeated call.
        params: By identity.
        regions: The calls they belong to.
    """

    trace: Trace
    repeated: dict[int, tuple[Trace, list[Tensor]]]
    params: dict[int, Tensor]
    regions: list[Region]

    @classmethod
    def upstream(cls, call: LossCall, create_graph: bool) -> _Graph:
        """Find what was noted before the output."""
        graph = cls(Trace(call.out, [], "plain"), {}, {}, [])
        for node, note in _noted(call.out):
            region = note.region
            if region not in graph.regions:
                graph.regions.append(region)
            if region.samples != len(call.out):
                raise ValueError(
                    f"{region.name} ran on {region.samples} samples, but the loss has {len(call.out)}. Second-order "
                    "quantities need one output per sample."
                )
            edge = GradientEdge(node, note.output)
            if isinstance(note, ModuleUse):
                if note.site is None:
                    raise RuntimeError(_FREED)
                site = note.site
                graph.trace.sites.append(replace(site, forms=_by_identity(site.forms, region.params), edge=edge))
            elif region.refusal is not None or region.reason is not None:
                graph.repeated[len(graph.trace.sites)] = (repeat(note, create_graph)[0], region.params)
                graph.trace.sites.append(Site(region.name, {}, edge, 0, [], note.value.shape, []))
            else:
                continue
            graph.params.update({id(p): p for p in region.params})
        return graph

    def curvature(self) -> _Curved | None:
        """How it curves, if nothing has to be repeated."""
        if self.repeated:
            return None
        leaves = list(self.params.values())
        trace = self.by_position(leaves)
        return _Curved(trace, leaves, curvature(trace, leaves, NodeLayouts()), self.regions)

    def by_position(self, params: list[Tensor]) -> Trace:
        """The recorded operations, with parameters by their position in a list."""
        place = {id(p): i for i, p in enumerate(params)}
        sites = [replace(s, forms={place[p]: form for p, form in s.forms.items()}) for s in self.trace.sites]
        return replace(self.trace, sites=sites)

    def chain(self) -> Chain | None:
        """Its operations, if it is one call that was recorded with them."""
        if self.repeated or len(self.regions) != 1 or not CHAIN or CHAIN[0][0] is not self.regions[0]:
            return None
        return CHAIN[0][1]

    def has_small_root(self, call: LossCall) -> bool:
        """Whether the columns of the loss Hessian's root, at all uses, take little memory."""
        sites = [s for s in self.trace.sites if s.forms] + [s for trace, _ in self.repeated.values() for s in trace.sites]
        numel = 0
        for site in sites:
            formed = [f for f in site.forms.values() if not isinstance(f, (Outer, Rows) if len(site.shape) == 2 else Rows)]
            whole = len(formed) == len(site.forms)
            numel += len(call.out) * sum(f.shape.numel() for f in formed) + (0 if whole else site.shape.numel())
        return numel * call.out[:1].numel() * call.out.element_size() <= BLOCKS_BYTES

    def pull(self, columns: Tensor, create_graph: bool) -> Iterator[tuple[int, Form, Tensor]]:
        """Parameter, form and cotangent for each use."""
        gs, _ = pull(self.trace, columns, create_graph=create_graph, retain_graph=True)
        for j, (site, g) in enumerate(zip(self.trace.sites, gs, strict=True)):
            if j in self.repeated:
                trace, params = self.repeated[j]
                inner, _ = pull(trace, g, create_graph=create_graph, retain_graph=True)
                for inner_site, h in zip(trace.sites, inner, strict=True):
                    yield from ((i, f, h) for i, f in _by_identity(inner_site.forms, params).items())
            else:
                yield from ((i, form, g) for i, form in site.forms.items())


@dataclass
class _Curved:
    """A graph with its curvature.

    Attributes:
        trace: The recorded operations, by position of the parameter.
        leaves: The parameters.
        curvature: Of ``trace``.
        regions: The calls they belong to.
    """

    trace: Trace
    leaves: list[Tensor]
    curvature: Curvature
    regions: list[Region]

    def is_ggn(self, call: LossCall) -> bool:
        """Whether the Hessian is the GGN: all operations are linear by pieces, and the loss is convex."""
        if call.loss.name is None or self.curvature.curved or self.curvature.residuals:
            return False
        return losses.signed_root(call.loss, self.trace.out.detach(), call.y)[1] is None

    def suffices(self, call: LossCall, create_graph: bool) -> bool:
        """Whether the Hessian can be read off this graph: of one call, whose operations can be differentiated often enough."""
        if len(self.regions) != 1 or _whole_model(call) is None or self.curvature.split:
            return False
        return not self.curvature.curved or (self.regions[0].twice and not create_graph)


def _by_identity(forms: dict[int, Form], params: list[Tensor]) -> dict[int, Form]:
    return {id(params[i]): form for i, form in forms.items()}


def _noted(out: Tensor) -> Iterator[tuple[Node, Any]]:
    """The notes on the graph before ``out``."""
    seen: set[Node] = set()
    stack: list[Node | None] = [get_gradient_edge(out).node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from ((node, note) for note in notes(node))
        stack.extend([n for n, _ in node.next_functions])


def _pulled(
    call: LossCall,
    graph: _Graph,
    cotangent: LossRoot,
    group: list[tuple[BackpropExtension, Quantity]],
    create_graph: bool,
) -> None:
    """All extensions that share columns of the loss Hessian's root."""
    out = call.out if create_graph else call.out.detach()
    root = cotangent.root(call.loss, out, call.y, None)
    found: dict[tuple[int, int, str], list[Any]] = {}  # by parameter, extension and contraction
    memory: dict[tuple[int, int], dict[str, Tensor]] = {}
    prepared, names = Prepared(), [name for _, spec in group for name in spec.contractions]
    products = takes_products(names) and all(ext.get_subsampling() is None for ext, _ in group)
    ranges = chunks(root.num, graph.trace, None)
    for start, stop in ranges:
        uses: dict[int, list[tuple[Form, Tensor]]] = {}
        for i, form, g in graph.pull(root.columns(start, stop).to(call.out.dtype), create_graph):
            uses.setdefault(i, []).append((form, g))
        for i in list(uses):
            mine = uses.pop(i)
            bound = merge([prepared.bind(form, g, products and len(mine) == 1) for form, g in mine])
            for k, (ext, spec) in enumerate(group):
                check_block(spec.contractions, bound, f"{type(ext).__name__}: a parameter")
                selected = select(bound, ext.get_subsampling())
                if start == 0:
                    p, samples = graph.params[i], selected.g.shape[1]
                    memory[i, k] = earlier(p, ext.savefield, spec, root.num, samples)
                whole = memory[i, k]
                buffers = {name: m[start:stop] if name == "per_sample" else m for name, m in whole.items()}
                for name, part in contracted(spec.contractions, selected, start == 0, len(ranges) == 1, buffers).items():
                    keep(found.setdefault((i, k, name), []), part, CONTRACTIONS[name][1])
                if stop == root.num:  # at once, so that the memory of what was there before can be used again
                    parts = [combine(name, found.pop((i, k, name)), whole.get(name)) for name in spec.contractions]
                    store(graph.params[i], ext, spec, spec.finish(selected.g.shape[1], *parts))


def _averaged(call: LossCall, graph: _Graph, ext: BackpropExtension, chain: Chain, create_graph: bool) -> None:
    """KFRA on the operations of the recorded call."""
    (region,) = graph.regions
    trace = graph.by_position(region.params)
    out = call.out if create_graph else call.out.detach()
    hessian = losses.summed_hessian(call.loss, out, call.y, lambda columns: columns)
    with nullcontext() if create_graph else torch.no_grad():
        found = factors(trace, region.params, region.names, chain, hessian, create_graph)
    for p, result in zip(region.params, found, strict=True):
        setattr(p, ext.savefield, list(result))


def _diagonals(call: LossCall, curved: _Curved, exts: list[BackpropExtension], create_graph: bool) -> None:
    """The Hessian's diagonal on the operations of the recorded call."""
    out = call.out if create_graph else call.out.detach()
    batched = any("sample_squares" in ext.quantity().contractions for ext in exts)
    with nullcontext() if create_graph else torch.no_grad():
        root, weights = losses.signed_root(call.loss, out, call.y)
        found = hessian.diagonal(
            curved.trace,
            curved.leaves,
            curved.curvature,
            hessian.Columns(root.num, lambda start, stop: root.columns(start, stop).to(out.dtype), weights),
            losses.gradient(call.loss, out, call.y, create_graph=create_graph),
            batched=batched,
            chunk_size=None,
            differentiable=create_graph,
        )
        for ext in exts:
            summed = batched and "squares" in ext.quantity().contractions
            for p, result in zip(curved.leaves, found, strict=True):
                setattr(p, ext.savefield, result.sum(0) if summed else result)


def _block_products(call: LossCall, graph: _Graph, exts: list[BackpropExtension]) -> None:
    """Products with blocks of the GGN; the functions outlive the graph, so they must not refer to any part of it."""
    with torch.no_grad():
        root, weights = losses.signed_root(call.loss, call.out.detach(), call.y)
        prepared = Prepared()
        parts: dict[int, list[Bound]] = {i: [] for i in graph.params}
        for start, stop in chunks(root.num, graph.trace, None):
            uses: dict[int, list[Bound]] = {}
            for i, form, g in graph.pull(root.columns(start, stop).to(call.out.dtype), False):
                uses.setdefault(i, []).append(prepared.bind(form, g, False))
            for i, mine in uses.items():
                parts[i].append(condensed(merge(mine), root.num))
        for i, p in graph.params.items():
            product = BlockProduct(Block.of(parts[i], weights) if parts[i] else None, p)
            for ext in exts:
                setattr(p, ext.savefield, product)


class BlockProduct:
    """Multiplies [V, *shape] with a parameter's block."""

    def __init__(self, block: Block | None, p: Tensor) -> None:
        self._block = block
        self._like = p.detach().new_empty(()).expand(p.shape)
        self._version = None if block is None else block.root.x._version

    def __call__(self, v: Tensor) -> Tensor:
        """The product, [V, *shape]."""
        check_vector("v", v, self._like, batched=True)
        if self._block is None:
            return torch.zeros_like(v)
        if self._block.root.x._version != self._version:
            raise RuntimeError(
                f"the input of the operation that uses the parameter of shape {tuple(self._like.shape)} was changed in "
                "place after the backward pass, so products are lost. Multiply before the change, or use new memory."
            )
        with torch.no_grad():
            return self._block(v.to(self._block.root.g.dtype)).to(v.dtype)


# -- by the functions, with a forward pass of their own


def _rerun(call: LossCall, exts: list[BackpropExtension]) -> None:
    """Run the functions that bear the extensions' names on the module whose output went into the loss."""
    region = _whole_model(call)
    if region is None:
        names = ", ".join(type(e).__name__ for e in exts)
        raise NotImplementedError(
            f"{names} needs the whole model as one extended module whose output goes straight into the extended loss. Extend "
            "a module that holds all of it, or use curvfunc.diag_hessian, kfra, hmp, ggnmp or pchmp on curvfunc.functionalize."
        )
    if region.refusal is not None:
        raise NotImplementedError(region.refusal)
    if region.inputs is None:
        raise RuntimeError(_FREED)
    params = dict(zip(region.names, region.params, strict=True))
    data = params if torch.is_grad_enabled() else {k: p.detach() for k, p in params.items()}
    inputs, outputs = region.inputs, []

    def model_fn(values: dict[str, Tensor], X: list[Tensor]) -> Any:
        outputs.append(inputs.model_fn(values, X))
        return outputs[-1]

    specs = {e.savefield: e.quantity() for e in exts if not isinstance(e, MatrixProduct)}
    results = compute(model_fn, data, inputs.X, call.y, specs, loss_fn=call.loss) if specs else {}
    for ext in exts:
        if isinstance(ext, MatrixProduct):
            with torch.enable_grad():
                results[ext.savefield] = ext.products(model_fn, data, inputs.X, call.y, call.loss)
    for out in outputs:
        if not torch._C._functorch.is_functorch_wrapped_tensor(out):
            check_repeated(region, out, call.out.detach(), call.out._version)
    outputs.clear()
    for savefield, values in results.items():
        for name, p in params.items():
            value = values[name]
            setattr(p, savefield, list(value) if isinstance(value, tuple) else value)


def _whole_model(call: LossCall) -> Region | None:
    """The call whose output went straight into the loss."""
    edge = get_gradient_edge(call.out)
    for note in notes(edge.node):
        if isinstance(note, RegionOutput) and note.output == edge.output_nr:
            region: Region = note.region
            return region
    return None
