"""The sample axis along autograd's graph, where no calls were seen: by those rules of the table that need shapes alone."""

import re
from collections.abc import Callable

import torch
from torch.autograd.graph import GradientEdge, Node

from curvfunc.rules import axis_rules, batch_axis
from curvfunc.rules.nonlinear import is_diagonal, is_reshape, operation

__all__ = ["CONSTANT", "UNKNOWN", "follow", "inputs_of", "shape_of"]

UNKNOWN = -1  # samples may have met
CONSTANT = -2  # depends on nothing but leaves

_RESHAPE = batch_axis.of_self(axis_rules.reshape)


def follow(top: GradientEdge, known: Callable[[GradientEdge], int | None], found: dict[GradientEdge, int]) -> int:
    """The sample axis of a tensor, by its edge; `UNKNOWN` or `CONSTANT` if it has none.

    Args:
        top: The edge.
        known: The axis of a tensor behind which nothing is to be looked for; None for all others.
        found: What was found by earlier calls with the same ``known``; what this one finds is added.
    """
    stack = [top]
    while stack:
        edge = stack[-1]
        if edge not in found:
            axis = known(edge)
            if axis is None:
                before = inputs_of(edge.node)
                rule = _rule(edge.node) if before else None
                if rule is not None and (missing := [e for e in before if e not in found]):
                    stack.extend(missing)
                    continue
                axis = CONSTANT if not before else UNKNOWN if rule is None else _carried(edge, rule, before, found)
            found[edge] = axis
        stack.pop()
    return found[top]


def _rule(node: Node) -> batch_axis.Rule | None:
    """The rule of an operation that takes nothing but tensors, or nothing else that matters."""
    if is_reshape(node):
        return _RESHAPE
    if is_diagonal(node):
        return batch_axis.elementwise
    pool = re.search(r"Pool(\d)D", operation(node))
    return None if pool is None else batch_axis.trailing(int(pool[1]))


def _carried(edge: GradientEdge, rule: batch_axis.Rule, before: list[GradientEdge], found: dict[GradientEdge, int]) -> int:
    """The axis of an operation's output, from those of its inputs."""
    axes = [found[e] for e in before]
    if UNKNOWN in axes:
        return UNKNOWN
    shapes = [shape_of(e) for e in (edge, *(e for e, axis in zip(before, axes, strict=True) if axis != CONSTANT))]
    if len(shapes) == 1:
        return CONSTANT
    out, *sampled = [torch.empty(shape, device="meta") for shape in shapes if shape is not None]
    if len(sampled) + 1 != len(shapes):
        return UNKNOWN
    axis_of: dict[int, int] = {id(t): axis for t, axis in zip(sampled, (a for a in axes if a != CONSTANT), strict=True)}
    axis = rule(sampled, {}, out, lambda t: axis_of[id(t)])
    return axis if isinstance(axis, int) else UNKNOWN


def inputs_of(node: Node) -> list[GradientEdge]:
    """The edges of what an operation took, with a gradient."""
    return [GradientEdge(n, number) for n, number in node.next_functions if n is not None]


def shape_of(edge: GradientEdge) -> torch.Size | None:
    """Of the tensor at an edge; None for a parameter."""
    metadata = getattr(edge.node, "_input_metadata", ())
    return torch.Size(metadata[edge.output_nr].shape) if edge.output_nr < len(metadata) else None
