"""
Influence: who taught it that?
==============================

Five percent of the labels are wrong. A sample's self-influence is large where the network bent
for it alone, and most wrong labels are among the highest. A larger network, and digits that
helped or harmed one test digit: ``examples/influence.py``.
"""

from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import curvfunc
from curvfunc import influence, kronecker

summed = partial(F.cross_entropy, reduction="sum")
digits = load_digits()
X, true = (
    torch.tensor(digits.images[:, None] / 16, dtype=torch.float32),
    torch.tensor(digits.target),
)
wrong = torch.randperm(len(X))[: len(X) // 20]
y = true.clone()
y[wrong] = (y[wrong] + torch.randint(1, 10, wrong.shape)) % 10

convolution = nn.Conv2d(1, 12, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
net = nn.Sequential(*convolution, nn.Linear(108, 48), nn.ReLU(), nn.Linear(48, 10))
model_fn, params = curvfunc.functionalize(net)
adam = torch.optim.Adam(params.values(), lr=5e-3)
for _ in range(900):
    batch = torch.randperm(len(X))[:128]
    for name, grad in curvfunc.compute(
        model_fn, params, X[batch], y[batch], curvfunc.Grad()
    ).items():
        params[name].grad = grad
    adam.step()
params = {name: p.detach() for name, p in params.items()}

# %%
# Kronecker factors of all samples, with EKFAC's eigenvalues, inverted; then g (B + δ)⁻¹ g of
# each sample.

factors = curvfunc.kflr(model_fn, params, X, y, joined=True, loss_fn=summed)
K = kronecker.decompose(factors, kronecker.structure(model_fn, params, X[:1]))
K = kronecker.correct(
    K, kronecker.ekfac(model_fn, params, X, y, K, mc_samples=0, loss_fn=summed)
)
inverse = kronecker.inverse(K, damping=1.0)
scores = influence.self_influence(model_fn, params, X, y, inverse, loss_fn=summed)
order = scores.argsort(descending=True)
hit = torch.isin(order, wrong)

# %%
# The sixteen highest, and how soon all wrong labels are found. A network as small as this has
# not learned them by heart: the plain loss finds them as soon.

figure = plt.figure(figsize=(10, 3.6))
left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
for ax, n in zip(left.subplots(2, 8).flat, order[:16].tolist(), strict=True):
    ax.imshow(X[n, 0], cmap="gray_r")
    title, color = (
        (f"“{y[n]}” is {true[n]}", "#D55E00") if y[n] != true[n] else (f"“{y[n]}”", "black")
    )
    ax.set_title(title, fontsize=9, loc="center", color=color)
    ax.set(xticks=[], yticks=[])
ax = right.subplots()
share = torch.arange(1, len(X) + 1) / len(X)
ax.plot(100 * share, 100 * hit.cumsum(0) / len(wrong), label="by self-influence")
losses = F.cross_entropy(model_fn(params, X), y, reduction="none")
hit_by_loss = torch.isin(losses.argsort(descending=True), wrong)
ax.plot(100 * share, 100 * hit_by_loss.cumsum(0) / len(wrong), label="by loss")
ax.plot([0, 100], [0, 100], color="0.5", linestyle=":", label="by chance")
ax.set(xlabel="% of digits looked at", title="% of wrong labels found", xlim=(0, 40))
ax.legend()
