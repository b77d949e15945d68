"""The forward pass of extended modules: it runs once, as the user wrote it, and what the backward pass needs is noted.

`extend` replaces ``module.forward`` by an object that runs the original under curvfunc's capture mode. The outermost
extended module that is called makes a *region*. For each use of a parameter in it, a hook on the autograd node of that
operation waits for the backward pass (`curvfunc.compat.hooks`). Nothing is kept on modules or globally: hooks and notes
live on the graph's nodes and refer only to what comes before these nodes, so they go when the graph goes, without cycles.

Where the capture does not hold on the plain path (a parameter is used without a rule, the sample axis is not proven), the
region notes its input only, and the backward pass runs the functional core on it.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, is_
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.loss import _Loss

from curvfunc import losses
from curvfunc.compat import delivery, hooks
from curvfunc.compat.context import CTX, LOCK, state
from curvfunc.compat.extensions import BatchDiagHessian, DiagHessian, MatrixProduct
from curvfunc.compat.notes import Call, LossCall, ModuleUse, NodeLayouts, Region, RegionOutput, note
from curvfunc.engine import plans
from curvfunc.engine.calls import BATCH_NORMS, takes_batch_statistics
from curvfunc.engine.graph import Opaque, edge_of, reached
from curvfunc.engine.observer import Observer
from curvfunc.rules.batch_axis import mutates
from curvfunc.rules.kernels import INSTEAD
from curvfunc.tensors.inputs import not_real
from curvfunc.tensors.samples import flatten

__all__ = ["extend", "memory_cleanup"]

BATCH_NORM = (
    "Encountered BatchNorm module in training mode: it mixes the samples of a batch, so that individual gradients and "
    "curvature are not defined. Call module.eval() on it, or use GroupNorm or LayerNorm."
)


# -- whether to record


class _Local(threading.local):
    region: Region | None = None


_LOCAL = _Local()


def _recordable() -> bool:
    if state().paused or not torch.is_grad_enabled() or _functorch.peek_interpreter_stack() is not None:
        return False
    modes = torch.overrides._get_current_function_mode_stack() if torch._C._len_torch_function_stack() else []
    return not any(isinstance(m, Observer) and not isinstance(m, _Recording) for m in modes)


class _Recording(Observer):
    """The capture mode, in the user's own forward pass: training-mode batch normalization is noted, not refused."""

    repeats = False
    refusal: str | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.effects = None  # the forward pass is the user's own, and so is what it changes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in BATCH_NORMS:
            statistics = takes_batch_statistics(args, kwargs)
            if statistics and (func is not F.batch_norm or not self.index or self.normalizes_samples(args, kwargs)):
                self.refusal = BATCH_NORM
                return func(*args, **kwargs)
        elif func in TABLES:
            args, kwargs = _renormalized(args, kwargs)
        elif not torch.is_grad_enabled() and mutates(func) and id(next(iter((*args, *kwargs.values())))) in self.index:
            return func(*args, **kwargs)  # the parameter has a new value, and no gradient knows of it
        return super().__torch_function__(func, types, args, kwargs)


TABLES = {F.embedding, F.embedding_bag}


def _renormalized(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Do what ``max_norm`` asks for, which changes rows of the table before they are looked up, and the call without it."""
    given = {**dict(zip(("input", "weight", "", "max_norm", "norm_type"), args, strict=False)), **kwargs}
    if given.get("max_norm") is None:
        return args, kwargs
    with torch.no_grad():
        torch.embedding_renorm_(
            given["weight"].detach(), given["input"].contiguous(), given["max_norm"], given.get("norm_type", 2.0)
        )
    return (*args[:3], *[None for _ in args[3:4]], *args[4:]), {k: v for k, v in kwargs.items() if k != "max_norm"}


# -- modules


class ExtendedForward:
    """Stands in for ``module.forward``. Follows deep copies and pickles of its module."""

    def __init__(self, module: nn.Module, original: Callable[..., Any] | None = None) -> None:
        self.module = weakref.ref(module)
        self.original = original
        self._parameters: _Parameters | None = None

    def parameters(self, module: nn.Module) -> "tuple[list[str], list[Tensor], list[weakref.ref[nn.Module]]]":
        """Those of the module that require grad: names, themselves, and the submodules that have them."""
        known = self._parameters
        tensors = None if known is None else known.tensors(module)
        if known is None or tensors is None:
            known, tensors = _Parameters.of(module)
            scripted = any(isinstance(m, torch.jit.ScriptModule) for m in module.modules())  # their entries are no dictionaries
            self._parameters = None if scripted else known
        return [*known.names], tensors, [*known.owners]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, recorded unless it is part of a recorded call."""
        module = self.module()
        assert module is not None
        if torch.compiler.is_compiling():
            return (self.original or partial(type(module).forward, module))(*args, **kwargs)
        forward = self.original or MethodType(type(module).forward, module)
        if (region := _LOCAL.region) is not None and not isinstance(module, _Loss):
            if not module._modules:
                region.calls.append(self.module)
            return forward(*args, **kwargs)
        if not _recordable():
            return forward(*args, **kwargs)
        if not state().store_io:
            return _watched(forward(*args, **kwargs))
        if isinstance(module, _Loss):
            return _record_loss(module, forward, args, kwargs)
        return _record_region(module, self.parameters(module), forward, args, kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The original, for ``inspect.signature``."""
        module = self.module()
        assert module is not None
        return self.original or MethodType(type(module).forward, module)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExtendedForward":
        module: Any = self.module()
        return ExtendedForward(memo.get(id(module), module), self.original)

    def __reduce__(self) -> tuple[Any, ...]:
        return ExtendedForward, (self.module(), self.original)


@dataclass
class Handle:
    """Undoes `extend` on one module."""

    module: "weakref.ref[nn.Module]"

    @property
    def alive(self) -> bool:
        """Whether the module still exists."""
        return self.module() is not None

    def remove(self) -> None:
        """Put the module's own forward back."""
        module = self.module()
        extended = None if module is None else module.__dict__.get("forward")
        if module is None or not isinstance(extended, ExtendedForward):
            return
        del module.__dict__["forward"]
        if extended.original is not None:
            module.__dict__["forward"] = extended.original
        module.__dict__.pop("_backpack_extend", None)


def extend(module: nn.Module, debug: bool = False, use_converter: bool = False) -> nn.Module:
    """Make a module or a loss, and everything in it, known to `backpack`.

    The module is changed in place and returned. Any module will do, without conversion.

    Args:
        module: A model, a part of it, or a loss module such as ``nn.CrossEntropyLoss()``.
        debug: Print which modules are extended.
        use_converter: Accepted; there is nothing to convert.

    Raises:
        TypeError: If ``module`` is not a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"extend takes a torch.nn.Module, got {type(module).__name__}. Use the loss's module, e.g. "
            "nn.CrossEntropyLoss() for F.cross_entropy, or curvfunc's functions, which take any loss function."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError("extend cannot record a scripted module. Extend a module that contains it, or the one it was made of.")
    for m in module.modules():
        if isinstance(m, torch.jit.ScriptModule):  # recorded as a part of what contains it
            continue
        if debug:
            print("[DEBUG] Extending", m)
        forward = m.__dict__.get("forward")
        m._backpack_extend = True  # type: ignore[assignment]
        if not isinstance(forward, ExtendedForward):
            m.__dict__["forward"] = ExtendedForward(m, forward)
            CTX.add_hook_handle(Handle(weakref.ref(m)))
    return module


def memory_cleanup(module: nn.Module) -> None:
    """Accepted; modules hold nothing that could be removed. What is recorded goes with the graph of the loss."""


def _record_loss(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = forward(*args, **kwargs)
    named = {**dict(zip(("input", "target"), args, strict=False)), **kwargs}
    out, y = named.get("input"), named.get("target")
    if isinstance(value, Tensor) and value.grad_fn is not None and isinstance(out, Tensor):
        call = LossCall(module, losses.normalize(module), out, y)
        value.grad_fn.register_prehook(partial(hooks.on_loss, [call]))
    return value


def _record_region(
    module: nn.Module,
    params: "tuple[list[str], list[Tensor], list[weakref.ref[nn.Module]]]",
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        leaves: list[Any] = [args[0]]
        rebuild: Callable[[Sequence[Any]], Any] = _alone
    else:
        leaves, rebuild = flatten((args, kwargs))
    first = next((t for t in leaves if isinstance(t, Tensor) and t.ndim), None)
    names, tensors, owners = params
    if first is None or not (tensors or first.requires_grad) or delivery.is_replayed(tensors):
        return forward(*args, **kwargs)
    samples = first.shape[0]
    sampled = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.ndim and t.shape[0] == samples]
    call = Call(weakref.ref(module), list(leaves), rebuild, sampled, _generators() if module.training else None)
    before = [edge_of(t) for t in leaves if isinstance(t, Tensor) and t.grad_fn is not None]
    region = Region(type(module).__name__, tensors, names, owners, samples, call, before)
    twice = CTX.is_extension_active(DiagHessian, BatchDiagHessian, MatrixProduct)
    mode = _Recording(dict(enumerate(tensors)), None, samples, NodeLayouts(), INSTEAD[2 if twice else 1])
    mode.plan = plans.expected(module, samples)
    for i in sampled:
        leaves[i] = mode.marked(leaves[i])
    args, kwargs = rebuild(leaves)
    _LOCAL.region = region
    if not module._modules:
        region.calls.append(call.module)
    try:
        fused = sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()  # it has no second derivative
        with mode, fused:
            out = forward(*args, **kwargs)
    finally:
        _LOCAL.region = None
    plans.keep(module, samples, mode.plan)
    outputs = [t for t in _tensors_in(out) if t.grad_fn is not None]
    if tensors and not outputs and state().active_exts and any(t.is_floating_point() for t in _tensors_in(out)):
        warnings.warn(hooks.NOTHING_USED.format(region.name, "its output has no graph"), stacklevel=2)
    region.versions = [p._version for p in tensors]
    _judge(region, mode, outputs)
    _attach(region, mode, outputs)
    return out


def _alone(values: Sequence[Any]) -> Any:
    """The arguments of a call with one tensor."""
    return (values[0],), {}


@dataclass(eq=False)
class _Parameters:
    """Where a module has parameters that require grad, each once. It keeps none alive, and notices every change.

    Attributes:
        names: Of the parameters.
        owners: The submodules that have them.
        others: All submodules.
        sizes: How many entries these and the module have.
        keys: The names of these entries.
        values: The entries, submodules before parameters.
        all: The parameters among these.
        flags: Whether they require grad.
        places: Those that do, each once.
    """

    names: list[str]
    owners: list["weakref.ref[nn.Module]"]
    others: list["weakref.ref[nn.Module]"]
    sizes: list[int]
    keys: list[str]
    values: list[Callable[[], Any]]
    all: list[int]
    flags: list[bool]
    places: list[int]

    @classmethod
    def of(cls, module: nn.Module) -> tuple["_Parameters", list[Tensor]]:
        """Those of a module, and the parameters."""
        modules = [*module.modules()]
        held = _dictionaries(modules)
        values = _values(held)
        place = {id(value): k for k, value in reversed([*enumerate(values)])}
        found: dict[int, tuple[str, weakref.ref[nn.Module]]] = {}
        for prefix, m in module.named_modules():
            for name, p in m._parameters.items():
                if p is not None and p.requires_grad:
                    found.setdefault(place[id(p)], (f"{prefix}.{name}" if prefix else name, weakref.ref(m)))
        every = [k for k, value in enumerate(values) if isinstance(value, Tensor)]
        known = cls(
            names=[name for name, _ in found.values()],
            owners=[owner for _, owner in found.values()],
            others=[*map(weakref.ref, modules[1:])],
            sizes=[*map(len, held)],
            keys=[key for entries in held for key in entries.keys()],  # noqa: SIM118 (those of scripted modules are no iterables)
            values=[_nothing if value is None else weakref.ref(value) for value in values],
            all=every,
            flags=[values[k].requires_grad for k in every],
            places=[*found],
        )
        return known, [values[k] for k in found]

    def tensors(self, module: nn.Module) -> list[Tensor] | None:
        """The parameters; None if anything has changed since: a submodule, a parameter, a flag."""
        modules: list[Any] = [module, *[other() for other in self.others]]
        if any(map(is_, modules, repeat(None))):
            return None
        held = _dictionaries(modules)
        if [*map(len, held)] != self.sizes or [*chain.from_iterable(held)] != self.keys:
            return None
        values = [*chain.from_iterable(map(dict.values, held))]
        if not all(map(is_, values, [value() for value in self.values])):
            return None
        own = map(values.__getitem__, self.all)  # None by now in place of one that is gone, which has no flag
        if [*map(getattr, own, repeat("requires_grad"), repeat(None))] != self.flags:
            return None
        return [values[k] for k in self.places]


def _dictionaries(modules: list[nn.Module]) -> list[Any]:
    """The entries of modules: first all of their submodules, then all of their parameters."""
    return [*map(attrgetter("_modules"), modules), *map(attrgetter("_parameters"), modules)]


def _values(held: list[Any]) -> list[Any]:
    return [value for entries in held for value in entries.values()]


def _nothing() -> None:
    """What there is of a parameter that a module has not."""


def _generators() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _tensors_in(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, dict):
        for value in out.values():
            yield from _tensors_in(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _tensors_in(value)


def _judge(region: Region, mode: _Recording, outputs: list[Tensor]) -> None:
    """Whether the sites hold, or why not."""
    for name, p in zip(region.names, region.params, strict=True):
        if p.is_complex():
            region.refusal = not_real(name, p)
    region.refusal = mode.refusal or region.refusal
    if not mode.reasons and any(mode.axis_or_none(t) is None for t in outputs):
        mode.note([None], "the sample axis could not be followed to the output")
    if not mode.reasons:
        tracked = dict(enumerate(region.params))
        unused = tracked.keys() - {i for site in mode.sites for i in site.forms}
        try:
            unseen = {*reached(outputs, mode.sites, tracked).params}
            if unused:  # by no operation that was seen
                unseen |= {*reached(outputs, [], {i: tracked[i] for i in unused}).params}
            mode.note(sorted(unseen), "it is used where calls cannot be seen")
        except Opaque:
            mode.note([None], "it holds checkpoints or compiled code, in which calls cannot be seen")
    for i, why in mode.reasons.items():
        region.reason = why if i is None else f"parameter {region.names[i]!r}: {why}"
        return


def _attach(region: Region, mode: _Recording, outputs: list[Tensor]) -> None:
    """Hang notes and hooks on the graph."""
    plain = region.refusal is None and region.reason is None
    if not region.params:
        region.inputs = None
        if not plain:
            return
    for site in mode.sites if plain else ():
        node, output, *_ = site.edge
        use = ModuleUse(site, region, output)
        site.edge = None  # type: ignore[assignment]
        for i in site.forms:
            region.uses[i] = region.uses.get(i, 0) + 1
        region.pending += 1
        note(node, use)
        node.register_prehook(partial(hooks.on_use, use))
    for t in outputs:
        node, output, *_ = get_gradient_edge(t)
        result = RegionOutput(region, output, mode.axis_or_none(t) or 0, t.shape, None if plain else t.detach(), t._version)
        note(node, result)
        if not plain:
            region.pending += 1
            node.register_prehook(partial(hooks.on_output, result))
        elif region.params and not region.uses:
            node.register_prehook(partial(hooks.on_nothing_used, region.name))
    if region.params:
        with LOCK:
            delivery.REGIONS.add(region)


def _watched(out: Any) -> Any:
    """Have a backward pass under active extensions raise, since nothing was recorded."""
    for t in _tensors_in(out):
        if t.grad_fn is not None:
            t.grad_fn.register_prehook(hooks.on_disabled)
    return out
