"""
Sub-sampling
============

``subsampling=`` asks for some samples of a batch. Curvature of a few, beside the gradient of
all, is what many second-order methods take: how few will do? And which samples agree:
`curvfunc.batch_dot_total` has all inner products of their gradients.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvfunc

digits = load_digits()
X, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
model_fn, params = curvfunc.functionalize(
    nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
)
for _ in range(40):
    grad = curvfunc.compute(model_fn, params, X, y, curvfunc.Grad())
    params = {name: p - 1.0 * grad[name] for name, p in params.items()}
X, y = X[:1024], y[:1024]

# %%
# The diagonal of the GGN from n of 1024 samples. The scale stays that of the whole batch, so
# that a part is multiplied by 1024 / n to stand for all. Exact columns beside one drawn label
# per sample.

exact = curvfunc.diag_ggn(model_fn, params, X, y)["0.weight"]
sizes, errors = (8, 16, 32, 64, 128, 256, 512), {"exact columns": [], "one drawn label": []}
for n in sizes:
    for kind, draws in zip(errors, (0, 1), strict=True):
        found = []
        for _ in range(8):
            some = torch.randperm(1024)[:n]
            part = curvfunc.diag_ggn(
                model_fn, params, X, y, mc_samples=draws, subsampling=some
            )["0.weight"]
            found.append(float((part * 1024 / n - exact).norm() / exact.norm()))
        errors[kind].append(torch.tensor(found))

# %%
# Inner products of the gradients of 150 digits, sorted by label and scaled to cosines.

order = y[:150].argsort(stable=True)
dots = curvfunc.batch_dot_total(model_fn, params, X, y, subsampling=order)
lengths = dots.diag().sqrt()
cosines = dots / torch.outer(lengths, lengths)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1.2, 1))
for kind, found in errors.items():
    mean = torch.stack(found).mean(1)
    (line,) = left.loglog(sizes, mean, "o-", label=kind)
    low, high = torch.stack(found).min(1).values, torch.stack(found).max(1).values
    left.fill_between(sizes, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
left.loglog(
    sizes,
    mean[0] * (sizes[0] / torch.tensor(sizes)) ** 0.5,
    color="0.5",
    linestyle=":",
    label="$1/\\sqrt{n}$",
)
left.set(
    xlabel="samples, of 1024",
    title="Relative error of the GGN's diagonal",
    xticks=sizes,
    xticklabels=sizes,
)
left.minorticks_off()
left.legend()
image = right.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
edges = torch.bincount(y[:150], minlength=10).cumsum(0)
right.set_xticks(edges - edges.diff(prepend=torch.tensor([0])) / 2, range(10))
right.set_yticks(edges - edges.diff(prepend=torch.tensor([0])) / 2, range(10))
right.set_title("Cosines between gradients of digits")
figure.colorbar(image, ax=right, shrink=0.8)
