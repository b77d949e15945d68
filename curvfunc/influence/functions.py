"""Scores of the samples of one batch, over all parameters together."""

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch.nn.functional as F
from torch import Tensor

from curvfunc.influence.specs import Influence, Queries, SelfInfluence
from curvfunc.kronecker import Decomposition
from curvfunc.quantities.call import compute
from curvfunc.tensors.docstrings import ARGUMENTS, documented, entries

__all__ = ["influence", "queries", "self_influence"]

Model = Callable[[Any, Any], Tensor]
LossFunction = Callable[[Tensor, Any], Tensor]

_documented = documented(
    ARGUMENTS
    | entries(
        """
        inverse: (B + δ)⁻¹, from `curvfunc.kronecker.inverse`, of factors or of a diagonal: per block, bases (U_B [o, o],
            U_A [k, k]) and eigenvalues [o, k].
        """
    )
)


@_documented
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

    Returns:
        [N]. The part of each parameter is `SelfInfluence`.

    Raises:
        ValueError: If the inverse is of other parameters, or has eigenvalues that are not positive.

    References:
        Koh and Liang 2017; with Kronecker factors, Grosse et al. 2023, "Studying large language model generalization with
        influence functions", sec. 3.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> K = kronecker.decompose(kfac(model_fn, params, X, y), kronecker.structure(model_fn, params, X))
        >>> influence.self_influence(model_fn, params, X, y, kronecker.inverse(K, damping=0.1)).shape
        torch.Size([8])
    """
    found = compute(model_fn, params, X, y, SelfInfluence(inverse=inverse), loss_fn=loss_fn, subsampling=subsampling)
    return _total(found)


@_documented
def queries(
    model_fn: Model, params: Any, X: Any, y: Any, inverse: Decomposition, *, loss_fn: LossFunction = F.cross_entropy
) -> Any:
    """The gradients qₘ of samples whose loss others influence, in the eigenbasis of the inverse, for `influence`.

    Args:
        X: Input of the queries, a tensor [M, ...] or a pytree of tensors with leading sample axis M.
        y: Targets of the queries, a tensor [M, ...] or a pytree likewise; for cross-entropy, class indices [M].

    Returns:
        A tree like ``params``, (g [M, s, r], x [M, s, c]) per parameter, with s positions, r rows and c columns.

    Raises:
        ValueError: If the inverse is of other parameters, or has eigenvalues that are not positive.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> K = kronecker.decompose(kfac(model_fn, params, X, y), kronecker.structure(model_fn, params, X))
        >>> g, x = influence.queries(model_fn, params, X[:2], y[:2], kronecker.inverse(K, damping=0.1))["weight"]
        >>> g.shape, x.shape
        (torch.Size([2, 1, 3]), torch.Size([2, 1, 4]))
    """
    return compute(model_fn, params, X, y, Queries(inverse=inverse), loss_fn=loss_fn)


@_documented
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
        queries: From `queries`, with the same inverse: (g [M, s, r], x [M, s, c]) per parameter.

    Returns:
        [N, M]. The part of each parameter is `Influence`.

    Raises:
        ValueError: If the inverse is of other parameters, or has eigenvalues that are not positive; if the queries do not fit
            the inverse.

    References:
        Koh and Liang 2017, "Understanding black-box predictions via influence functions".

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> K = kronecker.decompose(kfac(model_fn, params, X, y), kronecker.structure(model_fn, params, X))
        >>> inverse = kronecker.inverse(K, damping=0.1)
        >>> queries = influence.queries(model_fn, params, torch.randn(2, 4), torch.tensor([0, 2]), inverse)
        >>> influence.influence(model_fn, params, X, y, inverse, queries).shape
        torch.Size([8, 2])
    """
    spec = Influence(inverse=inverse, queries=queries)
    return _total(compute(model_fn, params, X, y, spec, loss_fn=loss_fn, subsampling=subsampling))


def _total(tree: Any) -> Tensor:
    first, *others = optree.tree_leaves(tree)
    total: Tensor = sum(others, first)
    return total
