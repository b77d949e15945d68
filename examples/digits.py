"""Train a small CNN on scikit-learn's digits with K-FAC and a diagonal Gauss-Newton preconditioner, beside SGD and Adam.

The diagonal's iterations ask for loss, gradient, a Monte-Carlo estimate of the GGN's diagonal and the variance of the
per-sample gradients in one call: the model runs once. The step is

    theta <- theta - lr * grad / (diag_ggn + damping)

K-FAC's step is one call of curvfunc.optim. The four methods see the same batches from the same start. Pictures are
written at the end, the first with what curvature bought. With the damping of 1 the diagonal of the GGN, mostly below 0.01 here,
changes little: expect DiagGGN to stay close to SGD.

    python examples/digits.py --help
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from curvfunc import DiagGGN, Grad, Loss, Variance, compute, functionalize, kfac, kronecker, optim

Params = dict[str, Tensor]

HELD_OUT = 500
DAMPING = 1.0
# Each the best of eight (0.01, 0.02, 0.05, ... 2 for DiagGGN and SGD, 1e-4 ... 2e-2 for Adam) by the training loss,
# averaged over the last 20 of 100 iterations with batches of 64 and over three seeds; K-FAC's of 0.02, ... 0.5, for one seed
LEARNING_RATES = {"K-FAC": 0.5, "DiagGGN": 0.2, "SGD": 0.2, "Adam": 2e-3}
KFAC = {"damping": 0.03, "kl_clip": 0.01 / LEARNING_RATES["K-FAC"] ** 2, "factors_every": 5, "inverses_every": 10}
GOAL = 0.1  # a training loss, to say when each gets there
LAYERS = {"0": "conv 1", "3": "conv 2", "7": "linear 1", "9": "linear 2"}

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey
COLORS = {"K-FAC": "#CC79A7", "DiagGGN": "#0072B2", "SGD": "#D55E00", "Adam": "#009E73"}
LAYER_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def load_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits, enlarged from 8 x 8 to 28 x 28 and standardized: training X [n, 1, 28, 28], y [n], held-out X, y."""
    digits = load_digits()
    X = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    X = F.interpolate(X, size=(28, 28), mode="bilinear", align_corners=False)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    X, y = X[order], torch.tensor(digits.target)[order]
    X = (X - X[HELD_OUT:].mean()) / X[HELD_OUT:].std()
    return X[HELD_OUT:], y[HELD_OUT:], X[:HELD_OUT], y[:HELD_OUT]


def make_network() -> nn.Module:
    """Two blocks of convolution, ReLU and pooling, then two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


@dataclass
class Run:
    """One method's parameters and history, the seconds up to each iteration."""

    params: Params
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Layerwise:
    """Per layer, one value an iteration."""

    curvature: dict[str, list[float]] = field(default_factory=lambda: {layer: [] for layer in LAYERS})
    signal_to_noise: dict[str, list[float]] = field(default_factory=lambda: {layer: [] for layer in LAYERS})

    def record(self, batch_size: int, grads: Params, curvature: Params, variances: Params) -> None:
        """Mean diagonal of the GGN, and the squared gradient over the expected square of its sampling noise.

        The gradient is the sum of N per-sample gradients (which carry the loss's 1/N), so its noise has variance
        N * variance: a ratio of 1 is what a gradient without signal would show.
        """
        for layer in LAYERS:
            names = [name for name in grads if name.startswith(f"{layer}.")]
            size = sum(grads[name].numel() for name in names)
            signal = sum(grads[name].square().sum().item() for name in names)
            noise = sum(variances[name].sum().item() for name in names) * batch_size
            self.curvature[layer].append(sum(curvature[name].sum().item() for name in names) / size)
            self.signal_to_noise[layer].append(signal / noise if noise else float("nan"))


def train(model_fn: Callable, params: Params, X: Tensor, y: Tensor, args: argparse.Namespace) -> tuple[dict, Layerwise]:
    """Train from the same start with each method, on the same batches; print a line an iteration."""
    runs = {name: Run({k: p.clone() for k, p in params.items()}) for name in LEARNING_RATES}
    layerwise = Layerwise()
    structure = kronecker.structure(model_fn, params, X[: args.batch_size])
    natural = optim.chain(optim.scale_by_kfac(structure, **KFAC), optim.scale(-LEARNING_RATES["K-FAC"]))
    state = natural.init(params)
    adam = torch.optim.Adam(runs["Adam"].params.values(), lr=LEARNING_RATES["Adam"])
    batches, sampling, sampling_kfac = (torch.Generator().manual_seed(args.seed) for _ in range(3))

    def kfac_step(run: Run, X: Tensor, y: Tensor) -> Tensor:
        nonlocal state
        loss, run.params, state = optim.step(model_fn, natural, run.params, state, X, y, generator=sampling_kfac)
        return loss

    def diag_ggn_step(run: Run, X: Tensor, y: Tensor) -> Tensor:
        specs = (Loss(), Grad(), DiagGGN(mc_samples=1), Variance())
        loss, grads, curvature, variances = compute(model_fn, run.params, X, y, specs, generator=sampling)
        lr = LEARNING_RATES["DiagGGN"]
        run.params = {k: p - lr * grads[k] / (curvature[k] + DAMPING) for k, p in run.params.items()}
        layerwise.record(len(X), grads, curvature, variances)
        return loss

    def sgd_step(run: Run, X: Tensor, y: Tensor) -> Tensor:
        loss, grads = compute(model_fn, run.params, X, y, (Loss(), Grad()))
        run.params = {k: p - LEARNING_RATES["SGD"] * grads[k] for k, p in run.params.items()}
        return loss

    def adam_step(run: Run, X: Tensor, y: Tensor) -> Tensor:
        loss, grads = compute(model_fn, run.params, X, y, (Loss(), Grad()))
        for k, p in run.params.items():
            p.grad = grads[k]
        adam.step()
        return loss

    steps = {"K-FAC": kfac_step, "DiagGGN": diag_ggn_step, "SGD": sgd_step, "Adam": adam_step}
    waiting = torch.empty(0, dtype=torch.long)
    for iteration in (bar := tqdm(range(1, args.iterations + 1), unit="it", desc="training")):
        while len(waiting) < args.batch_size:
            waiting = torch.cat([waiting, torch.randperm(len(X), generator=batches)])
        batch, waiting = waiting[: args.batch_size], waiting[args.batch_size :]
        for name, run in runs.items():
            start = time.perf_counter()
            run.loss.append(steps[name](run, X[batch], y[batch]).item())
            run.seconds.append(time.perf_counter() - start + (run.seconds[-1] if run.seconds else 0.0))
        bar.write(
            f"iteration {iteration:3d}   loss:   " + "   ".join(f"{name} {run.loss[-1]:.3f}" for name, run in runs.items())
        )
    return runs, layerwise


def running_mean(values: list[float], window: int = 7) -> list[float]:
    """Mean of the last ``window`` values at each step."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def caption(runs: dict[str, Run]) -> str:
    """What curvature bought: steps and seconds of each method to the goal, fewest steps first."""
    reached = {}
    for name, run in runs.items():
        steps = next((i for i, loss in enumerate(running_mean(run.loss), 1) if loss <= GOAL), None)
        reached[name] = (math.inf, math.inf) if steps is None else (steps, run.seconds[steps - 1])
    order = sorted(reached, key=reached.__getitem__)
    told = [
        f"{name} {reached[name][0]} steps, {reached[name][1]:.2g} s" if reached[name][0] < math.inf else f"{name} not reached"
        for name in order
    ]
    text = f"To a training loss of {GOAL:g} (mean of 7 batches): {'; '.join(told)}."
    if reached[order[0]][0] < math.inf:
        soonest = min(reached, key=lambda name: reached[name][1])
        text += f"\nFewest steps: {order[0]}. Fewest seconds: {soonest}."
    return text + " DiagGGN's seconds include what the second picture shows."


def tidy(ax: plt.Axes, title: str, ylabel: str, xlabel: str = "iteration") -> None:
    """Title, labels, a light grid, no box."""
    ax.set_title(title, loc="left", fontsize=11)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=xlabel == "iteration", steps=[1, 2, 5, 10]))
    if ax.get_yscale() == "log":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(True, color="0.9", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)


def draw_curve(
    ax: plt.Axes, values: list[float], color: str, label: str, width: float, seconds: list[float] | None = None
) -> None:
    """Each iteration pale, the running mean strong; against iterations, or against seconds."""
    steps = range(1, len(values) + 1) if seconds is None else seconds
    ax.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    ax.plot(steps, running_mean(values), color=color, linewidth=width, label=label)


def draw_level(ax: plt.Axes, level: float, text: str) -> None:
    """A dashed line with its name at the left end, above it."""
    ax.axhline(level, color="0.4", linestyle="--", linewidth=1)
    at = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
    ax.annotate(text, (0.01, level), color="0.4", fontsize=9, **at)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, level / 2), max(high, 2 * level))


def share_legend(figure: plt.Figure, ax: plt.Axes, columns: int = 4) -> None:
    """One legend for all panels, below them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns)


def draw_training(runs: dict[str, Run], path: Path) -> None:
    """Loss on the batches against iterations and against seconds, and what is to be seen."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained", sharey=True)
    widths = {"SGD": 4.5, "Adam": 2.0, "DiagGGN": 2.0, "K-FAC": 2.0}  # SGD is broad: DiagGGN may lie right on it
    damping = {"DiagGGN": f", damping {DAMPING:g}", "K-FAC": f", damping {KFAC['damping']:g}"}
    for name, width in widths.items():
        run, label = runs[name], f"{name}, learning rate {LEARNING_RATES[name]:g}{damping.get(name, '')}"
        draw_curve(axes[0], run.loss, COLORS[name], label, width)
        draw_curve(axes[1], run.loss, COLORS[name], label, width, run.seconds)
    axes[0].set_yscale("log")
    tidy(axes[0], "Training loss against steps", "cross-entropy of the batch")
    tidy(axes[1], "Training loss against seconds", "", "seconds")
    share_legend(figure, axes[1], columns=2)
    figure.suptitle(caption(runs), fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_layers(layerwise: Layerwise, path: Path) -> None:
    """Curvature and signal-to-noise of the gradient, a line per layer."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    for ax, values in zip(axes, (layerwise.curvature, layerwise.signal_to_noise), strict=True):
        for (layer, label), color in zip(LAYERS.items(), LAYER_COLORS, strict=True):
            draw_curve(ax, values[layer], color, label, width=2.0)
        ax.set_yscale("log")
    tidy(axes[0], "Curvature, training with DiagGGN", "mean diagonal of the GGN (1 MC sample)")
    draw_level(axes[0], DAMPING, "damping")
    tidy(axes[1], "Signal-to-noise of the gradient, training with DiagGGN", "|gradient|² / expected |noise|²")
    draw_level(axes[1], 1.0, "noise alone")
    share_legend(figure, axes[1])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_factors(factors: dict[str, tuple[Tensor, ...]], path: Path) -> None:
    """The two Kronecker factors of each weight as correlations: what each layer's outputs and inputs have in common."""
    figure, axes = plt.subplots(2, len(LAYERS), figsize=(10.4, 5.8), layout="constrained")
    colormap = plt.get_cmap("RdBu_r").with_extremes(bad="0.85")
    for column, (layer, label) in zip(axes.T, LAYERS.items(), strict=True):
        output_factor, input_factor = factors[f"{layer}.weight"]
        for ax, what, factor in zip(column, ("outputs", "inputs"), (output_factor, input_factor), strict=True):
            scale = factor.diag().sqrt()
            image = ax.imshow((factor / torch.outer(scale, scale)).numpy(), cmap=colormap, vmin=-1, vmax=1)
            ax.set_title(f"{label}, {what}\n{len(factor)} × {len(factor)}, trace {factor.trace():.2g}", fontsize=10)
            ax.set(xticks=[], yticks=[])
    bar = figure.colorbar(image, ax=axes, shrink=0.7, ticks=[-1, 0, 1])
    bar.set_label("correlation (grey: unit never active)")
    figure.suptitle("Kronecker factors of the GGN after training with DiagGGN", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def positive(text: str) -> int:
    """A positive integer from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def main() -> None:
    """Train, print the table, draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=positive, default=100)
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("digits-pictures"), help="folder for the pictures")
    args = parser.parse_args()

    torch.set_num_threads(1)  # so that seconds compare, whatever else the machine does; threads gain little at this size
    torch.manual_seed(args.seed)
    X, y, X_held_out, y_held_out = load_data(args.seed)
    model_fn, params = functionalize(make_network())
    runs, layerwise = train(model_fn, params, X, y, args)

    print(f"\n{'':10}{'learning rate':>15}{'last losses':>15}{'held-out accuracy':>20}{'ms / iteration':>17}")
    for name, run in runs.items():
        with torch.no_grad():
            accuracy = (model_fn(run.params, X_held_out).argmax(1) == y_held_out).float().mean().item()
        milliseconds = 1000 * run.seconds[-1] / args.iterations
        print(f"{name:10}{LEARNING_RATES[name]:>15g}{running_mean(run.loss)[-1]:>15.3f}{accuracy:>19.1%} {milliseconds:>17.1f}")

    print(f"\n{caption(runs)}")

    args.out.mkdir(parents=True, exist_ok=True)
    draw_training(runs, args.out / "training.png")
    draw_layers(layerwise, args.out / "layers.png")
    generator = torch.Generator().manual_seed(args.seed)
    factors = kfac(model_fn, runs["DiagGGN"].params, X[:256], y[:256], mc_samples=1, generator=generator)
    draw_factors(factors, args.out / "kronecker.png")
    print(f"\nPictures: {', '.join(str(args.out / f'{name}.png') for name in ('training', 'layers', 'kronecker'))}")


if __name__ == "__main__":
    main()
