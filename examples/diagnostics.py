"""Train the digits network with Adam, and draw its diagnostics: signal to noise, noise scale, curvature, and what they advise.

Loss, gradient and the gradient's variance come from one call an iteration. Every few iterations the trace of the GGN, the ratio
of gradient noise to it, and the largest eigenvectors of the GGN are there besides.

    python examples/diagnostics.py --help
"""

import argparse
from pathlib import Path

import digits
import torch
from tqdm import tqdm

from curvfunc import DiagGGN, Grad, Loss, SumGradSquared, Variance, compute, diagnostics, eigsh, functionalize, ggn_operator


def main() -> None:
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=digits.positive, default=150)
    parser.add_argument("--batch-size", type=digits.positive, default=128)
    parser.add_argument("--every", type=digits.positive, default=10, help="iterations between looks at the curvature")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("diagnostics-pictures"), help="folder for the picture")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    X, y, *_ = digits.load_data(args.seed)
    model_fn, params = functionalize(digits.make_network())
    adam = torch.optim.Adam(params.values(), lr=1e-3)
    N, signal = args.batch_size, {layer: [] for layer in digits.LAYERS}
    noises, squares, scales, sizes, evidence, looks, traces, ratios, aligned = ([] for _ in range(9))
    for iteration in tqdm(range(args.iterations), unit="it"):
        batch = torch.randperm(len(X))[:N]
        loss, grad, variance = compute(model_fn, params, X[batch], y[batch], (Loss(), Grad(), Variance()))
        for layer, ratio in diagnostics.signal_to_noise(grad, variance, N).items():
            signal[layer].append(N * ratio.item())
        found = diagnostics.noise_scale(grad, variance, N)
        noises.append(found.noise.item())
        squares.append(found.signal.item())
        noise, square = sum(noises[-20:]), sum(squares[-20:])  # means first, then the ratio, as the paper advises
        scales.append(noise / square if square > 0 else float("nan"))
        sizes.append(diagnostics.norm_test(grad, variance, N, theta=0.9).samples.item())
        evidence.append(diagnostics.early_stopping(grad, variance, N).item())
        if iteration % args.every == 0:
            moment, diagonal = compute(model_fn, params, X[batch], y[batch], (SumGradSquared(), DiagGGN(mc_samples=1)))
            looks.append(iteration + 1)
            traces.append(sum(d.sum().item() for d in diagonal.values()))
            ratios.append(diagnostics.trace_ratio(moment, diagonal, N).item())
            _, top = eigsh(ggn_operator(model_fn, params, X[batch], y[batch]), 3, which="LA", tol=0.1)
            aligned.append(diagnostics.alignment(grad, top).sum().item())
        for key, p in params.items():
            p.grad = grad[key]
        adam.step()
    print(f"loss {loss:.3f}   noise scale {scales[-1]:.3g}   evidence for stopping {evidence[-1]:.2f}")

    figure, axes = digits.plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    (layerwise, size), (curvature, stop) = axes
    for (layer, label), color in zip(digits.LAYERS.items(), digits.LAYER_COLORS, strict=True):
        digits.draw_curve(layerwise, signal[layer], color, label, width=2.0)
    digits.draw_curve(size, sizes, digits.COLORS["Adam"], "batch size that the norm test asks for", width=2.0)
    size.plot(range(1, args.iterations + 1), scales, color=digits.COLORS["SGD"], label="noise scale, over 20 iterations")
    for values, label, color in ((traces, "trace of the GGN", "DiagGGN"), (ratios, "gradient noise over it", "SGD")):
        curvature.plot(looks, values, "o-", color=digits.COLORS[color], label=label)
    curvature.plot(looks, aligned, "o-", color=digits.COLORS["Adam"], label="gradient in 3 eigenvectors")
    digits.draw_curve(stop, evidence, digits.COLORS["DiagGGN"], "positive: the gradient is noise", width=2.0)
    for ax, title in zip(axes.flat, ("Signal over noise of the gradient", "Samples", "Curvature", "Stopping"), strict=True):
        ax.set_yscale("log" if ax is not stop else "symlog")
        digits.tidy(ax, title, "")
        ax.legend(frameon=False)
    digits.draw_level(layerwise, 1.0, "noise alone")
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "diagnostics.png", dpi=150)
    print(f"Picture: {args.out / 'diagnostics.png'}")


if __name__ == "__main__":
    main()
