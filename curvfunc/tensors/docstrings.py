"""What docstrings have in common: written once, and pasted into each at import, so that ``help`` shows all of it."""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["ARGUMENTS", "RAISES", "documented", "entries", "told"]

F = TypeVar("F", bound=Callable[..., Any])

SECTIONS = ("Args:", "Returns:", "Raises:", "References:", "Example:")  # in their order


def entries(text: str) -> dict[str, str]:
    """The entries of a section by name: each begins without indentation and goes on with it."""
    found: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(text).strip().splitlines():
        if line and not line[0].isspace():
            name = line.partition(":")[0]
            found[name] = line
        elif name:
            found[name] += "\n" + line
    return {name: entry.rstrip() for name, entry in found.items()}


ARGUMENTS = entries(
    """
    model_fn: ``(params, X) -> output [N, ...]``, from `curvfunc.functionalize` or any function.
    params: Pytree of real floating-point tensors [*shape], usually ``{name: tensor}``; what is not in it stays fixed.
    X: Input, a tensor [N, ...] or a pytree of tensors with leading sample axis N.
    y: Targets, a tensor [N, ...] or a pytree of tensors with leading sample axis N; for cross-entropy, class indices [N].
    loss_fn: ``(output, y) -> scalar`` that sums or averages over samples, L = R Σₙ ℓ(fₙ, yₙ) with f = model_fn(params, X),
        and R = 1/N for a mean, R = 1 for a sum; results follow this scale. By default cross-entropy, averaged.
    mc_samples: 0 for the exact loss Hessian, else the number of Monte-Carlo draws per sample.
    subsampling: Indices [M] of samples (a sequence or a tensor, repeats allowed). Results per sample are those of the
        listed samples, M in place of N, sums run over them, and R stays that of the whole batch. The cost is that of the
        subset. A sample that is listed twice has the same Monte-Carlo draws both times.
    generator: Source of random numbers, on the device of the data; torch's default generator if None. Cannot be used inside
        ``torch.compile``.
    chunk_size: Number of vectors that are backpropagated together; by default chosen by memory. It changes results by
        rounding only.
    out: Memory for the result, what an earlier call returned (or tensors of its shapes and types): it is formed there, and
        returned. Not for calls that are differentiated, or under torch.func's transformations.
    """
)

RAISES = entries(
    """
    TypeError: If an argument is of another kind than said here: parameters that are no real floating-point tensors, say, or
        a model whose output is no tensor.
    ValueError: If samples, shapes, dtypes or indices do not fit each other; if gradients flow between samples (batch
        normalization in training mode), or the loss mixes samples. Messages name the argument, the shapes and the remedy.
    """
)


def documented(shared: Mapping[str, str] = ARGUMENTS, raises: Mapping[str, str] = RAISES) -> Callable[[F], F]:
    """A decorator that completes a docstring: by what is shared of arguments that it does not tell, and of what is raised.

    The function itself is returned. Without docstrings (``python -OO``) nothing happens.
    """

    def complete(function: F) -> F:
        if function.__doc__ is not None:
            function.__doc__ = completed(function.__doc__, names(function), shared, raises)
        return function

    return complete


def told(function: Any) -> dict[str, str]:
    """What a docstring tells of the arguments, by name."""
    return entries(split(function.__doc__ or "")[1].get("Args:", ""))


def names(function: Any) -> tuple[str, ...]:
    """Names of a function's arguments, in their order."""
    code = inspect.unwrap(function).__code__
    arguments: tuple[str, ...] = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return arguments


def completed(doc: str, arguments: tuple[str, ...], shared: Mapping[str, str], raises: Mapping[str, str]) -> str:
    """The docstring with all arguments in their order, and what is raised."""
    head, sections = split(doc)
    own = entries(sections.get("Args:", ""))
    sections["Args:"] = _joined({name: own.get(name) or shared.get(name, "") for name in (*arguments, *own)})
    errors = entries(sections.get("Raises:", ""))
    both = {name: f"{raises[name]}\n    {errors[name].partition(': ')[2]}" for name in errors.keys() & raises.keys()}
    sections["Raises:"] = _joined({**raises, **errors, **both})
    told = [(name, sections[name]) for name in SECTIONS if sections.get(name)]
    return "\n\n".join([head, *[f"{name}\n{textwrap.indent(lines, '    ')}" for name, lines in told]]) + "\n"


def _joined(found: Mapping[str, str]) -> str:
    return "\n".join([entry for entry in found.values() if entry])


def split(doc: str) -> tuple[str, dict[str, str]]:
    """What comes before the sections, and these without their indentation."""
    head: list[str] = []
    sections: dict[str, list[str]] = {}
    lines = head
    for line in inspect.cleandoc(doc).splitlines():
        if line in SECTIONS:
            lines = sections[line] = []
        else:
            lines.append(line)
    return "\n".join(head).strip(), {name: textwrap.dedent("\n".join(found)).strip() for name, found in sections.items()}
