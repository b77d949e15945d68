"""Find mislabelled digits by self-influence, and the training digits that helped and harmed most with one test digit.

Two percent of the labels are changed before training. A sample's self-influence g (B + damping)^-1 g, with EKFAC's inverse, is
large where the network had to bend for it alone: most of the wrong labels are among the five percent with the highest scores.

    python examples/influence.py --help
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from dataset_spectrum import train
from digits import load_data, plt, positive
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvfunc import KFLR, accumulate, functionalize, influence, kronecker

SUM = partial(F.cross_entropy, reduction="sum")


def make_network() -> nn.Module:
    """A convolution with pooling, and two linear layers: 19 000 parameters."""
    convolution = nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()
    return nn.Sequential(*convolution, nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10))


def draw(rows: dict[str, Tensor], labels: list[list[str]], path: Path) -> None:
    """Rows of digits, with a line of text above each digit."""
    figure, axes = plt.subplots(len(rows), 8, figsize=(9, 1.7 * len(rows)), layout="constrained", squeeze=False)
    for line, (name, images), texts in zip(axes, rows.items(), labels, strict=True):
        for ax in line[len(images) :]:
            ax.remove()
        for ax, image, text in zip(line, images, texts, strict=False):
            ax.imshow(image[0].numpy(), cmap="gray_r")
            ax.set_title(text, fontsize=9)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train on wrong labels, score, find, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=positive, default=8)
    parser.add_argument("--damping", type=float, default=1.0, help="of the sum of the samples' curvature")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("influence-pictures"), help="folder for the pictures")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    X, true, X_test, y_test = load_data(args.seed)
    wrong = torch.randperm(len(X))[: round(0.02 * len(X))]
    y = true.clone()
    y[wrong] = (y[wrong] + torch.randint(1, 10, wrong.shape)) % 10
    model_fn, params = functionalize(make_network())
    params = train(model_fn, params, DataLoader(TensorDataset(X, y), batch_size=64, shuffle=True), args.epochs)

    data = DataLoader(TensorDataset(X, y), batch_size=256)
    given = {"loss_fn": SUM, "progress": False}
    factors = accumulate(model_fn, params, data, KFLR(joined=True), **given)
    K = kronecker.decompose(factors, kronecker.structure(model_fn, params, X[:1]))
    K = kronecker.correct(K, accumulate(model_fn, params, data, kronecker.EKFAC(0, decomposition=K), **given))
    inverse = kronecker.inverse(K, damping=args.damping)

    scores = sum(accumulate(model_fn, params, data, influence.SelfInfluence(inverse=inverse), **given).values())
    suspects = scores.argsort(descending=True)[: round(0.05 * len(X))]
    found = int(torch.isin(wrong, suspects).sum())
    print(f"wrong labels among the 5 % with the highest self-influence: {found} of {len(wrong)} ({found / len(wrong):.0%})")

    with torch.no_grad():
        losses = F.cross_entropy(model_fn(params, X_test), y_test, reduction="none")
    hardest = int(losses.argmax())
    query = influence.queries(model_fn, params, X_test[[hardest]], y_test[[hardest]], inverse, loss_fn=SUM)
    parts = accumulate(model_fn, params, data, influence.Influence(inverse=inverse, queries=query), **given)
    order = sum(parts.values())[:, 0].argsort(descending=True)
    chosen = {"suspects": suspects[:8], "most helpful": order[:8], "most harmful": order.flip(0)[:8]}
    rows = {name: X[index] for name, index in chosen.items()}
    labels = [[f"{y[i]}" + (f", is {true[i]}" if y[i] != true[i] else "") for i in index] for index in chosen.values()]
    args.out.mkdir(parents=True, exist_ok=True)
    draw({f"test: {y_test[hardest]}": X_test[[hardest]]} | rows, [[""], *labels], args.out / "influence.png")
    print(f"Picture: {args.out / 'influence.png'}")


if __name__ == "__main__":
    main()
