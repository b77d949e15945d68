"""Kronecker factors of the empirical Fisher, from each sample's gradient."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad as gradient

from curvfunc import losses
from curvfunc.reference.jacobians import batch_jac
from curvfunc.reference.layers import layers

__all__ = ["kfac_empirical"]

ModelFn = Callable[[Any, Any], Tensor]
LossFn = Callable[[Tensor, Any], Tensor]
Indices = Sequence[int] | Tensor | None


def kfac_empirical(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    kfac_approx: str | None = None,
    joined: bool = False,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    r"""Kronecker factors of each parameter's block of the empirical Fisher, ``sum_n g_n g_n^T / R ~ B \\otimes A``.

    ``g_n = dL / d theta`` through sample n, and R is the factor of the mean in the loss (1 for a sum), so that ``g_n / R`` is
    the gradient of the sample's own terms, and R their share. With ``x[n, s, k]`` the input of a layer and ``G[n, s, o]`` the
    gradient of the loss with respect to its output at position s,

    ===========  ==========================================  ==========================
    kfac_approx  B[o, p]                                     A[k, l]
    ===========  ==========================================  ==========================
    "expand"     ``sum_{n,s} G G^T / R``                     ``mean_{n,s} x x^T``
    "reduce"     ``sum_n (sum_s G)(sum_s G)^T / R``          ``mean_n (mean_s x)(mean_s x)^T``
    None         as "expand" for linear layers, for convolutions B of "reduce" and A = ``mean_n sum_s x x^T``
    ===========  ==========================================  ==========================

    Every other parameter has its exact block. What counts as a layer, and groups of a convolution: see ``kfac``.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N.
        y: Targets, whatever ``loss_fn`` takes.
        loss_fn: ``(output, y) -> scalar``, a sum or a mean over samples.
        kfac_approx: "expand", "reduce" or None.
        joined: Whether inputs that meet a bias, too, have a one appended.
        subsampling: Samples to use: B sums and A averages over them; None is all.
        chunk_size: No effect.

    Returns:
        A tuple of factors per parameter: ``(B [o, o], A [k, k])``, or ``(block [P, P],)``.

    References:
        Kunstner, Balles, Hennig, Limitations of the empirical Fisher approximation for natural gradient descent, NeurIPS 2019.
    """
    every = torch.arange(len(optree.tree_leaves(X)[0]))
    samples = (every if subsampling is None else every[torch.as_tensor(subsampling, device="cpu")]).tolist()
    one = [optree.tree_map(lambda x: x[n : n + 1], X) for n in range(len(every))]  # noqa: B023
    out = torch.cat([model_fn(params, x).detach() for x in one])
    dL = gradient(loss_fn)(out, y).reshape(len(out), -1)[samples]
    terms = _averaged_terms(loss_fn, out, y)  # 1 / R
    per_sample = [layers(model_fn, params, one[n]) for n in samples]
    jacobian = batch_jac(model_fn, params, X, subsampling=subsampling)

    def factors(i: int, p: Tensor, J: Tensor) -> tuple[Tensor, ...]:
        uses = [layer for sample in per_sample if (layer := sample[i]) is not None]
        if not uses:
            g = torch.einsum("ncp,nc->np", J.reshape(*dL.shape, p.numel()), dL)
            return (terms * g.mT @ g,)
        x, G = torch.stack([use.x for use in uses]), torch.einsum("ncso,nc->nso", torch.stack([use.D for use in uses]), dL)
        summed = kfac_approx == "reduce" or (kfac_approx is None and uses[0].op is not F.linear)
        G = G.sum(1, keepdim=True) if summed else G
        x = F.pad(x, (0, 1), value=1.0) if joined and uses[0].biased else x
        x = x.mean(2, keepdim=True) if kfac_approx == "reduce" else x
        N, groups, positions, _ = x.shape
        A = torch.einsum("ngsk,ngsl->kl", x, x) / (N * groups)
        return terms * torch.einsum("nso,nsp->op", G, G), A if summed and kfac_approx is None else A / positions

    leaves, treespec = optree.tree_flatten(params)
    return optree.tree_unflatten(treespec, map(factors, range(len(leaves)), leaves, optree.tree_leaves(jacobian)))


def _averaged_terms(loss_fn: LossFn, out: Tensor, y: Any) -> float:
    """How many terms (or how much weight) the loss averages: by how much larger the sum of these terms is; 1 for a sum.

    For a loss without a ``reduction`` they are the samples, if it does not grow when the batch counts twice.
    """
    loss = losses.normalize(loss_fn)
    L = loss(out, y)
    if loss.name is None:
        twice = loss(torch.cat([out, out]), optree.tree_map(lambda t: torch.cat([t, t]), y))
        return len(out) if torch.isclose(twice, L) else 1.0
    summed = partial(loss.fn, **{**dict(loss.options), **loss.tensors, "reduction": "sum"})
    return float(summed(out, y) / L)
