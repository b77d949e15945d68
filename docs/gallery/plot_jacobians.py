"""
The features of a linearized network
====================================

Around its parameters a network is a linear model whose features are the rows of its Jacobian,
`curvfunc.batch_jac`. For one input and one output these features are curves; training moves
them to where the data needs them.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import curvfunc

torch.manual_seed(3)
X = torch.cat([torch.rand(40, 1) * 2 - 3, torch.rand(40, 1) * 2 + 1])
y = torch.sin(2 * X) + 0.1 * torch.randn_like(X)
model_fn, params = curvfunc.functionalize(
    nn.Sequential(nn.Linear(1, 60), nn.Tanh(), nn.Linear(60, 1))
)
start = {name: p.clone() for name, p in params.items()}
adam = torch.optim.Adam(params.values(), lr=2e-2)
for _ in range(1500):
    for name, grad in curvfunc.compute(
        model_fn, params, X, y, curvfunc.Grad(), loss_fn=F.mse_loss
    ).items():
        params[name].grad = grad
    adam.step()

# %%
# The Jacobian over a grid, [N, P]; and the linear model with its features, fitted to the same
# data with a little ridge.

grid = torch.linspace(-4, 4, 300)[:, None]


def features(params, X):
    """Jacobians as rows, [N, P]."""
    return torch.cat(
        [J[:, 0].flatten(1) for J in curvfunc.batch_jac(model_fn, params, X).values()], 1
    )


def linearized(params):
    """What the linear model says on the grid."""
    with torch.no_grad():
        J, residual = features(params, X), y - model_fn(params, X)
        weights = J.T @ torch.linalg.solve(J @ J.T + 1e-2 * torch.eye(len(X)), residual)
        return model_fn(params, grid) + features(params, grid) @ weights


figure, axes = plt.subplots(2, 2, figsize=(10, 5.8), height_ratios=(1.2, 1))
for column, (title, at) in zip(
    axes.T, {"At the start": start, "After training": params}.items(), strict=True
):
    J = features(at, grid)[:, :120]  # of the first layer
    J = J[:, J.abs().argmax(0).argsort()].T
    bound = float(J.abs().quantile(0.99))
    column[0].imshow(
        J,
        cmap="RdBu_r",
        vmin=-bound,
        vmax=bound,
        aspect="auto",
        extent=(-4, 4, 120, 0),
        interpolation="nearest",
    )
    column[0].set(title=f"{title}: the first layer's 120 features", yticks=[], xticks=[])
    column[1].plot(grid, linearized(at), label="linearized, fitted")
    column[1].plot(grid, model_fn(at, grid).detach(), linestyle="--", label="the network")
    column[1].plot(X, y, "o", color="0.4", markersize=3)
    column[1].set(xlabel="input", ylim=(-2.2, 2.2), xlim=(-4, 4))
axes[1, 0].legend(ncols=2)
