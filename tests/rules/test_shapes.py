"""Convolutions and linear layers of any shape against the specification."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import double
from torch import Tensor

import curvfunc
from curvfunc import BatchGrad, BatchL2, DiagGGN, reference

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def compare(model_fn: Any, params: dict[str, Tensor], X: Tensor, factors: bool = True) -> None:
    """Squared error of all outputs, so that no part of the Jacobian cancels."""
    y = torch.randn_like(model_fn(params, X))
    kwargs = {"loss_fn": F.mse_loss}
    results = curvfunc.compute(model_fn, params, X, y, (BatchGrad(), BatchL2(), DiagGGN()), **kwargs)
    for result, name in zip(results, ("batch_grad", "batch_l2", "diag_ggn"), strict=True):
        assert_close(result, getattr(reference, name)(model_fn, params, X, y, **kwargs))
    if factors:
        assert_close(curvfunc.kflr(model_fn, params, X, y, **kwargs), reference.kflr(model_fn, params, X, y, **kwargs))


def per_dimension(draw: st.DrawFn, dims: int, low: int, high: int) -> Any:
    """One number for all dimensions, or one for each."""
    if draw(st.booleans()):
        return draw(st.integers(low, high))
    return tuple(draw(st.integers(low, high)) for _ in range(dims))


@st.composite
def convolutions(draw: st.DrawFn, dims: int) -> dict[str, Any]:
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    padding = draw(st.sampled_from(["numbers", "same", "valid"]))
    dilation = per_dimension(draw, dims, 1, 2)
    stride = 1 if padding == "same" else per_dimension(draw, dims, 1, 3)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    positions = 4 if dims < 3 else 3
    return {
        "kernel": kernel,
        "options": {
            "stride": stride,
            "padding": per_dimension(draw, dims, 0, 2) if padding == "numbers" else padding,
            "dilation": dilation,
            "groups": groups,
        },
        "bias": draw(st.booleans()),
        "inputs": groups * draw(st.integers(1, 2)),
        "outputs": groups * draw(st.integers(1, 2)),
        "space": tuple(draw(st.integers(1, positions)) for _ in range(dims)),
        "samples": draw(st.integers(1, 3)),
    }


@pytest.mark.parametrize("dims", [1, 2, 3])
@SETTINGS
@given(data=st.data())
def test_convolutions(dims: int, data: st.DataObject) -> None:
    case = data.draw(convolutions(dims))
    options = case["options"]
    with double():
        torch.manual_seed(0)
        params = {"weight": torch.randn(case["outputs"], case["inputs"] // options["groups"], *case["kernel"])}
        if case["bias"]:
            params["bias"] = torch.randn(case["outputs"])
        X = torch.randn(case["samples"], case["inputs"], *case["space"])

        def model_fn(params: dict[str, Tensor], X: Tensor) -> Tensor:
            out = CONVOLUTIONS[dims](X, params["weight"], params.get("bias"), **options)
            return out.tanh().flatten(1)

        assume(fits(case))
        assume(model_fn(params, X).shape[1] <= 40)
        compare(model_fn, params, X)


def fits(case: dict[str, Any]) -> bool:
    """Whether the padded input is as large as the kernel."""
    options, dims = case["options"], len(case["kernel"])
    if options["padding"] == "same":
        return True
    padding = 0 if options["padding"] == "valid" else options["padding"]
    dilation = options["dilation"]
    paddings, dilations = ([v] * dims if isinstance(v, int) else v for v in (padding, dilation))
    sizes = zip(case["space"], case["kernel"], paddings, dilations, strict=True)
    return all(size + 2 * p >= d * (k - 1) + 1 for size, k, p, d in sizes)


@SETTINGS
@given(
    samples=st.integers(1, 3),
    shared=st.lists(st.integers(1, 4), max_size=3),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    bias=st.booleans(),
)
def test_linear_layers(samples: int, shared: list[int], inputs: int, outputs: int, bias: bool) -> None:
    with double():
        torch.manual_seed(0)
        params = {"weight": torch.randn(outputs, inputs)} | ({"bias": torch.randn(outputs)} if bias else {})
        X = torch.randn(samples, *shared, inputs)
        compare(lambda p, X: F.linear(X, p["weight"], p.get("bias")).tanh(), params, X)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(), (1,), (1, 3), (1, 1), (3,)])
@pytest.mark.parametrize("positions", [(), (2,)])
def test_biases_that_torch_broadcasts(shape: tuple[int, ...], positions: tuple[int, ...]) -> None:
    params = {"weight": torch.randn(3, 4), "bias": torch.randn(shape)}
    X = torch.randn(5, *positions, 4)
    compare(lambda p, X: F.linear(X, p["weight"], p["bias"]), params, X, factors=len(shape) < 2)


@SETTINGS
@given(
    samples=st.integers(1, 3),
    shared=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    features=st.integers(1, 4),
    place=st.integers(1, 2),
)
def test_sample_axis_anywhere(samples: int, shared: list[int], features: int, place: int) -> None:
    """Inside, samples stand behind other axes, whose sizes may be the number of samples."""
    place = min(place, len(shared))
    with double():
        torch.manual_seed(0)
        params = {"first": torch.randn(3, features), "second": torch.randn(2, 3), "bias": torch.randn(2)}
        X = torch.randn(samples, *shared, features)

        def model_fn(params: dict[str, Tensor], X: Tensor) -> Tensor:
            z = F.linear(X.movedim(0, place), params["first"]).tanh()
            return F.linear(z, params["second"], params["bias"]).movedim(place, 0).flatten(1)

        compare(model_fn, params, X)


@SETTINGS
@given(
    samples=st.integers(1, 3),
    inner=st.integers(1, 3),
    channels=st.integers(1, 2),
    positions=st.integers(2, 4),
)
def test_batch_axis_of_a_convolution_inside_a_sample(samples: int, inner: int, channels: int, positions: int) -> None:
    """Frames of one sample share a convolution: its batch axis is samples times frames."""
    with double():
        torch.manual_seed(0)
        params = {"weight": torch.randn(2, channels, 2), "bias": torch.randn(2)}
        X = torch.randn(samples, inner, channels, positions)

        def model_fn(params: dict[str, Tensor], X: Tensor) -> Tensor:
            z = F.conv1d(X.flatten(0, 1), params["weight"], params["bias"])
            return z.unflatten(0, X.shape[:2]).tanh().flatten(1)

        compare(model_fn, params, X)
