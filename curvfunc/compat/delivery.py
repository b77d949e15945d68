"""One backward pass through extended modules: what has arrived in it, and the results that it puts on the parameters.

First-order quantities are contracted on the spot, as soon as every use of a parameter has been reached.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from curvfunc.compat.backprop_extension import BackpropExtension
from curvfunc.compat.context import LOCK, State, no_op, state
from curvfunc.compat.memory import earlier
from curvfunc.compat.notes import LossCall, ModuleUse, Region, RegionOutput, nodes, notes
from curvfunc.engine.capture import capture
from curvfunc.engine.contractions import contracted
from curvfunc.engine.cotangents import pull
from curvfunc.engine.sites import Trace
from curvfunc.quantities.quantity import Quantity
from curvfunc.quantities.run import of_nothing
from curvfunc.uses.forms import Bound, Direct, at_samples, bind, direct, inputs_of, merge

Grads = tuple[Tensor | None, ...]

# Calls whose graph may still be used: a parameter in two of them waits for the end of the backward pass.
REGIONS: weakref.WeakSet[Region] = weakref.WeakSet()

NOTHING_BEFORE = (
    "no parameter of an extended module lies before {0}, so that extensions deliver nothing: look for no_grad or detach before "
    "it, and for modules that are not extended."
)
FREED = (
    "this part of the graph was freed by an earlier backward pass. Call backward(retain_graph=True) on all but the last one."
)


# -- one backward pass


class Pass:
    """What has arrived in one backward pass."""

    def __init__(self, task: int, now: State) -> None:
        self.task = task
        self.state = now  # at the end, autograd may be in a thread that does not know it
        self.create_graph = torch.is_grad_enabled()
        self.first_order = [(e, e.quantity()) for e in now.active_exts if not e.expects_backpropagation_quantities()]
        self.returns_gradients = any("per_sample" in spec.contractions for _, spec in self.first_order)
        self.second_order = [e for e in now.active_exts if e.expects_backpropagation_quantities()]
        self.hook: Callable[[nn.Module], Any] = now.extension_hook
        self.debug = now.debug
        self.losses: list[LossCall] = []
        self.reached = False
        self.curved: set[tuple[int, str]] = set()
        self.memory: dict[int, weakref.ref[Tensor]] = {}
        self.replayed: set[int] = set()
        self.arrived: dict[tuple[Region, int], list[Bound]] = {}
        self.counts: dict[tuple[Region, int], int] = {}
        self.deferred: dict[int, tuple[Tensor, list[Bound]]] = {}
        self.waiting: dict[Region, dict[int, list[int]]] = {}
        self.calls: dict[Region, list[weakref.ref[nn.Module]]] = {}

    @classmethod
    def current(cls, now: State) -> Pass:
        """The pass that runs now."""
        task = torch._C._current_graph_task_id()
        running: Pass | None = now.running.get(task)
        if running is None:
            running = now.running[task] = cls(task, now)
            Variable._execution_engine.queue_callback(running.finish)
        return running

    def deliver(self, use: ModuleUse, cotangent: Tensor) -> None:
        """Take the cotangent of a use of parameters."""
        self._check_loss()
        self.reached = True
        site, region = use.site, use.region
        assert site is not None
        if self.first_order and any(t._version != version for t, version in site.inputs):
            raise RuntimeError(
                f"the input of {site.name} was changed in place after the call, so its gradient is lost (autograd would "
                "refuse it too). Use the out-of-place operation instead."
            )
        g = cotangent.detach() if not self.create_graph else cotangent
        g = g.reshape(site.shape).movedim(site.axis, 0).unsqueeze(0)
        for i, form in site.forms.items():
            if self.first_order:
                bound = bind(form, g, inputs_of, factors=False)
                self._take(region, i, _owned(bound, cotangent) if self.returns_gradients else bound)
            count = self.counts[region, i] = self.counts.get((region, i), 0) + 1
            if count == region.uses[i]:
                self._complete(region, i)

    def replay(self, output: RegionOutput, cotangent: Tensor) -> None:
        """Run the functional core on a module's input, with the cotangent of its output."""
        self._check_loss()
        self.reached = True
        region = output.region
        self.replayed.update(map(id, region.params))
        if self.first_order and not cotangent.numel():
            for i, p in enumerate(region.params):
                self._take(region, i, direct(p.new_zeros(torch.Size((1, region.samples)) + p.shape)))
        elif self.first_order:
            trace, _ = repeat(output, self.create_graph)
            gs, _ = pull(trace, cotangent[None], create_graph=self.create_graph, retain_graph=True)
            for site, g in zip(trace.sites, gs, strict=True):
                for i, form in site.forms.items():
                    self._take(region, i, _owned(bind(form, g, inputs_of, factors=False), cotangent))
        region.uses = dict.fromkeys(range(len(region.params)), 1)
        for i in range(len(region.params)):
            self._complete(region, i)

    def finish(self) -> None:
        """At the end: parameters that not all uses of were reached, and those of several calls."""
        self.state.running.pop(self.task, None)
        with torch.set_grad_enabled(self.create_graph):
            for region, i in list(self.arrived):
                self._defer(region, i)
            for p, bounds in self.deferred.values():
                if not bounds:
                    continue
                samples = {b.g.shape[1] for b in bounds}
                if len(samples) > 1:
                    forget([p], [ext for ext, _ in self.first_order])
                    raise ValueError(
                        f"a parameter of shape {tuple(p.shape)} was used in separate calls of extended modules with "
                        f"{sorted(samples)} samples, and one backward pass runs through all of them. Run one backward pass "
                        "per call, or extend the module that makes the calls."
                    )
                self._store(p, bounds)
        for region in list(self.waiting):
            for owner in list(self.waiting[region]):
                self._call_hook(region, owner)
        for call in self.losses if not self.reached else ():
            if not any(note.region.params for node in nodes(call.out) for note in notes(node)):
                warnings.warn(NOTHING_BEFORE.format(type(call.module).__name__), stacklevel=2)

    def _check_loss(self) -> None:
        if self.second_order and not self.losses:
            names = ", ".join(type(e).__name__ for e in self.second_order)
            raise ValueError(
                f"{names} needs the loss Hessian, but no extended loss is part of this backward pass: use "
                "extend(nn.CrossEntropyLoss()) or another extended loss module, on the output of the extended model."
            )

    def _take(self, region: Region, i: int, bound: Bound) -> None:
        self.arrived.setdefault((region, i), []).append(bound)

    def _complete(self, region: Region, i: int) -> None:
        """All uses of a parameter in a call have arrived."""
        p = region.params[i]
        if (len(REGIONS) > 1 and _elsewhere(region, p)) or id(p) in self.deferred:
            self.deferred.setdefault(id(p), (p, []))
            self._defer(region, i)
        elif (region, i) in self.arrived:
            self._store(p, self.arrived.pop((region, i)))
        if self.hook is no_op:
            return
        owners = self.waiting.get(region)
        if owners is None:
            owners = self.waiting[region] = _indices_by_owner(region)
        for owner in [o for o, indices in owners.items() if i in indices]:
            owners[owner].remove(i)
            if not owners[owner] and id(p) not in self.deferred:
                self._call_hook(region, owner)

    def _defer(self, region: Region, i: int) -> None:
        if (region, i) in self.arrived:
            p = region.params[i]
            self.deferred.setdefault(id(p), (p, []))[1].extend(self.arrived.pop((region, i)))

    def put(self, p: Tensor, ext: BackpropExtension, result: Any) -> None:
        """Put a result on a parameter: a function, or tensors of the parameter's type."""
        if isinstance(result, (tuple, list)):
            result = [self._own(t.to(p.dtype)) for t in result]
        elif isinstance(result, Tensor):
            result = self._own(result.to(p.dtype))
        setattr(p, ext.savefield, result)

    def put_curved(self, p: Tensor, ext: BackpropExtension, result: Any) -> None:
        """Put a second-order result on a parameter, added to that of another loss of this pass."""
        if self.has_curved(p, ext):
            if not hasattr(p, ext.savefield):
                raise RuntimeError(
                    f"two extended losses of this backward pass depend on a parameter of shape {tuple(p.shape)}, and what "
                    f"{type(ext).__name__} has for the first was deleted before the second was reached, as by an extension "
                    "hook. Run one backward pass per loss."
                )
            result = ext.of_two_losses(p, getattr(p, ext.savefield), result)
        self.put(p, ext, result)
        self.curved.add((id(p), ext.savefield))

    def has_curved(self, p: Tensor, ext: BackpropExtension) -> bool:
        """Whether another loss of this pass had a result for the parameter."""
        return (id(p), ext.savefield) in self.curved

    def _own(self, t: Tensor) -> Tensor:
        """A tensor with memory that no other result has, and with room for all of its entries."""
        if not torch.is_grad_enabled():
            t = t.detach()  # no view, so that it is the only one to hold its memory
        if not t.numel():
            return t
        storage = t.untyped_storage()
        other = self.memory.get(place := storage.data_ptr())
        if (other is not None and other() is not None) or storage.nbytes() < t.nbytes:
            t = t.clone(memory_format=torch.contiguous_format)
            place = t.untyped_storage().data_ptr()
        self.memory[place] = weakref.ref(t)
        return t

    def _store(self, p: Tensor, bounds: list[Bound]) -> None:
        """Contract, and put the results on the parameter."""
        bound = merge(bounds)
        for ext, spec in self.first_order:
            self.say("Running extension", ext, "on a parameter of shape", tuple(p.shape))
            selected = select(bound, ext.get_subsampling())
            samples = selected.g.shape[1]
            memory = earlier(p, ext.savefield, spec, 1, samples)
            nothing = not selected.g.numel()
            self.put(p, ext, of_nothing(spec, [p], samples, 0)[0] if nothing else first_order(spec, selected, memory))

    def _call_hook(self, region: Region, owner: int) -> None:
        """The extension hook on a module, after those without parameters that were called later."""
        self.waiting[region].pop(owner, None)
        calls = self.calls.setdefault(region, list(region.calls))
        module = region.owners[owner]()
        position = max((k for k, r in enumerate(calls) if r() is module), default=None)
        for called in reversed(calls[position + 1 :]) if position is not None else ():
            if (m := called()) is not None and not m._parameters:
                self.say("Running extension hook on", m)
                self.hook(m)
        if position is not None:
            keep = [r for r in calls[position + 1 :] if (m := r()) is not None and m._parameters]
            self.calls[region] = [r for r in calls[:position] if r() is not module] + keep
        if module is not None:
            self.say("Running extension hook on", module)
            self.hook(module)

    def say(self, *message: object) -> None:
        """Print a message where messages are wanted."""
        if self.debug:
            print("[DEBUG]", *message)


def forget(params: Sequence[Tensor], exts: Sequence[BackpropExtension]) -> None:
    """Take results of earlier passes off parameters that get none in this one."""
    for p in params:
        for ext in exts:
            p.__dict__.pop(ext.savefield, None)


def is_replayed(params: Sequence[Tensor]) -> bool:
    """Whether a backward pass that runs now has seen to these parameters as a whole, so that checkpoints in it add nothing."""
    running = state().running
    return bool(running) and any(id(p) in current.replayed for current in running.values() for p in params)


def _elsewhere(region: Region, p: Tensor) -> bool:
    """Whether another call uses the parameter and waits for a backward pass."""
    with LOCK:
        others = [r for r in REGIONS if r is not region and r.pending > 0]
    return any(p is q for r in others for q in r.params)


def _indices_by_owner(region: Region) -> dict[int, list[int]]:
    """Per module, by the first of its parameters, the parameters that are used."""
    first: dict[int, int] = {}
    found: dict[int, list[int]] = {}
    for i in sorted(region.uses):
        owner = first.setdefault(id(region.owners[i]()), i)
        found.setdefault(owner, []).append(i)
    return found


# -- from cotangents to results


def repeat(output: RegionOutput, create_graph: bool) -> tuple[Trace, list[Tensor]]:
    """The functional core's forward pass of a recorded call, and the parameters it ran with.

    Raises:
        NotImplementedError: If no quantity is defined for the call.
        RuntimeError: If the call cannot be repeated.
    """
    region = output.region
    if region.refusal is not None:
        raise NotImplementedError(region.refusal)
    if region.inputs is None or output.value is None:
        raise RuntimeError(FREED)
    names, X, model_fn = region.names, region.inputs.X, region.inputs.function()
    for name, p, version in zip(names, region.params, region.versions, strict=True):
        if p._version != version:
            raise RuntimeError(
                f"parameter {name!r} of {region.name} was changed in place after its forward pass, and {region.name} has to "
                f"run a second time ({region.reason}). Change it before the call, or after the backward pass."
            )
    if not create_graph:
        X = [x.detach().requires_grad_(x.requires_grad) for x in X]  # reentrant checkpoints look at it
    with torch.enable_grad():
        leaves = [p.view_as(p) if create_graph else p.detach().requires_grad_() for p in region.params]
        trace = capture(model_fn, leaves, lambda values: dict(zip(names, values, strict=True)), X, region.samples)
    check_repeated(region, trace.out, output.value, output.version)
    return trace, leaves


def check_repeated(region: Region, out: Tensor, value: Tensor, version: int) -> None:
    """Raise if a call that ran again gave another output."""
    if value._version != version:
        return
    scale = value.abs().max() * 1e3 * torch.finfo(value.dtype).eps
    if out.shape != value.shape or not bool((out.detach() - value).abs().max() <= scale):
        raise RuntimeError(
            f"{region.name} has to run a second time ({region.reason or 'for a quantity of this kind'}), and then its output "
            "differs: it depends on random numbers, or on what the first run changed, or its first tensor argument does "
            "not have the samples on axis 0. Use curvfunc's functions on curvfunc.functionalize(module) instead."
        )


def select(b: Bound, subsampling: Sequence[int] | None) -> Bound:
    """The samples of a subset."""
    return b if subsampling is None else at_samples(b, torch.as_tensor(list(subsampling)))


def first_order(spec: Quantity, b: Bound, memory: dict[str, Tensor] | None = None) -> Any:
    """The result of a first-order quantity for one parameter."""
    parts = contracted(spec.contractions, b, first=True, only=True, buffers=memory or {})
    return spec.finish(b.g.shape[1], *[parts[name] for name in spec.contractions])


def _owned(b: Bound, cotangent: Tensor) -> Bound:
    """A bound form whose gradient is not the tensor that travels through the graph, which results must not share."""
    if isinstance(b.form, Direct) and b.g.untyped_storage().data_ptr() == cotangent.untyped_storage().data_ptr():
        g = b.g.clone()
        return Bound(b.form, g, g)
    return b
