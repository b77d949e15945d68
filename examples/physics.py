"""Poisson's equation by a physics-informed network: K-FAC and Gauss-Newton beside Adam, with the same time for each.

-Δu = f on the unit square with u = 0 around it, and f such that u = sin(πx) sin(πy). The network N is part of an ansatz that
is zero on the boundary, u = 16 x (1 - x) y (1 - y) N(x, y). What is trained is the residual Δu + f at random collocation
points, a model like any other, with the mean square as its loss. Value, gradient and Laplacian go forward through the network
together, as four rows per point: each layer is one linear operation on them, for which K-FAC has real factors. (Derivatives by
torch.func give the same numbers, but there no operation is seen on the samples, and all blocks are dense.)

    python examples/physics.py --help
"""

import argparse
import math
import time
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvfunc import KFLR, kronecker, optim

Params = dict[str, Tensor]
WIDTHS, POINTS = (2, 32, 32, 1), 256
# Adam's is the best of eight, 1e-3, 2e-3, 5e-3, ... 0.2, each decaying by a cosine to zero within the budget, by the error
# after 15 s, averaged over two other seeds. It has new points at each step; others profit from some steps on the same ones.
LEARNING_RATE = 5e-3
NEW_POINTS_EVERY = {"Adam": 1, "K-FAC": 50, "Gauss-Newton": 10}
COLORS = {"Adam": "#009E73", "K-FAC": "#CC79A7", "Gauss-Newton": "#0072B2"}
GRID = torch.cartesian_prod(*2 * [torch.linspace(0, 1, 51, dtype=torch.float64)])


def ansatz(params: Params, X: Tensor) -> tuple[Tensor, Tensor]:
    """u and Δu at X [n, 2]: [n], [n]. Weights [out, in + 1] have the bias as their last column."""
    at = X.new_tensor([1.0, 0.0, 0.0, 0.0])[:, None].expand(len(X), 4, 1)  # a constant's value, gradient, Laplacian
    h = torch.cat([X[:, None], torch.eye(2).to(X).expand(len(X), 2, 2), torch.zeros_like(X)[:, None]], 1)
    for i, weight in enumerate(params.values()):
        if i:  # tanh' = 1 - tanh², tanh'' = -2 tanh tanh'
            t, gradient, laplacian = h[:, :1].tanh(), h[:, 1:3], h[:, 3:]
            slope = 1 - t**2
            h = torch.cat([t, slope * gradient, slope * (laplacian - 2 * t * (gradient**2).sum(1, keepdim=True))], 1)
        h = F.linear(torch.cat([h, at], 2), weight)
    factors = 4 * X * (1 - X)  # zero on the boundary, with the second derivative -8
    value, gradient = factors.prod(1), 4 * (1 - 2 * X) * factors.flip(1)
    u = value * h[:, 0, 0]
    return u, value * h[:, 3, 0] + 2 * (gradient * h[:, 1:3, 0]).sum(1) - 8 * factors.sum(1) * h[:, 0, 0]


def solution(X: Tensor) -> Tensor:
    """What u should be."""
    return (math.pi * X).sin().prod(1)


def residual(params: Params, X: Tensor) -> Tensor:
    """Δu + f, the model."""
    return ansatz(params, X)[1] + 2 * math.pi**2 * solution(X)


def error(params: Params) -> float:
    """Relative L2 error of u on a grid."""
    with torch.no_grad():
        return ((ansatz(params, GRID)[0] - solution(GRID)).norm() / solution(GRID).norm()).item()


def newton(method: str, params: Params) -> optim.Transformation:
    """K-FAC or Gauss-Newton, whose steps need no learning rate."""
    if method == "Gauss-Newton":
        return optim.chain(optim.newton_cg(damping=1.0, iterations=100), optim.scale(-1.0))
    kfac = optim.scale_by_kfac(kronecker.structure(residual, params, GRID[:2]), KFLR(), damping=1e-5)
    return optim.chain(optim.scale_exactly(kfac, damping=10.0), optim.scale(-1.0))


def train(method: str, seed: int, seconds: float, steps: float = math.inf) -> tuple[Params, list[tuple[float, int, float]]]:
    """The parameters; and seconds, steps and error from time to time, which is not counted."""
    torch.manual_seed(seed)
    layers = [nn.Linear(i, o, dtype=torch.float64) for i, o in pairwise(WIDTHS)]
    params = {str(i): torch.cat([m.weight, m.bias[:, None]], 1).detach() for i, m in enumerate(layers)}
    history, used, k = [(0.0, 0, error(params))], 0.0, 0
    if method == "Adam":
        adam = torch.optim.Adam([p.requires_grad_() for p in params.values()])
    else:
        transformation = newton(method, params)
        state = transformation.init(params)
    while used < seconds and k < steps:
        if k % NEW_POINTS_EVERY[method] == 0:
            X, y = torch.rand(POINTS, 2, dtype=torch.float64), torch.zeros(POINTS, dtype=torch.float64)
        begin = time.process_time()
        if method == "Adam":
            adam.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * max(used / seconds, k / steps))) / 2
            adam.zero_grad()
            F.mse_loss(residual(params, X), y).backward()
            adam.step()
        else:
            _, params, state = optim.step(residual, transformation, params, state, X, y, loss_fn=F.mse_loss)
        used, k = used + time.process_time() - begin, k + 1
        if k >= 1.05 * history[-1][1] and used >= history[-1][0] + seconds / 200:
            history.append((used, k, error(params)))
    return params, [*history, (used, k, error(params))]


def draw(runs: dict, path: Path) -> None:
    """Errors against seconds and steps; the solution, and where each method errs."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), layout="constrained")
    for ax, at, label in zip(axes[0], (0, 1), ("seconds of one core", "step"), strict=False):
        for method, (_, history) in runs.items():
            ax.loglog([row[at] for row in history[1:]], [row[2] for row in history[1:]], color=COLORS[method], label=method)
        ax.set(xlabel=label, ylabel="relative L2 error")
    axes[0, 0].legend(frameon=False)
    exact = solution(GRID)
    errors = {method: (ansatz(params, GRID)[0] - exact).detach().abs() for method, (params, _) in runs.items()}
    fields = {"u": exact} | {f"{m}: log₁₀ |error|": e.clamp_min(1e-9).log10() for m, e in errors.items()}
    for ax, (title, field) in zip(axes.flat[2:], fields.items(), strict=True):
        shown = ax.imshow(field.reshape(51, 51).T.numpy(), origin="lower", extent=(0, 1, 0, 1), cmap="magma")
        shown.set_clim(*((0, 1) if title == "u" else (-7, -3)))
        ax.set_title(title, fontsize=10)
        figure.colorbar(shown, ax=ax)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="of one core, for each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("physics.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for method in COLORS:  # so that nothing is done for the first time in what is measured
        train(method, args.seed, math.inf, steps=2)
    runs = {method: train(method, args.seed, args.seconds) for method in COLORS}
    print("| | steps | ms / step | relative L2 error | of Adam's |\n|" + "---|" * 5)
    for method, (_, history) in runs.items():
        seconds, steps, found = history[-1]
        print(f"| {method} | {steps} | {1000 * seconds / steps:.1f} | {found:.1e} | {found / runs['Adam'][1][-1][2]:.3f} |")
    draw(runs, args.picture)


if __name__ == "__main__":
    main()
