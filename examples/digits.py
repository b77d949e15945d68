"""Train a small CNN on scikit-learn's digits with a diagonal Gauss-Newton preconditioner, beside SGD and Adam.

Every iteration asks for loss, output, gradient, a Monte-Carlo estimate of the GGN's diagonal and the variance of the
per-sample gradients in one call: the model runs once. The step is

    theta <- theta - lr * grad / (diag_ggn + damping)

The three methods see the same batches from the same start. Pictures of what happened are written at the end. With the
damping of 1 the diagonal of the GGN, mostly below 0.01 here, changes little: expect DiagGGN to stay close to SGD.

    python examples/digits.py --help
"""

import argparse
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

from curvfunc import DiagGGN, Grad, Loss, Output, Variance, compute, functionalize, kfac

Params = dict[str, Tensor]

HELD_OUT = 500
DAMPING = 1.0
# Each the best of eight (0.01, 0.02, 0.05, ... 2 for DiagGGN and SGD, 1e-4 ... 2e-2 for Adam) by the training loss,
# averaged over the last 20 of 100 iterations with batches of 64 and over three seeds
LEARNING_RATES = {"DiagGGN": 0.2, "SGD": 0.2, "Adam": 2e-3}
LAYERS = {"0": "conv 1", "3": "conv 2", "7": "linear 1", "9": "linear 2"}

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey
COLORS = {"DiagGGN": "#0072B2", "SGD": "#D55E00", "Adam": "#009E73"}
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
    """One method's parameters and history."""

    params: Params
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0


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
    adam = torch.optim.Adam(runs["Adam"].params.values(), lr=LEARNING_RATES["Adam"])
    batches = torch.Generator().manual_seed(args.seed)
    sampling = torch.Generator().manual_seed(args.seed)

    def diag_ggn_step(run: Run, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        specs = (Loss(), Output(), Grad(), DiagGGN(mc_samples=1), Variance())
        loss, out, grads, curvature, variances = compute(model_fn, run.params, X, y, specs, generator=sampling)
        lr = LEARNING_RATES["DiagGGN"]
        run.params = {k: p - lr * grads[k] / (curvature[k] + DAMPING) for k, p in run.params.items()}
        layerwise.record(len(X), grads, curvature, variances)
        return loss, out

    def sgd_step(run: Run, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, out, grads = compute(model_fn, run.params, X, y, (Loss(), Output(), Grad()))
        run.params = {k: p - LEARNING_RATES["SGD"] * grads[k] for k, p in run.params.items()}
        return loss, out

    def adam_step(run: Run, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, out, grads = compute(model_fn, run.params, X, y, (Loss(), Output(), Grad()))
        for k, p in run.params.items():
            p.grad = grads[k]
        adam.step()
        return loss, out

    steps = {"DiagGGN": diag_ggn_step, "SGD": sgd_step, "Adam": adam_step}
    waiting = torch.empty(0, dtype=torch.long)
    for iteration in (bar := tqdm(range(1, args.iterations + 1), unit="it", desc="training")):
        while len(waiting) < args.batch_size:
            waiting = torch.cat([waiting, torch.randperm(len(X), generator=batches)])
        batch, waiting = waiting[: args.batch_size], waiting[args.batch_size :]
        for name, run in runs.items():
            start = time.perf_counter()
            loss, out = steps[name](run, X[batch], y[batch])
            run.seconds += time.perf_counter() - start
            run.loss.append(loss.item())
            run.accuracy.append((out.argmax(1) == y[batch]).float().mean().item())
        states = (f"{name} loss {run.loss[-1]:.3f} accuracy {run.accuracy[-1]:.2f}" for name, run in runs.items())
        bar.write(f"iteration {iteration:3d}   " + "   ".join(states))
    return runs, layerwise


def running_mean(values: list[float], window: int = 7) -> list[float]:
    """Mean of the last ``window`` values at each step."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def tidy(ax: plt.Axes, title: str, ylabel: str) -> None:
    """Title, labels, a light grid, no box."""
    ax.set_title(title, loc="left", fontsize=11)
    ax.set(xlabel="iteration", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if ax.get_yscale() == "log":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(True, color="0.9", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)


def draw_curve(ax: plt.Axes, values: list[float], color: str, label: str, width: float) -> None:
    """Each iteration pale, the running mean strong."""
    steps = range(1, len(values) + 1)
    ax.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    ax.plot(steps, running_mean(values), color=color, linewidth=width, label=label)


def draw_level(ax: plt.Axes, level: float, text: str) -> None:
    """A dashed line with its name at the left end, above it."""
    ax.axhline(level, color="0.4", linestyle="--", linewidth=1)
    at = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
    ax.annotate(text, (0.01, level), color="0.4", fontsize=9, **at)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, level / 2), max(high, 2 * level))


def share_legend(figure: plt.Figure, ax: plt.Axes) -> None:
    """One legend for all panels, below them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))


def draw_training(runs: dict[str, Run], path: Path) -> None:
    """Loss and accuracy on the batches."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    for name, width in (("SGD", 4.5), ("Adam", 2.0), ("DiagGGN", 2.0)):  # SGD is broad: DiagGGN may lie right on it
        run, label = runs[name], f"{name}, learning rate {LEARNING_RATES[name]:g}"
        if name == "DiagGGN":
            label += f", damping {DAMPING:g}"
        for ax, values in zip(axes, (run.loss, run.accuracy), strict=True):
            draw_curve(ax, values, COLORS[name], label, width)
    axes[0].set_yscale("log")
    tidy(axes[0], "Training loss", "cross-entropy of the batch")
    tidy(axes[1], "Training accuracy", "share of the batch")
    axes[1].set_ylim(0, 1.02)
    share_legend(figure, axes[1])
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
            image = ax.imshow(factor / torch.outer(scale, scale), cmap=colormap, vmin=-1, vmax=1)
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

    torch.manual_seed(args.seed)
    X, y, X_held_out, y_held_out = load_data(args.seed)
    model_fn, params = functionalize(make_network())
    runs, layerwise = train(model_fn, params, X, y, args)

    print(f"\n{'':10}{'learning rate':>15}{'last losses':>15}{'held-out accuracy':>20}{'ms / iteration':>17}")
    for name, run in runs.items():
        with torch.no_grad():
            accuracy = (model_fn(run.params, X_held_out).argmax(1) == y_held_out).float().mean().item()
        milliseconds = 1000 * run.seconds / args.iterations
        print(f"{name:10}{LEARNING_RATES[name]:>15g}{running_mean(run.loss)[-1]:>15.3f}{accuracy:>19.1%} {milliseconds:>17.1f}")

    args.out.mkdir(parents=True, exist_ok=True)
    draw_training(runs, args.out / "training.png")
    draw_layers(layerwise, args.out / "layers.png")
    generator = torch.Generator().manual_seed(args.seed)
    factors = kfac(model_fn, runs["DiagGGN"].params, X[:256], y[:256], mc_samples=1, generator=generator)
    draw_factors(factors, args.out / "kronecker.png")
    print(f"\nPictures: {', '.join(str(args.out / f'{name}.png') for name in ('training', 'layers', 'kronecker'))}")


if __name__ == "__main__":
    main()
