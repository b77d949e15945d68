"""
All quantities at a glance
==========================

One small network on the digits, one call, and the same layer in every quantity: 64 pixels go
into each of ten units, so a parameter of the layer is a picture of 8 × 8 pixels for each unit.
Here is the one that is asked for threes.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvfunc
from curvfunc import (
    KFLR,
    BatchGrad,
    DiagGGN,
    DiagHessian,
    Grad,
    SqrtGGN,
    SumGradSquared,
    Variance,
)

digits = load_digits()
X, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
model_fn, params = curvfunc.functionalize(
    nn.Sequential(nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10))
)

# %%
# A few steps first, so that there is something to see. Then eight quantities, from one forward
# pass.

for _ in range(60):
    grad = curvfunc.compute(model_fn, params, X, y, Grad())
    params = {name: p - 2.0 * grad[name] for name, p in params.items()}

specs = (
    Grad(),
    BatchGrad(),
    SumGradSquared(),
    Variance(),
    DiagGGN(),
    DiagHessian(),
    SqrtGGN(),
    KFLR(),
)
grad, each, squares, variance, diag_ggn, diag_h, root, factors = curvfunc.compute(
    model_fn, params, X[:400], y[:400], specs
)

# %%
# Rows of pictures: first order, second order, and the two Kronecker factors with their
# product's diagonal beside the exact one.

name, unit, three = "0.weight", 3, int((y == 3).nonzero()[0])
B, A = factors[name]
pictures = {
    "a digit, $x_n$": X[three],
    "its gradient, $g_n$": each[name][three, unit],
    "the gradient, $\\Sigma g_n$": grad[name][unit],
    "squares, $\\Sigma g_n^2$": squares[name][unit],
    "variance": variance[name][unit],
    "a column of the root": root[name][3, three, unit],
    "GGN, diagonal": diag_ggn[name][unit],
    "by the factors": B[unit, unit] * A.diag(),
    "Hessian, diagonal": diag_h[name][unit],
}
figure, axes = plt.subplots(2, 6, figsize=(10, 3.9))
for ax, (title, values) in zip(axes.T.flat, pictures.items(), strict=False):
    signed = bool((values < 0).any())
    bound = float(values.abs().max())
    ax.imshow(
        values.reshape(8, 8),
        cmap="RdBu_r" if signed else "magma",
        vmin=-bound if signed else 0,
        vmax=bound,
    )
    ax.set_title(title, fontsize=9)
for ax, matrix, title in (
    (axes[1, 4], B, "factor of outputs, $B$"),
    (axes[0, 5], A, "factor of inputs, $A$"),
):
    bound = float(matrix.abs().max())
    ax.imshow(matrix, cmap="RdBu_r", vmin=-bound, vmax=bound)
    ax.set_title(title, fontsize=9)
axes[1, 5].scatter(
    each[name].flatten(1).norm(dim=1), each["2.weight"].flatten(1).norm(dim=1), s=4, alpha=0.5
)
axes[1, 5].set_title("norms in two layers", fontsize=9)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
