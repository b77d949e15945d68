"""How operations use their parameters: one function per family of operations, keyed by the operation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from curvfunc.contractions import Form

__all__ = ["RULES", "Rule", "rule"]


@dataclass(frozen=True)
class Rule:
    """A rule: the names of the operation's arguments, those that may be parameters, and the forms of their use."""

    arguments: tuple[str, ...]
    parameters: frozenset[str]
    forms: Callable[..., dict[str, Form]]


RULES: dict[Any, Rule] = {}


def rule(*functions: Any, arguments: str, parameters: str) -> Callable[[Callable[..., dict[str, Form]]], Any]:
    """Register how ``functions`` use the arguments named in ``parameters``.

    The decorated function takes the operation's arguments, every tensor that is not a parameter with the sample axis
    first, and returns ``{argument: form}``. It reads shapes only; work is deferred to the form's functions.

    Args:
        functions: The operations, as a ``TorchFunctionMode`` sees them.
        arguments: Their argument names in order of position, separated by blanks.
        parameters: Those that can be parameters.
    """

    def register(forms: Callable[..., dict[str, Form]]) -> Callable[..., dict[str, Form]]:
        for function in functions:
            RULES[function] = Rule(tuple(arguments.split()), frozenset(parameters.split()), forms)
        return forms

    return register


from curvfunc.rules import conv, linear  # noqa: E402  (they register themselves)

_ = (conv, linear)
