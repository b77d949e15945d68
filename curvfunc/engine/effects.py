"""What a forward pass leaves behind beside its output: tensors that it changed in place, and attributes of modules."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch

__all__ = [
    "HIDDEN_WRITES",
    "Attributes",
    "Effects",
    "ParameterChanged",
    "all_held",
    "keepers",
    "kept_tensors",
    "shares_memory",
]


def _statistics(flag: str, default: bool) -> Callable[[Sequence[Any], dict[str, Any]], list[Any]]:
    """Running statistics are written where those of the batch are used."""

    def written(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        if not (args[5] if len(args) > 5 else kwargs.get(flag, default)):
            return []
        names = ("running_mean", "running_var")
        return [args[k] if len(args) > k else kwargs.get(name) for k, name in enumerate(names, start=1)]

    return written


def _renormalized(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    limit = args[3] if len(args) > 3 else kwargs.get("max_norm")
    return [] if limit is None else [args[1] if len(args) > 1 else kwargs["weight"]]


# Functions that write into arguments without a name that says so, and into which.
HIDDEN_WRITES: dict[Any, Callable[[Sequence[Any], dict[str, Any]], list[Any]]] = {
    F.instance_norm: _statistics("use_input_stats", True),
    F.batch_norm: _statistics("training", False),
    F.embedding: _renormalized,
    F.embedding_bag: _renormalized,
}


class ParameterChanged(Exception):
    """The forward pass is about to change a parameter in place."""


class Effects:
    """Values of tensors that a forward pass did not make, from before it wrote into them."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = list(params)
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def before(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], is_made: Callable[[Tensor], bool]) -> None:
        """Keep what a call will overwrite, unless the forward pass made it.

        Raises:
            ParameterChanged: If it is memory of a parameter.
        """
        written = HIDDEN_WRITES.get(func)
        targets = [*args, *kwargs.values()][:1] if written is None else written(args, kwargs)
        for t in _tensors(targets):
            if any(t is p for p in self._params) or (t.grad_fn is None and any(shares_memory(t, p) for p in self._params)):
                raise ParameterChanged
            if not is_made(t) and id(t) not in self._saved:
                self._saved[id(t)] = t, t.detach().clone()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._saved)

    def values(self) -> dict[int, Tensor]:
        """Earlier values, by identity of the tensors."""
        return {key: old for key, (_, old) in self._saved.items()}

    def rewind(self) -> None:
        """Put back what was there, in place, and go on knowing it."""
        with torch.no_grad():
            for t, old in self._saved.values():
                t.copy_(old)

    def undo(self, but: Container[int] = ()) -> "Effects":
        """Put back what was there, in place; the effects that take this back."""
        other = Effects(self._params)
        with torch.no_grad():
            for key, (t, old) in self._saved.items():
                if key not in but:
                    other._saved[key] = t, t.detach().clone()
                    t.copy_(old)
        self._saved = {}
        return other


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in the same memory, as far as it can be told."""
    try:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.numel() > 0
    except (NotImplementedError, RuntimeError):  # tensors of torch.func's transformations have none of their own
        return a._base is b or b._base is a


# What each module has; buffers aside, a forward pass does not change it.
_COMMON = frozenset(vars(nn.Module())) - {"_buffers"}


def keepers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that may keep something from one call to the next: all but those of torch.nn."""
    return [m for m in modules if not type(m).__module__.startswith("torch.nn.modules.")]


class Attributes:
    """Attributes of the modules that a model is made of, to be put back; those of torch.nn itself keep nothing.

    Modules are found in functionalized modules, bound methods, partials, closures and globals.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._own = [{k: v for k, v in vars(m).items() if k not in _COMMON} for m in modules]
        self._inside: list[dict[str, Any]] = [
            {k: v.copy() for k, v in own.items() if isinstance(v, (dict, list, set))} for own in self._own
        ]

    @classmethod
    def of(cls, model_fn: Any) -> "Attributes":
        """Those of a model."""
        if torch.compiler.is_dynamo_compiling():  # which takes back itself what it traces
            return cls([])
        if (kept := getattr(model_fn, "keepers", None)) is not None:
            return cls(kept)
        modules = {id(m): m for root in _modules_of(model_fn) for m in root.modules()}
        return cls(keepers(modules.values()))

    def tensors(self) -> list[Tensor]:
        """The tensors among the attributes, buffers included."""
        return [t for own in self._own for value in own.values() for t in kept_tensors(value)]

    def kept(self) -> list[tuple[nn.Module, str]]:
        """Attributes that hold floating-point tensors beside parameters and buffers."""
        found = []
        for m, own in zip(self._modules, self._own, strict=True):
            for key, value in own.items():
                if key != "_buffers" and any(t.is_floating_point() for t in kept_tensors(value)):
                    found.append((m, key))
        return found

    def hide(self, *, delete: bool) -> None:
        """Empty what `kept` lists, until `restore`: containers, and single tensors, which are deleted or None."""
        for m, key in self.kept():
            value = vars(m)[key]
            if isinstance(value, (dict, list)):
                value.clear()
            elif delete:
                del vars(m)[key]
            else:
                vars(m)[key] = None

    def now(self) -> "Attributes":
        """The attributes of the same modules as they are now."""
        return Attributes(self._modules)

    def restore(self, values: Mapping[int, Tensor] = MappingProxyType({})) -> None:
        """Put everything back; where tensors had other values, new ones with these, by identity of the tensors."""
        for m, own, inside in zip(self._modules, self._own, self._inside, strict=True):
            for key in [k for k in vars(m) if k not in _COMMON and k not in own]:
                del vars(m)[key]
            for key, value in own.items():
                self._put_back(m, key, value, inside)
                if isinstance(value, dict) and values:
                    value.update({k: values[id(t)].clone() for k, t in inside[key].items() if id(t) in values})
                elif id(value) in values:
                    vars(m)[key] = values[id(value)].clone()

    def holds(self) -> set[int]:
        """Identities of the tensors that are attributes, or in dictionaries that are."""
        directly = {id(v) for own in self._own for v in own.values() if isinstance(v, Tensor)}
        inside = [v for values in self._inside for d in values.values() if isinstance(d, dict) for v in dict(d).values()]
        return directly | {id(v) for v in inside}

    def take_back(self) -> None:
        """Put back what holds tensors with a graph, which belongs to the call's own parameters."""
        for m, own, inside in zip(self._modules, self._own, self._inside, strict=True):
            for key, value in list(vars(m).items()):
                if key in _COMMON or not any(map(_is_of_call, kept_tensors(value))):
                    continue
                if key in own:
                    self._put_back(m, key, own[key], inside)
                else:
                    del vars(m)[key]

    def _put_back(self, m: nn.Module, key: str, value: Any, inside: dict[str, Any]) -> None:
        vars(m)[key] = value
        if isinstance(value, list):
            value[:] = inside[key]
        elif isinstance(value, (dict, set)) and (len(value) != len(inside[key]) or isinstance(value, dict)):
            value.clear()
            value.update(inside[key])


def _modules_of(model_fn: Any) -> Iterator[nn.Module]:
    while isinstance(model_fn, partial):
        model_fn = model_fn.func
    held = [getattr(model_fn, "module", None), getattr(model_fn, "__self__", None)]
    code = getattr(model_fn, "__code__", None)
    held += [model_fn.__globals__.get(name) for name in code.co_names] if code is not None else []
    for cell in getattr(model_fn, "__closure__", None) or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    for value in held:
        for candidate in (value, getattr(value, "module", None)):
            found = candidate() if isinstance(candidate, ref) else candidate
            if isinstance(found, nn.Module):
                yield found
                break


def all_held(model_fn: Any, tensors: Iterable[Tensor]) -> bool:
    """Whether a model has all of these tensors from before its call: in closures, globals, attributes and containers."""
    missing = {id(t): t for t in tensors}
    seen: set[int] = set()
    ahead: list[tuple[Any, int]] = [(model_fn, 0)]
    while missing and ahead:
        value, depth = ahead.pop()
        if isinstance(value, Tensor):
            missing.pop(id(value), None)
        elif depth < 8 and id(value) not in seen:
            seen.add(id(value))
            ahead += [(inner, depth + 1) for inner in _inside(value)]
    return not missing


def _inside(value: Any) -> list[Any]:
    """What an object holds, as far as a model may have its tensors there."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set)):
        return list(value)
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, ref):
        return [value()]
    if isinstance(value, FunctionType):
        names = [name for code in (value.__code__, *_codes(value.__code__)) for name in code.co_names]
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [value.__globals__.get(name) for name in names] + cells + [value.__defaults__, value.__kwdefaults__]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, (ModuleType, type)) or not hasattr(value, "__dict__"):
        return []
    return [vars(value), type(value).__call__ if callable(value) else None]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The functions that a function defines."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _codes(inner)


def _is_of_call(t: Tensor) -> bool:
    return t.grad_fn is not None or getattr(t, "_curvfunc_leaf", False) or _functorch.is_functorch_wrapped_tensor(t)


def kept_tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in an attribute of a module, containers included."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from kept_tensors(inner, depth - 1)
