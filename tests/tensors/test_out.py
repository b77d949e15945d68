"""Results in memory that the caller provides."""

from typing import Any

import optree
import pytest
import torch
from helpers import assert_close
from problems import PROBLEMS, tagged
from torch import nn

import curvfunc
from curvfunc import (
    KFAC,
    KFLR,
    BatchDiagGGN,
    BatchGrad,
    BatchL2,
    DiagGGN,
    DiagHessian,
    Grad,
    Loss,
    Output,
    SqrtGGN,
    SumGradSquared,
    Variance,
    compute,
    functionalize,
)

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

LARGE = (BatchGrad(), SqrtGGN(), BatchDiagGGN())


def spoiled(results: Any) -> Any:
    """Tensors like the results, full of NaN."""
    return optree.tree_map(lambda t: torch.full_like(t, torch.nan), results)


def same_tensors(a: Any, b: Any) -> bool:
    return all(s is t for s, t in zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True))


def run(name: str, specs: Any, **kwargs: Any) -> Any:
    model_fn, params, X, y, loss_fn = PROBLEMS[name].make()
    return compute(model_fn, params, X, y, specs, loss_fn=loss_fn, **kwargs)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", tagged())
def test_large_results_are_written_where_asked(name: str, chunk_size: int | None) -> None:
    expected = run(name, LARGE, chunk_size=chunk_size)
    buffers = spoiled(expected)
    found = run(name, LARGE, chunk_size=chunk_size, out=buffers)
    assert same_tensors(found, buffers)
    assert_close(found, expected)


@pytest.mark.parametrize("subsampling", [None, [2, 0]])
@pytest.mark.parametrize("name", ["batch_grad", "sqrt_ggn", "batch_diag_ggn", "batch_diag_hessian"])
def test_functions_with_large_results_take_buffers(name: str, subsampling: list[int] | None) -> None:
    model_fn, params = functionalize(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))
    X, y = torch.randn(5, 4), torch.arange(5) % 3
    function = getattr(curvfunc, name)
    for given in ({}, {"mc_samples": 2}) if name.endswith("ggn") else ({},):
        torch.manual_seed(0)
        expected = function(model_fn, params, X, y, subsampling=subsampling, **given)
        buffers = spoiled(expected)
        torch.manual_seed(0)
        found = function(model_fn, params, X, y, subsampling=subsampling, out=buffers, **given)
        assert same_tensors(found, buffers)
        assert_close(buffers, expected)
    step = torch.compile(lambda out: function(model_fn, params, X, y, out=out), backend="eager", fullgraph=True)
    expected = function(model_fn, params, X, y)
    buffers = spoiled(expected)
    assert_close(step(buffers), expected)
    assert_close(buffers, expected)


def test_every_result_can_be_asked_into_buffers() -> None:
    specs = {
        "scalars": (Loss(), Output(), Grad()),
        "sums": [BatchL2(), SumGradSquared(), Variance(), DiagGGN(), DiagHessian()],
        "factors": (KFLR(), KFLR(kfac_approx="reduce")),
        "large": LARGE,
    }
    expected = run("conv2d, groups", specs)
    buffers = spoiled(expected)
    found = run("conv2d, groups", specs, out=buffers)
    assert same_tensors(found, buffers)
    assert_close(found, expected)


def test_some_results_only_and_a_subset_of_samples() -> None:
    expected = run("mlp: squared error", (Grad(), BatchGrad()), subsampling=[2, 0])
    buffer = spoiled(expected[1])
    grad, found = run("mlp: squared error", (Grad(), BatchGrad()), subsampling=[2, 0], out=(None, buffer))
    assert same_tensors(found, buffer)
    assert_close((grad, found), expected)


def test_the_same_result_twice() -> None:
    expected = run("mlp: squared error", [BatchGrad(), BatchGrad()])
    buffers = spoiled(expected)
    assert_close(run("mlp: squared error", [BatchGrad(), BatchGrad()], out=buffers), expected)
    assert not same_tensors(buffers[0], buffers[1])


def test_no_gradients_of_samples_are_made_besides_the_buffers() -> None:
    module = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 3))
    model_fn, params = functionalize(module)
    X, y = torch.randn(20, 200), torch.arange(20) % 3
    buffers = compute(model_fn, params, X, y, BatchGrad())
    with torch.profiler.profile(profile_memory=True) as profile:
        compute(model_fn, params, X, y, BatchGrad(), out=buffers)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < buffers["0.weight"].numel() * 8 / 10


def test_low_precision() -> None:
    model_fn, params = functionalize(nn.Linear(4, 3, dtype=torch.bfloat16))
    X, y = torch.randn(5, 4, dtype=torch.bfloat16), torch.arange(5) % 3
    expected = compute(model_fn, params, X, y, LARGE)
    found = compute(model_fn, params, X, y, LARGE, out=spoiled(expected))
    assert all(torch.equal(a, b) for a, b in zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True))


def test_compiled() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    model_fn, params = functionalize(module)
    X, y = torch.randn(4, 1, 4, 4), torch.arange(4) % 3

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(params: Any, X: Any, y: Any, out: Any) -> Any:
        return compute(model_fn, params, X, y, (Grad(), BatchGrad()), out=(None, out))

    expected = compute(model_fn, params, X, y, (Grad(), BatchGrad()))
    buffer = spoiled(expected[1])
    found = step(params, X, y, buffer)
    assert_close(buffer, expected[1])
    assert_close(found, expected)


def test_compiled_code_does_not_broadcast_into_buffers() -> None:
    model_fn, params = functionalize(nn.Linear(4, 3))
    X, y = torch.randn(1, 4), torch.zeros(1, dtype=torch.long)
    step = torch.compile(lambda out: compute(model_fn, params, X, y, BatchGrad(), out=out), backend="aot_eager", fullgraph=True)
    right = compute(model_fn, params, X, y, BatchGrad())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ValueError"):
        step({**right, "weight": right["weight"].expand(5, 3, 4).clone()})


def test_buffers_that_are_not_contiguous() -> None:
    model_fn, params = functionalize(nn.Linear(4, 3))
    X, y = torch.randn(5, 4), torch.arange(5) % 3
    expected = compute(model_fn, params, X, y, LARGE)
    buffers = optree.tree_map(lambda t: torch.full_like(t.mT if t.ndim > 2 else t, torch.nan), expected)
    buffers = optree.tree_map(lambda t: t.mT if t.ndim > 2 else t, buffers)
    assert_close(compute(model_fn, params, X, y, LARGE, out=buffers), expected)
    assert_close(buffers, expected)


def test_refusals() -> None:
    model_fn, params = functionalize(nn.Linear(4, 3))
    X, y = torch.randn(5, 4), torch.arange(5) % 3
    right = compute(model_fn, params, X, y, BatchGrad())

    def into(out: Any, params: Any = params, specs: Any = BatchGrad()) -> Any:
        return compute(model_fn, params, X, y, specs, out=out)

    with pytest.raises(ValueError, match=r"BatchGrad, parameter 'weight' has shape \(4, 3, 4\).*\(5, 3, 4\) on cpu"):
        into({**right, "weight": right["weight"][:4]})
    with pytest.raises(ValueError, match="out for BatchGrad must be a tree like params"):
        into({"weight": right["weight"]})
    with pytest.raises(ValueError, match="like what an earlier call with the same specs returned"):
        into((right,), specs=(Grad(), BatchGrad()))
    with pytest.raises(TypeError, match="'bias' must be a tensor, got int"):
        into({**right, "bias": 3})
    with pytest.raises(ValueError, match="DiagGGN has shape"):
        into(right, specs=DiagGGN())
    with pytest.raises(ValueError, match=r"dtype torch\.float32, and its result torch\.float64"):
        into({name: t.float() for name, t in right.items()})
    with pytest.raises(ValueError, match="without a graph"):
        into(right, params={k: p.requires_grad_() for k, p in params.items()})
    with pytest.raises(ValueError, match=r"torch\.func transformation"):
        torch.func.grad(lambda p: into(right, p)["weight"].sum())({k: p.detach() for k, p in params.items()})


def test_monte_carlo_factors() -> None:
    model_fn, params = functionalize(nn.Linear(4, 3))
    X, y = torch.randn(5, 4), torch.arange(5) % 3
    torch.manual_seed(1)
    expected = compute(model_fn, params, X, y, KFAC(mc_samples=3))
    torch.manual_seed(1)
    buffers = spoiled(expected)
    assert_close(compute(model_fn, params, X, y, KFAC(mc_samples=3), out=buffers), expected)
    assert_close(buffers, expected)
