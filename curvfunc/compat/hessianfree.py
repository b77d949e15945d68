"""Matrix-free products on a graph that the caller made, by autograd alone.

Without a graph of one's own: `curvfunc.operators.products` (``hessian_vp``, ``ggn_vp``, ``jvp``, ``vjp``).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "L_op",
    "R_op",
    "ggn_vector_product",
    "ggn_vector_product_from_plist",
    "hessian_vector_product",
    "jacobian_vector_product",
    "transposed_jacobian_vector_product",
]

Tensors = Tensor | Sequence[Tensor]


def L_op(ys: Tensors, xs: Tensors, ws: Tensors, retain_graph: bool = True, detach: bool = True) -> tuple[Tensor, ...]:
    """Vector-Jacobian products (∂y/∂x)ᵀ w, one tensor per x."""
    found = _grad(ys, xs, ws, retain_graph)
    return tuple([g.detach() for g in found]) if detach else found


def R_op(ys: Tensors, xs: Tensors, vs: Tensors, retain_graph: bool = True, detach: bool = True) -> tuple[Tensor, ...]:
    """Jacobian-vector products (∂y/∂x) v, one tensor per y: w ↦ (∂y/∂x)ᵀ w is linear, and its own transpose is wanted."""
    ws = [torch.zeros_like(y).requires_grad_() for y in ([ys] if isinstance(ys, Tensor) else ys)]
    pulled = _grad(ys, xs, ws, retain_graph)
    found = _grad(pulled, ws, vs, True)
    return tuple([g.detach() for g in found]) if detach else found


def _grad(ys: Tensors, xs: Tensors, ws: Tensors, retain_graph: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        ys, xs, ws, create_graph=True, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )


def transposed_jacobian_vector_product(
    f: Tensors, x: Tensors, v: Tensors, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """Vector-Jacobian products, as `L_op`."""
    return L_op(f, x, v, retain_graph, detach)


def jacobian_vector_product(
    f: Tensors, x: Tensors, v: Tensors, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """Jacobian-vector products, as `R_op`."""
    return R_op(f, x, v, retain_graph, detach)


def hessian_vector_product(
    f: Tensor, params: Tensors, v: Tensors, grad_params: Iterable[Tensor] | None = None, detach: bool = True
) -> tuple[Tensor, ...]:
    """Hessian-vector products (∂²f/∂p²) v, one tensor per parameter.

    Args:
        f: A scalar with its graph.
        params: What to differentiate by.
        v: Tensors of the shapes of ``params``.
        grad_params: The gradient of ``f``, made with ``create_graph=True``, if it is there already.
        detach: Whether the results are detached.
    """
    if grad_params is None:
        gradient: Any = torch.autograd.grad(f, params, create_graph=True, materialize_grads=True)
    else:
        gradient = tuple(grad_params)
    return R_op(gradient, params, v, detach=detach)


def ggn_vector_product(loss: Tensor, output: Tensor, model: nn.Module, v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """GGN-vector products Jᵀ H J v over the model's trainable parameters; see `ggn_vector_product_from_plist`."""
    return ggn_vector_product_from_plist(loss, output, [p for p in model.parameters() if p.requires_grad], v)


def ggn_vector_product_from_plist(
    loss: Tensor, output: Tensor, plist: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """GGN-vector products Jᵀ H J v, with J = ∂output/∂p and H = ∂²loss/∂output², one tensor per parameter."""
    jv = R_op(output, plist, v)
    hjv = hessian_vector_product(loss, output, jv)
    return L_op(output, plist, hjv)
