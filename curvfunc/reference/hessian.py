"""The diagonal of the Hessian."""

from typing import Any

import optree
import torch.nn.functional as F

from curvfunc.reference.dense import Indices, LossFn, ModelFn, as_tree, hessian, pick

__all__ = ["batch_diag_hessian", "diag_hessian"]


def batch_diag_hessian(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Diagonal of each sample's Hessian, ``H[n, p, p] = R d^2 l_n / d theta[p]^2``; arguments as :func:`diag_hessian`.

    Returns:
        ``[N, *shape]`` per parameter.
    """
    H = pick(hessian(model_fn, params, X, y, loss_fn), subsampling)
    return as_tree(H.diagonal(dim1=1, dim2=2), params)


def diag_hessian(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Diagonal of the Hessian of the loss, ``sum_n H[n, p, p] = d^2 L / d theta[p]^2``.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N.
        y: Targets, whatever ``loss_fn`` takes.
        loss_fn: ``(output, y) -> scalar``, a sum or a mean over samples, twice differentiable.
        subsampling: Samples to sum over; None is all of them.
        chunk_size: No effect.

    Returns:
        ``[*shape]`` per parameter.

    References:
        Dangel, Harmeling & Hennig, Modular block-diagonal curvature approximations for feedforward architectures,
        AISTATS 2020, eq. 4.
    """
    per_sample = batch_diag_hessian(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling)
    return optree.tree_map(lambda d: d.sum(0), per_sample)
