"""How operations use their parameters: one function per family of operations, keyed by the operation."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvfunc.contractions import Form

__all__ = ["DECOMPOSITIONS", "EXPANSIONS", "ROWS", "RULES", "TRANSPOSES", "Rule", "Use", "rule"]


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
    parameters: frozenset[str]
    forms: Callable[..., dict[str, Form]]
    takes_use: bool


RULES: dict[Any, Rule] = {}

# Opaque calls, and functions that do the same by operations that have rules.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}

# How parameters are commonly transposed, split by rows, and repeated.
TRANSPOSES = {torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__}
ROWS = {torch.chunk, Tensor.chunk, torch.split, Tensor.split, torch.functional.split}
EXPANSIONS = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to, torch.tile}


def rule(*functions: Any, arguments: str, parameters: str) -> Callable[[Callable[..., dict[str, Form]]], Any]:
    """Register how ``functions`` use the arguments named in ``parameters``.

    The decorated function takes the operation's arguments, every tensor that is not a parameter with the sample axis
    first, and returns ``{argument: form}``, or NotImplemented where it does not hold. It reads shapes only; work is
    deferred to the form's functions. If it takes ``use``, it gets a `Use`.

    Args:
        functions: The operations, as a ``TorchFunctionMode`` sees them.
        arguments: Their argument names in order of position, separated by blanks.
        parameters: Those that can be parameters.
    """

    def register(forms: Callable[..., dict[str, Form]]) -> Callable[..., dict[str, Form]]:
        takes_use = "use" in inspect.signature(forms).parameters
        for function in functions:
            RULES[function] = Rule(tuple(arguments.split()), frozenset(parameters.split()), forms, takes_use)
        return forms

    return register


from curvfunc.rules import attention, conv, embedding, linear, matmul, norm, recurrent, scale  # noqa: E402

_ = (attention, conv, embedding, linear, matmul, norm, recurrent, scale)  # they register themselves
