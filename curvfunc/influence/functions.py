"""Scores of the samples of one batch, over all parameters together."""

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch.nn.functional as F
from torch import Tensor

from curvfunc.influence.specs import Influence, Queries, SelfInfluence
from curvfunc.kronecker import Decomposition
from curvfunc.quantities.call import compute

__all__ = ["influence", "queries", "self_influence"]

Model = Callable[[Any, Any], Tensor]
LossFunction = Callable[[Tensor, Any], Tensor]


def self_influence(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    inverse: Decomposition,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """gₙᵀ (B + δ)⁻¹ gₙ: how much a sample holds its own loss down. It is large for labels that are wrong.

    Args:
        model_fn: ``(params, X) -> output [N, ...]``.
        params: Pytree of tensors.
        X: Input.
        y: Targets.
        inverse: (B + δ)⁻¹, from `curvfunc.kronecker.inverse`, of factors or of a diagonal.
        loss_fn: ``(output, y) -> scalar`` that sums or averages over samples.
        subsampling: Indices of samples.

    Returns:
        [N]. The part of each parameter is `SelfInfluence`.

    Raises:
        ValueError: If the inverse is of other parameters, or has eigenvalues that are not positive.

    References:
        Koh and Liang 2017; with Kronecker factors, Grosse et al. 2023, "Studying large language model generalization with
        influence functions", sec. 3.
    """
    found = compute(model_fn, params, X, y, SelfInfluence(inverse=inverse), loss_fn=loss_fn, subsampling=subsampling)
    return _total(found)


def queries(
    model_fn: Model, params: Any, X: Any, y: Any, inverse: Decomposition, *, loss_fn: LossFunction = F.cross_entropy
) -> Any:
    """The gradients of samples whose loss others influence, in the eigenbasis of the inverse, for `influence`.

    Returns:
        (g [M, s, r], x [M, s, c]) per parameter, with s positions, r rows and c columns.
    """
    return compute(model_fn, params, X, y, Queries(inverse=inverse), loss_fn=loss_fn)


def influence(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    inverse: Decomposition,
    queries: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """gₙᵀ (B + δ)⁻¹ qₘ: the loss of query m would rise by that, to first order, without sample n.

    Helpful samples have positive scores, harmful ones negative ones.

    Args:
        model_fn: ``(params, X) -> output [N, ...]``.
        params: Pytree of tensors.
        X: Input.
        y: Targets.
        inverse: (B + δ)⁻¹, from `curvfunc.kronecker.inverse`.
        queries: From `queries`, with the same inverse.
        loss_fn: ``(output, y) -> scalar`` that sums or averages over samples.
        subsampling: Indices of samples.

    Returns:
        [N, M]. The part of each parameter is `Influence`.

    Raises:
        ValueError: As `self_influence`; if the queries do not fit the inverse.

    References:
        Koh and Liang 2017, "Understanding black-box predictions via influence functions".
    """
    spec = Influence(inverse=inverse, queries=queries)
    return _total(compute(model_fn, params, X, y, spec, loss_fn=loss_fn, subsampling=subsampling))


def _total(tree: Any) -> Tensor:
    first, *others = optree.tree_leaves(tree)
    total: Tensor = sum(others, first)
    return total
