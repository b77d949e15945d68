"""Which path and rule each parameter takes, and why."""

import html
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from curvfunc.engine.sites import Trace
from curvfunc.quantities.run import trace
from curvfunc.tensors.docstrings import documented
from curvfunc.uses.forms import Through

__all__ = ["Explanation", "Row", "explain"]

WIDTH = 120  # of the table, where names and rules leave room

# What to do about a reason, by what it says. None has to be done: results are right on every path, some take longer.
REMEDIES = {
    "has no rule": "register one with curvfunc.rule",
    "does not cover this use": "use another operation, or register a rule of your own with curvfunc.rule",
    "in two arguments": "pass it to two calls",
    "no proven sample axis": "keep the samples on an axis of their own from the input on",
    "could not be followed": "keep the samples on an axis of their own up to the output, in torch's own operations",
    "samples first": "have the samples on the first axis there",
    "cannot be seen": "write that part in torch's own operations, without autograd.Function or DisableTorchFunction",
    "in place and mixes samples": "use the out-of-place operation",
    "vmap cannot run the model": "avoid .item(), branches on values, and writing into new tensors",
    "another parameter": "see the other ones",
}


class Row(NamedTuple):
    """How one parameter is treated.

    Attributes:
        name: Of the parameter.
        path: "plain" (on the whole batch), "vmap" (over samples) or "loop" (sample by sample).
        rule: The operations whose rules are used, "generic" without one, "unused" if the output does not depend on it.
        why: What stands against the plain path or the rule, and what to do about it; empty where nothing does.
    """

    name: str
    path: str
    rule: str
    why: str


# Of cells in notebooks, whose own styles align numbers; colours are those of the page, dark or light.
CELL = "text-align: left; vertical-align: top; padding: 0.2em 0.8em; border-bottom: 1px solid rgba(128, 128, 128, 0.35)"
PLAIN = "background: none; color: inherit"


HEAD = Row("parameter", "path", "rule", "why")


@dataclass(frozen=True)
class Explanation:
    """A row per parameter; a table when printed or shown, in notebooks as HTML.

    Attributes:
        rows: In the order of the parameters.
    """

    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """The table for notebooks."""

        def line(tag: str, cells: Sequence[str], style: str = CELL) -> str:
            return "".join([f'<{tag} style="{style}; {PLAIN}">{cell}</{tag}>' for cell in cells])

        head = line("th", HEAD)
        rows = [(f"<code style='{PLAIN}'>{html.escape(row.name)}</code>", *map(html.escape, row[1:])) for row in self.rows]
        body = "".join([f'<tr style="{PLAIN}">{line("td", row)}</tr>' for row in rows])
        return f'<table style="border-collapse: collapse; {PLAIN}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'

    def __str__(self) -> str:
        """The rows as a table; long reasons take several lines."""
        table = [HEAD, *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        before = sum(widths) + 2 * len(widths)
        lines = []
        for row in table:
            first, *others = textwrap.wrap(row.why, max(40, WIDTH - before)) or [""]
            cells = [cell.ljust(w) for cell, w in zip(row[:3], widths, strict=True)]
            lines += ["  ".join([*cells, first]).rstrip(), *[" " * before + line for line in others]]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


@documented()
def explain(model_fn: Callable[[Any, Any], Tensor], params: Any, X: Any) -> Explanation:
    """How each parameter of a model is treated: its path, the rules of the operations that use it, and why.

    Args:
        X: Input, a tensor [N, ...] or a pytree of tensors with leading sample axis N.

    Returns:
        An `Explanation`: ``.rows``, and a table when printed.

    Raises:
        ValueError: For a model in which gradients flow between samples, which has no path.

    Example:
        >>> model_fn, params = functionalize(nn.Sequential(nn.Linear(2, 3), nn.Tanh()))
        >>> print(explain(model_fn, params, torch.zeros(4, 2)))
        parameter  path   rule    why
        -----------------------------
        0.weight   plain  linear
        0.bias     plain  linear
    """
    names, found = trace(model_fn, params, X)
    scripted = getattr(model_fn, "scripted", [])
    return Explanation(tuple([_row(name, i, found, scripted) for i, name in enumerate(names)]))


def _row(name: str, i: int, found: Trace, scripted: Sequence[str]) -> Row:
    uses = [(s.name, isinstance(s.forms[i], Through)) for s in found.sites if i in s.forms]
    labels = {rule + (" (derived)" if derived else ""): None for rule, derived in uses}
    counts = [sum(rule + (" (derived)" if d else "") == label for rule, d in uses) for label in labels]
    rule = " + ".join(f"{label} x{n}" if n > 1 else label for label, n in zip(labels, counts, strict=True))
    why = found.reasons.get(i) or (found.reasons.get(None, "another parameter is generic") if found.reasons else "")
    return Row(name, found.mode, rule or "unused", _with_remedy(why, scripted))


def _with_remedy(why: str, scripted: Sequence[str]) -> str:
    """A reason, and what to do about it."""
    if why and scripted:
        names = ", ".join(repr(name) if name else "the module" for name in scripted)
        return f"{why}: {names} is scripted; use the Python module that it was made of"
    remedy = next((remedy for reason, remedy in REMEDIES.items() if reason in why), None)
    return f"{why}; {remedy}" if remedy else why
