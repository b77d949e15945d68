"""Which axes of a parameter each of its Kronecker factors belongs to, and which bias stands beside a weight."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from curvfunc.engine.sites import Trace, biases
from curvfunc.quantities import run
from curvfunc.tensors.docstrings import documented
from curvfunc.tensors.inputs import flatten_params
from curvfunc.tensors.precision import wide
from curvfunc.uses.forms import Form, Outer

__all__ = ["Layout", "Structure", "structure"]


SHOWN = 6  # parameters or blocks, in what is shown of them


def listed(parts: Sequence[str]) -> str:
    """What is shown of many: the first ones, and how many more."""
    more = [f"... {len(parts) - SHOWN} more"] if len(parts) > SHOWN else []
    return ", ".join([*parts[:SHOWN], *more])


@dataclass(frozen=True)
class Layout:
    """How a parameter is the matrix [rows, columns] that its factors act on.

    Attributes:
        name: Of the parameter.
        shape: Of the parameter.
        dtype: Of what is returned in its shape: its own, or single precision if that is more.
        bias: Name of the bias that is used beside it wherever either of them is used, with the rows as its entries.
        split: Its axes, cut into parts; empty where rows and columns are its axes in their order.
        order: The parts in the order in which they make up rows and columns.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bias: str | None = None
    split: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def sizes(self) -> set[tuple[int, ...]]:
        """The sizes that its factors may have."""
        parts = [self.split[d] for d in self.order] if self.split else list(self.shape)
        rows = [math.prod(parts[:d]) for d in range(len(parts) + 1)]
        return {(self.numel,), *[(r, self.numel // r) for r in rows if r]}

    def matrix(self, t: Tensor, rows: int) -> Tensor:
        """[..., *shape] as [..., rows, columns]."""
        lead = t.shape[: t.ndim - len(self.shape)]
        if self.split:
            t = t.reshape(lead + self.split).permute(*range(len(lead)), *[len(lead) + d for d in self.order])
        return t.reshape(*lead, rows, self.numel // rows)

    def parameter(self, t: Tensor) -> Tensor:
        """[..., rows, columns] as [..., *shape]."""
        lead = t.shape[:-2]
        if self.split:
            t = t.reshape(lead + tuple([self.split[d] for d in self.order]))
            places = sorted(range(len(self.order)), key=lambda k: self.order[k])
            t = t.permute(*range(len(lead)), *[len(lead) + k for k in places])
        return t.reshape(lead + self.shape)


@dataclass(frozen=True)
class Structure:
    """The layouts of all parameters, from `structure`; constant and hashable, and the same for every batch.

    Attributes:
        layouts: One per parameter, in their order.
        tree: Structure of the parameters' tree; None for a dictionary by name.
    """

    layouts: tuple[Layout, ...]
    tree: Any = None

    def __repr__(self) -> str:
        return f"Structure({listed([f'{layout.name} {list(layout.shape)}' for layout in self.layouts])})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple([layout.name for layout in self.layouts])

    def flatten(self, what: str, tree: Any) -> list[Any]:
        """What a tree like the parameters has for each of them.

        Args:
            what: The argument, for the error message.
            tree: The tree.

        Raises:
            ValueError: If it is of other parameters.
        """
        if self.tree is not None:
            try:
                return list(self.tree.flatten_up_to(tree))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{what} has another tree than the parameters: {error}") from error
        if not isinstance(tree, dict):
            raise TypeError(f"{what} must be a dictionary by parameter name, got {type(tree).__name__}.")
        missing, extra = [n for n in self.names if n not in tree], [n for n in tree if n not in self.names]
        if missing or extra:
            raise ValueError(
                f"{what} is of other parameters than the structure: it lacks {missing} and has {extra} in excess. Compute all "
                "of them with the same params."
            )
        return [tree[name] for name in self.names]

    def unflatten(self, values: Sequence[Any]) -> Any:
        """A tree like the parameters with these values."""
        if self.tree is None:
            return dict(zip(self.names, values, strict=True))
        return self.tree.unflatten(values)


@documented()
def structure(model_fn: Callable[[Any, Any], Tensor], params: Any, X: Any) -> Structure:
    """How the factors of `curvfunc.kfac` and its like belong to the axes of the parameters, from one forward pass.

    Two factors (F, G) of a parameter act on it as a matrix with len(F) rows and len(G) columns. Mostly, these are its axes
    in their order, [o, i · kernel] for a convolution; but the weight [i, o, *kernel] of a transposed one has the rows o and
    the columns i · kernel, which the factors alone do not tell. Nor do they tell which bias stands beside which weight.

    Args:
        X: Any input, a tensor [N, ...] or a pytree of tensors with leading sample axis N; a single sample will do.

    Returns:
        A `Structure`, for `decompose`. It holds for all values of the parameters and all inputs.

    Raises:
        NotImplementedError: If the entries of a parameter have an order that is none of parts of its axes, by the ``arrange``
            of a rule of one's own.

    Example:
        >>> model_fn, params = functionalize(nn.ConvTranspose2d(2, 3, 5))
        >>> weight, bias = kronecker.structure(model_fn, params, torch.randn(1, 2, 4, 4)).layouts
        >>> weight.bias, weight.matrix(params["weight"], rows=3).shape
        ('bias', torch.Size([3, 50]))
    """
    names, leaves, _ = flatten_params(params)
    tree = None if type(params) is dict and list(params) == names else optree.tree_structure(params)
    _, trace = run.trace(model_fn, params, X)
    beside = biases(trace.sites)
    layouts = []
    for i, (name, p) in enumerate(zip(names, leaves, strict=True)):
        bias = names[beside[i]] if i in beside else None
        split, order = _axes(name, _form(trace, i))
        layouts.append(Layout(name, tuple(map(int, p.shape)), wide(p.dtype), bias, split, order))
    return Structure(tuple(layouts), tree)


def _form(trace: Trace, i: int) -> Form | None:
    """Of a parameter that is used once; uses that are merged have no arrangement."""
    forms = [site.forms[i] for site in trace.sites if i in site.forms]
    return forms[0] if len(forms) == 1 else None


@torch.no_grad()
def _axes(name: str, form: Form | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The parts of a parameter's axes, and their order in the matrix [(q o), k]; empty where that is their own."""
    if not isinstance(form, Outer) or form.arrange is None:
        return (), ()
    x = form.inputs()
    groups, columns, numel = x.shape[1], x.shape[3], form.shape.numel()
    places = form.arrange(torch.arange(numel).reshape(groups, numel // (groups * columns), columns)).reshape(form.shape)
    parts = [part for d in range(places.ndim) for part in _parts(_along(places, d))]
    order = tuple(sorted(range(len(parts)), key=lambda d: -parts[d][1]))
    layout = Layout("", tuple(form.shape), places.dtype, None, tuple([size for size, _ in parts]), order)
    matrix = torch.arange(numel).reshape(-1, columns)
    if not torch.equal(layout.parameter(matrix), places):
        raise NotImplementedError(
            f"parameter {name!r} has entries in an order that is none of parts of its axes, by the ``arrange`` of its rule."
        )
    return ((), ()) if order == tuple(range(len(parts))) else (layout.split, order)


def _along(t: Tensor, d: int) -> Tensor:
    """The first entries along an axis."""
    return t.movedim(d, -1).flatten(0, -2)[0] if t.ndim > 1 else t


def _parts(places: Tensor) -> list[tuple[int, int]]:
    """Sizes and steps of the parts of an axis, outermost first, from the places of its entries."""
    found: list[tuple[int, int]] = []
    while (size := len(places)) > 1:
        step = int(places[1] - places[0])
        regular = (places == places[0] + step * torch.arange(size)).tolist()
        run = regular.index(False) if False in regular else size
        inner = max([c for c in range(2, run + 1) if size % c == 0], default=size)
        found.append((inner, step))
        places = places[::inner]
    return found[::-1]
