"""Which path and rule each parameter takes, and why."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from curvfunc.compute import trace
from curvfunc.forms import Through
from curvfunc.sites import Trace

__all__ = ["Explanation", "Row", "explain"]


class Row(NamedTuple):
    """How one parameter is treated.

    Attributes:
        name: Of the parameter.
        path: "plain" (on the whole batch), "vmap" (over samples) or "loop" (sample by sample).
        rule: The operations whose rules are used, "generic" without one, "unused" if the output does not depend on it.
        why: What stands against the plain path or the rule; empty where nothing does.
    """

    name: str
    path: str
    rule: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """A row per parameter; prints as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """The rows as a table."""
        table = [Row("parameter", "path", "rule", "why"), *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(Row._fields))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def explain(model_fn: Callable[[Any, Any], Tensor], params: Any, X: Any) -> Explanation:
    """How each parameter of a model is treated: its path, the rules of the operations that use it, and why.

    Args:
        model_fn: ``(params, X) -> output``.
        params: Pytree of parameters.
        X: Input with leading sample axis.

    Returns:
        An `Explanation`: ``.rows``, and a table when printed.

    Example:
        >>> model_fn, params = functionalize(nn.Sequential(nn.Linear(2, 3), nn.Tanh()))
        >>> print(explain(model_fn, params, torch.zeros(4, 2)))
        parameter  path   rule    why
        -----------------------------
        0.weight   plain  linear
        0.bias     plain  linear
    """
    names, found = trace(model_fn, params, X)
    return Explanation(tuple([_row(name, i, found) for i, name in enumerate(names)]))


def _row(name: str, i: int, found: Trace) -> Row:
    uses = [(s.name, isinstance(s.forms[i], Through)) for s in found.sites if i in s.forms]
    labels = {rule + (" (derived)" if derived else ""): None for rule, derived in uses}
    counts = [sum(rule + (" (derived)" if d else "") == label for rule, d in uses) for label in labels]
    rule = " + ".join(f"{label} x{n}" if n > 1 else label for label, n in zip(labels, counts, strict=True))
    why = found.reasons.get(i) or (found.reasons.get(None, "another parameter is generic") if found.reasons else "")
    return Row(name, found.mode, rule or "unused", why)
