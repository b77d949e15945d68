"""Gradients of each sample."""

from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc import losses
from curvfunc.reference.dense import Indices, LossFn, ModelFn, jacobian, pick

__all__ = ["batch_dot", "batch_dot_total", "batch_grad", "batch_l2", "clipped_grad", "sum_grad_squared", "variance"]


def batch_grad(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Gradient of each sample's term of the loss: ``g[n, p] = sum_c J[n, c, p] dL[n, c] = R d l_n / d theta[p]``.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N.
        y: Targets, whatever ``loss_fn`` takes.
        loss_fn: ``(output, y) -> scalar``, a sum or a mean over samples.
        subsampling: Samples to return results for; None is all of them.
        chunk_size: No effect.

    Returns:
        ``[N, *shape]`` per parameter.
    """
    out, jac = jacobian(model_fn, params, X)
    dL = torch.func.grad(loss_fn)(out, y).reshape(len(out), -1)

    def per_sample(p: Tensor, J: Tensor) -> Tensor:
        return pick(torch.einsum("ncp,nc->np", J, dL), subsampling).reshape(-1, *p.shape)

    return optree.tree_map(per_sample, params, jac)


def batch_l2(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Squared norm of each sample's gradient, ``sum_p g[n, p]^2``; arguments as :func:`batch_grad`.

    Returns:
        ``[N]`` per parameter.

    References:
        Goodfellow, Efficient per-example gradient computations, 2015, sec. 4.
    """
    grads = batch_grad(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling)
    return optree.tree_map(lambda g: g.reshape(len(g), -1).square().sum(1), grads)


def clipped_grad(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    max_norm: float,
    per_layer: bool = False,
    loss_fn: LossFn = losses.SUMMED,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Sum of gradients that are scaled to norms of at most C, ``sum_n min(1, C / |g[n]|) g[n]``; as :func:`batch_grad`.

    The norm is that over all parameters, or with ``per_layer`` over each of L layers (names up to the last dot), with the bound
    C / sqrt(L); C is ``max_norm``, and the loss a sum.

    Returns:
        ``[*shape]`` per parameter.

    References:
        Abadi et al., Deep learning with differential privacy, 2016, algorithm 1.
    """
    grads = batch_grad(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling)
    paths, leaves, tree = optree.tree_flatten_with_path(grads)
    names = [".".join(map(str, path)) for path in paths]
    layers = [name.rpartition(".")[0] or name for name in names] if per_layer else [""] * len(names)
    clipped = []
    for layer, g in zip(layers, leaves, strict=True):
        together = [h for other, h in zip(layers, leaves, strict=True) if other == layer]
        norms = torch.cat([h.reshape(len(h), -1) for h in together], 1).norm(dim=1)
        weights = (max_norm / len(set(layers)) ** 0.5 / norms).clamp(max=1)
        clipped.append(torch.tensordot(weights, g, 1))
    return tree.unflatten(clipped)


def sum_grad_squared(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Second moment of the per-sample gradients, ``sum_n g[n, p]^2``; arguments as :func:`batch_grad`.

    Returns:
        ``[*shape]`` per parameter.

    References:
        Dangel, Kunstner & Hennig, BackPACK: Packing more into backprop, ICLR 2020, appendix A.
    """
    grads = batch_grad(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling)
    return optree.tree_map(lambda g: g.square().sum(0), grads)


def variance(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Variance of the per-sample gradients, ``mean_n g[n, p]^2 - (mean_n g[n, p])^2``; arguments as :func:`batch_grad`.

    Returns:
        ``[*shape]`` per parameter.

    References:
        Dangel, Kunstner & Hennig, BackPACK: Packing more into backprop, ICLR 2020, appendix A.
    """
    grads = batch_grad(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling)
    return optree.tree_map(lambda g: g.square().mean(0) - g.mean(0).square(), grads)


def batch_dot(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Inner products of the per-sample gradients, ``sum_p g[n, p] g[m, p]``; arguments as :func:`batch_grad`.

    Returns:
        ``[N, N]`` per parameter.
    """
    grads = batch_grad(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling)
    return optree.tree_map(lambda g: torch.einsum("np,mp->nm", g.reshape(len(g), -1), g.reshape(len(g), -1)), grads)


def batch_dot_total(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Inner products of the gradients with respect to all parameters together: the sum of :func:`batch_dot` over parameters.

    Returns:
        ``[N, N]``.
    """
    dots = optree.tree_leaves(batch_dot(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling))
    return torch.stack(dots).sum(0)
