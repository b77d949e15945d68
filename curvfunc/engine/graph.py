"""Autograd's graph of a forward pass: its edges, and what of the parameters it reaches."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvfunc.engine.columns import over_columns
from curvfunc.engine.sites import Site

__all__ = [
    "Opaque",
    "Reached",
    "all_visible",
    "calls_may_hide",
    "check_twice_differentiable",
    "edge_of",
    "gradients",
    "pullback",
    "reached",
    "viewed",
]


class Opaque(Exception):
    """The model runs in a way that hides calls from the mode, and that can be switched off."""


# Nodes behind which calls were hidden.
HIDING = ("CheckpointFunctionBackward", "CompiledFunctionBackward")


class _Here(threading.local):
    visible = False


_HERE = _Here()


def calls_may_hide() -> bool:
    """Whether this is not yet the attempt with nothing hidden."""
    return not _HERE.visible


@contextmanager
def all_visible() -> Iterator[None]:
    """Take it, in this thread, that no calls are hidden."""
    before, _HERE.visible = _HERE.visible, True
    try:
        yield
    finally:
        _HERE.visible = before


def edge_of(t: Tensor) -> GradientEdge:
    """The gradient edge of a tensor with a gradient; as torch's own function, which takes longer."""
    node = t.grad_fn
    return get_gradient_edge(t) if node is None or isinstance(node, _FUNCTIONS) else GradientEdge(node, t.output_nr)


_FUNCTIONS = torch._C._FunctionBase  # nodes of autograd.Functions


def viewed(t: Tensor) -> Tensor:
    """The tensor that a view shows whole, in the same order; otherwise ``t``.

    A change in place of a view replaces the view's graph node, but not the one that its base had before.
    """
    base = t._base
    same = base is not None and base.numel() == t.numel() and base.is_contiguous() and t.is_contiguous()
    return base if same and base.requires_grad else t  # type: ignore[return-value, union-attr]


def gradients(
    out: Tensor, targets: Sequence[Any], column: Tensor, *, retain_graph: bool, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` of one output, None where it does not depend on a target.

    What torch's own function does before it calls the engine takes as long as the backward pass of a small network.
    """
    if _ENGINE is None or type(out) is not Tensor or out.shape != column.shape or torch.compiler.is_compiling():
        given: dict[str, Any] = {"retain_graph": retain_graph, "create_graph": create_graph, "allow_unused": True}
        return torch.autograd.grad(out, targets, column, **given)
    asked = (out,), (column,), retain_graph, create_graph, tuple(targets), True
    found: tuple[Tensor | None, ...] = _ENGINE(*asked, accumulate_grad=False)
    return found


_ENGINE: Callable[..., Any] | None = getattr(torch.autograd.graph, "_engine_run_backward", None)


def pullback(edge: GradientEdge, leaf: Tensor) -> Callable[[Tensor], Tensor]:
    """Takes gradients [v, n, ...] at ``edge`` to gradients [v, n, *shape] of ``leaf``."""

    def one(g: Tensor) -> Tensor:
        create = torch.is_grad_enabled()
        found = torch.autograd.grad(edge, leaf, g, retain_graph=True, create_graph=create, materialize_grads=True)
        return found[0]

    def pull(g: Tensor) -> Tensor:
        found: Tensor = over_columns(lambda column: over_columns(one, column), g)
        return found

    return pull


_MADE_BY = attrgetter("grad_fn")


def check_twice_differentiable(out: Tensor) -> None:
    """Raise if a function of the model's own is differentiable once only: torch leaves out what it cannot differentiate.

    A backward pass to given tensors does not run the node that would raise.
    """
    seen: set[Node] = set()
    stack = [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, _FUNCTIONS):
            made_by: Any = getattr(node, "_forward_cls", None)
            if getattr(getattr(made_by, "backward", None), "__code__", None) is _ONCE:
                raise NotImplementedError(
                    f"the backward of {made_by.__name__} is marked by once_differentiable, and this call takes second "
                    "derivatives of the model. Write it with operations that torch differentiates and without the mark, or ask "
                    "for what takes first derivatives only, such as diag_ggn."
                )
        stack.extend([n for n, _ in node.next_functions])


_ONCE = once_differentiable(lambda ctx: None).__code__


class Reached(NamedTuple):
    """What the graph of an output reaches.

    Attributes:
        params: Parameters, by index, other than through sites.
        leaves: All other leaves.
        sites: Those among what was reached.
        nodes: All nodes that it passes.
    """

    params: list[int]
    leaves: list[Tensor]
    sites: list[Site]
    nodes: set[Node]


def reached(outputs: Sequence[Tensor], sites: list[Site], tracked: dict[int, Tensor], stops: Sequence[Tensor] = ()) -> Reached:
    """What the graph of the outputs reaches other than through the sites, by walking the graph.

    Args:
        outputs: Of the forward pass.
        sites: What is known of it.
        tracked: Parameters by index.
        stops: Tensors of this forward pass behind which nothing is looked for.

    Returns:
        A `Reached`.
    """
    params = tracked.values()
    ends: dict[Any, int] = dict(zip(map(id, params), tracked, strict=True))
    if any(made := [*map(_MADE_BY, params)]):
        ends |= {node: i for node, i in zip(made, tracked, strict=True) if node is not None}
    producers: dict[Node, list[Node]] = {edge_of(t).node: [] for t in stops}
    for site in sites:
        producers.setdefault(site.edge.node, []).extend(site.producers)
    seen: set[Node] = set()
    stack = [edge_of(out).node for out in outputs if out.requires_grad]
    found: set[int] = set()
    leaves: dict[int, Tensor] = {}
    may_hide = calls_may_hide()
    while stack:
        node: Any = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__
        if may_hide and kind in HIDING:
            raise Opaque
        leaf = node.variable if kind == "AccumulateGrad" else None  # functions of users may have such an attribute, too
        end = node if leaf is None else id(leaf)
        if end in ends:
            found.add(ends[end])
        elif (before := producers.get(node)) is not None:
            stack += before
        elif leaf is not None:
            leaves[id(leaf)] = leaf
        else:
            stack.extend([n for n, _ in node.next_functions if n is not None])
    return Reached(sorted(found), list(leaves.values()), [site for site in sites if site.edge.node in seen], seen)
