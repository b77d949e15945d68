"""One forward pass and what is made of it: one backward pass per kind of cotangent, shared by all specs."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Generator, Tensor
from torch._C import _functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvfunc import losses
from curvfunc.engine import scripted
from curvfunc.engine.capture import capture
from curvfunc.engine.chance import Chance
from curvfunc.engine.clipping import ClippedLossGradient, clipped_sum
from curvfunc.engine.company import Entangled, check_apart, check_subset
from curvfunc.engine.contractions import FACTORS
from curvfunc.engine.cotangents import AveragedHessian, FullHessian, LossGradient, LossRoot, OutputEntries, common
from curvfunc.engine.effects import Attributes
from curvfunc.engine.graph import check_twice_differentiable
from curvfunc.engine.leaves import leaf, leaves_of
from curvfunc.engine.model import check_function, without_recomputation
from curvfunc.engine.nothing import sums_of_nothing
from curvfunc.engine.outputs import check_output
from curvfunc.engine.passes import BackwardPass, Prepared, check_unchanged
from curvfunc.engine.sites import Layouts, Trace
from curvfunc.hessian import diagonal as hessian
from curvfunc.hessian import estimates, kfra
from curvfunc.hessian.choice import resolve
from curvfunc.hessian.residuals import Curvature, curvature
from curvfunc.quantities.quantity import Quantity
from curvfunc.rules.kernels import INSTEAD, PARTS, Instead
from curvfunc.rules.nonlinear import COMPOSITES
from curvfunc.tensors.buffers import deliver, parameter_buffers
from curvfunc.tensors.inputs import Batch, explain_limits, flatten_params, forward_errors, read_batch
from curvfunc.tensors.ownership import apart
from curvfunc.tensors.samples import tensors_of
from curvfunc.tensors.signs import random_signs

__all__ = ["DrawnError", "Run", "of_nothing", "trace"]

WITHOUT_SITES = frozenset({(), ("total",)})  # contractions for which nobody has to know where parameters are used

# Contractions whose results may be what autograd returns, which a backward pass or a hook of the model's own may keep.
AS_AUTOGRAD_GIVES = frozenset({("total",), ("weighted_total",), ("per_sample",)})


class DrawnError(Exception):
    """A forward pass drew random numbers, and another one would draw others."""


@dataclass(eq=False)  # quicker to make than if it were frozen
class Run:
    """One forward pass and what is made of it."""

    model_fn: Callable[..., Any]
    names: Sequence[str]
    rebuild: Callable[[Sequence[Any]], Any]
    batch: Batch
    loss: losses.Loss
    generator: Generator | None
    chunk_size: int | None
    differentiable: bool
    params: Any = None
    buffers: list[Any] | None = None
    watched: bool = False  # raises if the forward pass draws random numbers
    chosen: Tensor | None = None  # the samples of the batch that all but the specs of the whole batch are of

    def evaluate(self, params: list[Tensor], specs: list[Quantity]) -> list[Any]:
        """The results: the output or a loss, or a list of one per parameter; where the caller has memory for one, this."""
        try:
            return self._evaluate(params, specs)
        except RuntimeError as error:
            explain_limits(error)
            raise

    def _evaluate(self, params: list[Tensor], specs: list[Quantity]) -> list[Any]:
        """The results, with a graph of its own level where torch.func transforms are active."""
        differentiable = self.differentiable
        if _functorch.peek_interpreter_stack() is None:
            with torch.enable_grad():
                if differentiable:
                    leaves = [p.view_as(p) if p.requires_grad else leaf(p) for p in params]
                else:
                    leaves = leaves_of(params)
                return self._results(leaves, specs, differentiable)[1]

        def forward(*leaves: Tensor) -> tuple[Tensor, list[Any]]:
            return self._results(list(leaves), specs, differentiable)

        with scripted.refused():
            found: tuple[Any, ...] = torch.func.vjp(forward, *params, has_aux=True)
        return found[-1]

    def _results(self, leaves: list[Tensor], specs: list[Quantity], differentiable: bool) -> tuple[Tensor, list[Any]]:
        cotangents = common([s.cotangent for s in specs])
        kinds = {*map(type, cotangents)}
        estimated = curves = False
        if FullHessian in kinds:
            estimated = any(c.mc_samples for c in cotangents if isinstance(c, FullHessian))
            curves = FullHessian() in cotangents
        averaged = AveragedHessian in kinds
        in_parts = PARTS[3 if self.differentiable or estimated else 2] if curves else None
        layouts = Layouts(COMPOSITES, in_parts) if in_parts is not None else Layouts() if averaged else None
        picks = [self.chosen is not None and not s.whole_batch for s in specs]
        asked = {s.contractions for s in specs}
        sites = bool(self.batch.total) and (not asked <= WITHOUT_SITES or any(picks))
        chance = Chance([*leaves, *tensors_of(self.batch.X)]) if self.watched or (curves and len(specs) > 1) else None
        with chance or nullcontext():
            trace = self._forward(leaves, sites, layouts, faster=layouts is None and not estimated, order=3 if estimated else 1)
        drawn = chance is not None and chance.drawn
        if chance is not None and drawn and self.watched:
            chance.undo()
            trace.restart()
            raise DrawnError
        if ClippedLossGradient in kinds:
            check_apart(self.model_fn, leaves, self.rebuild, self.batch, trace)
        if not trace.out.numel():
            return trace.out, self._of_nothing(leaves, specs, trace.out)
        curved = self._curvature(trace, leaves, layouts) if layouts is not None and curves else None
        if curved is not None and drawn and curved[0] is not trace:
            if any(not FACTORS.isdisjoint(s.contractions) for s in specs):
                raise NotImplementedError(
                    "the diagonal of the Hessian needs a forward pass of its own here, as a parameter is used twice, and this "
                    "model draws random numbers, which Kronecker factors in the same call would not share. Ask for them in "
                    "another call, or switch the randomness off: module.eval()."
                )
            trace = curved[0]
        device = trace.out.device.type
        full_precision = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with nullcontext() if differentiable else torch.no_grad(), full_precision:
            out = trace.out if differentiable else trace.out.detach()
            whole = self.batch.spread(out)
            loss = losses.check(self.loss, whole, self.batch.y)
            parts: dict[tuple[Any, str], list[Any]] = {}
            wanted: dict[Any, dict[str, None]] = {}
            keys = [*zip(cotangents, picks, strict=True)]
            for s, key in zip(specs, keys, strict=True):
                if s.contractions:
                    wanted.setdefault(key, {}).update(dict.fromkeys(s.contractions))
            # first the Hessians, since the graph ends with the last of the others
            for key in [key for key in wanted if isinstance(key[0], FullHessian)] if FullHessian in kinds else ():
                batched = "sample_squares" in wanted.pop(key) or self.chosen is not None
                if draws := key[0].mc_samples:
                    diagonal = self._estimated(draws, trace, leaves, batched)
                else:
                    assert curved is not None
                    diagonal = self._hessian(*curved, leaves, batched, differentiable)
                parts[key, "sample_squares"] = diagonal
                parts[key, "squares"] = [d.sum(0) for d in diagonal] if batched else diagonal
            if layouts is not None and averaged:
                if self.chosen is not None:
                    raise NotImplementedError(
                        "kfra averages over the samples of one forward pass, and this model draws random numbers or lets the "
                        "data of samples meet, so that the subset cannot have one beside that of the whole batch, or with "
                        "repeated indices. Ask for KFRA in a call of its own, with each index once, switch the randomness off "
                        "(module.eval()), or leave subsampling away."
                    )
                key = AveragedHessian(), False
                wanted.pop(key)
                summed = losses.summed_hessian(self.loss, whole, self.batch.y, self.batch.select)
                parts[key, "factors"] = kfra.factors(trace, leaves, self.names, layouts, summed, differentiable)
            columns: dict[Any, losses.Root] = {}
            prepared, operands = Prepared(), self._operands(specs)
            select = None if self.batch.index is None else self.batch.select
            ordered = [*wanted.items()]
            if ClippedLossGradient in kinds:  # which need norms
                ordered.sort(key=lambda item: isinstance(item[0][0], ClippedLossGradient))
            for i, (key, names) in enumerate(ordered):
                cotangent, picks = key
                if (root := columns.get(cotangent)) is None:
                    root = columns[cotangent] = cotangent.root(loss, whole, self.batch.y, self.generator)
                last = i == len(ordered) - 1
                outs = {} if self.buffers is None else self._outs(leaves, specs, keys, key, root.num, out.shape[1:])
                given = (self.chunk_size, differentiable, self.chosen if picks else None)
                backward = BackwardPass(trace, leaves, self.names, select, *given, prepared, operands)
                if isinstance(cotangent, ClippedLossGradient):
                    norms = parts.get(((LossGradient(), False), "sample_norms"))
                    (name,) = names
                    parts[key, name] = clipped_sum(backward, cotangent, root, not last, norms)
                    continue
                bare = "per_sample" in names and all(
                    s.of_one_column for s, k in zip(specs, keys, strict=True) if k == key and "per_sample" in s.contractions
                )
                for name, result in backward.run(root, list(names), not last, outs, bare).items():
                    parts[key, name] = result
            results = [self._finish(s, key, out, parts) for s, key in zip(specs, keys, strict=True)]
        return trace.out, self._delivered(specs, results)

    def _of_nothing(self, leaves: list[Tensor], specs: list[Quantity], out: Tensor) -> list[Any]:
        """The results where there are no samples, or no entries of their outputs: sums of nothing."""
        out = out if self.differentiable else out.detach()
        losses.check(self.loss, self.batch.spread(out) if len(out) else out, self.batch.y)
        shape = out.shape[1:]
        results = [
            self._finish(s, None, out, {})
            if s.forward
            else shaped(s, of_nothing(s, leaves, self._samples(s), shape.numel()), shape)
            for s in specs
        ]
        return self._delivered(specs, results)

    def _delivered(self, specs: list[Quantity], results: list[Any]) -> list[Any]:
        """The results, or where the caller has memory for one, this."""
        if self.buffers is None:
            return results
        return [
            r if b is None else deliver(type(s).__name__, r if s.forward else self.rebuild(r), b)
            for s, r, b in zip(specs, results, self.buffers, strict=True)
        ]

    def _outs(
        self, leaves: list[Tensor], specs: list[Quantity], keys: list[Any], wanted: Any, columns: int, shape: torch.Size
    ) -> dict[str, list[Tensor]]:
        """The caller's buffers for the parts of large results, by contraction."""
        found = {}
        for s, key, buffer in zip(specs, keys, self.buffers or (), strict=False):
            if buffer is None or key != wanted:
                continue
            samples = self._samples(s)
            lead = (samples, *shape) if s.of_entries else s.lead(columns, samples)
            if lead is None:
                continue
            own = parameter_buffers(type(s).__name__, self.params, self.names, leaves, buffer, lead)
            (name,) = s.contractions
            if s.of_entries:  # an earlier result is [V, N, *shape] in memory; in any other the new one is copied
                own = [b.reshape(samples, columns, *b.shape[len(lead) :]).transpose(0, 1) for b in own]
            elif name == "per_sample" and len(lead) == 1:
                own = [b[None] for b in own]
            found[name] = own
        return found

    def _forward(
        self,
        leaves: list[Tensor],
        sites: bool,
        layouts: Layouts | None = None,
        generic: Sequence[int] = (),
        faster: bool = False,
        order: int = 1,
    ) -> Trace:
        X, samples = self.batch.inputs(), self.batch.size
        with forward_errors(self.names, leaves, X):
            order = 3 if self.differentiable else max(order, 1 if layouts is None else 2)
            if sites:  # fused attention has no second derivative
                with sdpa_kernel(SDPBackend.MATH) if order > 1 or layouts is not None else nullcontext():
                    given: dict[str, Any] = {"generic": generic, "layouts": layouts, "faster": faster, "order": order}
                    trace = capture(self.model_fn, leaves, self.rebuild, X, samples, **given)
                    if order > 1:
                        check_twice_differentiable(trace.out)
                    try:
                        check_subset(self.model_fn, leaves, self.rebuild, self.batch, trace, trace.out, order)
                    except Entangled:
                        trace.restart()
                        raise
                    return trace
            attributes = Attributes.of(self.model_fn)
            with Instead(INSTEAD[order]), without_recomputation():  # reentrant checkpoints know but one kind of backward pass
                out = self.model_fn(self.rebuild(leaves), X)
            attributes.take_back()
        check_output(out, samples)
        return Trace(out, [], "plain")

    def _curvature(self, trace: Trace, leaves: list[Tensor], layouts: Layouts) -> tuple[Trace, Curvature]:
        """What curves; after another forward pass if some parameters' Hessians need copies of them for each sample."""
        while True:
            found = resolve(trace, curvature(trace, leaves, layouts))
            generic = [i for i in range(len(leaves)) if found.split >> i & 1]
            if not generic:
                return trace, found
            generic += [i for i in trace.reasons if i is not None]
            trace.restart()
            trace = self._forward(leaves, True, layouts, generic)

    def _hessian(
        self, trace: Trace, curved: Curvature, leaves: list[Tensor], batched: bool, differentiable: bool
    ) -> list[Tensor]:
        """The Hessian's diagonal per parameter."""
        for site in trace.sites:
            check_unchanged(site)
        whole = self.batch.spread(trace.out if differentiable else trace.out.detach())
        root, weights = losses.signed_root(self.loss, whole, self.batch.y)
        gradient = losses.gradient(self.loss, whole, self.batch.y, create_graph=differentiable)
        if differentiable and curved.curved and self.batch.has_repeats():
            raise NotImplementedError("diag_hessian of this model cannot be differentiated with repeated subsampling indices.")

        def columns(start: int, stop: int) -> Tensor:
            return self.batch.select(root.columns(start, stop)).to(trace.out.dtype)

        found = hessian.diagonal(
            trace,
            leaves,
            curved,
            hessian.Columns(root.num, columns, None if weights is None else self.batch.select(weights)),
            self.batch.select(gradient[None])[0],
            batched=batched,
            chunk_size=self.chunk_size,
            differentiable=differentiable,
        )
        return found if self.chosen is None else [d[self.chosen.to(d.device)] for d in found]

    def _estimated(self, draws: int, trace: Trace, leaves: list[Tensor], batched: bool) -> list[Tensor]:
        """Estimates of the Hessian's diagonal per parameter, from derivatives of the gradients, all or each sample's."""
        name = "per_sample" if batched else "total"
        with torch.enable_grad(), Instead(INSTEAD[3]):  # for rules that run operations again
            root = LossGradient().root(self.loss, self.batch.spread(trace.out), self.batch.y, None)
            backward = BackwardPass(trace, leaves, self.names, self.batch.select, self.chunk_size, True, self.chosen)
            gradients = [g[0] if batched else g for g in backward.run(root, [name], retain_graph=True, outs={})[name]]
        order = optree.tree_leaves(self.rebuild(range(len(leaves))))  # by name, whatever a dictionary's own order
        return estimates.estimate(
            trace,
            leaves,
            gradients,
            order,
            lambda numel: random_signs((numel,), leaves[0], self.generator),
            draws,
            batched=batched,
            chunk_size=self.chunk_size,
            differentiable=self.differentiable,
        )

    def _operands(self, specs: list[Quantity]) -> dict[str, Sequence[Any]]:
        """Data of contractions that take some; one contraction cannot take those of two specs."""
        found: dict[str, Sequence[Any]] = {}
        for s in specs:
            if not (own := s.operands(self.names)).keys().isdisjoint(found):
                raise ValueError(f"specs has {type(s).__name__} twice, with data of its own each; ask in two calls of compute.")
            found |= own
        return found

    def _samples(self, spec: Quantity) -> int:
        """The number of samples that a spec is of."""
        return self.chosen.shape[0] if self.chosen is not None and not spec.whole_batch else self.batch.size

    def _finish(self, spec: Quantity, key: Any, out: Tensor, parts: dict[tuple[Any, str], list[Any]]) -> Any:
        if spec.forward == "output":  # a detached one is another tensor than the model's own
            return out.clone() if self.differentiable and not torch.compiler.is_compiling() else out
        if spec.forward == "loss":
            return apart([self.loss(out, self.batch.y)])[0]
        lists = [parts[key, name] for name in spec.contractions]
        values = shaped(spec, spec.finish_all(self._samples(spec), *lists), out.shape[1:])
        return apart(values, views=spec.contractions not in AS_AUTOGRAD_GIVES)


def shaped(spec: Quantity, values: list[Any], shape: torch.Size) -> list[Any]:
    """The results of a quantity of the output's entries with the axes of the output, whose shape is ``shape`` for a sample."""
    return [v.reshape(v.shape[0], *shape, *v.shape[2:]) for v in values] if spec.of_entries else values


def of_nothing(spec: Quantity, params: Sequence[Tensor], samples: int, entries: int) -> list[Any]:
    """The results per parameter where the output has no entries: sums of nothing.

    Args:
        spec: The quantity.
        params: The parameters.
        samples: Number of samples, which may be none.
        entries: Number of entries of one sample's output, which may be none.

    Raises:
        ValueError: If it is a mean over samples, and there are none.
    """
    if samples == 0 and spec.averages:
        raise ValueError(f"{type(spec).__name__} takes a mean over samples, and there are none (N = 0). Leave it out.")
    cotangent = spec.cotangent
    columns = cotangent.mc_samples or entries if isinstance(cotangent, LossRoot) else 1
    columns = entries if isinstance(cotangent, OutputEntries) else columns
    return [spec.finish(samples, *[sums_of_nothing(name, p, columns, samples) for name in spec.contractions]) for p in params]


def trace(model_fn: Callable[..., Any], params: Any, X: Any) -> tuple[list[str], Trace]:
    """Names of the parameters and one forward pass, as `compute` makes it."""
    check_function(model_fn)
    names, leaves, rebuild = flatten_params(params)
    batch = read_batch(X, X, None)
    with forward_errors(names, leaves, X):
        return names, capture(model_fn, [leaf(p) for p in leaves], rebuild, X, batch.size)
