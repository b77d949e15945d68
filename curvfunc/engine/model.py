"""Modules as pure functions of their parameters."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import is_not
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from curvfunc.engine.effects import keepers, shares_memory
from curvfunc.engine.places import Slots, holders, places_of, run, turn
from curvfunc.engine.wrappers import SHARDING, Talkers, unwrapped

__all__ = ["ModelFunction", "check_function", "functionalize", "recomputation", "without_recomputation"]


class ModelFunction:
    """A module as a function ``(params, X) -> output``; made by :func:`functionalize`.

    ``params`` maps parameter names to tensors. Names that it lacks stay fixed at the module's own values, as do the
    buffers. Two model functions are equal when they wrap the same module in the same way, so that ``torch.compile``
    does not compile anew from step to step.
    """

    def __init__(self, module: nn.Module, output_fn: Callable[[Any], Tensor] | None = None) -> None:
        """Wrap ``module``; see :func:`functionalize`."""
        self.module = module
        self.output_fn = output_fn
        self._read()

    def _read(self) -> None:
        """Note where the module holds its tensors."""
        self._parameters, self._buffers = holders(self.module, "_parameters"), holders(self.module, "_buffers")
        self._places = places_of(self.module)
        self._keepers = keepers(self.module.modules())
        self._recurrent = [m for m in self.module.modules() if isinstance(m, nn.RNNBase)]
        scripted = [name for name, m in self.module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
        self.scripted = [name for name in scripted if not name or name.rpartition(".")[0] not in scripted]  # the outermost
        changeable = [m for m in self.module.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._talkers, self._kinds = Talkers(changeable), (changeable, [type(m) for m in changeable])
        self._talks = bool(self._talkers)
        self._submodules = [(m._modules, key, child) for m in changeable for key, child in m._modules.items()]
        self._columns: Any = tuple(zip(*self._submodules, strict=True)) or ((), (), ())
        self._known: list[str] | None = None  # names of params that were looked at
        self._slots = Slots.of(self._places, ())

    @property
    def keepers(self) -> list[nn.Module]:
        """Those of its modules that may keep something from one call to the next."""
        self.refresh()
        return self._keepers

    def refresh(self) -> list[tuple[dict[str, Any], str, Any]]:
        """Note it again if a submodule was replaced since; returns where each is held, by which key, and itself."""
        held, keys, children = self._columns
        replaced = any(map(is_not, map(dict.get, held, keys), children))
        if replaced or (
            SHARDING in sys.modules and any(map(is_not, map(type, self._kinds[0]), self._kinds[1]))
        ):  # by fully_shard
            self._read()
        return self._submodules

    def __call__(self, params: dict[str, Tensor], X: Any) -> Tensor:
        """Evaluate the module at ``params``: ``module(X)``, ``module(*X)`` for a tuple, ``module(**X)`` for a mapping.

        A namedtuple or a dataclass is one argument. Mappings are dictionaries, and what tokenizers return.
        """
        return self.apply(params, {}, X)

    def apply(self, params: dict[str, Tensor], state: dict[str, Tensor], X: Any) -> Tensor:
        """As a call, with the fixed tensors in ``state`` (see :meth:`state`) in place of the module's own."""
        if torch.compiler.is_dynamo_compiling():
            return self._apply(params, state, X)
        with turn(self.module):
            return self._apply(params, state, X)

    def _apply(self, params: dict[str, Tensor], state: dict[str, Tensor], X: Any) -> Tensor:
        self._check(params)
        if not state and not self._parameters.keys() <= params.keys():
            state = self.frozen(params)
        args, kwargs = _arguments(X)
        values = state | params if state else params
        if self._slots.names != [*values]:
            self._slots = Slots.of(self._places, values)
        slots = self._slots  # of this call, whatever one inside of it asks for
        lists = [(m, m._flat_weights, m._flat_weight_refs) for m in self._recurrent]  # where they keep what they ran with
        try:
            silent = self._talkers.silent() if self._talks else nullcontext()
            with silent, nullcontext() if self._are_own(values, slots) else without_recomputation():
                if torch.compiler.is_compiling() and not self.scripted:
                    out = self._functional_call(values, args, kwargs)
                else:
                    out = run(self.module, slots, values, args, kwargs)
        finally:
            for m, weights, refs in lists:
                m._flat_weights, m._flat_weight_refs = weights, refs
        return out if self.output_fn is None else self.output_fn(out)

    def trace(self, params: dict[str, Tensor], state: dict[str, Tensor], X: Any) -> Tensor:
        """As :meth:`apply` for dynamo to see what is read, at the module's own tensors where these are alike."""
        self._check(params)
        if self._talks:
            raise NotImplementedError(
                f"{type(self.module).__name__} has parts that talk to other processes (fully_shard, or DistributedDataParallel "
                "inside of it), which compiled code cannot leave out. Call curvfunc outside of compiled code."
            )
        args, kwargs = _arguments(X)
        alike = True
        for name, t in params.items():
            _, held, key = self._places[name][0]
            own = held[key]
            alike = alike and t.shape == own.shape and t.dtype == own.dtype and t.device == own.device
        out = self.module(*args, **kwargs) if alike else self._functional_call(state | params, args, kwargs)
        return out if self.output_fn is None else self.output_fn(out)

    def _functional_call(self, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = {place: t for name, t in values.items() for place, *_ in self._places[name]}
        return functional_call(self.module, named, args, kwargs, tie_weights=False)

    def _are_own(self, values: dict[str, Tensor], slots: Slots) -> bool:
        """Whether the module's tensors are these, or detached ones, so that what runs again later has the same values."""
        if torch.compiler.is_dynamo_compiling():
            return True
        with torch._C.DisableTorchFunction():  # for whoever watches the forward pass, these are none of its operations
            given, own = slots.spread(values), slots.read()
            try:
                return [*map(Tensor.data_ptr, given)] == [*map(Tensor.data_ptr, own)]
            except RuntimeError:  # tensors of torch.func's transformations have no memory of their own
                return all(t is o or shares_memory(t, o) for t, o in zip(given, own, strict=True))
            except TypeError:
                slots.check()
                raise

    def frozen(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's parameters that ``params`` does not name, without gradient."""
        own = {name: held[key] for name, (held, key) in self._parameters.items() if name not in params}
        return {name: p.detach() for name, p in own.items() if p is not None}  # who sets one to None means to do without

    def state(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors besides ``params`` that the output depends on: frozen parameters and buffers."""
        if self.scripted and torch.compiler.is_compiling():
            raise NotImplementedError(
                f"torch.compile cannot look into scripted modules, and {type(self.module).__name__} has {self.scripted}. Use "
                "the Python modules that they were made of, or call curvfunc outside of compiled code."
            )
        return self.frozen(params) | {name: held[key] for name, (held, key) in self._buffers.items()}

    @contextmanager
    def holding(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Have the module's parameters of these names be these tensors for a while."""
        before = [(held, key, held[key]) for name in values for _, held, key in self._places[name]]
        try:
            for name, t in values.items():
                for _, held, key in self._places[name]:
                    held[key] = t
            yield
        finally:
            for held, key, t in before:
                held[key] = t

    def holds(self, t: Tensor) -> bool:
        """Whether a call puts another tensor in the place of this one."""
        return any(held[key] is t for places in self._places.values() for _, held, key in places)

    def _check(self, params: dict[str, Tensor]) -> None:
        if not isinstance(params, dict):
            raise TypeError(
                f"params of a functionalized module is a dict by parameter name, got {type(params).__name__}. Take it from "
                "functionalize(module)."
            )
        names = [*params]
        if not torch.compiler.is_dynamo_compiling():  # it guards on the submodules, see `curvfunc.engine.compiled`
            self.refresh()
            if names == self._known:
                return
        if not params.keys() <= self._places.keys():
            unknown = sorted(params.keys() - self._places.keys())
            raise ValueError(
                f"params has {unknown}, which {type(self.module).__name__} does not have; its parameters are "
                f"{sorted(self._parameters)}. Take params from functionalize(module), or remove these entries."
            )
        first: dict[str, str] = {}
        for name in names:
            if (other := first.setdefault(self._places[name][0][0], name)) != name:
                raise ValueError(f"{other!r} and {name!r} in params are one parameter. Remove one of them.")
        if not torch.compiler.is_dynamo_compiling():
            self._known = names

    def __eq__(self, other: object) -> bool:
        """Equal when module and output function are the same objects."""
        return isinstance(other, ModelFunction) and self.module is other.module and self.output_fn is other.output_fn

    def __hash__(self) -> int:
        """Hash of the wrapped objects' identities."""
        return hash((id(self.module), id(self.output_fn)))

    def __repr__(self) -> str:
        """The wrapped class and its number of parameters."""
        return f"ModelFunction({type(self.module).__name__}, {len(self._parameters)} parameters)"


def _arguments(X: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module is called with: a tuple is several arguments, but a namedtuple is one; a mapping has keywords."""
    if isinstance(X, tuple) and not hasattr(X, "_fields"):
        return X, {}
    return ((), dict(X)) if isinstance(X, Mapping) else ((X,), {})


_CHECKPOINTS = torch.utils.checkpoint.CheckpointFunction, torch.utils.checkpoint._checkpoint_without_reentrant_generator
_LOCK, _DEPTH = threading.Lock(), [0]


class _Here(threading.local):
    plain = 0


_HERE = _Here()


class _Plain:
    """Checkpoints, of both kinds, as if there were none; in other threads as they are."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args) if _HERE.plain else _CHECKPOINTS[0].apply(function, preserve_rng_state, *args)

    @staticmethod
    def generator(
        fn: Any, preserve_rng_state: bool, context_fn: Callable[[], Any], *args: Any, **kwargs: Any
    ) -> Iterator[None]:
        if not _HERE.plain:
            yield from _CHECKPOINTS[1](fn, preserve_rng_state, context_fn, *args, **kwargs)
            return
        forward_context, _ = context_fn()
        storing = isinstance(forward_context, torch.utils.checkpoint._CachingTorchDispatchMode)  # for a second run only
        with nullcontext() if storing else forward_context:
            yield


@contextmanager
def without_recomputation() -> Iterator[None]:
    """Run checkpointed parts of a model as they are: in a backward pass, they would run with the module's own parameters."""
    module: Any = torch.utils.checkpoint
    with _LOCK:
        _DEPTH[0] += 1
        module.CheckpointFunction, module._checkpoint_without_reentrant_generator = _Plain, _Plain.generator
    _HERE.plain += 1
    try:
        yield
    finally:
        _HERE.plain -= 1
        with _LOCK:
            _DEPTH[0] -= 1
            if not _DEPTH[0]:
                module.CheckpointFunction, module._checkpoint_without_reentrant_generator = _CHECKPOINTS


def recomputation(model_fn: Any) -> AbstractContextManager[None]:
    """How checkpoints run in a call of ``model_fn``, whose backward pass may come when the call is over.

    A functionalized module knows whether its parameters are still there by then. Of any other function nothing is known:
    ``torch.func.functional_call`` puts the module's own back, and a second run would silently take these.
    """
    return nullcontext() if isinstance(model_fn, ModelFunction) else without_recomputation()


pytree.register_constant(ModelFunction)


def functionalize(
    module: nn.Module, output_fn: Callable[[Any], Tensor] | None = None
) -> tuple[ModelFunction, dict[str, Tensor]]:
    """Split a module into a pure function and its parameters.

    Args:
        module: Any module. Its parameters are not changed; its mode (train or eval), buffers and frozen parameters are read
            at each call. Buffers and other attributes that its forward pass updates (running statistics in training mode, a
            counter) are updated once per call, as when the module itself is called; tensors made from ``params`` that it keeps
            are taken back. A parameter shared by several submodules appears once. Activation checkpoints save memory where the
            model runs with the module's own parameters, or detached ones as here; at other values, and in a plain function of
            ``(params, X)``, they run as if there were none, since a second run would meet other parameters. Scripted and traced
            parts run sample by sample, or under vmap over samples, since their operations cannot be seen. Threads that call
            one module's function at once take turns in its forward pass. Of a model in
            ``DistributedDataParallel`` it is the one inside, with its own names (without ``module.``), and no call reduces
            gradients or broadcasts buffers. After ``fully_shard`` parameters are `DTensor`s, for ``compute(..., group=)``
            and ``accumulate(..., group=)``; its mixed precision is not taken over.
        output_fn: Chooses the output tensor where the module returns more, e.g. ``lambda out: out.logits``.

    Returns:
        ``model_fn(params, X) -> output [N, ...]`` (a `ModelFunction`) and ``params``, ``{name: tensor [*shape]}`` with the
        module's trainable parameters, detached and sharing memory with the module's. Parameters with ``requires_grad=False``
        stay fixed and are not in ``params``.

    Raises:
        TypeError: For what is no module. A plain function of ``(params, X)`` needs no conversion.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(2, 3))
        >>> model_fn(params, torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"functionalize takes a torch.nn.Module, got {type(module).__name__}. A plain function of (params, X) "
            "needs no conversion: pass it as model_fn."
        )
    module = unwrapped(module)
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return ModelFunction(module, output_fn), params


def check_function(model_fn: Any) -> None:
    """Refuse a module in place of a function of ``(params, X)``."""
    if isinstance(model_fn, nn.Module):
        raise TypeError(
            f"model_fn is the module {type(model_fn).__name__}; a function of (params, X) is needed: "
            "model_fn, params = curvfunc.functionalize(module)."
        )


_ = torch  # the doctest's namespace
