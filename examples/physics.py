"""Poisson's equation by a physics-informed network: K-FAC and Gauss-Newton beside Adam, with the same time for each.

-Δu = f on the unit square with u = 0 around it, and f such that u = sin(πx) sin(πy). The network N is part of an ansatz that is
zero on the boundary, u = 16 x (1 - x) y (1 - y) N(x, y). What is trained is the residual Δu + f at random collocation points,
a model like any other, with the mean square as its loss. Value, gradient and Laplacian go forward through the network together,
as four rows per point, so that each layer is one linear operation on them, and K-FAC has factors of what the rows share. (With
derivatives by torch.func the same numbers come out, but no operation is seen on the samples: all blocks are dense.)

    python examples/physics.py --help
"""

import argparse
import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvfunc import KFLR, kronecker, optim

Params = dict[str, Tensor]
WIDTHS, POINTS = (2, 32, 32, 1), 256
# Adam's is the best of eight, 1e-3, 2e-3, 5e-3, ... 0.2, decaying by a cosine to zero within the budget, which did better than
# constant rates, as new points at each step did better than at each 20th; by the error after 15 s, averaged over three seeds
LEARNING_RATE, DAMPING, GGN_DAMPING = 1e-2, 1e-3, 1e-2
NEW_POINTS_EVERY = {"Adam": 1, "K-FAC": 20, "Gauss-Newton": 20}
COLORS = {"Adam": "#009E73", "K-FAC": "#CC79A7", "Gauss-Newton": "#0072B2"}


def ansatz(params: Params, X: Tensor) -> tuple[Tensor, Tensor]:
    """u and Δu at X [n, 2]: [n], [n]. Weights [out, in + 1] have the bias as their last column."""
    at = X.new_tensor([1.0, 0.0, 0.0, 0.0])[:, None].expand(len(X), 4, 1)  # a constant's value, gradient, Laplacian
    h = torch.cat([X[:, None], torch.eye(2).to(X).expand(len(X), 2, 2), torch.zeros_like(X)[:, None]], 1)
    for i, weight in enumerate(params.values()):
        if i:  # tanh' = 1 - tanh², tanh'' = -2 tanh tanh'
            t, gradient, laplacian = h[:, :1].tanh(), h[:, 1:3], h[:, 3:]
            slope = 1 - t**2
            bend = -2 * t * slope * (gradient**2).sum(1, keepdim=True)
            h = torch.cat([t, slope * gradient, slope * laplacian + bend], 1)
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


def exactly_scaled(kfac: optim.Transformation, damping: float) -> optim.Transformation:
    """K-FAC's direction and the step before, both scaled to the minimum of the quadratic model with the exact GGN + λ.

    λ adapts by the reduction ratio, and a step that would raise the loss is not taken: Martens and Grosse 2015, sec. 6.4 to 7.
    """

    def init(params: Params) -> dict:
        return {"kfac": kfac.init(params), "last": {k: torch.zeros_like(p) for k, p in params.items()}, "damping": damping}

    def update(grads: Params, state: dict, params: Params, curvature: tuple, due: tuple | None = None) -> tuple[Params, dict]:
        factors, local = curvature
        direction, inner = kfac.update(grads, state["kfac"], params, factors, due)
        flat = lambda tree: torch.cat([tree[k].flatten() for k in params])
        D = torch.stack([flat(direction), flat(state["last"])])
        GD = torch.stack([flat(local.product(d)) for d in (direction, state["last"])])
        A, b = D @ (GD + state["damping"] * D).T, D @ flat(grads)
        scales = A.diagonal().clamp_min(1e-300).rsqrt()
        best = scales * (torch.linalg.pinv(A * scales * scales[:, None], hermitian=True) @ (scales * b))
        step = {k: best[0] * direction[k] + best[1] * state["last"][k] for k in params}
        moved = local.loss({k: p - step[k] for k, p in params.items()})
        ratio = (local.value - moved) / (b @ best / 2)
        step = step if ratio > 0 else {k: torch.zeros_like(p) for k, p in params.items()}
        factor = 0.8 if ratio > 0.75 else 1.0 if ratio > 0.25 else 1.25
        return step, {"kfac": inner, "last": step, "damping": max(factor * state["damping"], 1e-10)}

    due = lambda state: kfac.due(state["kfac"])
    return optim.Transformation(init, update, due, lambda state, due: (kfac.needs(state["kfac"], due), optim.Locally()))


def start(method: str, params: Params) -> Callable[[Tensor, float], Params]:
    """A function that makes a step on a batch of points, given the share of the budget that is over."""
    if method == "Adam":
        adam = torch.optim.Adam([p.requires_grad_() for p in params.values()])

        def adam_step(X: Tensor, share: float) -> Params:
            adam.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * share)) / 2
            adam.zero_grad()
            residual(params, X).square().mean().backward()
            adam.step()
            return params

        return adam_step
    if method == "K-FAC":
        kfac = optim.scale_by_kfac(kronecker.structure(residual, params, GRID[:2]), KFLR(), damping=DAMPING)
        newton = exactly_scaled(kfac, DAMPING)
    else:
        newton = optim.newton_cg(damping=GGN_DAMPING, iterations=100)
    transformation = optim.chain(newton, optim.scale(-1.0))
    state = transformation.init(params)

    def newton_step(X: Tensor, share: float) -> Params:
        nonlocal params, state
        _, params, state = optim.step(residual, transformation, params, state, X, X.new_zeros(len(X)), loss_fn=F.mse_loss)
        return params

    return newton_step


def train(method: str, seed: int, seconds: float, steps: float = math.inf) -> tuple[Params, list[tuple[float, int, float]]]:
    """The parameters, and seconds, steps and error from time to time, which is not counted."""
    torch.manual_seed(seed)
    layers = [nn.Linear(i, o, dtype=torch.float64) for i, o in pairwise(WIDTHS)]
    params = {str(i): torch.cat([m.weight, m.bias[:, None]], 1).detach() for i, m in enumerate(layers)}
    step, history, used, k = start(method, params), [(0.0, 0, error(params))], 0.0, 0
    while used < seconds and k < steps:
        if k % NEW_POINTS_EVERY[method] == 0:
            X = torch.rand(POINTS, 2, dtype=torch.float64)
        begin = time.process_time()
        params = step(X, min(max(used / seconds, k / steps), 1))
        used, k = used + time.process_time() - begin, k + 1
        if k >= 1.05 * history[-1][1] and used >= history[-1][0] + seconds / 200:
            history.append((used, k, error(params)))
    return params, [*history, (used, k, error(params))]


def draw(runs: dict, path: Path) -> None:
    """Errors against seconds and steps; the solution, and where each method errs."""
    figure, axes = plt.subplot_mosaic([["seconds"] * 2 + ["steps"] * 2, ["u", *runs]], figsize=(11, 6.5), layout="constrained")
    side = math.isqrt(len(GRID))
    image = lambda ax, values, **options: ax.imshow(
        values.reshape(side, side).T.numpy(), origin="lower", extent=(0, 1, 0, 1), **options
    )
    for method, (params, history) in runs.items():
        seconds, steps, errors = zip(*history, strict=True)
        axes["seconds"].plot(seconds, errors, color=COLORS[method], label=method)
        axes["steps"].plot(steps, errors, color=COLORS[method])
        distance = (ansatz(params, GRID)[0] - solution(GRID)).detach().abs()
        shown = image(axes[method], distance.log10().clamp_min(-9), vmin=-7, vmax=-3, cmap="magma")
        axes[method].set_title(f"{method}: log₁₀ |error|", fontsize=10)
    axes["u"].set_title("u", fontsize=10)
    figure.colorbar(image(axes["u"], solution(GRID), cmap="viridis"), ax=axes["u"], shrink=0.6)
    figure.colorbar(shown, ax=[axes[method] for method in runs], shrink=0.6)
    for name in ("seconds", "steps"):
        axes[name].set(xlabel=name, ylabel="relative L2 error", yscale="log", xscale="linear" if name == "seconds" else "log")
        axes[name].grid(True, color="0.9")
    axes["seconds"].legend(frameon=False)
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


GRID = torch.cartesian_prod(*2 * [torch.linspace(0, 1, 51, dtype=torch.float64)])

if __name__ == "__main__":
    main()
