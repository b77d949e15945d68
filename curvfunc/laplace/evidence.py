"""How well a prior fits: the marginal likelihood."""

import math

import optree
import torch
from torch import Tensor

from curvfunc import kronecker
from curvfunc.laplace.posterior import RAISED, SHARED, Posterior, check_precision
from curvfunc.tensors.docstrings import documented

__all__ = ["log_marginal_likelihood"]


@documented(SHARED, RAISED)
def log_marginal_likelihood(posterior: Posterior, prior_precision: float | Tensor) -> Tensor:
    """log p(data | δ) ≈ −L(θ) − ½ δ ‖θ‖² + ½ P log δ − ½ log det (K + δ), for the prior N(0, 1/δ) of P parameters.

    It can be differentiated by δ, and optimized in log δ.

    Returns:
        A scalar, in float64.

    Raises:
        ValueError: If the prior precision is not positive.

    References:
        MacKay 1992, "A practical Bayesian framework for backpropagation networks"; Immer et al. 2021, "Scalable marginal
        likelihood estimation for model selection in deep learning".

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> posterior = laplace.fit(model_fn, params, [(torch.randn(8, 4), torch.arange(8) % 3)])
        >>> log_delta = torch.zeros((), requires_grad=True)
        >>> adam = torch.optim.Adam([log_delta], lr=0.1, maximize=True)
        >>> for _ in range(3):
        ...     adam.zero_grad()
        ...     laplace.log_marginal_likelihood(posterior, log_delta.exp()).backward()
        ...     adam.step()
    """
    check_precision(prior_precision)
    leaves = optree.tree_leaves(posterior.mean)
    delta = torch.as_tensor(prior_precision, dtype=torch.float64, device=posterior.loss.device)
    squared = torch.stack([p.double().square().sum().to(delta.device) for p in leaves]).sum()
    size = sum([math.prod(p.shape) for p in leaves])
    logdets = [d.to(delta) for d in kronecker.logdet(posterior.curvature, damping=delta).values()]
    return -posterior.loss - (delta * squared - size * delta.log() + torch.stack(logdets).sum()) / 2
