"""
Laplace uncertainty
===================

A posterior around trained parameters, from one pass over the data: where there was none, the
network is unsure. `curvfunc.laplace.fit` takes Kronecker factors, the marginal likelihood
chooses the prior precision by its own gradient, and `curvfunc.laplace.functional_variance` says
what outputs are uncertain by.
"""

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import nn

import curvfunc
from curvfunc import laplace

points, labels = make_moons(300, noise=0.15, random_state=0)
X, y = torch.tensor(points, dtype=torch.float32), torch.tensor(labels)
net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
model_fn, params = curvfunc.functionalize(net)
adam = torch.optim.Adam(params.values(), lr=1e-2, weight_decay=1e-3)
for _ in range(300):
    for name, grad in curvfunc.compute(model_fn, params, X, y, curvfunc.Grad()).items():
        params[name].grad = grad
    adam.step()
params = {name: p.detach() for name, p in params.items()}

# %%
# Fit; then the prior precision with the largest evidence.

posterior = laplace.fit(model_fn, params, [(X, y)])
log_precision = torch.zeros((), dtype=torch.float64, requires_grad=True)
ascent, path = torch.optim.Adam([log_precision], lr=0.1, maximize=True), []
for _ in range(80):
    ascent.zero_grad()
    evidence = laplace.log_marginal_likelihood(posterior, log_precision.exp())
    evidence.backward()
    path.append((float(log_precision.detach().exp()), float(evidence.detach())))
    ascent.step()
precision = path[-1][0]

# %%
# Probabilities on a grid: plain, and moderated by the variance of the outputs (MacKay 1992).

side = 120
grid = torch.cartesian_prod(torch.linspace(-3, 4, side), torch.linspace(-2.8, 3.2, side))
with torch.no_grad():
    outputs = model_fn(params, grid)
covariance = laplace.functional_variance(model_fn, grid, posterior, precision)
moderated = outputs / (1 + math.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt()

figure, axes = plt.subplots(1, 3, figsize=(10.8, 3.5), width_ratios=(1, 1, 0.8))
shown = {"Plain network": outputs, "With its posterior": moderated}
for ax, (title, values) in zip(axes, shown.items(), strict=False):
    confidence = values.softmax(1).max(1).values.reshape(side, side).T
    given = {"origin": "lower", "extent": (-3, 4, -2.8, 3.2), "cmap": "viridis"}
    image = ax.imshow(confidence, vmin=0.5, vmax=1, **given)
    for label, color in ((0, "#D55E00"), (1, "white")):
        ax.plot(*X[y == label].T, "o", color=color, markersize=2.5)
    ax.set(title=title, xticks=[], yticks=[])
figure.colorbar(image, ax=axes[1], shrink=0.9, label="confidence")
axes[2].plot([p for p, _ in path], [e for _, e in path], "o-", markersize=3)
axes[2].set(xlabel="prior precision", title="Log marginal likelihood")
