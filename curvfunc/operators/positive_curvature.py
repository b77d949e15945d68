"""The positive-curvature Hessian: the Hessian's diagonal blocks with the concave part of every activation taken out.

On a graph of operations that are (piecewise) linear or elementwise,

    H_p = J_pᵀ ∇²L J_p + Σ_m J_mpᵀ diag(r_m) J_mp,    r_m = φ_m''(z_m) ⊙ δ_m,

where z_m is the input of elementwise operation m, J_mp its Jacobian by the parameter p and δ_m the loss gradient at the
output of m. Replacing r_m by max(r_m, 0) or |r_m| makes every term positive semi-definite.

The operations are found by walking autograd's graph, so nothing is hidden: not by containers, not by changes in place.
How they curve is what `curvfunc.rules.nonlinear` says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvfunc.operators.linearization import GaussNewton, Problem, Product, differentiate, pullback_graph
from curvfunc.rules.nonlinear import curve, operation

__all__ = ["MODIFICATIONS", "PositiveCurvature"]

MODIFICATIONS = {"clip": lambda r: r.clamp(min=0), "abs": torch.abs}


@dataclass(frozen=True)
class PositiveCurvature:
    """The positive-curvature Hessian; ``modify`` is "clip" or "abs". Diagonal blocks only."""

    modify: str

    def linearize(self, problem: Problem, leaves: Sequence[Tensor], out: Tensor) -> Product:
        """One pullback from the output and from the inputs of all elementwise operations together."""
        problem.exact_root(out.detach())  # raises unless the loss is convex
        residuals = [(z, MODIFICATIONS[self.modify](r)) for z, r in _residuals(problem, leaves, out)]
        kept = [(z, r) for z, r in residuals if r.any()]
        outputs = [out, *(z for z, _ in kept)]
        us, pulled = pullback_graph(leaves, outputs, [out, *(r.clone().requires_grad_() for _, r in kept)])
        middle = GaussNewton().middle(problem, out)

        def product(which: Sequence[int], v: Sequence[Tensor], create_graph: bool) -> list[Tensor]:
            first, *tangents = differentiate([pulled[i] for i in which], us, v, create_graph=create_graph)
            scaled = [r * t for (_, r), t in zip(kept, tangents, strict=True)]
            weights = [middle(first, create_graph), *scaled]
            return differentiate(outputs, [leaves[i] for i in which], weights, create_graph=create_graph)

        return product


def _residuals(problem: Problem, leaves: Sequence[Tensor], out: Tensor) -> list[tuple[GradientEdge, Tensor]]:
    """(edge of z, r) for each input z in which an operation is elementwise and smooth."""
    found = smooth_inputs(problem.names, leaves, out)
    if not found:
        return []
    edges = [GradientEdge(node, 0) for node, _ in found]
    deltas = torch.autograd.grad(out, edges, problem.gradient(out).detach(), retain_graph=True)
    return [(_input(node, k), _residual(node, k, delta)) for (node, k), delta in zip(found, deltas, strict=True)]


def _input(node: Node, k: int) -> GradientEdge:
    before, number = node.next_functions[k]
    assert before is not None
    return GradientEdge(before, number)


def _residual(node: Node, k: int, delta: Tensor) -> Tensor:
    """r = φ''(z) ⊙ δ in input k, from the derivative of the operation's own backward pass δ ↦ φ'(z) ⊙ δ."""
    back: Any = node(delta)  # type: ignore[operator]
    back = back[k] if isinstance(back, tuple) else back
    if not back.requires_grad:
        return torch.zeros_like(back)
    return torch.autograd.grad(back.sum(), [_input(node, k)], retain_graph=True, materialize_grads=True)[0]


def smooth_inputs(names: Sequence[str], leaves: Sequence[Tensor], out: Tensor) -> list[tuple[Node, int]]:
    """(node, k) for each operation between parameters and output that is smooth and elementwise in input k.

    Raises:
        NotImplementedError: If another non-linear operation is there, or a product of two tensors that depend on the
            same parameter.
    """
    if not out.requires_grad:
        return []
    ends = {get_gradient_edge(p).node: 1 << i for i, p in enumerate(leaves)}
    depends: dict[Node | None, int] = {None: 0}  # on which parameters, as a bit mask
    found = []
    for node in _in_order(get_gradient_edge(out).node):
        before = [depends[n] for n, _ in node.next_functions]
        known, both, depends[node] = curve(node), 0, ends.get(node, 0)
        for mask in before:
            both |= depends[node] & mask
            depends[node] |= mask
        unknown = range(len(before)) if known.unknown is None else known.unknown
        if any(before[k] for k in unknown if k < len(before)):
            raise NotImplementedError(
                f"pchmp: the operation {operation(node)} is neither (piecewise) linear nor elementwise, so the "
                "positive-curvature Hessian is not defined. Use ggnmp (positive semi-definite) or hmp."
            )
        if both and not known.additive:
            raise NotImplementedError(
                f"pchmp: the operation {operation(node)} multiplies tensors that both depend on "
                f"{[n for i, n in enumerate(names) if both >> i & 1]}: a parameter is used more than once, or "
                "activations are multiplied. The positive-curvature Hessian is not defined then. Use ggnmp (positive "
                "semi-definite) or hmp."
            )
        found += [(node, k) for k in known.elementwise if k < len(before) and before[k]]
    return found


def _in_order(root: Node) -> list[Node]:
    """The nodes behind ``root``, each after all that it depends on."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((n, False) for n, _ in node.next_functions if n is not None)
    return order
