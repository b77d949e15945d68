"""The specification: every quantity in a few obvious lines of ``torch.func``, slow and independent of the engine.

Each function here has the signature, the result and the scale of the function of the same name in :mod:`curvfunc`,
and nothing of its machinery: samples are run through the model one by one, Jacobians and Hessians are dense. What the
two modules disagree about is a bug. Use it to read what a quantity *is*, and to check a new layer or loss on a small
problem; time and memory grow with (samples x outputs x parameters).

Notation: sample ``n`` of N; output entries ``c``, ``d`` of C (all axes of one sample's output, flattened); parameter
entries ``p``, ``q`` of a parameter with P entries; root column ``v`` of V; shared positions ``s``, ``t`` (pixel, time
step); output and input features ``o``, ``k`` of a layer. With the loss ``L(f) = R sum_n l_n(f_n, y_n)`` of the model's
outputs f_n (R = 1/N for a mean, 1 for a sum), everything is made of three things:

- ``J[n, c, p] = d f_n[c] / d theta[p]``, the Jacobian of one sample's output,
- ``dL[n, c] = d L / d f_n[c]``, the gradient of the loss,
- ``M[n, c, d]``, the curvature of the loss: ``d^2 L / d f_n[c] d f_n[d]``, or its Monte-Carlo estimate.

``subsampling`` (indices, repeats allowed) picks samples *after* J, dL and M are formed on the full batch: results per
sample are slices of the full ones, sums run over the picked samples only, R stays that of the full batch.
``chunk_size`` is accepted for the signature's sake and has no effect: it bounds memory and never changes a result.
A parameter that the output does not depend on gets zeros. Inputs are not validated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad as gradient
from torch.func import hessian, jacrev

from curvfunc import losses
from curvfunc.reference.layers import layers

__all__ = [
    "batch_diag_ggn",
    "batch_grad",
    "batch_l2",
    "diag_ggn",
    "kfac",
    "kflr",
    "sqrt_ggn",
    "sum_grad_squared",
    "variance",
]

ModelFn = Callable[[Any, Any], Tensor]
LossFn = Callable[[Tensor, Any], Tensor]
Indices = Sequence[int] | Tensor | None

# ---------------------------------------------------------------------------------------------------------------------
# First order
# ---------------------------------------------------------------------------------------------------------------------


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
    out, jac = _jacobian(model_fn, params, X)
    dL = gradient(loss_fn)(out, y).reshape(len(out), -1)

    def per_sample(p: Tensor, J: Tensor) -> Tensor:
        return _pick(torch.einsum("ncp,nc->np", J, dL), subsampling).reshape(-1, *p.shape)

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
    """
    grads = batch_grad(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling)
    return optree.tree_map(lambda g: g.reshape(len(g), -1).square().sum(1), grads)


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
    """
    grads = batch_grad(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling)
    return optree.tree_map(lambda g: g.square().mean(0) - g.mean(0).square(), grads)


# ---------------------------------------------------------------------------------------------------------------------
# Generalized Gauss-Newton
# ---------------------------------------------------------------------------------------------------------------------


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
    """
    out, jac = _jacobian(model_fn, params, X)
    S = _root(loss_fn, out, y, mc_samples, generator)

    def root(p: Tensor, J: Tensor) -> Tensor:
        columns = _pick(torch.einsum("ncp,vnc->nvp", J, S), subsampling).transpose(0, 1)
        return columns.reshape(*columns.shape[:2], *p.shape)

    return optree.tree_map(root, params, jac)


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
    out, jac = _jacobian(model_fn, params, X)
    M = _curvature(loss_fn, out, y, mc_samples, generator)

    def diagonal(p: Tensor, J: Tensor) -> Tensor:
        return _pick(torch.einsum("ncp,ncd,ndp->np", J, M, J), subsampling).reshape(-1, *p.shape)

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


# ---------------------------------------------------------------------------------------------------------------------
# Kronecker factors
# ---------------------------------------------------------------------------------------------------------------------


def kfac(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    r"""Kronecker factors of each parameter's block of the GGN, ``block ~ B \otimes A``.

    Let ``x[n, s, k]`` be the input of a layer (for a convolution the patch under the kernel at output position s),
    ``z[n, s, o]`` its output and ``D[n, c, s, o] = d f_n[c] / d z[n, s, o]``. The weight's factors are

    ========================  ====================================================  ===========================
    layer                     B[o, p]                                               A[k, l]
    ========================  ====================================================  ===========================
    ``F.linear``              ``sum_{n,c,d,s} D[n,c,s,o] M[n,c,d] D[n,d,s,p]``      ``mean_{n,s} x x^T``
    ``F.conv1d/2d/3d``        ``sum_{n,c,d,s,t} D[n,c,s,o] M[n,c,d] D[n,d,t,p]``    ``mean_n sum_s x x^T``
    ========================  ====================================================  ===========================

    Transposed convolutions are as convolutions, with x what each entry of the kernel meets. A weight that several calls
    share has the positions of all of them side by side in s. The groups of a convolution each see patches of their own: A
    is the mean over groups. Every other parameter (a bias, a norm's scale, a weight that is used in any other way) has one
    factor, its exact block ``sum_{n,c,d} J[n,c,p] M[n,c,d] J[n,d,q]``.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N.
        y: Targets, whatever ``loss_fn`` takes.
        loss_fn: ``(output, y) -> scalar``, a sum or a mean over samples, convex in the output.
        mc_samples: Number of samples from the likelihood that the loss implies; 0 is the exact curvature of the loss.
        generator: Source of the samples.
        subsampling: Samples to use: B sums and A averages over them; None is all.
        chunk_size: No effect.

    Returns:
        A tuple of factors per parameter: ``(B [o, o], A [k, k])``, or ``(block [P, P],)``.

    References:
        Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015.
        Grosse & Martens, A Kronecker-factored approximate Fisher matrix for convolution layers, ICML 2016.
        Eschenhagen et al., Kronecker-factored approximate curvature for modern neural network architectures,
        NeurIPS 2023 (shared positions of linear layers: "expand").
    """
    out, jac = _jacobian(model_fn, params, X)
    M = _pick(_curvature(loss_fn, out, y, mc_samples, generator), subsampling)
    per_sample = [layers(model_fn, params, _sample(X, n)) for n in _picked(len(out), subsampling)]

    def factors(i: int, J: Tensor) -> tuple[Tensor, ...]:
        uses = [layer for sample in per_sample if (layer := sample[i]) is not None]
        if not uses:
            J = _pick(J, subsampling)
            return (torch.einsum("ncp,ncd,ndq->pq", J, M, J),)
        x, D = torch.stack([use.x for use in uses]), torch.stack([use.D for use in uses])
        N, groups, positions, _ = x.shape
        A = torch.einsum("ngsk,ngsl->kl", x, x) / (N * groups)
        if uses[0].op is F.linear:
            return torch.einsum("ncso,ncd,ndsp->op", D, M, D), A / positions
        return torch.einsum("ncso,ncd,ndtp->op", D, M, D), A

    leaves, treespec = optree.tree_flatten(jac)
    return optree.tree_unflatten(treespec, [factors(i, J) for i, J in enumerate(leaves)])


def kflr(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Kronecker factors with the exact curvature of the loss: :func:`kfac` with ``mc_samples=0``.

    References:
        Botev et al., Practical Gauss-Newton optimisation for deep learning, ICML 2017.
    """
    return kfac(model_fn, params, X, y, loss_fn=loss_fn, mc_samples=0, subsampling=subsampling)


# ---------------------------------------------------------------------------------------------------------------------
# What everything is made of
# ---------------------------------------------------------------------------------------------------------------------


def _sample(X: Any, n: int) -> Any:
    """Sample n, as a batch of one."""
    return optree.tree_map(lambda x: x[n : n + 1], X)


def _picked(N: int, subsampling: Indices) -> list[int]:
    """The samples to use, as numbers in 0 ... N - 1."""
    return torch.arange(N).tolist() if subsampling is None else torch.arange(N)[_index(subsampling)].tolist()


def _pick(per_sample: Tensor, subsampling: Indices) -> Tensor:
    """The picked slices of axis 0."""
    return per_sample if subsampling is None else per_sample[_index(subsampling).to(per_sample.device)]


def _index(subsampling: Sequence[int] | Tensor) -> Tensor:
    return torch.as_tensor(subsampling, device="cpu")


def _jacobian(model_fn: ModelFn, params: Any, X: Any) -> tuple[Tensor, Any]:
    """Outputs ``[N, *out]`` and the pytree of ``J [N, C, P]``, one sample at a time."""

    def output(params: Any, x: Any) -> tuple[Tensor, Tensor]:
        f = model_fn(params, x)
        return f.flatten(), f

    N = len(optree.tree_leaves(X)[0])
    # chunk_size=1 runs one backward pass per output entry without vmap: it needs no batching rule of any operation
    jacobian = jacrev(output, has_aux=True, chunk_size=1)
    jacobians, outputs = zip(*(jacobian(params, _sample(X, n)) for n in range(N)), strict=True)
    return torch.cat(outputs), optree.tree_map(lambda *J: torch.stack([j.reshape(len(j), -1) for j in J]), *jacobians)


def _root(loss_fn: LossFn, out: Tensor, y: Any, mc_samples: int, generator: torch.Generator | None) -> Tensor:
    """Columns ``S [V, N, C]`` of the curvature of the loss."""
    loss = losses.normalize(loss_fn)
    if mc_samples == 0:
        root = losses.exact_root(loss, out, y)
    else:
        root = losses.sampled_root(loss, out, y, mc_samples, generator)
    return root.columns(0, root.num).reshape(root.num, len(out), -1)


def _curvature(loss_fn: LossFn, out: Tensor, y: Any, mc_samples: int, generator: torch.Generator | None) -> Tensor:
    """Curvature ``M [N, C, C]`` of the loss, exact (``mc_samples=0``) or sampled."""
    if mc_samples == 0:
        N, C = len(out), out[0].numel()
        return torch.einsum("ncnd->ncd", hessian(loss_fn)(out, y).reshape(N, C, N, C))
    S = _root(loss_fn, out, y, mc_samples, generator)
    return torch.einsum("vnc,vnd->ncd", S, S)
