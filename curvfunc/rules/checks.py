"""What is checked of rules of one's own: when they are registered, and where their forms are used."""

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from curvfunc.uses.forms import Direct, Form, Outer, Rows, adapted

__all__ = ["check_function", "check_signature", "comparing_parts", "guarded", "name_of"]


_COMPARING: ContextVar[bool] = ContextVar("_COMPARING", default=False)


@contextmanager
def comparing_parts() -> Iterator[None]:
    """Compare parts of inputs, which are used where these are large, with the whole, however small it is."""
    before = _COMPARING.set(True)
    try:
        yield
    finally:
        _COMPARING.reset(before)


def name_of(function: Any) -> str:
    """The operation as messages call it."""
    return getattr(function, "__name__", str(function))


def check_function(function: Any, known: bool) -> None:
    """Refuse to register a rule that cannot work: for a function that is not seen, or has a rule already.

    Args:
        function: What the rule is for.
        known: Whether it has a rule.
    """
    name = name_of(function)
    if known:
        raise ValueError(f"rule: {name} has a rule already, which would be lost. Write an operation of your own and use that.")
    if getattr(function, "_curvfunc_operation", False) or isinstance(
        function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    ):
        return
    if isinstance(function, CustomOpDef):
        raise ValueError(
            f"rule: models call {function._qualname} as an operator: register the rule for {function._opoverload}."
        )
    if isinstance(function, types.FunctionType) and function not in torch.overrides.get_testing_overrides():
        raise ValueError(
            f"rule: {name} is a plain function, whose calls cannot be seen, so that the rule would never be used. Make it an "
            f"operation, {name} = curvfunc.operation({name}), and call that in the model."
        )
    if not callable(function) or (inspect.isclass(function) or isinstance(function, torch.nn.Module)):
        raise TypeError(f"rule: {name} is no function of tensors. Give the function that is called, such as F.linear.")


def check_signature(forms: Callable[..., Any], names: Sequence[str]) -> None:
    """Refuse a rule that cannot take the operation's arguments."""
    parameters = inspect.signature(forms).parameters
    keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    missing = [] if keywords else [n for n in names if n not in parameters]
    required = [
        k for k, p in parameters.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if missing or (unknown := set(required) - {*names, "use"}):
        wrong = f"does not take {missing}" if missing else f"needs {sorted(unknown)}, which the operation does not have"
        raise ValueError(f"rule: the rule {wrong}. It gets the operation's arguments {list(names)} by name, and ``use``.")


def guarded(
    operation: str, forms: Any, shapes: Mapping[str, torch.Size], arguments: Sequence[str], samples: int
) -> dict[str, Form]:
    """The forms, with a look at the shapes of all that they give.

    Args:
        operation: Its name.
        forms: What the rule returned.
        shapes: Of the arguments that are parameters.
        arguments: Names of those that can be.
        samples: Number of samples.
    """
    if not isinstance(forms, dict):
        raise TypeError(
            f"the rule of {operation} returned {type(forms).__name__}; {{argument: form}} or NotImplemented is needed."
        )
    if unknown := sorted(set(forms) - set(arguments)):
        raise ValueError(
            f"the rule of {operation} returned forms for {unknown}; it was registered for the arguments {list(arguments)}."
        )
    found: dict[str, Form] = {}
    replaced: dict[int, Form] = {}
    for argument, form in sorted(forms.items(), key=lambda item: isinstance(item[1], Direct)):  # what they refer to comes first
        if argument not in shapes:
            found[argument] = form
            continue
        where = f"the rule of {operation} for {argument!r}"
        if not isinstance(form, (Outer, Rows, Direct)):
            raise TypeError(f"{where} gives {type(form).__name__}; a Direct, Outer or Rows form is needed.")
        if form.shape != shapes[argument]:
            raise ValueError(f"{where} gives a form of shape {tuple(form.shape)}; the parameter has {tuple(shapes[argument])}.")
        found[argument] = replaced[id(form)] = looked = _looked_at(where, form, samples)
        if isinstance(looked, Direct) and looked.sums is not None:
            sums: Any = replaced.get(id(looked.sums), looked.sums)
            found[argument] = replace(looked, sums=sums)
    return found


def _looked_at(where: str, form: Outer | Rows | Direct | None, samples: int) -> Any:
    """The form, and what may take its place, with a look at the shapes that they give."""
    if form is None:
        return None
    guard = _Guard(where, form, samples)
    if isinstance(form, Direct):
        return replace(form, cotangent=guard.gradient)
    given = {}
    if isinstance(form, Outer):
        given = {name: _looked_at(where, getattr(form, name), samples) for name in ("instead", "alone")}
        given["moment"] = None if form.moment is None else guard.moment
    return adapted(form, cotangent=guard.features, inputs=guard.inputs, **given)


class _Guard:
    """A form's functions, with a look at the shapes that they give."""

    def __init__(self, where: str, form: Outer | Rows | Direct, samples: int) -> None:
        self._where, self._form, self._samples = where, form, samples
        self._g: tuple[int, ...] | None = None
        self._x: tuple[int, ...] | None = None
        self._k: int | None = None

    def gradient(self, g: Tensor) -> Tensor:
        """For `Direct`."""
        found, shape = self._form.cotangent(g), self._form.shape
        if found.shape != g.shape[:2] + shape:
            raise ValueError(
                f"{self._where}: the Direct form maps a cotangent [v, n, ...] of shape {tuple(g.shape)} to one of shape "
                f"{tuple(found.shape)}; [v, n, *shape] = {(*g.shape[:2], *shape)} is needed."
            )
        return found

    def features(self, g: Tensor) -> Tensor:
        """For `Outer` and `Rows`."""
        found = self._form.cotangent(g)
        axes = "[v, n, q, s, o]" if isinstance(self._form, Outer) else "[v, n, s, d]"
        if found.ndim != axes.count(",") + 1 or found.shape[:2] != g.shape[:2]:
            raise ValueError(
                f"{self._where}: the {type(self._form).__name__} form maps a cotangent [v, n, ...] of shape {tuple(g.shape)} "
                f"to {tuple(found.shape)}; {axes} is needed."
            )
        self._g = tuple(found.shape[2:])
        self._compare()
        return found

    def inputs(self) -> Tensor:
        """For `Outer` and `Rows`."""
        assert not isinstance(self._form, Direct)
        found = self._form.inputs()
        axes = "[n, q, s, k]" if isinstance(self._form, Outer) else "[n, s]"
        if found.ndim != axes.count(",") + 1 or len(found) != self._samples:
            raise ValueError(
                f"{self._where}: the inputs of the {type(self._form).__name__} form have shape {tuple(found.shape)}; {axes} "
                f"with n = {self._samples} samples is needed."
            )
        if isinstance(self._form, Rows) and (found.is_floating_point() or found.is_complex()):
            raise TypeError(f"{self._where}: the inputs of the Rows form have dtype {found.dtype}; integers are needed.")
        self._x = tuple(found.shape[1:])
        self._compare()
        if _COMPARING.get() and isinstance(self._form, Outer) and self._form.part is not None:
            for some in (slice(0, 1), slice(1, None)):
                part, expected = self._form.part(some), found[some]
                if part.shape != expected.shape or not torch.allclose(part, expected):
                    raise ValueError(
                        f"{self._where}: part({some}) of the Outer form, of shape {tuple(part.shape)}, is not what inputs() "
                        f"gives for these samples, of shape {tuple(expected.shape)}."
                    )
        return found

    def moment(self) -> Tensor:
        """For `Outer`."""
        assert isinstance(self._form, Outer)
        assert self._form.moment is not None
        found = self._form.moment()
        if found.ndim != 2 or found.shape[0] != found.shape[1]:
            raise ValueError(f"{self._where}: the moment of the Outer form has shape {tuple(found.shape)}; [k, k] is needed.")
        self._k = len(found)
        self._compare()
        return found

    def _compare(self) -> None:
        """Whether cotangent and inputs fit each other, and the parameter."""
        if self._g is not None and self._k is not None and self._g[0] * self._g[2] * self._k != self._form.shape.numel():
            raise ValueError(
                f"{self._where}: cotangent and moment of the Outer form are [q, s, o] and [k, k] = {self._g} and "
                f"{(self._k, self._k)}, which do not fit each other or the parameter's shape {tuple(self._form.shape)}."
            )
        if self._g is None or self._x is None:
            return
        g, x, shape = self._g, self._x, self._form.shape
        if isinstance(self._form, Outer):
            fits = g[:2] == x[:2] and g[0] * g[2] * x[2] == shape.numel()
        else:
            fits = g[0] == x[0] and len(shape) == 2 and g[1] == shape[1]
        if not fits:
            what = "[q, s, o] and [q, s, k]" if isinstance(self._form, Outer) else "[s, d] and [s]"
            raise ValueError(
                f"{self._where}: cotangent and inputs of the {type(self._form).__name__} form are {what} = {g} and {x}, which "
                f"do not fit each other or the parameter's shape {tuple(shape)}."
            )
