"""Influence of training samples: inner products of their gradients in the metric of the inverse curvature, gᵢᵀ (B + δ)⁻¹ gⱼ.

To first order, leaving sample i out moves the parameters by (B + δ)⁻¹ gᵢ, and so the loss of another one, j, by that product
(Koh and Liang 2017, "Understanding black-box predictions via influence functions"). The inverse is that of Kronecker factors,
of EKFAC or of a diagonal:

>>> model_fn, params = functionalize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
>>> X, y = torch.randn(8, 4), torch.arange(8) % 3
>>> K = kronecker.decompose(kflr(model_fn, params, X, y, joined=True), kronecker.structure(model_fn, params, X))
>>> inverse = kronecker.inverse(K, damping=0.01)
>>> influence.self_influence(model_fn, params, X, y, inverse).shape
torch.Size([8])
>>> queries = influence.queries(model_fn, params, X[:2], y[:2], inverse)
>>> influence.influence(model_fn, params, X, y, inverse, queries).shape
torch.Size([8, 2])

A sample's gradient is formed only where its parameter is used at several positions, and a part of it at a time. Over a data set
go the specs `SelfInfluence`, `Influence` and `BatchProjection`, by `curvfunc.accumulate`. As all results, gradients follow
the loss: those of a mean carry 1/N.
"""

from curvfunc.influence.functions import influence, queries, self_influence
from curvfunc.influence.projection import BatchProjection, batch_projection
from curvfunc.influence.specs import Influence, Queries, SelfInfluence

__all__ = [
    "BatchProjection",
    "Influence",
    "Queries",
    "SelfInfluence",
    "batch_projection",
    "influence",
    "queries",
    "self_influence",
]
