"""How soon do six optimizers reach 97 % held-out accuracy on scikit-learn's digits? In steps, and in seconds of one core.

The same for all: digits of 8 x 8, 500 of 1797 held out (split, start and batches by seed), a CNN of two convolutions and two
linear layers, float32, batches of 256. Momentum is 0.9 for SGD and DiagGGN; K-FAC and E-KFAC have 0.5, a bound on the KL
divergence of a step, and new inverses or bases every 5 steps; Hessian-free takes 20 iterations of conjugate gradients, and
whole steps. Seconds are those of all steps, without the held-out evaluation. Learning rate and damping are what ``--search``
finds: the best of 16 points of a Sobol sequence, the same for all, over three decades, by the steps to 97 % for two more seeds.

    python examples/kfac_digits.py --help
"""

import argparse
import math
import time
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from curvfunc import optim

GOAL, HELD_OUT, BATCH, SEEDS, SEARCH_SEEDS = 0.97, 500, 256, range(5), (100, 101)
both = lambda lr, d: {"lr": lr, "damping": d, "momentum": 0.5, "kl_clip": 0.01 / lr**2, "factors_every": 1}
# What makes it of model, learning rate and damping; the two as found; where the search begins, up to 1000 times that; color
METHODS = {
    "SGD": (lambda m, lr, d: torch.optim.SGD(m.parameters(), lr, momentum=0.9), (0.11, None), (1e-3, None), "#D55E00"),
    "Adam": (lambda m, lr, d: torch.optim.Adam(m.parameters(), lr), (0.017, None), (1e-4, None), "#009E73"),
    "DiagGGN": (lambda m, lr, d: optim.Diagonal(m, lr=lr, damping=d), (0.0014, 0.0092), (1e-3, 1e-4), "#0072B2"),
    "K-FAC": (lambda m, lr, d: optim.KFAC(m, **both(lr, d), inverses_every=5), (0.054, 0.0013), (1e-3, 1e-3), "#CC79A7"),
    "E-KFAC": (lambda m, lr, d: optim.EKFAC(m, **both(lr, d), bases_every=5, moments_every=1),
               (0.054, 0.0013), (1e-3, 1e-3), "#E69F00"),
    "Hessian-free": (lambda m, lr, d: optim.NewtonCG(m, damping=d, iterations=20), (None, 2.3), (None, 1e-2), "#000000"),
}  # fmt: skip


def train(method: str, rates: tuple, seed: int, steps: int, stop: bool = False) -> list[tuple[float, float, float]]:
    """Seconds, held-out accuracy and held-out loss after each step; ends where it diverges, or at the goal if it is to stop."""
    torch.manual_seed(seed)
    X, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order, rest = torch.randperm(len(X)), len(X) - HELD_OUT
    X, y = ((X - X.mean()) / X.std())[order].float().reshape(-1, 1, 8, 8), y[order]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = METHODS[method][0](model, *rates)
    history, seconds = [], 0.0
    indices = torch.cat([HELD_OUT + torch.randperm(rest) for _ in range(math.ceil(steps * BATCH / rest))])
    for batch in indices.split(BATCH)[:steps]:
        start = time.process_time()
        if isinstance(optimizer, optim.Preconditioned):
            optimizer.step(X[batch], y[batch])
        else:
            optimizer.zero_grad()
            F.cross_entropy(model(X[batch]), y[batch]).backward()
            optimizer.step()
        seconds += time.process_time() - start
        with torch.no_grad():
            loss = F.cross_entropy(out := model(X[:HELD_OUT]), y[:HELD_OUT]).item()
        history.append((seconds, (out.argmax(1) == y[:HELD_OUT]).double().mean().item(), loss))
        if not loss < 100 or (stop and history[-1][1] >= GOAL):
            break
    return history


def to_goal(history: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Steps and seconds to the goal."""
    return next(((i, row[0]) for i, row in enumerate(history, 1) if row[1] >= GOAL), (math.inf, math.inf))


def search(method: str, steps: int) -> tuple[tuple, float]:
    """Learning rate and damping with the fewest steps to the goal, and how many; a trial ends where it has lost."""
    found, best = METHODS[method][1], len(SEARCH_SEEDS) * steps
    for point in torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(16).tolist():
        rates = tuple(low and float(f"{low * 1000**x:.2g}") for low, x in zip(METHODS[method][2], point, strict=True))
        used = 0
        for seed in SEARCH_SEEDS:
            limit = min(steps, best - used)
            used += min(to_goal(train(method, rates, seed, limit, stop=True))[0], steps) if limit > 0 else 0
        found, best = (rates, used) if used < best else (found, best)
    return found, best / len(SEARCH_SEEDS)


def main() -> None:
    """Search; or train, print the table, and draw medians over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--search", action="store_true", help="search learning rates and damping instead (minutes)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--picture", type=Path, default=Path("kfac-digits.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.search:
        for method in METHODS:
            print(method, *search(method, args.steps), flush=True)
        return
    for method in METHODS:  # so that nothing is done for the first time in what is measured
        train(method, METHODS[method][1], SEARCH_SEEDS[0], 2)
    runs = {method: [] for method in METHODS}
    for seed in SEEDS:
        for method, histories in runs.items():
            histories.append(train(method, METHODS[method][1], seed, args.steps))
    print("| | learning rate | damping | steps to 97 % | seconds to 97 % | accuracy at the end |\n|" + "---|" * 6)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained")
    for method, histories in runs.items():
        steps, seconds = zip(*map(to_goal, histories), strict=True)
        rates = " | ".join("–" if rate is None else f"{rate:g}" for rate in METHODS[method][1])
        rows = [map(median, zip(*step, strict=True)) for step in zip(*histories, strict=False)]
        x, *curves = zip(*rows, strict=True)
        reached = f"{median(steps):g} ({min(steps):g} to {max(steps):g}) | {median(seconds):.2f}"
        print(f"| {method} | {rates} | {reached} | {curves[0][-1]:.1%} |")
        for column, at in zip(axes.T, (range(1, len(x) + 1), x), strict=True):
            for ax, values in zip(column, curves, strict=True):
                ax.plot(at, values, color=METHODS[method][3], label=method)
            column[0].axhline(GOAL, color="0.4", linestyle="--", linewidth=1)
    axes[0, 0].set(ylabel="held-out accuracy", ylim=(0.8, 1))
    axes[1, 0].set(ylabel="held-out loss", yscale="log", xlabel="step")
    axes[1, 1].set(xscale="log", xlabel="seconds of one core")
    for ax in axes.flat:
        ax.grid(True, color="0.9")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(runs))
    figure.savefig(args.picture, dpi=120)


if __name__ == "__main__":
    main()
