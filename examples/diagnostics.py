"""Train the digits network with Adam, and draw its diagnostics: signal to noise, noise scale, curvature, and what they advise.

Loss, gradient and the gradient's variance come from one call an iteration. Every few iterations the trace of the GGN, the ratio
of gradient noise to it, and the largest eigenvectors of the GGN are there besides.

    python examples/diagnostics.py --help
"""

import argparse
from pathlib import Path

import torch
from digits import COLORS, LAYER_COLORS, LAYERS, draw_curve, draw_level, load_data, make_network, plt, positive, tidy
from tqdm import tqdm

from curvfunc import DiagGGN, Grad, Loss, SumGradSquared, Variance, compute, diagnostics, eigsh, functionalize, ggn_operator


def main() -> None:
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=positive, default=150)
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--every", type=positive, default=10, help="iterations from one look at the curvature to the next")
    parser.add_argument("--eigenvectors", type=positive, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("diagnostics-pictures"), help="folder for the picture")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    X, y, *_ = load_data(args.seed)
    model_fn, params = functionalize(make_network())
    adam = torch.optim.Adam(params.values(), lr=1e-3)
    N, signal = args.batch_size, {layer: [] for layer in LAYERS}
    losses, noises, squares, sizes, evidence = [], [], [], [], []
    looks, traces, ratios, aligned = [], [], [], []
    for iteration in tqdm(range(args.iterations), unit="it"):
        batch = torch.randperm(len(X))[:N]
        loss, grad, variance = compute(model_fn, params, X[batch], y[batch], (Loss(), Grad(), Variance()))
        losses.append(loss.item())
        for layer, ratio in diagnostics.signal_to_noise(grad, variance, N).items():
            signal[layer].append(N * ratio.item())
        found = diagnostics.noise_scale(grad, variance, N)
        noises.append(found.noise.item())
        squares.append(found.signal.item())
        sizes.append(diagnostics.norm_test(grad, variance, N, theta=0.9).samples.item())
        evidence.append(diagnostics.early_stopping(grad, variance, N).item())
        if iteration % args.every == 0:
            specs = (SumGradSquared(), DiagGGN(mc_samples=1))
            moment, diagonal = compute(model_fn, params, X[batch], y[batch], specs)
            looks.append(iteration + 1)
            traces.append(sum(d.sum().item() for d in diagonal.values()))
            ratios.append(diagnostics.trace_ratio(moment, diagonal, N).item())
            _, top = eigsh(ggn_operator(model_fn, params, X[batch], y[batch]), args.eigenvectors, which="LA", tol=0.1)
            aligned.append(diagnostics.alignment(grad, top).sum().item())
        for key, p in params.items():
            p.grad = grad[key]
        adam.step()
    last = slice(-20, None)  # the paper's advice: means of noise and signal first, then the ratio
    scale = sum(noises[last]) / max(sum(squares[last]), 1e-30)
    print(f"loss {losses[-1]:.3f}   noise scale {scale:.3g}   evidence for stopping {evidence[-1]:.2f}")

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    (noise_of_layers, size), (curvature, stop) = axes
    for (layer, label), color in zip(LAYERS.items(), LAYER_COLORS, strict=True):
        draw_curve(noise_of_layers, signal[layer], color, label, width=2.0)
    draw_curve(size, sizes, COLORS["Adam"], "batch size that the norm test asks for", width=2.0)
    draw_curve(
        size, [n / max(s, 1e-30) for n, s in zip(noises, squares, strict=True) if s > 0], COLORS["SGD"], "noise scale", 2.0
    )
    for values, label, color in ((traces, "trace of the GGN", "DiagGGN"), (ratios, "gradient noise over it", "SGD")):
        curvature.plot(looks, values, "o-", color=COLORS[color], label=label)
    curvature.plot(looks, aligned, "o-", color=COLORS["Adam"], label=f"gradient in {args.eigenvectors} eigenvectors")
    draw_curve(stop, evidence, COLORS["DiagGGN"], "positive: the gradient is noise", width=2.0)
    titles = ("Signal over noise of the batch's gradient", "Samples", "Curvature", "Evidence for stopping")
    for ax, title in zip(axes.flat, titles, strict=True):
        ax.set_yscale("log" if ax is not stop else "symlog")
        tidy(ax, title, "")
        ax.legend(frameon=False)
    draw_level(noise_of_layers, 1.0, "noise alone")
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "diagnostics.png", dpi=150)
    print(f"Picture: {args.out / 'diagnostics.png'}")


if __name__ == "__main__":
    main()
