"""`scale_exactly` against dense matrices."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

import curvfunc
from curvfunc import Grad, compute, kronecker, optim

pytestmark = pytest.mark.usefixtures("float64")


def problem() -> Any:
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    X, y = torch.randn(12, 3), torch.arange(12) % 3
    return model_fn, params, X, y, optim.scale_by_kfac(kronecker.structure(model_fn, params, X), curvfunc.KFLR(), damping=0.1)


def test_the_minimum_in_the_plane_of_direction_and_last_step() -> None:
    model_fn, params, X, y, kfac = problem()
    method, damping, last = optim.scale_exactly(kfac, damping=0.3, adapt=1.0), 0.3, None
    state, chain = method.init(params), optim.chain(method, optim.scale(-1.0))
    for _ in range(3):
        operator = curvfunc.ggn_operator(model_fn, params, X, y)
        G = operator.dense() + damping * torch.eye(operator.shape[0])
        grad, factors = compute(model_fn, params, X, y, (Grad(), kfac.needs(state["inner"], kfac.due(state["inner"]))))
        direction, _ = kfac.update(grad, state["inner"], params, factors)
        D = torch.stack([operator.flatten(d) for d in ([direction] if last is None else [direction, last])], 1)
        want = D @ torch.linalg.solve(D.T @ G @ D, D.T @ operator.flatten(grad))
        _, new, (state, _) = optim.step(model_fn, chain, params, (state, ()), X, y)
        last = {name: p - new[name] for name, p in params.items()}
        assert_close(operator.flatten(last), want, rtol=1e-7)
        assert F.cross_entropy(model_fn(new, X), y) < F.cross_entropy(model_fn(params, X), y)
        params = new


def test_damping_follows_the_ratio_and_bad_steps_are_not_taken() -> None:
    model_fn, params, X, y, kfac = problem()
    method = optim.scale_exactly(kfac, damping=0.3, adapt=0.5)
    state = method.init(params)
    needed = method.needs(state, method.due(state))
    grads, factors = compute(model_fn, params, X, y, (Grad(), needed[0]))
    operator = curvfunc.ggn_operator(model_fn, params, X, y)
    product = lambda v: operator @ v
    value = torch.tensor(1.0)
    for moved, factor, taken in ((2.0, 2.0, False), (float("nan"), 2.0, False), (-100.0, 0.5, True)):
        local = optim.Local(product, lambda p, moved=moved: torch.tensor(moved), value)
        step, new = method.update(grads, state, params, (factors, local))
        assert_close(new["damping"], state["damping"] * factor, rtol=1e-12)
        assert any(bool(t.any()) for t in step.values()) == taken


def test_bad_input() -> None:
    model_fn, params, X, y, kfac = problem()
    for bad in ({"damping": -1.0}, {"adapt": 0.0}, {"adapt": 1.5}):
        with pytest.raises(ValueError, match="scale_exactly"):
            optim.scale_exactly(kfac, **bad)
    method = optim.scale_exactly(kfac)
    state = method.init(params)
    grads = compute(model_fn, params, X, y, Grad())
    with pytest.raises(TypeError, match="pair"):
        method.update(grads, state, params, ())
    with pytest.raises(ValueError, match="scale_exactly"):
        method.update({"other": torch.zeros(2)}, state, params, ((), ()))
