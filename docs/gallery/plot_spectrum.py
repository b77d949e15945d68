"""
The spectrum of a Hessian
=========================

Stochastic Lanczos quadrature draws the density of a matrix's eigenvalues out of products with
it. This network has 1,482 parameters, so that the matrix can still be formed to compare; the
products do not know that.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvfunc

digits = load_digits()
X, y = (
    torch.tensor(digits.data / 16, dtype=torch.float32)[:1000],
    torch.tensor(digits.target)[:1000],
)
net = nn.Sequential(
    nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10)
)
model_fn, params = curvfunc.functionalize(net)
adam = torch.optim.Adam(params.values(), lr=1e-2)
for _ in range(40):
    for name, grad in curvfunc.compute(model_fn, params, X, y, curvfunc.Grad()).items():
        params[name].grad = grad
    adam.step()
params = {name: p.detach().double() for name, p in params.items()}
X = X.double()

# %%
# Both matrices as operators; 50 products with each of three random vectors. The largest
# eigenvalues by ``eigsh``.

operators = {"Hessian": curvfunc.hessian_operator, "Gauss-Newton": curvfunc.ggn_operator}
matrices = {name: operator(model_fn, params, X, y) for name, operator in operators.items()}
spectra = {
    name: curvfunc.spectral_density(A, num_steps=50, num_vectors=3)
    for name, A in matrices.items()
}
largest, _ = curvfunc.eigsh(matrices["Hessian"], 12, which="LA", tol=1e-3)

# %%
# The bulk of the Hessian sits around zero, with negative eigenvalues that the Gauss-Newton
# matrix, which has none, leaves out. Few eigenvalues stand out, about one less than there are
# classes.

figure, axes = plt.subplots(2, 1, figsize=(10, 5.4), sharex=True)
high = 1.05 * float(largest.max())
low = -0.12 * high
grid, width = torch.linspace(low, high, 1500, dtype=torch.float64), high / 250
for ax, (name, spectrum), color in zip(
    axes, spectra.items(), ("#D55E00", "#0072B2"), strict=True
):
    density = spectrum.density(grid, width)
    ax.fill_between(
        grid,
        density.clamp(min=1e-5),
        1e-5,
        color=color,
        alpha=0.35,
        linewidth=0,
        label="Lanczos quadrature",
    )
    eigenvalues = torch.linalg.eigvalsh(matrices[name].dense())
    exact = torch.exp(-0.5 * ((grid[:, None] - eigenvalues) / width) ** 2).mean(1) / (
        width * (2 * torch.pi) ** 0.5
    )
    ax.plot(grid, exact.clamp(min=1e-5), color="black", linewidth=0.9, label="all eigenvalues")
    negative = int((eigenvalues < -1e-8).sum())
    title = f"{name}: {len(eigenvalues)} eigenvalues, {negative} negative"
    ax.set(yscale="log", ylim=(1e-4, None), title=title)
    ax.legend()
axes[0].plot(largest, [2e-4] * len(largest), "|", color="black", markersize=12)
axes[1].set_xlabel("eigenvalue")
