"""The Jacobian of the model's output, and its products."""

from typing import Any

import optree
import torch
from torch import Tensor

from curvfunc.reference.dense import Indices, ModelFn, jacobian, pick

__all__ = ["batch_jac", "ntk", "ntk_total"]


def batch_jac(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    *,
    subsampling: Indices = None,
    chunk_size: int | None = None,
    out: Any = None,
) -> Any:
    """Jacobian of each sample's output, ``J[n, *c, *p] = d f_n[c] / d theta[p]``.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N, at least 1.
        subsampling: Samples to return results for; None is all of them.
        chunk_size: No effect.
        out: No effect.

    Returns:
        ``[N, *out, *shape]`` per parameter.
    """
    f, J = jacobian(model_fn, params, X)
    return optree.tree_map(lambda p, j: pick(j.reshape(*f.shape, *p.shape), subsampling), params, J)


def ntk(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    X2: Any = None,
    *,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Empirical neural tangent kernel, ``K[n, c, m, d] = sum_p J[n, c, p] J[m, d, p]`` for each parameter.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N, the samples n.
        X2: Pytree of tensors with leading axis M, the samples m; None is X.
        subsampling: Samples of X to use; None is all of them.
        chunk_size: No effect.

    Returns:
        ``[N, C, M, C]`` per parameter, M = N without ``X2``, C the number of entries of a sample's output.

    References:
        Jacot, Gabriel, Hongler, Neural tangent kernel, NeurIPS 2018.
    """
    J = optree.tree_map(lambda j: pick(j, subsampling), jacobian(model_fn, params, X)[1])
    J2 = J if X2 is None else jacobian(model_fn, params, X2)[1]
    return optree.tree_map(lambda j, k: torch.einsum("ncp,mdp->ncmd", j, k), J, J2)


def ntk_total(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    X2: Any = None,
    *,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Empirical neural tangent kernel of all parameters together: the sum of :func:`ntk`; arguments as there.

    Returns:
        ``[N, C, M, C]``.
    """
    return torch.stack(optree.tree_leaves(ntk(model_fn, params, X, X2, subsampling=subsampling))).sum(0)
