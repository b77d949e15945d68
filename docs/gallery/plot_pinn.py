"""
A physics-informed network
==========================

Poisson's equation, -u'' = f with u(0) = u(1) = 0, solved by a network: the residual is a model
like any other, with a mean square as its loss. Gauss-Newton steps (`curvfunc.optim.newton_cg`)
reach what Adam does not. In two dimensions, with K-FAC and a budget of seconds:
:doc:`/physics`.
"""

import math
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from curvfunc import optim

WIDTH, POINTS = 32, 100


def solution(x):
    """What u should be."""
    return torch.sin(math.pi * x) + 0.3 * torch.sin(4 * math.pi * x)


def source(x):
    """-u''."""
    return math.pi**2 * (torch.sin(math.pi * x) + 4.8 * torch.sin(4 * math.pi * x))


def network(params, x):
    """Value, first and second derivative at x [N], carried forward together."""
    z = params["w"] * x[:, None] + params["b"]
    t = z.tanh()
    slope = 1 - t**2
    value = t @ params["v"]
    first = (slope * params["w"]) @ params["v"]
    second = (-2 * t * slope * params["w"] ** 2) @ params["v"]
    return value, first, second


def u(params, x):
    """The ansatz x (1 - x) N(x), which is zero at both ends."""
    return x * (1 - x) * network(params, x)[0]


def residual(params, x):
    """u'' + f, the model."""
    value, first, second = network(params, x)
    return -2 * value + 2 * (1 - 2 * x) * first + x * (1 - x) * second + source(x)


start = {
    "w": 6 * torch.randn(WIDTH),
    "b": 3 * torch.randn(WIDTH),
    "v": torch.randn(WIDTH) / WIDTH**0.5,
}
start = {name: p.double() for name, p in start.items()}
x, zero = (
    torch.linspace(0, 1, POINTS, dtype=torch.float64),
    torch.zeros(POINTS, dtype=torch.float64),
)
grid = torch.linspace(0, 1, 400, dtype=torch.float64)


def error(params):
    """Relative L2 error of u."""
    return float((u(params, grid) - solution(grid)).norm() / solution(grid).norm())


# %%
# Adam, with a rate that falls to zero; and Gauss-Newton by conjugate gradients, whose damping
# follows what steps bring.


def adam(steps, lr):
    """Seconds and errors."""
    params = {name: p.clone().requires_grad_() for name, p in start.items()}
    method, history, begin = torch.optim.Adam(params.values(), lr=lr), [], time.perf_counter()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(method, steps)
    for _ in range(steps):
        method.zero_grad()
        F.mse_loss(residual(params, x), zero).backward()
        method.step()
        schedule.step()
        with torch.no_grad():
            history.append((time.perf_counter() - begin, error(params)))
    return {name: p.detach() for name, p in params.items()}, history


def gauss_newton(steps):
    """The same of Gauss-Newton."""
    params, history, begin = start, [], time.perf_counter()
    method = optim.chain(optim.newton_cg(damping=1.0, iterations=60), optim.scale(-1.0))
    state = method.init(params)
    for _ in range(steps):
        _, params, state = optim.step(
            residual, method, params, state, x, zero, loss_fn=F.mse_loss
        )
        history.append((time.perf_counter() - begin, error(params)))
    return params, history


runs = {"Adam": adam(2500, 1e-2), "Gauss-Newton": gauss_newton(60)}

figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.6))
for label, (params, history) in runs.items():
    axes[0].loglog([row[0] for row in history], [row[1] for row in history], label=label)
    axes[1].plot(grid, u(params, grid), label=label)
    axes[2].semilogy(
        grid,
        (u(params, grid) - solution(grid)).abs().clamp(min=1e-10),
        linewidth=1.2,
        label=label,
    )
axes[0].set(xlabel="seconds", title="Relative error")
axes[0].legend()
axes[1].plot(grid, solution(grid), color="black", linestyle=":", label="solution")
axes[1].set(xlabel="x", title="u")
axes[2].set(xlabel="x", title="Where each errs")
