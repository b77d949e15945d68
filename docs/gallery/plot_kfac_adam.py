"""
K-FAC against Adam
==================

K-FAC divides by a curvature matrix that is a Kronecker product for each layer, `curvfunc.optim`
makes an optimizer of it. It needs fewer steps than Adam, and each of its steps takes longer;
both are drawn. With five seeds and searched learning rates: :doc:`/optimizers`.
"""

import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvfunc
from curvfunc import optim

digits = load_digits()
order = torch.randperm(len(digits.target))
X, y = (
    torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32)[order],
    torch.tensor(digits.target)[order],
)
X, y, X_held_out, y_held_out = X[500:], y[500:], X[:500], y[:500]


def network():
    """Two convolutions and two linear layers, the same each time."""
    torch.manual_seed(1)
    convolutions = (
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
    )
    return nn.Sequential(*convolutions, nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


# %%
# The optimizer takes the batch, as it needs more of it than the gradient: ``step(X, y)``.


def run(make, steps):
    """Seconds, losses and held-out accuracies."""
    net = network()
    optimizer, generator = make(net), torch.Generator().manual_seed(0)
    rows, seconds = [], 0.0
    for _ in range(steps):
        batch = torch.randint(len(X), (256,), generator=generator)
        begin = time.perf_counter()
        if isinstance(optimizer, curvfunc.optim.Preconditioned):
            loss = optimizer.step(X[batch], y[batch])
        else:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(X[batch]), y[batch])
            loss.backward()
            optimizer.step()
        seconds += time.perf_counter() - begin
        with torch.no_grad():
            rows.append(
                (
                    seconds,
                    float(loss),
                    float((net(X_held_out).argmax(1) == y_held_out).float().mean()),
                )
            )
    return list(zip(*rows, strict=True))


kfac = {
    "lr": 0.054,
    "momentum": 0.5,
    "damping": 1.3e-3,
    "kl_clip": 0.01 / 0.054**2,
    "inverses_every": 5,
}
runs = {
    "K-FAC": run(lambda net: optim.KFAC(net, **kfac), 60),
    "Adam": run(lambda net: torch.optim.Adam(net.parameters(), lr=0.017), 60),
    "SGD": run(lambda net: torch.optim.SGD(net.parameters(), lr=0.11, momentum=0.9), 60),
}

figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.6))
for label, (seconds, losses, accuracies) in runs.items():
    steps = range(1, len(losses) + 1)
    axes[0].semilogy(steps, losses, label=label)
    axes[1].plot(steps, accuracies, label=label)
    axes[2].plot(seconds, accuracies, label=label)
axes[0].set(xlabel="step", title="Loss of the batch")
for ax, label in ((axes[1], "step"), (axes[2], "seconds")):
    ax.axhline(0.97, color="0.4", linestyle="--", linewidth=1)
    ax.set(xlabel=label, title="Held-out accuracy", ylim=(0.6, 1.0))
axes[0].legend()
