"""Products with the Jacobian and with curvature matrices, which are formed here."""

from collections.abc import Callable
from typing import Any, Literal

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.reference.calls import Call, Point, derivative, record
from curvfunc.reference.dense import (
    Indices,
    LossFn,
    ModelFn,
    TwiceDifferentiable,
    as_tree,
    curvature,
    gradient,
    hessian,
    jacobian,
    outputs,
    pick,
    picked,
    sample,
    side_by_side,
)
from curvfunc.reference.first_order import batch_grad

__all__ = ["fisher_vp", "ggn_vp", "ggnmp", "hessian_vp", "hmp", "jvp", "pchmp", "vjp"]

# ---------------------------------------------------------------------------------------------------------------------
# The diagonal block of each parameter
# ---------------------------------------------------------------------------------------------------------------------


def hmp(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Products with the diagonal blocks of the Hessian, ``v[p] -> sum_q (sum_n H[n, p, q]) v[q]``.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N.
        y: Targets, whatever ``loss_fn`` takes.
        loss_fn: ``(output, y) -> scalar``, a sum or a mean over samples, twice differentiable.
        subsampling: Samples to sum over; None is all of them.
        chunk_size: No effect.

    Returns:
        One function per parameter, which maps ``[V, *shape]`` to ``[V, *shape]``.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, 1994.
    """
    return _products(pick(hessian(model_fn, params, X, y, loss_fn), subsampling).sum(0), params)


def ggnmp(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    mc_samples: int = 0,
    generator: torch.Generator | None = None,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Products with the diagonal blocks of the GGN, ``v[p] -> sum_{n,c,d,q} J[n, c, p] M[n, c, d] J[n, d, q] v[q]``.

    Arguments as :func:`hmp`; ``mc_samples`` and ``generator`` as :func:`sqrt_ggn`. Draws are made once, here.

    Returns:
        One function per parameter, which maps ``[V, *shape]`` to ``[V, *shape]``.

    References:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002.
    """
    return _products(_ggn(model_fn, params, X, y, loss_fn, mc_samples, generator, subsampling), params)


def pchmp(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    modify: Literal["clip", "abs"] = "clip",
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Products with the diagonal blocks of the positive-curvature Hessian.

    In a network of operations that are linear by pieces or elementwise, a diagonal block of the Hessian is

        ``sum_n H[n, p, q] = sum_{n,c,d} J[n, c, p] M[n, c, d] J[n, d, q] + sum_{m,n,i} J_m[n, i, p] r_m[n, i] J_m[n, i, q]``,

    m running over the elementwise operations ``a = phi_m(z)``, with ``J_m[n, i, p] = d z[n, i] / d theta[p]``,
    ``r_m[n, i] = phi_m''(z[n, i]) delta[n, i]`` and ``delta[n, i] = d L / d a[n, i]``. The positive-curvature Hessian has
    ``max(r_m, 0)`` ("clip") or ``|r_m|`` ("abs") in place of r_m. Arguments as :func:`hmp`.

    Returns:
        One function per parameter, which maps ``[V, *shape]`` to ``[V, *shape]``.

    Raises:
        NotImplementedError: If the formula is not the Hessian's block, since the network has other operations.

    References:
        Chen, Chou & Chang, BDA-PCH: Block-diagonal approximation of positive-curvature Hessian for training neural
        networks, arXiv:1802.06502.
    """
    out = outputs(model_fn, params, X)
    dL = torch.func.grad(loss_fn)(out, y)
    exact = positive = _ggn(model_fn, params, X, y, loss_fn, 0, None, subsampling)
    for n in picked(len(out), subsampling):
        f, leaves, calls = record(model_fn, params, sample(X, n))
        for call in calls:
            delta = _gradients(f, dL[n : n + 1], call.outputs)
            for k, z in call.inputs.items():
                r, J = _second_derivative(call, k, delta), derivative(z, leaves)
                exact = exact + J.mT @ (r[:, None] * J)
                positive = positive + J.mT @ ((r.clamp(min=0) if modify == "clip" else r.abs())[:, None] * J)
    H = pick(hessian(model_fn, params, X, y, loss_fn), subsampling).sum(0)
    for block, wanted in zip(_blocks(exact, params), _blocks(H, params), strict=True):
        if (block - wanted).norm() > torch.finfo(H.dtype).eps ** 0.5 * wanted.norm():
            raise NotImplementedError("pchmp: an operation is neither elementwise nor linear by pieces. Use ggnmp or hmp.")
    return _products(positive, params)


# ---------------------------------------------------------------------------------------------------------------------
# The whole matrix
# ---------------------------------------------------------------------------------------------------------------------


def hessian_vp(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    v: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
) -> Any:
    """Product with the Hessian of the loss, ``sum_{n,q} H[n, p, q] v[q]``, p and q over all parameters together.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N.
        y: Targets, whatever ``loss_fn`` takes.
        v: Pytree like ``params``.
        loss_fn: ``(output, y) -> scalar``, a sum or a mean over samples, twice differentiable.
        subsampling: Samples to sum over; None is all of them.

    Returns:
        Pytree like ``params``.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, 1994.
    """
    H = pick(hessian(model_fn, params, X, y, loss_fn), subsampling).sum(0)
    return as_tree(H @ side_by_side(v), params)


def ggn_vp(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    v: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    mc_samples: int = 0,
    generator: torch.Generator | None = None,
    subsampling: Indices = None,
) -> Any:
    """Product with the GGN, ``sum_{n,c,d,q} J[n, c, p] M[n, c, d] J[n, d, q] v[q]``, p and q over all parameters together.

    Arguments as :func:`hessian_vp`; ``mc_samples`` and ``generator`` as :func:`sqrt_ggn`.

    Returns:
        Pytree like ``params``.

    References:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002.
    """
    return as_tree(_ggn(model_fn, params, X, y, loss_fn, mc_samples, generator, subsampling) @ side_by_side(v), params)


def fisher_vp(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    v: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    empirical: bool = False,
    mc_samples: int = 0,
    generator: torch.Generator | None = None,
    subsampling: Indices = None,
) -> Any:
    """Product with the Fisher information, p and q over all parameters together.

    - With labels from the likelihood that the loss implies (cross-entropy, squared error, BCE with logits) the Fisher is
      the GGN, and this is :func:`ggn_vp`.
    - ``empirical``: with the targets, ``sum_{n,q} g[n, p] g[n, q] v[q]``, g as in :func:`batch_grad`.

    Arguments as :func:`ggn_vp`.

    Returns:
        Pytree like ``params``.

    References:
        Martens, New insights and perspectives on the natural gradient method, 2020.
    """
    if not empirical:
        return as_tree(_ggn(model_fn, params, X, y, loss_fn, mc_samples, generator, subsampling) @ side_by_side(v), params)
    grads = optree.tree_leaves(batch_grad(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling))
    g = torch.cat([t.reshape(len(t), -1) for t in grads], dim=1)
    return as_tree(torch.einsum("np,nq,q->p", g, g, side_by_side(v)), params)


def jvp(model_fn: ModelFn, params: Any, X: Any, v: Any, *, subsampling: Indices = None) -> Tensor:
    """Product with the Jacobian of the model, ``sum_p J[n, c, p] v[p]``; arguments as :func:`hessian_vp`.

    Returns:
        ``[N, *out]``.
    """
    out, jac = jacobian(model_fn, params, X)
    J = torch.cat(optree.tree_leaves(jac), dim=2)
    return pick(torch.einsum("ncp,p->nc", J, side_by_side(v)).reshape(out.shape), subsampling)


def vjp(model_fn: ModelFn, params: Any, X: Any, u: Tensor, *, subsampling: Indices = None) -> Any:
    """Product with the transposed Jacobian of the model, ``sum_{n,c} J[n, c, p] u[n, c]``.

    ``u [N, *out]`` is like the output, with ``subsampling`` like that of the picked samples. Other arguments as
    :func:`hessian_vp`.

    Returns:
        Pytree like ``params``.
    """
    _, jac = jacobian(model_fn, params, X)
    J = pick(torch.cat(optree.tree_leaves(jac), dim=2), subsampling)
    return as_tree(torch.einsum("ncp,nc->p", J, u.reshape(J.shape[:2])), params)


# ---------------------------------------------------------------------------------------------------------------------
# Matrices
# ---------------------------------------------------------------------------------------------------------------------


def _ggn(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    loss_fn: LossFn,
    mc_samples: int,
    generator: torch.Generator | None,
    subsampling: Indices,
) -> Tensor:
    """The GGN ``[P, P]`` over the entries of all parameters side by side."""
    out, jac = jacobian(model_fn, params, X)
    J = pick(torch.cat(optree.tree_leaves(jac), dim=2), subsampling)
    M = pick(curvature(loss_fn, out, y, mc_samples, generator), subsampling)
    return torch.einsum("ncp,ncd,ndq->pq", J, M, J)


def _blocks(matrix: Tensor, params: Any) -> list[Tensor]:
    """The diagonal block of each parameter."""
    sizes = [p.numel() for p in optree.tree_leaves(params)]
    return [rows.split(sizes, dim=1)[i] for i, rows in enumerate(matrix.split(sizes))]


def _products(matrix: Tensor, params: Any) -> Any:
    """For each parameter the product with its diagonal block."""

    def product(block: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda v: torch.einsum("pq,vq->vp", block, v.reshape(len(v), len(block))).reshape(v.shape)

    _, tree = optree.tree_flatten(params)
    return optree.tree_unflatten(tree, [product(block) for block in _blocks(matrix, params)])


def _gradients(f: Tensor, dL: Tensor, outputs: dict[int, Point]) -> list[Tensor]:
    """``d L / d a`` for each output a of a call."""
    edges = [a.edge for a in outputs.values()]
    found = torch.autograd.grad([f], edges, [dL], retain_graph=True, allow_unused=True)
    return [dL.new_zeros(a.shape) if g is None else g for g, a in zip(found, outputs.values(), strict=True)]


def _second_derivative(call: Call, k: int, delta: list[Tensor]) -> Tensor:
    """``d^2 <delta, phi(z)> / d z[i]^2`` for each entry of input k, the other inputs held fixed."""
    z = call.values[k].clone().requires_grad_()
    with torch.enable_grad(), TwiceDifferentiable():
        total = torch.stack([(d * a).sum() for d, a in zip(delta, call.of(k, z), strict=True)]).sum()
        slope = gradient(total, [z], create_graph=True)
        return torch.stack([gradient(entry, [z])[i] for i, entry in enumerate(slope)])
