"""Train the digits network with differential privacy, and draw what a bound on each sample's influence costs.

Each step takes a Poisson sample of the digits, bounds the norm of every digit's gradient, adds noise of that size to the sum
and divides by the expected number of digits. The accountant of dp-accounting says what the steps together tell of any one
digit; without that package this is left out. Beside it the network is trained without bound and noise. (The histogram is of
training digits, and so not in the account: in a release it would have no place.)

    python examples/private.py --help
"""

import argparse
import math
from pathlib import Path

import torch
from digits import COLORS, load_data, make_network, plt, positive, tidy
from tqdm import tqdm

from curvfunc import batch_l2, functionalize, private

DELTA = 1e-4  # below one over the number of digits


def epsilon(rate: float, noise_multiplier: float, steps: int) -> float:
    """What the steps together cost by Rényi accounting, or NaN without the package for it."""
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError:
        return math.nan
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    return RdpAccountant().compose(event, steps).get_epsilon(DELTA)


def main() -> None:
    """Train twice, account, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--rate", type=float, default=0.1, help="chance of a digit to be in a batch")
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--noise-multiplier", type=float, default=1.5)
    parser.add_argument("--lr", type=float, default=0.5, help="without bound and noise it is 0.2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--secure", action="store_true", help="chance from the operating system, as a release would need")
    parser.add_argument("--out", type=Path, default=Path("private-pictures"), help="folder for the picture")
    args = parser.parse_args()

    X, y, X_held_out, y_held_out = load_data(args.seed)
    torch.manual_seed(args.seed)
    model_fn, start = functionalize(make_network())
    chance = {"secure": True} if args.secure else {"generator": torch.Generator().manual_seed(args.seed)}
    settings = {"private": (args.max_norm, args.noise_multiplier, args.lr), "plain": (1e6, 0.0, 0.2)}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    for (name, (max_norm, noise, lr)), color in zip(settings.items(), COLORS.values(), strict=False):
        params, accuracy = start, []
        given = {"max_norm": max_norm, "noise_multiplier": noise, "denominator": args.rate * len(X)}
        for batch in tqdm(private.poisson_batches(len(X), args.rate, steps=args.steps, **chance), name, args.steps):
            grad = private.noisy_grad(model_fn, params, X[batch], y[batch], **given, **chance)
            params = {key: p - lr * grad[key] for key, p in params.items()}
            with torch.no_grad():
                accuracy.append((model_fn(params, X_held_out).argmax(1) == y_held_out).float().mean().item())
        cost = epsilon(args.rate, noise, args.steps) if noise else math.inf
        told = "epsilon unknown: dp-accounting is not installed" if math.isnan(cost) else f"epsilon {cost:.3g}"
        print(f"{name:8} held-out accuracy {accuracy[-1]:.1%}   {told} at delta {DELTA:g}")
        axes[0].plot(range(1, args.steps + 1), accuracy, color=color, label=f"{name}, {told}")
        norms = 500 * sum(batch_l2(model_fn, params, X[:500], y[:500]).values()).sqrt()  # of a mean, over 500
        axes[1].hist(norms.clamp(min=1e-8).log10(), bins=40, range=(-8, 3), color=color, alpha=0.6, label=name)
    tidy(axes[0], "Accuracy on held-out digits", "share")
    tidy(axes[1], "Gradients of single digits after training", "digits of 500")
    axes[1].axvline(math.log10(args.max_norm), color="0.4", linestyle="--", label="bound")
    axes[1].set(xlabel="log10 of the norm")
    for ax in axes:
        ax.legend(frameon=False)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "private.png", dpi=150)
    print(f"Picture: {args.out / 'private.png'}")


if __name__ == "__main__":
    main()
