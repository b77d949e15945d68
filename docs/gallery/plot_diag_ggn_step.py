"""
A step with the diagonal of the GGN
===================================

Parameters differ in how much the loss curves along them. Dividing the gradient by the diagonal
of the generalized Gauss-Newton matrix evens that out. Here inputs have scales from 0.1 to 3, as
raw features have, and a plain gradient step is either too long for some or too short for
others.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvfunc
from curvfunc import DiagGGN, Grad, Loss

digits = load_digits()
X, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
scales = torch.logspace(-1, 0.5, 64)[torch.randperm(64)]
X = (X - X.mean(0)) * scales
model_fn, start = curvfunc.functionalize(
    nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
)

# %%
# The step is p − lr · g / (D + δ), with one drawn label per sample for D. Both methods have the
# best of seven learning rates.


def train(lr, damping, steps=60):
    """Losses of all digits, step by step; a damping of None is gradient descent."""
    params, losses, generator = start, [], torch.Generator().manual_seed(0)
    average = None
    for step in range(steps):
        specs = (Loss(), Grad(), *([DiagGGN(mc_samples=1)] if damping else []))
        loss, grad, *diagonal = curvfunc.compute(
            model_fn, params, X, y, specs, generator=generator
        )
        losses.append(float(loss))
        if diagonal:
            weight = 1 / min(step + 1, 10)  # a moving average of draws
            average = (
                diagonal[0]
                if average is None
                else {k: a + weight * (diagonal[0][k] - a) for k, a in average.items()}
            )
        params = {
            name: p - lr * (grad[name] / (average[name] + damping) if average else grad[name])
            for name, p in params.items()
        }
    return losses, average


rates = {
    None: (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
    1e-3: (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
}
best = {
    damping: min((train(lr, damping) for lr in some), key=lambda run: run[0][-1])
    for damping, some in rates.items()
}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
for (losses, _), label in zip(
    best.values(), ("gradient", "gradient over GGN's diagonal"), strict=True
):
    left.semilogy(losses, label=label)
left.set(xlabel="step", title="Loss of all digits")
left.legend()
curvature = best[1e-3][1]["0.weight"].mean(0)
right.loglog(scales, curvature, "o", markersize=5, alpha=0.8)
right.axhline(1e-3, color="0.4", linestyle="--", linewidth=1)
right.annotate("damping", (0.1, 1e-3), color="0.4", xytext=(0, 3), textcoords="offset points")
right.set(
    xlabel="scale of the input", title="Curvature of a pixel's weights", ylim=(1e-7, None)
)
