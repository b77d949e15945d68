"""Where rules are registered, keyed by the operation, and what a rule is given and gives."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from curvfunc.rules import batch_axis, checks
from curvfunc.uses.forms import Form

__all__ = ["BUILT_IN", "DECOMPOSITIONS", "EXPANSIONS", "RULES", "SPLITS", "TRANSPOSES", "Rule", "Use", "operation", "rule"]


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
    """A rule.

    Attributes:
        arguments: The names of the operation's arguments.
        parameters: Those that may be parameters.
        forms: Gives the forms of their use.
        takes_use: Whether it takes a `Use`.
        accepts: The names that ``forms`` takes; all of the operation's options need not be among them.
        samples_first: Whether inputs and outputs have the samples first.
        own: Whether it is a user's; what those give is looked at.
    """

    arguments: tuple[str, ...]
    parameters: tuple[str, ...]
    forms: Callable[..., dict[str, Form]]
    takes_use: bool
    accepts: frozenset[str]
    samples_first: bool
    own: bool


RULES: dict[Any, Rule] = {}
BUILT_IN: set[Any] = set()  # filled when all rules of this package are there

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

    The decorated function takes the operation's arguments by name, every tensor that is not a parameter with the sample
    axis first, and returns ``{argument: form}``, or NotImplemented where it does not hold. It reads shapes only; work is
    deferred to the form's functions. If it takes ``use``, it gets a `Use`. Of complex numbers, and of tensors without
    elements, it is never asked. A rule is for speed and for Kronecker factors: without one, autodiff gives the same.

    A form is one of three (axes: n sample, v backpropagated vector, s shared position, q group):

    - ``Direct(cotangent, shape)``: ``cotangent`` maps that of the output, [v, n, ...], to gradients [v, n, *shape].
    - ``Outer(inputs, cotangent, shape)``: the gradients are Σ_s g[v,n,q,s,o] x[n,q,s,k], with g = ``cotangent(...)`` and
      x = ``inputs()``; reshaped from [q, o, k] to the parameter's shape, or by ``arrange``. It has Kronecker factors.
    - ``Rows(inputs, cotangent, shape)``: as for a table, whose rows i[n,s] = ``inputs()`` get g[v,n,s,d].

    The shapes that they give are looked at. `check_rule` compares all that rests on a rule with autodiff; run it in a test.

    Args:
        functions: The operations, as a ``TorchFunctionMode`` sees them; functions of one's own by `operation`.
        arguments: Their argument names in order of position, separated by blanks; by default read off the first.
        parameters: Those that can be parameters.
        samples_first: Whether inputs and outputs have the samples as their first axis, each output depending on its own
            sample only. Then the rule sees inputs [n, ...] and cotangents [v, n, ...] in the same way on every path.

    Returns:
        A decorator, which returns the ``function`` that it is given.

    Raises:
        TypeError, ValueError: For a function whose calls cannot be seen, or that has a rule already; if the rule's arguments
            are not the operation's.

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
        >>> print(check_rule(gate, X, params["w"]))
        gate: w by Direct, right on the plain and the vmap path
    """

    def register(forms: Callable[..., Any]) -> Callable[..., Any]:
        names = _arguments(functions[0]) if arguments is None else tuple(arguments.split())
        taken = inspect.signature(forms).parameters
        takes_use, accepts = "use" in taken, frozenset(taken)
        if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            accepts |= {*names}
        if unknown := set(parameters.split()) - set(names):
            raise ValueError(f"rule: {sorted(unknown)} are not among the operation's arguments {list(names)}.")
        own = bool(BUILT_IN)
        if own:
            checks.check_signature(forms, names)
            for function in functions:
                checks.check_function(function, function in RULES or function in BUILT_IN)
        for function in functions:
            RULES[function] = Rule(names, tuple(parameters.split()), forms, takes_use, accepts, samples_first, own)
            if samples_first:
                batch_axis.RULES[function] = batch_axis.samples_first
        return forms

    return register


def _arguments(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"rule: the arguments of {checks.name_of(function)} cannot be read off it. Name them, in order of position: "
            'arguments="input weight bias".'
        ) from error


def operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of one's own visible as one operation, so that a `rule` can be given for it.

    Without a rule it runs as its parts.

    Args:
        function: Any function of tensors.

    Returns:
        The same function, with the same arguments and results of any shapes, to be called in models in its place.

    Example:
        >>> @operation
        ... def swish(x, beta):
        ...     return x * torch.sigmoid(beta * x)
        >>> swish(torch.zeros(3), torch.ones(3))
        tensor([0., 0., 0.])
    """

    @functools.wraps(function)
    def visible(*args: Any, **kwargs: Any) -> Any:
        if visible in RULES:
            tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if torch.overrides.has_torch_function(tensors):
                return torch.overrides.handle_torch_function(visible, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    visible._curvfunc_operation = True  # type: ignore[attr-defined]
    return visible
