"""The generalized Gauss-Newton matrix: its root, its diagonal, and the inner products of its columns."""

from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.reference.dense import Indices, LossFn, ModelFn, curvature, jacobian, pick, root

__all__ = ["batch_diag_ggn", "diag_ggn", "ggn_gram", "ggn_gram_total", "sqrt_ggn"]


def sqrt_ggn(
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
    """Square root of the generalized Gauss-Newton matrix: ``V[v, n, p] = sum_c J[n, c, p] S[v, n, c]``.

    The columns S satisfy ``sum_v S[v, n, c] S[v, n, d] = M[n, c, d]``, so that ``sum_{v,n} V[v, n, p] V[v, n, q]`` is
    the GGN. A root is unique up to a rotation of its columns; these are the columns of :mod:`curvfunc.losses`.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N.
        y: Targets, whatever ``loss_fn`` takes.
        loss_fn: ``(output, y) -> scalar``, a sum or a mean over samples, convex in the output.
        mc_samples: Number of samples from the likelihood that the loss implies; 0 is the exact root.
        generator: Source of the samples.
        subsampling: Samples to return results for; None is all of them.
        chunk_size: No effect.

    Returns:
        ``[V, N, *shape]`` per parameter, V the number of columns: ``mc_samples``, or that of the exact root.

    References:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002.
        Martens, New insights and perspectives on the natural gradient method, 2020, secs. 8 and 9.
    """
    out, jac = jacobian(model_fn, params, X)
    S = root(loss_fn, out, y, mc_samples, generator)

    def columns(p: Tensor, J: Tensor) -> Tensor:
        V = pick(torch.einsum("ncp,vnc->nvp", J, S), subsampling).transpose(0, 1)
        return V.reshape(*V.shape[:2], *p.shape)

    return optree.tree_map(columns, params, jac)


def batch_diag_ggn(
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
    """Diagonal of each sample's GGN, ``sum_cd J[n, c, p] M[n, c, d] J[n, d, p]``; arguments as :func:`sqrt_ggn`.

    Returns:
        ``[N, *shape]`` per parameter.
    """
    out, jac = jacobian(model_fn, params, X)
    M = curvature(loss_fn, out, y, mc_samples, generator)

    def diagonal(p: Tensor, J: Tensor) -> Tensor:
        return pick(torch.einsum("ncp,ncd,ndp->np", J, M, J), subsampling).reshape(-1, *p.shape)

    return optree.tree_map(diagonal, params, jac)


def diag_ggn(
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
    """Diagonal of the GGN, the sum of :func:`batch_diag_ggn` over samples; arguments as :func:`sqrt_ggn`.

    Returns:
        ``[*shape]`` per parameter.
    """
    per_sample = batch_diag_ggn(
        model_fn, params, X, y, loss_fn=loss_fn, mc_samples=mc_samples, generator=generator, subsampling=subsampling
    )
    return optree.tree_map(lambda d: d.sum(0), per_sample)


def ggn_gram(
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
    """Gram matrix of the GGN's root, ``sum_p V[v, n, p] V[w, m, p]``; arguments as :func:`sqrt_ggn`.

    Returns:
        ``[V, N, V, N]`` per parameter.

    References:
        Dangel, Tatzel & Hennig, ViViT: Curvature access through the generalized Gauss-Newton's low-rank structure, 2022.
    """
    roots = sqrt_ggn(
        model_fn, params, X, y, loss_fn=loss_fn, mc_samples=mc_samples, generator=generator, subsampling=subsampling
    )

    def gram(V: Tensor) -> Tensor:
        V = V.reshape(*V.shape[:2], -1)
        return torch.einsum("vnp,wmp->vnwm", V, V)

    return optree.tree_map(gram, roots)


def ggn_gram_total(
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
) -> Tensor:
    """Gram matrix of the root of the whole GGN, over all parameters together: the sum of :func:`ggn_gram` over parameters.

    Returns:
        ``[V, N, V, N]``.
    """
    grams = ggn_gram(
        model_fn, params, X, y, loss_fn=loss_fn, mc_samples=mc_samples, generator=generator, subsampling=subsampling
    )
    return torch.stack(optree.tree_leaves(grams)).sum(0)
