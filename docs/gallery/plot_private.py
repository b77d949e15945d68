"""
Private training
================

`curvfunc.private.noisy_grad` bounds the norm of every digit's gradient, adds noise of that size
and divides by the expected size of a batch, which is Poisson's. What noise costs in accuracy,
for three multipliers; what each is worth in (ε, δ) is an accountant's to say, as
``examples/private.py`` shows.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvfunc
from curvfunc import private

digits = load_digits()
order = torch.randperm(len(digits.target))
X, y = (
    torch.tensor(digits.data / 16, dtype=torch.float32)[order],
    torch.tensor(digits.target)[order],
)
X, y, X_held_out, y_held_out = X[500:], y[500:], X[:500], y[:500]
model_fn, start = curvfunc.functionalize(
    nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
)

# %%
# Four runs with the same batches: no bound and no noise, and a bound of one with more and more
# noise.

rate, steps = 0.1, 150
settings = {
    "plain": (1e6, 0.0, 0.5),
    "noise 1": (1.0, 1.0, 1.0),
    "noise 3": (1.0, 3.0, 1.0),
    "noise 9": (1.0, 9.0, 1.0),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
for label, (max_norm, noise, lr) in settings.items():
    params, accuracies, chance = start, [], torch.Generator().manual_seed(0)
    for batch in private.poisson_batches(len(X), rate, steps=steps, generator=chance):
        given = {
            "max_norm": max_norm,
            "noise_multiplier": noise,
            "denominator": rate * len(X),
            "generator": chance,
        }
        grad = private.noisy_grad(model_fn, params, X[batch], y[batch], **given)
        params = {name: p - lr * grad[name] for name, p in params.items()}
        with torch.no_grad():
            accuracies.append(
                float((model_fn(params, X_held_out).argmax(1) == y_held_out).float().mean())
            )
    (line,) = left.plot(range(1, steps + 1), accuracies, label=label)
    norms = (
        len(X) * sum(curvfunc.batch_l2(model_fn, params, X, y).values()).sqrt()
    )  # of a mean, times N
    right.hist(
        norms.log10(),
        bins=60,
        range=(-4, 2),
        histtype="stepfilled",
        alpha=0.35,
        color=line.get_color(),
        label=label,
    )
left.set(xlabel="step", title="Accuracy on held-out digits", ylim=(0, 1))
left.legend()
right.axvline(0, color="0.4", linestyle="--", linewidth=1)
right.annotate(
    "bound",
    (0, right.get_ylim()[1]),
    color="0.4",
    va="top",
    xytext=(4, 0),
    textcoords="offset points",
)
right.set(xlabel="log10 of the norm", title="Gradients of single digits after training")
