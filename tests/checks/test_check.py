"""The check of a model: silent where all is right, and it names the parameter and the operation where something is not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import ZOO

import curvfunc
from curvfunc import Direct, functionalize
from curvfunc.engine import capture
from curvfunc.rules import RULES, batch_axis
from curvfunc.rules.kernels import INSTEAD

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str) -> None:
    model_fn, params, X, y, loss_fn, _ = ZOO[name]()
    report = curvfunc.check(model_fn, params, X, y, loss_fn=loss_fn, samples=1)
    assert report, str(report)
    assert {row.parameter for row in report.rows} == params.keys()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands for torch's wrong kernels."""
    for order, functions in INSTEAD.items():
        monkeypatch.setitem(INSTEAD, order, {F.embedding: functions[F.embedding]})
        monkeypatch.setitem(capture.FASTEST, order, {})


def wrong(report: curvfunc.Report, parameters: set[str], *causes: str) -> None:
    found = [row for row in report.rows if not row.ok]
    assert {row.parameter for row in found} == parameters, str(report)
    for cause in causes:
        assert any(cause in row.why for row in found), str(report)
    with pytest.raises(ArithmeticError, match="WRONG"):
        report.raise_if_wrong()


def distances(p: Any, x: Tensor) -> Tensor:
    return torch.cdist((x @ p["before"]).view(-1, 2, 2), p["centers"], p=1.0).flatten(1) @ p["after"]


def scattered(p: Any, x: Tensor) -> Tensor:
    h = x @ p["before"]
    return torch.select_scatter(h.tanh(), h[:, 0], 1, 2) @ p["after"] + torch.atan2(x[:, :1], p["generic"])


def tokens(p: Any, x: Tensor) -> Tensor:
    h = F.batch_norm((x @ p["before"]).view(-1, 2, 2, 3), MEAN, VARIANCE).flatten(2).transpose(1, 2)
    return (h * p["position"]).sum(1)


MEAN, VARIANCE = torch.zeros(2, dtype=torch.float64), torch.full((2,), 3.0, dtype=torch.float64)


@pytest.mark.usefixtures("bare")
def test_backward_pass_under_vmap_over_columns() -> None:
    params = {"before": noise(3, 4), "centers": noise(3, 2), "after": noise(6, 2)}
    report = curvfunc.check(distances, params, X, Y)
    wrong(report, {"before", "centers"}, "cdist: its backward pass under vmap over columns")
    assert "centers" in str(report)


@pytest.mark.usefixtures("bare")
def test_backward_pass_under_vmap_over_samples() -> None:
    """Where it is wrong, the samples are compared with the batch, and run one by one."""
    params = {"before": noise(3, 4), "after": noise(4, 2), "generic": noise(1)}
    assert curvfunc.check(scattered, params, X, Y)
    rows = curvfunc.explain(scattered, params, X).rows
    assert {(row.path, "under vmap the model has other values or gradients" in row.why) for row in rows} == {("loop", True)}


@pytest.mark.usefixtures("bare")
def test_second_derivative() -> None:
    params = {"v": noise(4, 3), "g": noise(4, 1), "after": noise(4, 2)}
    model_fn = lambda p, x: F.linear(x, torch._weight_norm(p["v"], p["g"], 0)).tanh() @ p["after"]
    wrong(curvfunc.check(model_fn, params, X, Y), {"v"}, "_weight_norm: its second derivative")


@pytest.mark.usefixtures("bare")
def test_strides_of_one_sample() -> None:
    """Here torch's ordinary backward pass is wrong, and curvfunc's with it."""
    params = {"before": noise(3, 12), "position": noise(6, 2)}
    wrong(curvfunc.check(tokens, params, X[:1], Y[:1]), {"before"}, "batch_norm: its gradient, if the cotangent is strided")


def test_what_stands_for_them_is_right() -> None:
    before, after = noise(3, 4), noise(4, 2)
    assert curvfunc.check(distances, {"before": before, "centers": noise(3, 2), "after": noise(6, 2)}, X, Y)
    assert curvfunc.check(scattered, {"before": before, "after": after, "generic": noise(1)}, X, Y)
    report = curvfunc.check(tokens, {"before": noise(3, 12), "position": noise(6, 2)}, X[:1], Y[:1])
    assert report
    assert "torch's own backward pass is wrong" in str(report)


@curvfunc.operation
def scaled(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x) * w


@pytest.fixture
def wrong_rule() -> Iterator[None]:
    curvfunc.rule(scaled, parameters="w", samples_first=True)(lambda x, w: {"w": Direct(lambda g: g * x, w.shape)})
    yield
    del RULES[scaled], batch_axis.RULES[scaled]


@pytest.mark.usefixtures("wrong_rule")
def test_rule() -> None:
    params = {"w": noise(3), "after": noise(3, 2)}
    wrong(curvfunc.check(lambda p, x: scaled(x, p["w"]) @ p["after"], params, X, Y), {"w"}, "perhaps the rule of scaled")


class Cube(torch.autograd.Function):
    """x³."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * 3 * x**2


class Sloppy(Cube):
    """Right for one column, twice that for several together."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * 3 * x**2 * (2 if torch._C._functorch.is_batchedtensor(g) else 1)


def test_autograd_function() -> None:
    params = {"before": noise(3, 4), "after": noise(4, 2)}
    wrong(curvfunc.check(lambda p, x: Sloppy.apply(x @ p["before"]) @ p["after"], params, X, Y), {"before"}, "SloppyBackward")


def test_samples_that_depend_on_each_other() -> None:
    """Through tensors without gradient; where that is refused, there is nothing to check."""
    params = {"w": noise(3, 2)}
    try:
        report = curvfunc.check(lambda p, x: (x - x.mean(0)) @ p["w"], params, X, Y)
    except ValueError as error:
        assert "mixes" in str(error)  # noqa: PT017
    else:
        wrong(report, {"w"}, "mixes samples")


def test_parts_that_are_detached_are_no_mistake() -> None:
    params = {"w": noise(3, 2)}
    report = curvfunc.check(lambda p, x: (h := x @ p["w"]) + (h.round() - h).detach(), params, X, Y)
    assert report
    assert "finite differences do not" in str(report)


def test_single_precision() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2))
    model_fn, params = functionalize(model)
    report = curvfunc.check(model_fn, params, X.float(), Y, generator=torch.Generator().manual_seed(0))
    assert report, str(report)
    assert "comparisons, largest error" in str(report)


def test_chance() -> None:
    """Where all samples run together, they draw the same numbers again; where each runs alone, there is nothing to compare."""
    model_fn, params = functionalize(nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2)).double())
    assert curvfunc.check(model_fn, params, X, Y)
    params["generic"] = noise(1)
    apart = lambda p, x: model_fn({k: p[k] for k in p if k != "generic"}, x) + torch.atan2(x[:, :1], p["generic"])
    with pytest.raises(ValueError, match=r"depends on chance.*module.eval"):
        curvfunc.check(apart, params, X, Y)


def test_state() -> None:
    calls = []

    def model_fn(p: Any, x: Tensor) -> Tensor:
        calls.append(1)
        return x @ p["w"] * len(calls)

    with pytest.raises(ValueError, match="two runs of the model with the same random numbers differ"):
        curvfunc.check(model_fn, {"w": noise(3, 2)}, X, Y)


def test_what_is_refused_is_said() -> None:
    params = {"w": noise(3, 4), "v": noise(4, 2)}
    loss = lambda h, x: F.multi_margin_loss(h, (x[:, 0] > 0).long(), reduction="none")
    report = curvfunc.check(lambda p, x: loss(x @ p["w"], x)[:, None] * p["v"][0], params, X, Y)
    assert report
    assert "refused: derivative for aten::multi_margin_loss_backward is not implemented" in str(report)
