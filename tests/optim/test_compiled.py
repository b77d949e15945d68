"""Whole steps in compiled code: one graph for each answer to what is due, and never another one."""

from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import nn

import curvfunc
from curvfunc import KFLR, DiagGGN, kronecker, optim

pytestmark = pytest.mark.usefixtures("float64")
OFTEN: Any = {"factors_every": 2, "damping": 0.1}

METHODS = {
    "diagonal": lambda s: optim.scale_by_diagonal(DiagGGN(), damping=0.1, exponent=0.5, every=2),
    "kfac, pi": lambda s: optim.scale_by_kfac(s, KFLR(joined=True), inverses_every=4, kl_clip=0.1, **OFTEN),
    "kfac, exact": lambda s: optim.scale_by_kfac(s, KFLR(), split="exact", inverses_every=2, **OFTEN),
    "ekfac": lambda s: optim.scale_by_ekfac(s, KFLR(joined=True), bases_every=2, **OFTEN),
    "newton, ggn": lambda s: optim.newton_cg(iterations=2),
    "newton, hessian": lambda s: optim.newton_cg("hessian", iterations=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_steps(name: str) -> None:
    torch._dynamo.reset()
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.LayerNorm(3)))
    X, y = torch.randn(6, 3), torch.arange(6) % 3
    structure = kronecker.structure(model_fn, params, X)
    method = optim.chain(METHODS[name](structure), optim.momentum(0.5, average=True), optim.scale(-0.1))

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(params: Any, state: Any, X: Any, y: Any, due: Any) -> Any:
        return optim.step(model_fn, method, params, state, X, y, due=due)

    got = want = params
    state = eager = method.init(params)
    seen: set[Any] = set()
    for t in range(5):
        X, y = torch.randn(6, 3), torch.randint(3, (6,))
        due = method.due(state)
        with torch._dynamo.config.patch(error_on_recompile=(t > 0, due) in seen):
            loss, got, state = compiled(got, state, X, y, due)
        seen.add((t > 0, due))  # the first step's state has no curvature yet
        before, want, eager = optim.step(model_fn, method, want, eager, X, y)
        assert_close(loss, before, rtol=1e-9)
        assert_close(got, want, rtol=1e-8)
    assert len(seen) < 6


def test_draws_of_a_product() -> None:
    torch._dynamo.reset()
    model_fn, params = curvfunc.functionalize(nn.Linear(3, 3))
    X, y = torch.randn(6, 3), torch.arange(6) % 3
    method = optim.newton_cg(mc_samples=1)
    step = torch.compile(lambda p, s: optim.step(model_fn, method, p, s, X, y, due=()), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="draw anew at each call"):
        step(params, method.init(params))
