"""`newton_cg` against dense matrices."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import Grad, compute, optim

pytestmark = pytest.mark.usefixtures("float64")
LOOSE = {"iterations": 200, "tolerance": 0.0}


def problem() -> Any:
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    return model_fn, params, torch.randn(12, 3), torch.arange(12) % 3


def matrix(kind: str, model_fn: Any, params: Any, X: Tensor, y: Tensor) -> Any:
    operator = {"ggn": curvfunc.ggn_operator, "hessian": curvfunc.hessian_operator}[kind](model_fn, params, X, y)
    return operator, operator.dense()


@pytest.mark.parametrize(("kind", "damping"), [("ggn", 0.1), ("ggn", 0.02), ("hessian", 1.0)])
def test_the_dense_damped_newton_step(kind: str, damping: float) -> None:
    model_fn, params, X, y = problem()
    method = optim.newton_cg(kind, damping=damping, **LOOSE)
    grad = compute(model_fn, params, X, y, Grad())
    _, new, _ = optim.step(model_fn, optim.chain(method, optim.scale(-1.0)), params, (method.init(params), ()), X, y)
    operator, dense = matrix(kind, model_fn, params, X, y)
    step = torch.linalg.solve(dense + damping * torch.eye(len(dense)), operator.flatten(grad))
    assert F.cross_entropy(model_fn(new, X), y) < F.cross_entropy(model_fn(params, X), y)
    assert_close({n: params[n] - new[n] for n in params}, operator.unflatten(step), rtol=1e-8)


def test_damping_follows_the_reduction_ratio() -> None:
    """Levenberg-Marquardt: three losses around the point decide what becomes of λ, and of the step."""
    params = {"w": torch.tensor([2.0, -1.0])}
    A, g = torch.tensor([[3.0, 1.0], [1.0, 2.0]]), {"w": torch.tensor([1.0, 0.5])}
    method = optim.newton_cg(damping=0.5, adapt=2.0, warm_start=0.0, **LOOSE)
    u = torch.linalg.solve(A + 0.5 * torch.eye(2), g["w"])
    predicted = 0.5 * g["w"] @ u  # of the damped model at its minimum
    for ratio, size, taken in [
        (1.0, 0.25, True),
        (0.5, 0.5, True),
        (0.1, 1.0, True),
        (-0.1, 1.0, False),
        (math.nan, 1.0, False),
    ]:

        def loss(at: Any, ratio: float = ratio) -> Tensor:
            assert_close(at["w"], params["w"] - u)
            return 7.0 - ratio * predicted

        local = optim.Local(lambda v: {"w": A @ v["w"]}, loss, torch.tensor(7.0))
        got, state = method.update(g, method.init(params), params, local)
        assert float(state["damping"]) == size
        assert_close(got, {"w": u if taken else torch.zeros(2)})


def test_warm_start() -> None:
    """With a single iteration, what is found depends on where it started: one step of steepest descent from there."""
    params, g = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2.0])}
    A = torch.diag(torch.tensor([1.0, 4.0]))
    local = optim.Local(lambda v: {"w": A @ v["w"]}, lambda at: torch.tensor(0.0), torch.tensor(1.0))
    method = optim.newton_cg(damping=0.0, iterations=1, warm_start=0.9)
    start = torch.tensor([0.3, 0.1])
    got, _ = method.update(g, method.init(params) | {"solution": {"w": start}}, params, local)
    r = g["w"] - A @ (0.9 * start)
    assert_close(got["w"], 0.9 * start + (r @ r) / (r @ A @ r) * r)


def test_stops_where_nothing_is_gained() -> None:
    """Martens' criterion, by the count of products."""
    eigenvalues = torch.logspace(0, 4, 200)
    params, g = {"w": torch.zeros(200)}, {"w": torch.ones(200)}
    counts, falls = [], []
    for tolerance in (0.0, 5e-4, 5e-2):
        calls: list[int] = []

        def product(v: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            return {"w": eigenvalues * v["w"]}

        method = optim.newton_cg(damping=0.0, iterations=500, tolerance=tolerance)
        local = optim.Local(product, lambda at: torch.tensor(0.0), torch.tensor(1.0))
        u, _ = method.update(g, method.init(params), params, local)
        counts.append(len(calls))
        falls.append(float((u["w"] - eigenvalues * u["w"].square() / 2).sum()))
    assert counts[0] > counts[1] > counts[2] > 10
    assert falls[0] > falls[1] > falls[2] > 0
    assert falls[0] == pytest.approx(float((1 / eigenvalues).sum()) / 2)


def test_negative_curvature_of_a_hessian() -> None:
    """CG stops there; the gradient is the step if nothing was found, and damping grows until the matrix is positive."""
    params, g = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 0.0])}
    local = optim.Local(lambda v: {"w": -v["w"]}, lambda at: torch.tensor(0.5), torch.tensor(1.0))
    method = optim.newton_cg("hessian", damping=0.1)
    got, _ = method.update(g, method.init(params), params, local)
    assert_close(got, g)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_convergence(kind: str) -> None:
    model_fn, params, X, y = problem()
    method = optim.chain(optim.newton_cg(kind), optim.scale(-1.0))
    state, losses = method.init(params), []
    for _ in range(40):
        loss, params, state = optim.step(model_fn, method, params, state, X, y)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05 * losses[0]


# -- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping must be finite, at least 0"),
        ({"adapt": 0.5}, "adapt must be finite, at least 1"),
        ({"iterations": 0}, "iterations must be positive"),
        ({"warm_start": 1.5}, "warm_start must be at most 1"),
        ({"matrix": "fisher"}, 'matrix must be "ggn" or "hessian"'),
        ({"matrix": "hessian", "mc_samples": 1}, "the Hessian has no draws"),
    ],
)
def test_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.newton_cg(**options)


def test_a_loss_that_is_not_convex() -> None:
    model_fn, params, X, _ = problem()
    loss_fn = lambda out, y: (1 - (-(out - y).square().sum(1) / 8).exp()).mean()
    y = 3 * torch.ones(12, 3)
    method = optim.chain(optim.newton_cg(damping=0.1), optim.scale(-1.0))
    with pytest.raises(ValueError, match="not convex in the model's output"):
        optim.step(model_fn, method, params, method.init(params), X, y, loss_fn=loss_fn)
    method = optim.chain(optim.newton_cg("hessian", damping=0.1), optim.scale(-1.0))
    state = method.init(params)
    for _ in range(30):
        before, params, state = optim.step(model_fn, method, params, state, X, y, loss_fn=loss_fn)
        assert loss_fn(model_fn(params, X), y) <= before
    assert loss_fn(model_fn(params, X), y) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_no_negative_curvature(seed: int) -> None:
    """In single precision, where a classifier is sure and the entries of the loss Hessian cancel."""
    torch.manual_seed(seed)
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).float())
    X = torch.randn(16, 20, dtype=torch.float32)
    y = model_fn(params, X).argmax(1)
    params = {name: 3 * p if name == "2.weight" else p for name, p in params.items()}
    method = optim.chain(optim.newton_cg(damping=1e-6), optim.scale(-1.0))
    state = method.init(params)
    for _ in range(15):
        loss, params, state = optim.step(model_fn, method, params, state, X, y)
    assert loss < 1e-5


def test_curvature_and_states_of_other_parameters() -> None:
    model_fn, params, X, y = problem()
    method = optim.newton_cg()
    grad = compute(model_fn, params, X, y, Grad())
    with pytest.raises(TypeError, match="curvature must be a curvfunc.optim.Local"):
        method.update(grad, method.init(params), params, grad)
    with pytest.raises(ValueError, match="the state of newton_cg is of other parameters"):
        method.update(grad, method.init({"w": torch.ones(2)}), params, ())
