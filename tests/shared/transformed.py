"""The diagonal of the Hessian under the transformations of torch.func, against calls without."""

from typing import Any

import torch
from helpers import assert_close
from torch import Tensor

import curvfunc as cf


def check_transformed(model_fn: Any, params: dict[str, Tensor], X: Tensor, y: Tensor) -> None:
    """vmap over parameters, grad, jvp and a plain graph, by each other and by differences."""
    ensemble = {k: torch.stack([v, 1.1 * v + 0.01]) for k, v in params.items()}
    got = torch.vmap(lambda p: cf.diag_hessian(model_fn, p, X, y))(ensemble)
    each = [cf.diag_hessian(model_fn, {k: v[i] for k, v in ensemble.items()}, X, y) for i in range(2)]
    assert_close(got, {k: torch.stack([e[k] for e in each]) for k in params}, rtol=1e-9)
    key = next(iter(params))

    def total(q: Tensor) -> Tensor:
        return sum((d.sin().sum() for d in cf.diag_hessian(model_fn, {**params, key: q}, X, y).values()), torch.zeros(()))

    direction, step = torch.randn_like(params[key]), 1e-5
    slope = (total(params[key] + step * direction) - total(params[key] - step * direction)) / (2 * step)
    gradient = torch.func.grad(total)(params[key])
    assert_close((gradient * direction).sum(), slope, rtol=1e-5)
    assert_close(torch.func.jvp(total, (params[key],), (direction,))[1], (gradient * direction).sum())
    leaf = params[key].clone().requires_grad_()
    assert_close(torch.autograd.grad(total(leaf), leaf)[0], gradient)
