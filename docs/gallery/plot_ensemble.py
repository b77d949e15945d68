"""
An ensemble by vmap
===================

Everything is a function of the parameters, so `torch.vmap` runs it for many networks at once.
Thirty networks that differ in their start alone, trained together with steps over their own
curvature: where they agree, and where they do not.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import stack_module_state, vmap

import curvfunc
from curvfunc import DiagGGN, Grad, Loss

X = torch.cat([torch.rand(25, 1) * 2.5 - 4, torch.rand(25, 1) * 2.5 + 1.5])
y = torch.sin(1.5 * X) + 0.3 * X + 0.1 * torch.randn_like(X)
members = [
    nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    for _ in range(30)
]
ensemble, _ = stack_module_state(members)
ensemble = {name: p.detach() for name, p in ensemble.items()}
model_fn, _ = curvfunc.functionalize(members[0])

# %%
# A step of one network; and of all of them.


def step(params):
    """A gradient over the GGN's diagonal, damped."""
    loss, grad, curvature = curvfunc.compute(
        model_fn, params, X, y, (Loss(), Grad(), DiagGGN()), loss_fn=F.mse_loss
    )
    return {
        name: p - 0.03 * grad[name] / (curvature[name] + 0.02) for name, p in params.items()
    }, loss


losses = []
for _ in range(500):
    ensemble, loss = vmap(step)(ensemble)
    losses.append(loss)

# %%
# Curvature of each member by the same way: at the end of training, a number for each network.


def trace(params):
    """Of the Gauss-Newton matrix of one network."""
    return sum(
        d.sum() for d in curvfunc.diag_ggn(model_fn, params, X, y, loss_fn=F.mse_loss).values()
    )


sharpness = vmap(trace)(ensemble)
grid = torch.linspace(-7, 7, 300)[:, None]
outputs = vmap(lambda params: model_fn(params, grid))(ensemble)[..., 0]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1, 1.6))
left.loglog(range(1, 501), torch.stack(losses), color="#0072B2", alpha=0.35, linewidth=1)
left.set(xlabel="step", title="Loss of thirty networks")
shade = (sharpness - sharpness.min()) / (sharpness.max() - sharpness.min())
for values, at in zip(outputs, shade, strict=True):
    right.plot(grid, values, color=plt.get_cmap("viridis")(float(at)), linewidth=0.8, alpha=0.8)
right.plot(X, y, "o", color="black", markersize=4)
right.set(title="What each says; brighter: more curved", ylim=(-2.5, 2.5), xlabel="input")
