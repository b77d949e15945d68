"""Digits that are turned away from what the network knows: how sure it is, plain and with Laplace approximations.

For all layers or the last one, by Kronecker factors or a diagonal: one pass over the data gives the curvature, the marginal
likelihood chooses the prior precision, and the outputs get a covariance, by which the probabilities are moderated
(MacKay 1992). Expected calibration errors are printed and drawn by angle.

    python examples/laplace.py --help
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from dataset_spectrum import train
from digits import COLORS, LAYER_COLORS, load_data, plt, positive
from influence import make_network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvfunc import KFLR, DiagGGN, functionalize
from curvfunc import laplace as la

ANGLES = range(0, 181, 15)


def rotated(X: Tensor, degrees: float) -> Tensor:
    """The digits, turned around their centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    grid = F.affine_grid(torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]]).expand(len(X), 2, 3), X.shape, align_corners=False)
    return F.grid_sample(X - X.min(), grid, align_corners=False) + X.min()  # outside is background


def calibration_error(probabilities: Tensor, y: Tensor, bins: int = 15) -> float:
    """Mean difference of confidence and accuracy, over bins of the confidence."""
    confidence, prediction = probabilities.max(1)
    of = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins).index_add(0, of, confidence - (prediction == y).float())
    return float(gap.abs().sum() / len(y))


def fit(net: nn.Module, data: DataLoader, curvature: object) -> tuple:
    """Model function, posterior, and the prior precision with the largest marginal likelihood."""
    model_fn, params = functionalize(net)
    posterior = la.fit(model_fn, params, data, curvature=curvature)
    log_precision = torch.zeros((), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([log_precision], lr=0.1, maximize=True)
    for _ in range(100):
        adam.zero_grad()
        la.log_marginal_likelihood(posterior, log_precision.exp()).backward()
        adam.step()
    return model_fn, posterior, float(log_precision.detach().exp())


def main() -> None:
    """Train, fit, turn, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=positive, default=15)
    parser.add_argument("--test", type=positive, default=500, help="number of digits that are turned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("laplace-pictures"), help="folder for the picture")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    X, y, X_test, y_test = load_data(args.seed)
    net = make_network()
    model_fn, params = functionalize(net)
    net.load_state_dict(train(model_fn, params, DataLoader(TensorDataset(X, y), 64, shuffle=True), args.epochs))
    data = DataLoader(TensorDataset(X, y), batch_size=256)
    methods = {}
    for layers in ("all layers", "last layer"):
        net.requires_grad_(layers == "all layers")
        net[-1].requires_grad_()
        for name, curvature in (("Kronecker", KFLR(joined=True)), ("diagonal", DiagGGN())):
            methods[f"{layers}, {name}"] = fit(net, data, curvature)

    errors: dict[str, list[float]] = {name: [] for name in ("plain network", *methods)}
    for angle in ANGLES:
        turned, truth = rotated(X_test[: args.test], angle), y_test[: args.test]
        with torch.no_grad():
            out = net(turned)
        errors["plain network"].append(calibration_error(out.softmax(1), truth))
        for name, (model_fn, posterior, precision) in methods.items():
            variance = la.functional_variance(model_fn, turned, posterior, precision).diagonal(dim1=1, dim2=2)
            errors[name].append(calibration_error((out / (1 + math.pi / 8 * variance).sqrt()).softmax(1), truth))
    print(f"{'':24}{'prior precision':>16}{'calibration error':>19}{'turned by 45° and more':>24}")
    for name, values in errors.items():
        precision = f"{methods[name][2]:.2f}" if name in methods else ""
        print(f"{name:24}{precision:>16}{values[0]:>19.3f}{sum(values[3:]) / len(values[3:]):>24.3f}")

    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, values), color in zip(errors.items(), (COLORS["SGD"], *LAYER_COLORS), strict=True):
        ax.plot(ANGLES, values, color=color, label=name, linestyle="--" if "diagonal" in name else "-")
    ax.set(xlabel="angle in degrees", ylabel="expected calibration error", xticks=ANGLES)
    ax.legend(frameon=False)
    ax.grid(True, color="0.9", linewidth=0.8)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "calibration.png", dpi=150)
    print(f"Picture: {args.out / 'calibration.png'}")


if __name__ == "__main__":
    main()
