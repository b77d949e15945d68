"""Draw the spectrum of the Hessian and of the generalized Gauss-Newton matrix of the digits network, over the whole data set.

The network is trained first. A product with either matrix then goes through all digits, batch by batch, so that memory is that
of one batch, and neither matrix (431 080 rows) is ever formed. Stochastic Lanczos quadrature makes densities of the products.
It takes a few minutes on two cores.

    python examples/dataset_spectrum.py --help
"""

import argparse
from pathlib import Path

import torch
from digits import COLORS, load_data, make_network, plt, positive
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

from curvfunc import Grad, Loss, accumulate, compute, eigsh, functionalize, ggn_operator, hessian_operator, spectral_density
from curvfunc.operators.estimators import Spectrum

Params = dict[str, Tensor]
NAMES = {"Hessian": COLORS["SGD"], "GGN": COLORS["DiagGGN"]}


def train(model_fn: object, params: Params, loader: DataLoader, epochs: int) -> Params:
    """A few epochs of Adam."""
    adam = torch.optim.Adam(params.values(), lr=2e-3)
    for _ in tqdm(range(epochs), unit="epoch", desc="training"):
        for X, y in loader:
            for name, grad in compute(model_fn, params, X, y, Grad()).items():
                params[name].grad = grad
            adam.step()
    return {name: p.detach() for name, p in params.items()}


def draw(spectra: dict[str, Spectrum], largest: dict[str, Tensor], path: Path) -> None:
    """The densities of both matrices, on a logarithmic scale, and above them their largest eigenvalues."""
    figure, axes = plt.subplots(len(spectra), 1, figsize=(8, 6), layout="constrained", sharex=True, sharey=True)
    low = min(float(s.nodes.min()) for s in spectra.values())
    high = max(float(s.nodes.max()) for s in spectra.values())
    width = (high - low) / 200
    x = torch.linspace(low - 5 * width, high + 5 * width, 2000)
    for ax, (name, spectrum) in zip(axes, spectra.items(), strict=True):
        ax.fill_between(x, spectrum.density(x, width).clamp(min=1e-12), 1e-12, color=NAMES[name], alpha=0.4, linewidth=0)
        ax.plot(largest[name], [3e-7] * len(largest[name]), "|", color=NAMES[name], markersize=14, label="largest, by eigsh")
        ax.set(yscale="log", ylim=(1e-7, None), ylabel="density")
        trace = float(spectrum.trace(lambda nodes: nodes))
        ax.set_title(f"{name}: {spectrum.size} eigenvalues, trace about {trace:.3g}", loc="left", fontsize=11)
        ax.grid(True, color="0.9", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    axes[-1].set_xlabel("eigenvalue")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train, multiply, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--batch-size", type=positive, default=256)
    parser.add_argument("--steps", type=positive, default=20, help="Lanczos steps: products, each a pass over the data")
    parser.add_argument("--vectors", type=positive, default=1, help="random vectors, multiplied together")
    parser.add_argument("--eigenvalues", type=positive, default=5, help="how many of the largest are computed on their own")
    parser.add_argument("--tol", type=float, default=5e-2, help="relative precision of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="30 digits and 3 steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("spectrum-pictures"), help="folder for the picture")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.batch_size, args.steps, args.eigenvalues, args.tol = 1, 16, 3, 1, 0.5

    torch.manual_seed(args.seed)
    X, y, *_ = load_data(args.seed)
    digits = Subset(TensorDataset(X, y), range(30 if args.quick else len(X)))
    data = DataLoader(digits, batch_size=args.batch_size)  # in the same order at each pass
    model_fn, params = functionalize(make_network())
    params = train(model_fn, params, DataLoader(digits, batch_size=64, shuffle=True), args.epochs)
    print(f"loss over {len(digits)} digits: {accumulate(model_fn, params, data, Loss()):.4f}")

    spectra, largest = {}, {}
    for name, operator in (("Hessian", hessian_operator), ("GGN", ggn_operator)):
        matrix, generator = operator(model_fn, params, data), torch.Generator().manual_seed(args.seed)
        given = {"num_steps": args.steps, "num_vectors": args.vectors, "generator": generator}
        spectra[name] = spectral_density(matrix, **given, progress=True)
        largest[name], _ = eigsh(matrix, args.eigenvalues, which="LA", tol=args.tol, generator=generator, progress=True)
        print(f"{name:8} largest eigenvalues: {', '.join(f'{value:.3g}' for value in largest[name].flip(0))}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(spectra, largest, args.out / "spectrum.png")
    print(f"Picture: {args.out / 'spectrum.png'}")


if __name__ == "__main__":
    main()
