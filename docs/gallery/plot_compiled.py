"""
A compiled training step
========================

A whole step, gradient, curvature and update, compiles to one graph. Small networks are bound by
Python, and gain most. Where there is no C++ compiler, the picture shows eager code alone.
"""

import shutil
import sysconfig
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvfunc
from curvfunc import BatchL2, DiagGGN, Grad, Loss, Variance

digits = load_digits()
X, y = (
    torch.tensor(digits.data / 16, dtype=torch.float32)[:128],
    torch.tensor(digits.target)[:128],
)
model_fn, params = curvfunc.functionalize(
    nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
)

# %%
# Steps that differ in what they ask for besides the gradient.

asked = {
    "gradient": (),
    "norms": (BatchL2(),),
    "GGN's diagonal": (DiagGGN(),),
    "all of these, and variance": (BatchL2(), Variance(), DiagGGN()),
}


def step_with(specs):
    """A gradient step, with what was asked for beside it."""

    def step(params, X, y):
        loss, grad, *found = curvfunc.compute(model_fn, params, X, y, (Loss(), Grad(), *specs))
        return {name: p - 0.1 * grad[name] for name, p in params.items()}, loss, found

    return step


def milliseconds(step):
    """The median of many, after a few."""
    seconds = []
    for _ in range(60):
        begin = time.perf_counter()
        step(params, X, y)
        seconds.append(time.perf_counter() - begin)
    return 1000 * sorted(seconds[10:])[25]


times = {"eager": [milliseconds(step_with(specs)) for specs in asked.values()]}
compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
if compiler and Path(sysconfig.get_path("include"), "Python.h").exists():
    times["compiled"] = [
        milliseconds(torch.compile(step_with(specs), fullgraph=True))
        for specs in asked.values()
    ]

# %%
# Milliseconds of one step, and of the same step compiled.

figure, ax = plt.subplots(figsize=(8, 3.6))
for i, (kind, values) in enumerate(times.items()):
    bars = ax.barh(
        [row + 0.38 * i for row in range(len(asked))], values, height=0.36, label=kind
    )
    ax.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
ax.set_yticks([row + 0.19 * (len(times) - 1) for row in range(len(asked))], asked)
ax.invert_yaxis()
ax.set(xlabel="milliseconds", title="One step on 128 digits, a network with 2,410 parameters")
ax.legend()
