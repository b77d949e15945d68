"""The Jacobian of the model's output, and its products: plain ``torch.autograd``, one sample and one entry at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

__all__ = ["batch_jac", "ntk", "ntk_total"]

ModelFn = Callable[[Any, Any], Tensor]
Indices = Sequence[int] | Tensor | None


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
    leaves, treespec = optree.tree_flatten(params)
    leaves = [p.detach().requires_grad_() for p in leaves]
    every = torch.arange(len(optree.tree_leaves(X)[0]))
    samples = (every if subsampling is None else every[torch.as_tensor(subsampling, device="cpu")]).tolist()
    rows: list[list[Tensor]] = [[] for _ in leaves]
    for n in samples:
        f = model_fn(optree.tree_unflatten(treespec, leaves), optree.tree_map(lambda x: x[n : n + 1], X))[0]  # noqa: B023
        entries = [_gradient(f_c, leaves) for f_c in f.reshape(-1)]
        for i, p in enumerate(leaves):
            of_p = [gradient[i] for gradient in entries]
            rows[i].append(torch.stack(of_p).reshape(*f.shape, *p.shape) if of_p else p.new_zeros(*f.shape, *p.shape))
    return optree.tree_unflatten(treespec, [torch.stack(of_samples) for of_samples in rows])


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
    first = batch_jac(model_fn, params, X, subsampling=subsampling)
    second = first if X2 is None else batch_jac(model_fn, params, X2)

    def kernel(p: Tensor, J: Tensor, K: Tensor) -> Tensor:
        return torch.einsum("ncp,mdp->ncmd", *[_flat(j, p) for j in (J, K)])

    return optree.tree_map(kernel, params, first, second)


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


def _flat(J: Tensor, p: Tensor) -> Tensor:
    """``[N, *out, *shape]`` as ``[N, C, P]``."""
    return J.reshape(len(J), J.shape[1 : J.ndim - p.ndim].numel(), p.numel())


def _gradient(entry: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The gradient of one number with respect to each parameter."""
    if not entry.requires_grad:
        return [torch.zeros_like(p) for p in leaves]
    return list(torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True, materialize_grads=True))
