"""Second-order quantities, evaluated when a backward pass reaches an extended loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvfunc import losses
from curvfunc.compat import blocks, graphs
from curvfunc.compat.backprop_extension import BackpropExtension
from curvfunc.compat.context import paused
from curvfunc.compat.delivery import FREED, Pass, check_repeated, forget, select
from curvfunc.compat.extensions import HMP, PCHMP, MatrixProduct
from curvfunc.compat.memory import earlier
from curvfunc.compat.notes import Call, LossCall, Repeated, nodes, notes
from curvfunc.compat.upstream import Curved, Upstream, whole_model
from curvfunc.engine.contractions import CONTRACTIONS, check_block, combine, contracted, keep
from curvfunc.engine.cotangents import AveragedHessian, FullHessian, LossRoot, chunks, common
from curvfunc.engine.effects import shares_memory
from curvfunc.engine.passes import Prepared
from curvfunc.hessian import diagonal as hessian
from curvfunc.hessian.kfra import factors
from curvfunc.operators import products
from curvfunc.quantities.call import compute
from curvfunc.quantities.quantity import Quantity
from curvfunc.quantities.run import of_nothing
from curvfunc.uses.forms import Form, merge

__all__ = ["evaluate"]


def evaluate(call: LossCall, current: Pass) -> None:
    """Compute second-order quantities and put them on the parameters."""
    try:
        _evaluate(call, current)
    except Exception:
        for node in nodes(call.out):
            for note in notes(node):
                forget(note.region.params, current.second_order)
        raise


def _evaluate(call: LossCall, current: Pass) -> None:
    create_graph, exts = torch.is_grad_enabled(), current.second_order
    call = replace(call, loss=losses.check(call.loss, call.out, call.y))
    if not call.out.requires_grad:
        return
    pulled: dict[LossRoot, list[tuple[BackpropExtension, Quantity]]] = {}
    others: list[BackpropExtension] = []
    asked = [ext for ext in exts if isinstance(ext, MatrixProduct)]
    with paused():
        graph = Upstream.of(call, create_graph)
        if not graph.params:
            return
        if not call.out.numel():
            _of_nothing(call, graph, current)
            return
        specs = [(ext, ext.quantity()) for ext in exts if not isinstance(ext, MatrixProduct)]
        apart = graph.keeps_samples_apart(call)
        if specs and (refusal := next((r.refusal for r in graph.regions if r.refusal is not None), None)) is not None:
            raise NotImplementedError(refusal)
        if specs and not apart:
            names = ", ".join(type(ext).__name__ for ext, _ in specs)
            raise ValueError(
                f"{names} needs a loss that is a sum over samples, but between the extended modules, or before the loss, the "
                "samples of the batch are mixed, as in out - out.mean(0). Only HMP, GGNMP and PCHMP can be had then."
            )
        cotangents = [spec.cotangent for _, spec in specs]
        hessians = FullHessian() in cotangents or any(isinstance(ext, (HMP, PCHMP)) for ext in exts)
        curved = graph.curvature() if hessians else None
        if curved is not None and curved.is_ggn(call):
            cotangents = [LossRoot(0, fewest=True) if c == FullHessian() else c for c in cotangents]
        diagonals: list[BackpropExtension] = []
        for (ext, spec), cotangent in zip(specs, common(cotangents), strict=True):
            if isinstance(cotangent, LossRoot):
                pulled.setdefault(cotangent, []).append((ext, spec))
            elif isinstance(cotangent, AveragedHessian) and not graph.outputs:
                _averaged(call, graph, ext, current)
            elif isinstance(cotangent, FullHessian) and curved is not None and curved.suffices(create_graph):
                diagonals.append(ext)
            else:
                others.append(ext)
        for cotangent, group in pulled.items():
            _pulled(call, graph, cotangent, group, current)
        if curved is not None and diagonals:
            _diagonals(call, curved, diagonals, current)
        if apart:
            asked = blocks.put_products(call, graph, curved, asked, current)
        if asked and graphs.put_products(call, graph, asked, current):
            asked = []
        if others or asked:
            _rerun(call, graph, [*others, *asked], current)


def _of_nothing(call: LossCall, graph: Upstream, current: Pass) -> None:
    """Where the output has no entries."""
    params, samples, entries = list(graph.params.values()), len(call.out), call.out.shape[1:].numel()
    for ext in current.second_order:
        if isinstance(ext, MatrixProduct):
            found: list[Any] = [blocks.FunctionProduct(p, torch.zeros_like) for p in params]
        else:
            found = of_nothing(ext.quantity(), params, samples, entries)
        for p, result in zip(params, found, strict=True):
            current.put_curved(p, ext, result)


# -- on the graph of the forward pass


def _pulled(
    call: LossCall,
    graph: Upstream,
    cotangent: LossRoot,
    group: list[tuple[BackpropExtension, Quantity]],
    current: Pass,
) -> None:
    """All extensions that share columns of the loss Hessian's root."""
    create_graph = current.create_graph
    out = call.out if create_graph else call.out.detach()
    root = cotangent.root(call.loss, out, call.y, None)
    found: dict[tuple[int, int, str], list[Any]] = {}  # by parameter, extension and contraction
    memory: dict[tuple[int, int], dict[str, Tensor]] = {}
    names = [name for _, spec in group for name in spec.contractions]
    whole_batch = all(ext.get_subsampling() is None for ext, _ in group)
    ranges = chunks(root.num, graph.trace, None)
    prepared = Prepared(whole=len(ranges) > 1)
    for start, stop in ranges:
        uses: dict[int, list[tuple[Form, Tensor]]] = {}
        for i, form, g in graph.pull(root.columns(start, stop).to(call.out.dtype), create_graph):
            uses.setdefault(i, []).append((form, g))
        factors: list[dict[Any, Tensor]] = [{} for _ in group]
        for i in list(uses):
            mine = uses.pop(i)
            bound = merge([prepared.bind(form, g, names, whole_batch and len(mine) == 1) for form, g in mine])
            for k, (ext, spec) in enumerate(group):
                if any(n.startswith("output_factor") for n in spec.contractions):
                    check_block(bound, f"{type(ext).__name__}: a parameter")
                selected = select(bound, ext.get_subsampling())
                if start == 0:
                    p, samples = graph.params[i], selected.g.shape[1]
                    taken = current.has_curved(p, ext)
                    memory[i, k] = {} if taken else earlier(p, ext.savefield, spec, root.num, samples)
                whole = memory[i, k]
                buffers = {name: m[start:stop] if name == "per_sample" else m for name, m in whole.items()}
                only = len(ranges) == 1
                for name, part in contracted(spec.contractions, selected, start == 0, only, buffers, factors[k]).items():
                    keep(found.setdefault((i, k, name), []), part, CONTRACTIONS[name][1])
                if stop == root.num:  # at once, so that the memory of what was there before can be used again
                    parts = [combine(name, found.pop((i, k, name)), whole.get(name)) for name in spec.contractions]
                    p, result = graph.params[i], spec.finish(selected.g.shape[1], *parts)
                    current.put_curved(p, ext, result)


def _averaged(call: LossCall, graph: Upstream, ext: BackpropExtension, current: Pass) -> None:
    """KFRA on the operations of the recorded call."""
    create_graph = current.create_graph
    params = list(graph.params.values())
    trace = graph.by_position(params)
    out = call.out if create_graph else call.out.detach()
    hessian = losses.summed_hessian(call.loss, out, call.y, lambda columns: columns)
    with nullcontext() if create_graph else torch.no_grad():
        found = factors(trace, params, graph.names(), graph.layouts, hessian, create_graph)
        for p, result in zip(params, found, strict=True):
            current.put_curved(p, ext, result)


def _diagonals(call: LossCall, curved: Curved, exts: list[BackpropExtension], current: Pass) -> None:
    """The Hessian's diagonal on the operations of the recorded call."""
    create_graph = current.create_graph
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
                current.put_curved(p, ext, result.sum(0) if summed else result)


# -- by the functions, with a forward pass of their own


class _Watched(Repeated):
    """Keeps the outputs at these parameters, to compare them."""

    def __init__(self, call: Call, params: dict[str, Tensor]) -> None:
        super().__init__(call)
        self.params = params
        self.outputs: list[Tensor] = []

    def __call__(self, params: dict[str, Tensor], X: Sequence[Tensor]) -> Any:
        """Run it."""
        out = super().__call__(params, X)
        if all(shares_memory(params[name], p) for name, p in self.params.items() if p.numel()):
            self.outputs.append(out)
        return out


def _rerun(call: LossCall, graph: Upstream, exts: list[BackpropExtension], current: Pass) -> None:
    """Run the functions that bear the extensions' names on the module whose output went into the loss."""
    region = whole_model(call, graph.params)
    if region is None:
        names = ", ".join(type(e).__name__ for e in exts)
        raise NotImplementedError(
            f"{names} needs the whole model as one extended module whose output goes straight into the extended loss. Extend "
            "a module that holds all of it, or use curvfunc.diag_hessian, kfra, hmp, ggnmp or pchmp on curvfunc.functionalize."
        )
    if region.refusal is not None:
        raise NotImplementedError(region.refusal)
    if region.inputs is None:
        raise RuntimeError(FREED)
    params = dict(zip(region.names, region.params, strict=True))
    data = params if torch.is_grad_enabled() else {k: p.detach() for k, p in params.items()}
    model_fn = _Watched(region.inputs, data)
    specs = {e.savefield: e.quantity() for e in exts if not isinstance(e, MatrixProduct)}
    results = compute(model_fn, data, region.inputs.X, call.y, specs, loss_fn=call.loss) if specs else {}
    for ext in exts:
        if isinstance(ext, MatrixProduct):
            with torch.enable_grad():
                name = type(ext).__name__
                found = products.blocks(name, ext.matrix(), model_fn, data, region.inputs.X, call.y, call.loss)
                results[ext.savefield] = {k: blocks.FunctionProduct(params[k], f) for k, f in found.items()}
    for out in model_fn.outputs:
        if not torch._C._functorch.is_functorch_wrapped_tensor(out) and len(out) == len(call.out):  # not of single samples
            check_repeated(region, out, call.out.detach(), call.out._version)
    model_fn.outputs.clear()
    for ext in exts:
        for name, p in params.items():
            current.put_curved(p, ext, results[ext.savefield][name])
