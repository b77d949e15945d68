"""
Curvature along training
========================

Gradient descent with a constant step goes where the largest eigenvalue of the Hessian is about
two over the step: the edge of stability. The Gram matrix of the GGN's root
(`curvfunc.ggn_gram_total`) has all its non-zero eigenvalues, and `curvfunc.eigsh` the largest
of the Hessian.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import curvfunc

digits = load_digits()
X, y = (
    torch.tensor(digits.data / 16, dtype=torch.float32)[:100],
    F.one_hot(torch.tensor(digits.target)[:100], 10).float(),
)
net = nn.Sequential(
    nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 10)
)
model_fn, start = curvfunc.functionalize(net)


def train(lr, steps, every=10):
    """Losses, and now and then the largest eigenvalue of the Hessian and ten of the GGN."""
    params, losses, looks = start, [], []
    for step in range(steps):
        loss, grad = curvfunc.compute(
            model_fn, params, X, y, (curvfunc.Loss(), curvfunc.Grad()), loss_fn=F.mse_loss
        )
        losses.append(float(loss))
        if step % every == 0:
            hessian = curvfunc.hessian_operator(model_fn, params, X, y, loss_fn=F.mse_loss)
            top, _ = curvfunc.eigsh(hessian, 1, which="LA", tol=1e-2)
            gram = curvfunc.ggn_gram_total(
                model_fn, params, X[:40], y[:40], loss_fn=F.mse_loss
            ).reshape(400, 400)
            looks.append((step, float(top[0]), torch.linalg.eigvalsh(gram).flip(0)[:10]))
        params = {name: p - lr * grad[name] for name, p in params.items()}
    return losses, looks


# %%
# Three learning rates. The largest eigenvalue rises, and where it meets 2 / lr it turns, while
# the loss goes on falling.

runs = {lr: train(lr, 300) for lr in (0.5, 1.0, 2.0)}

figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.7))
for lr, (losses, looks) in runs.items():
    (line,) = axes[0].semilogy(losses, label=f"step {lr:g}")
    axes[1].plot(
        [row[0] for row in looks],
        [row[1] for row in looks],
        "o-",
        markersize=3,
        linewidth=1,
        color=line.get_color(),
    )
    axes[1].axhline(2 / lr, color=line.get_color(), linestyle="--", linewidth=1)
axes[0].set(xlabel="step", title="Loss")
axes[0].legend()
axes[1].set(xlabel="step", title="Largest eigenvalue; dashed: 2 / step")
steps, eigenvalues = (
    [row[0] for row in runs[1.0][1]],
    torch.stack([row[2] for row in runs[1.0][1]]),
)
for i, values in enumerate(eigenvalues.T):
    axes[2].semilogy(steps, values, color=plt.get_cmap("viridis")(i / 10), linewidth=1.5)
axes[2].set(xlabel="step", title="Ten eigenvalues of the GGN, step 1")
