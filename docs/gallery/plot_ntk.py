"""
The neural tangent kernel
=========================

`curvfunc.ntk_total` compares samples by the Jacobians of their outputs. While a network trains,
its kernel learns what belongs together: blocks of digits come out. The alignment of the centred
kernel with the labels says how much; a kernel machine with either is as good.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvfunc

digits = load_digits()
order = torch.randperm(len(digits.target))
X, y = (
    torch.tensor(digits.data / 16, dtype=torch.float32)[order],
    torch.tensor(digits.target)[order],
)
X_train, y_train, X_test, y_test = X[:200], y[:200], X[200:500], y[200:500]
by_label = y_train.argsort(stable=True)
X_train, y_train = X_train[by_label], y_train[by_label]

model_fn, params = curvfunc.functionalize(
    nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
)


def kernel(params, X1, X2=None):
    """The kernel, averaged over the outputs: [N1, N2]."""
    whole = (
        curvfunc.ntk_total(model_fn, params, X1)
        if X2 is None
        else curvfunc.ntk_total(model_fn, params, X1, X2)
    )
    return whole.diagonal(dim1=1, dim2=3).mean(-1)


def centred(K):
    """The kernel of features less their mean."""
    return K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()


def alignment(K):
    """Cosine between the centred kernel and that of the labels."""
    labels = centred((y_train[:, None] == y_train).float())
    return float((K * labels).sum() / (K.norm() * labels.norm()))


def accuracy(params):
    """Of kernel regression on one-hot labels."""
    K = kernel(params, X_train)
    ridge = 1e-3 * K.diag().mean() * torch.eye(len(K))
    weights = torch.linalg.solve(K + ridge, nn.functional.one_hot(y_train, 10).float() - 0.1)
    return float(
        ((kernel(params, X_test, X_train) @ weights).argmax(1) == y_test).float().mean()
    )


# %%
# The kernel at the start, and after training.

moments = {"at the start": params}
adam = torch.optim.Adam(
    [p.requires_grad_() for p in map(torch.clone, params.values())], lr=5e-3
)
trained = dict(zip(params, adam.param_groups[0]["params"], strict=True))
for _ in range(300):
    for name, grad in curvfunc.compute(
        model_fn, trained, X_train, y_train, curvfunc.Grad()
    ).items():
        trained[name].grad = grad
    adam.step()
moments["after training"] = {name: p.detach() for name, p in trained.items()}

figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.7))
for ax, (moment, at) in zip(axes, moments.items(), strict=False):
    K = centred(kernel(at, X_train))
    scale = K.diag().rsqrt()
    ax.imshow(K * scale[:, None] * scale, cmap="RdBu_r", vmin=-1, vmax=1)
    told = f"alignment {alignment(K):.2f}, kernel machine {accuracy(at):.1%} right"
    ax.set(title=f"Kernel {moment}", xticks=[], yticks=[], xlabel=told)
    axes[2].semilogy(torch.linalg.eigvalsh(K).flip(0) / K.trace(), label=moment)
axes[2].set(title="Eigenvalues, in parts of the trace", xlabel="index")
axes[2].set_ylim(1e-6, 1)
axes[2].legend()
