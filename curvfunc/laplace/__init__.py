"""Laplace approximations: N(θ, (K + δ)⁻¹) with the curvature K of the log-likelihood at its maximum, and prior precision δ.

>>> model_fn, params = functionalize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
>>> X, y = torch.randn(8, 4), torch.arange(8) % 3
>>> posterior = laplace.fit(model_fn, params, [(X, y)])  # by KFLR; curvature=DiagGGN() is the diagonal one
>>> evidence = laplace.log_marginal_likelihood(posterior, prior_precision=1.0)
>>> covariance = laplace.functional_variance(model_fn, X, posterior, prior_precision=1.0)  # of the linearized outputs
>>> covariance.shape, laplace.sample(posterior, 5, prior_precision=1.0)["0.weight"].shape
(torch.Size([8, 3, 3]), torch.Size([5, 5, 4]))

That of the last layers takes the others as constants: `functionalize` leaves out what does not require a gradient.
"""

from curvfunc.laplace.evidence import log_marginal_likelihood
from curvfunc.laplace.posterior import Posterior, covariance, fit, sample
from curvfunc.laplace.predictive import FunctionalVariance, functional_variance

__all__ = [
    "FunctionalVariance",
    "Posterior",
    "covariance",
    "fit",
    "functional_variance",
    "log_marginal_likelihood",
    "sample",
]
