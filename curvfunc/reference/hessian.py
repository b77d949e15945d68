"""The diagonal of the Hessian."""

from typing import Any

import optree
import torch
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
    mc_samples: int = 0,
    generator: torch.Generator | None = None,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Diagonal of each sample's Hessian, ``H[n, p, p] = R d^2 l_n / d theta[p]^2``; arguments as :func:`diag_hessian`.

    With ``mc_samples`` an unbiased estimate from random signs, ``mean_m z[m, p] sum_q H[n, p, q] z[m, q]``, q over the
    entries of all parameters.

    Returns:
        ``[N, *shape]`` per parameter.
    """
    H = pick(hessian(model_fn, params, X, y, loss_fn), subsampling)
    if not mc_samples:
        return as_tree(H.diagonal(dim1=1, dim2=2), params)
    bits = [torch.randint(0, 2, H.shape[2:], generator=generator, device=H.device) for _ in range(mc_samples)]
    z = 2 * torch.stack(bits).to(H) - 1
    return as_tree((z * torch.einsum("npq,mq->nmp", H, z)).mean(1), params)


def diag_hessian(
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
    """Diagonal of the Hessian of the loss, ``sum_n H[n, p, p] = d^2 L / d theta[p]^2``.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N.
        y: Targets, whatever ``loss_fn`` takes.
        loss_fn: ``(output, y) -> scalar``, a sum or a mean over samples, twice differentiable.
        mc_samples: Number of draws of random signs; 0 is the exact diagonal.
        generator: Source of the signs.
        subsampling: Samples to sum over; None is all of them.
        chunk_size: No effect.

    Returns:
        ``[*shape]`` per parameter.

    References:
        Dangel, Harmeling & Hennig, Modular block-diagonal curvature approximations for feedforward architectures,
        AISTATS 2020, eq. 4.
        Bekas, Kokiopoulou & Saad, An estimator for the diagonal of a matrix, 2007.
    """
    draws: dict[str, Any] = {"mc_samples": mc_samples, "generator": generator}
    per_sample = batch_diag_hessian(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling, **draws)
    return optree.tree_map(lambda d: d.sum(0), per_sample)
