"""`scale_by_diagonal`, momentum and chains, against the formulas of the papers written out."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import DiagGGN, DiagHessian, Grad, SumGradSquared, compute, optim

pytestmark = pytest.mark.usefixtures("float64")


def problem() -> Any:
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    batches = [(torch.randn(6, 3), torch.arange(6) % 3) for _ in range(5)]
    return model_fn, params, batches


def trees(num: int) -> list[dict[str, Tensor]]:
    return [{"w": torch.randn(3, 2), "b": torch.randn(3)} for _ in range(num)]


def updates(method: optim.Transformation, grads: list[Any], diagonals: list[Any]) -> list[Any]:
    params, found = grads[0], []
    state = method.init(params)
    for g, d in zip(grads, diagonals, strict=True):
        u, state = method.update(g, state, params, d)
        found.append(u)
    return found


def average(values: list[Tensor], decay: float, corrected: bool = True) -> Tensor:
    t = len(values)
    total = sum((1 - decay) * decay ** (t - 1 - i) * v for i, v in enumerate(values))
    return total / (1 - decay**t) if corrected else total


def test_adahessian() -> None:
    """Yao et al. 2021, algorithm 1, with Hessian power k."""
    grads, hessians = trees(4), trees(4)
    for k in (1.0, 0.5):
        method = optim.chain(
            optim.momentum(0.9, average=True),
            optim.scale_by_diagonal(squares=True, exponent=k, decay=0.999, damping=1e-8),
            optim.scale(-0.15),
        )
        found = updates(method, grads, [((), h, ()) for h in hessians])
        for t in range(4):
            for name in grads[0]:
                m = average([g[name] for g in grads[: t + 1]], 0.9)
                v = average([h[name].square() for h in hessians[: t + 1]], 0.999)
                assert_close(found[t][name], -0.15 * m / (v.sqrt() ** k + 1e-8))


def test_sophia() -> None:
    """Liu et al. 2023, algorithm 3, with an estimate at every second step."""
    grads, hessians = trees(5), trees(5)
    lr, gamma, eps = 0.1, 0.3, 1e-2
    method = optim.chain(
        optim.momentum(0.96, average=True),
        optim.scale_by_diagonal(decay=0.99, floor=eps / gamma, clip=gamma, every=2, bias_correction=False),
        optim.scale(-lr / gamma),
    )
    found = updates(method, grads, [((), h if i % 2 == 0 else (), ()) for i, h in enumerate(hessians)])
    clipped = 0
    for t in range(5):
        for name in grads[0]:
            m = average([g[name] for g in grads[: t + 1]], 0.96)
            h = average([h[name] for h in hessians[: t + 1 : 2]], 0.99, corrected=False)
            want = (m / (gamma * h).clamp_min(eps)).clamp(-1, 1)
            clipped += int((want.abs() == 1).sum())
            assert_close(found[t][name], -lr * want)
    assert clipped > 5


@pytest.mark.parametrize("spec", [DiagGGN(), DiagHessian(), SumGradSquared()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_of_quantities(spec: Any, exponent: float) -> None:
    """A loop with `step`: averages of what the quantity is at each of the points."""
    model_fn, params, batches = problem()
    method = optim.chain(optim.scale_by_diagonal(spec, exponent=exponent, damping=0.1, decay=0.8), optim.scale(-0.2))
    got, want, state = params, params, method.init(params)
    seen: list[Any] = []
    for X, y in batches:
        loss, got, state = optim.step(model_fn, method, got, state, X, y)
        assert_close(loss, F.cross_entropy(model_fn(want, X), y))
        grad, diagonal = compute(model_fn, want, X, y, (Grad(), spec))
        seen.append(diagonal)
        mean = {n: average([d[n] for d in seen], 0.8) for n in grad}
        want = {n: p - 0.2 * grad[n] / (mean[n].clamp_min(0) ** exponent + 0.1) for n, p in want.items()}
        assert_close(got, want)


def test_momentum() -> None:
    grads = trees(3)
    found = updates(optim.momentum(0.7), grads, [()] * 3)
    assert_close(found[2], {n: 0.49 * grads[0][n] + 0.7 * grads[1][n] + grads[2][n] for n in grads[0]})


def test_what_is_due() -> None:
    method = optim.scale_by_diagonal(DiagGGN(), damping=1.0, every=3)
    state, found = method.init({"w": torch.zeros(2)}), []
    for _ in range(5):
        due = method.due(state)
        found.append((due, method.needs(state, due)))
        _, state = method.update({"w": torch.ones(2)}, state, {"w": torch.zeros(2)}, {"w": torch.ones(2)} if due else (), due)
    never, now = ((), ()), (("diagonal",), DiagGGN())
    assert found == [now, never, never, now, never]


def test_low_precision_is_averaged_in_single() -> None:
    params = {"w": torch.ones(3, dtype=torch.bfloat16)}
    method = optim.chain(optim.scale_by_diagonal(damping=0.1), optim.momentum(0.9), optim.scale(-0.1))
    state = method.init(params)
    u, state = method.update(params, state, params, ({"w": torch.ones(3)}, (), ()))
    assert state[0]["diagonal"]["w"].dtype == state[1]["momentum"]["w"].dtype == torch.float32
    assert optim.apply_updates(params, u)["w"].dtype == torch.bfloat16


def test_any_tree() -> None:
    """Parameters in a nested tree."""
    w, b = torch.randn(3, 4), torch.randn(3)
    model_fn = lambda p, X: F.linear(X, p[0]["w"], p[1])
    method = optim.chain(optim.scale_by_diagonal(DiagGGN(), damping=0.1), optim.momentum(0.5), optim.scale(-0.1))
    params: Any = ({"w": w}, b)
    state = method.init(params)
    X, y = torch.randn(5, 4), torch.arange(5) % 3
    _, new, _ = optim.step(model_fn, method, params, state, X, y)
    grad, d = compute(model_fn, params, X, y, (Grad(), DiagGGN()))
    assert_close(new, ({"w": w - 0.1 * grad[0]["w"] / (d[0]["w"] + 0.1)}, b - 0.1 * grad[1] / (d[1] + 0.1)))


# -- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(optim.scale_by_diagonal, damping=-1.0), "damping must be finite, at least 0, got -1"),
        (partial(optim.scale_by_diagonal, damping=math.nan), "damping must be finite"),
        (partial(optim.scale_by_diagonal, decay=1.0), "decay must be finite, at least 0 and less than 1"),
        (partial(optim.scale_by_diagonal, clip=0.0), "clip must be positive"),
        (partial(optim.scale_by_diagonal, every=0), "every must be positive"),
        (partial(optim.momentum, 1.0), "decay must be finite, at least 0 and less than 1"),
        (partial(optim.scale, math.nan), "factor must be finite, got nan"),
    ],
)
def test_numbers_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_things_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match="spec must be a quantity"):
        optim.scale_by_diagonal(DiagGGN)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="chain takes transformations"):
        optim.chain(optim.scale)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="factor must be a number"):
        optim.scale("0.1")  # type: ignore[arg-type]


def test_trees_of_other_parameters() -> None:
    [params, grads] = trees(2)
    method = optim.scale_by_diagonal(damping=0.1)
    state = method.init(params)
    with pytest.raises(ValueError, match=r"grads is of other parameters than params: it lacks \['b'\] and has \['c'\]"):
        method.update({"w": grads["w"], "c": grads["b"]}, state, params, params)
    with pytest.raises(ValueError, match=r"curvature is of other parameters than params: it lacks \['b'\]"):
        method.update(grads, state, params, {"w": params["w"]})
    with pytest.raises(ValueError, match=r"curvature has \(3,\) for parameter 'w', which has shape \(3, 2\)"):
        method.update(grads, state, params, {"w": torch.ones(3), "b": torch.ones(3)})
    with pytest.raises(ValueError, match="the state of scale_by_diagonal is of other parameters"):
        method.update(grads, method.init({"w": params["w"]}), params, params)
    with pytest.raises(
        ValueError, match=r"the state of scale_by_diagonal is a dictionary with .*got a dictionary with \['mass'"
    ):
        method.update(grads, optim.momentum(0.9).init(params), params, params)
    with pytest.raises(ValueError, match="the state of a chain of 2 transformations is a tuple.*got a dict"):
        optim.chain(method, optim.scale(-1.0)).update(grads, state, params)
    with pytest.raises(ValueError, match="updates is of other parameters"):
        optim.apply_updates(params, {"w": grads["w"]})


def test_nothing_to_divide_by() -> None:
    [params] = trees(1)
    method = optim.scale_by_diagonal()
    zero = {"w": torch.ones(3, 2), "b": torch.tensor([1.0, 0.0, 1.0])}
    with pytest.raises(ValueError, match="damping is 0, and the curvature of parameter 'b' has entries that are not positive"):
        method.update(params, method.init(params), params, zero)


def test_a_loss_that_is_not_convex() -> None:
    model_fn, params, [(X, _), *_] = problem()
    loss_fn = lambda out, y: (1 - (-(out - y).square()).exp()).mean()
    method = optim.scale_by_diagonal(DiagGGN(), damping=0.1)
    with pytest.raises(ValueError, match="convex"):
        optim.step(model_fn, method, params, method.init(params), X, 3 * torch.ones(6, 3), loss_fn=loss_fn)
