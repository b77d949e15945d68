"""Differentially private gradients: what each sample can add is bounded, noise of that size hides it, batches are Poisson's.

A private step releases (Σₙ min(1, C / ‖gₙ‖) gₙ + N(0, (σC)² I)) / D. The sum is `curvfunc.clipped_grad`'s; the noise multiplier
σ, the sampling rate q and the number of steps T are what an accountant makes (ε, δ) of, such as that of ``dp-accounting`` or
Opacus; none is here. The denominator D is a number that does not depend on the data, usually the expected batch size q N: the
size of a batch is a secret.

>>> model_fn, params = functionalize(nn.Linear(4, 3))
>>> X, y, N, rate = torch.randn(100, 4), torch.arange(100) % 3, 100, 0.2
>>> for batch in private.poisson_batches(N, rate, steps=5):
...     given = {"max_norm": 1.0, "noise_multiplier": 1.1, "denominator": rate * N}
...     grad = private.noisy_grad(model_fn, params, X[batch], y[batch], **given)
...     params = {name: p - 0.1 * grad[name] for name, p in params.items()}

What else a program tells of the data (a loss that it prints, buffers that the model changes in its forward pass, a number of
steps that follows the loss, parameters chosen by their accuracy) is not in the account. Sums are formed in floating point,
whose rounding the accounts do not know either.
"""

from curvfunc.private.batches import poisson_batches
from curvfunc.private.noise import add_noise
from curvfunc.private.step import noisy_grad

__all__ = ["add_noise", "noisy_grad", "poisson_batches"]
