"""
Signal and noise per layer
==========================

A gradient of a batch is the true one and noise. `Variance` says how much noise, from the same
backward pass, and `curvfunc.diagnostics.signal_to_noise` compares them layer by layer. A ratio
of one is what pure noise would show.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvfunc
from curvfunc import Grad, Loss, Variance, diagnostics

digits = load_digits()
X, y = (
    torch.tensor(digits.images[:, None] / 16, dtype=torch.float32),
    torch.tensor(digits.target),
)
convolutions = (
    nn.Conv2d(1, 12, 3),
    nn.ReLU(),
    nn.Conv2d(12, 24, 3),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
)
net = nn.Sequential(*convolutions, nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10))
model_fn, params = curvfunc.functionalize(net)
layers = {"0": "conv 1", "2": "conv 2", "6": "linear 1", "8": "linear 2"}

# %%
# Adam, with loss, gradient and variance from one call a step.

N, steps = 128, 200
adam = torch.optim.Adam(params.values(), lr=3e-3)
losses, ratios = [], {layer: [] for layer in layers}
for _ in range(steps):
    batch = torch.randperm(len(X))[:N]
    loss, grad, variance = curvfunc.compute(
        model_fn, params, X[batch], y[batch], (Loss(), Grad(), Variance())
    )
    losses.append(float(loss))
    for layer, ratio in diagnostics.signal_to_noise(grad, variance, N).items():
        ratios[layer].append(N * float(ratio))
    for name, p in params.items():
        p.grad = grad[name]
    adam.step()

# %%
# At first there is more signal than noise, most of all in the first layer. Once the digits are
# learned, what is left of a batch's gradient is noise: a larger batch, or a smaller step, would
# be worth more than another epoch of the same.


def smooth(values, width=9):
    """Medians of neighbours."""
    return torch.tensor(values).unfold(0, width, 1).median(1).values


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
left.plot(losses, color="0.75", linewidth=1)
left.plot(range(4, steps - 4), smooth(losses), color="black")
left.set(yscale="log", xlabel="step", title="Loss of the batch")
for layer, label in layers.items():
    (line,) = right.plot(range(4, steps - 4), smooth(ratios[layer]), label=label)
    right.plot(ratios[layer], color=line.get_color(), alpha=0.15, linewidth=1)
right.axhline(1, color="0.4", linestyle="--", linewidth=1)
right.annotate(
    "noise alone",
    (steps, 1),
    ha="right",
    va="top",
    color="0.4",
    xytext=(0, -40),
    textcoords="offset points",
)
right.set(yscale="log", xlabel="step", title="Signal over noise of the gradient")
right.legend(ncols=2)
