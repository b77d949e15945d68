"""How operations use their parameters: one function per family of operations, keyed by the operation."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvfunc import batch_axis
from curvfunc.forms import Form

__all__ = ["DECOMPOSITIONS", "EXPANSIONS", "RULES", "SPLITS", "TRANSPOSES", "Rule", "Use", "operation", "rule"]


@dataclass(frozen=True)
class Use:
    """How an operation is called.

    Attributes:
        axis: Sample axis of its output where it runs on the whole batch; None where it runs on each sample by itself
            (under vmap), so that its own axes do not include the samples.
        parameters: Names of the arguments that are parameters.
        sampled: Names of the arguments that have a sample axis.
    """

    axis: int | None
    parameters: frozenset[str]
    sampled: frozenset[str]


@dataclass(frozen=True)
class Rule:
    """A rule: the names of the operation's arguments, those that may be parameters, and the forms of their use."""

    arguments: tuple[str, ...]
    parameters: tuple[str, ...]
    forms: Callable[..., dict[str, Form]]
    takes_use: bool
    samples_first: bool


RULES: dict[Any, Rule] = {}

# Opaque calls, and functions that do the same by operations that have rules.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}

# How parameters are commonly transposed, split into pieces that follow each other along an axis, and repeated.
TRANSPOSES = {torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
SPLITS = {
    *(torch.chunk, Tensor.chunk, torch.split, Tensor.split, torch.functional.split, torch.tensor_split, Tensor.tensor_split),
    *(torch.unsafe_chunk, Tensor.unsafe_chunk, torch.unsafe_split, Tensor.unsafe_split),
    *(torch.split_with_sizes, Tensor.split_with_sizes),
}
EXPANSIONS = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to, torch.tile}


def rule(
    *functions: Any, arguments: str | None = None, parameters: str, samples_first: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register how ``functions`` use the arguments named in ``parameters``.

    The decorated function takes the operation's arguments, every tensor that is not a parameter with the sample axis
    first, and returns ``{argument: form}``, or NotImplemented where it does not hold. It reads shapes only; work is
    deferred to the form's functions. If it takes ``use``, it gets a `Use`.

    Args:
        functions: The operations, as a ``TorchFunctionMode`` sees them; functions of one's own by `operation`.
        arguments: Their argument names in order of position, separated by blanks; by default read off the first.
        parameters: Those that can be parameters.
        samples_first: Whether inputs and outputs have the samples as their first axis, each output depending on its own
            sample only. Then the rule sees inputs [n, ...] and cotangents [v, n, ...] in the same way on every path.

    Example:
        An operation of one's own, z[n] = tanh(x[n]) * w, in ten lines:

        >>> @operation
        ... def gate(x, w):
        ...     return torch.tanh(x) * w
        >>> @rule(gate, parameters="w", samples_first=True)
        ... def _(x, w):
        ...     return {"w": Direct(lambda g: g * torch.tanh(x), w.shape)}
        >>> model_fn = lambda params, X: gate(X, params["w"])
        >>> X, y, params = torch.randn(4, 3), torch.arange(4) % 3, {"w": torch.ones(3)}
        >>> batch_grad(model_fn, params, X, y)["w"].shape
        torch.Size([4, 3])
    """

    def register(forms: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(functions[0]) if arguments is None else None
        names = tuple(signature.parameters if signature else arguments.split())  # type: ignore[union-attr]
        takes_use = "use" in inspect.signature(forms).parameters
        if unknown := set(parameters.split()) - set(names):
            raise ValueError(f"rule: {sorted(unknown)} are not among the operation's arguments {list(names)}.")
        for function in functions:
            RULES[function] = Rule(names, tuple(parameters.split()), forms, takes_use, samples_first)
            if samples_first:
                batch_axis.RULES[function] = batch_axis.samples_first
        return forms

    return register


def operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of one's own visible as one operation, so that a `rule` can be given for it.

    Without a rule it runs as its parts.

    Args:
        function: Any function of tensors.

    Returns:
        The same function, to be called in models in its place.
    """

    @functools.wraps(function)
    def visible(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if visible in RULES and torch.overrides.has_torch_function(tensors):
            return torch.overrides.handle_torch_function(visible, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return visible


from curvfunc.rules import attention, conv, embedding, linear, matmul, norm, recurrent, scale  # noqa: E402

_ = (attention, conv, embedding, linear, matmul, norm, recurrent, scale)  # they register themselves
