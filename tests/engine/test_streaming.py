"""One column of large cotangents is contracted inside of the backward pass: the same results, and nothing is kept."""

import gc
import weakref
from typing import Any

import pytest
import torch
from helpers import assert_close
from problems import PROBLEMS
from torch import Tensor, nn
from zoo import ZOO

import curvfunc
from curvfunc import KFAC, BatchGrad, BatchL2, DiagGGN, Grad, SumGradSquared, Variance, compute
from curvfunc.engine import contractions, passes

MAKE = {**{name: p.make for name, p in PROBLEMS.items()}, **{f"zoo: {name}": make for name, make in ZOO.items()}}
SPECS: tuple[Any, ...] = (
    Grad(),
    BatchGrad(),
    BatchL2(),
    SumGradSquared(),
    Variance(),
    DiagGGN(mc_samples=1),
    KFAC(mc_samples=1),
)


def streamed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stream whatever can be, from here on; a list that gets an entry for each backward pass of that kind."""
    passed: list[int] = []
    stream = passes.stream
    monkeypatch.setattr(passes, "STREAMED_BYTES", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(passes, "stream", lambda *args, **kwargs: (passed.append(1), stream(*args, **kwargs))[1])
    return passed


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MAKE)
def test_results_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_fn, params, X, y, loss_fn, *_ = MAKE[name]()

    def found() -> Any:
        generator = torch.Generator().manual_seed(5)
        return compute(model_fn, params, X, y, SPECS, loss_fn=loss_fn, generator=generator)

    want = found()
    passed = streamed(monkeypatch)
    assert_close(found(), want, rtol=1e-12)
    assert len(passed) == 2  # the loss gradient, and the draws


def deep(layers: int = 12) -> nn.Module:
    """As many layers of the same width, with a connection over two of them."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList(nn.Linear(64, 64) for _ in range(layers)), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            for k, layer in enumerate(self.layers):
                h = layer(x).tanh()
                x = x + h if k % 3 == 2 else h
            return self.head(x)

    return Deep()


@pytest.mark.parametrize("spec", [BatchL2(), DiagGGN(mc_samples=1), KFAC(mc_samples=1)])
def test_cotangents_and_inputs_go_at_once(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model_fn, params = curvfunc.functionalize(deep())
    X, y = torch.randn(16, 64), torch.arange(16) % 3
    passed, alive = streamed(monkeypatch), list[int]()
    cotangents: list[weakref.ref[Tensor]] = []
    inputs: list[weakref.ref[Tensor]] = []
    bind = passes.bind

    def spy(form: Any, g: Tensor, prepare: Any, factors: bool) -> Any:
        alive.append(sum(r() is not None for r in cotangents))
        cotangents.append(weakref.ref(g))
        bound = bind(form, g, prepare, factors)
        inputs.append(weakref.ref(bound.x))
        return bound

    monkeypatch.setattr(passes, "bind", spy)
    gc.disable()
    try:
        compute(model_fn, params, X, y, spec)
    finally:
        gc.enable()
    assert passed == [1]
    assert len(alive) == 26
    assert max(alive) <= 3  # those of one layer's weight and bias, and the one that both come from
    assert sum(r() is not None for r in inputs) == 0


def test_what_a_later_pass_needs_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of columns, of which the first is streamed."""
    model_fn, params = curvfunc.functionalize(deep(3).double())
    X, y = torch.randn(5, 64, dtype=torch.float64), torch.arange(5) % 3
    want = compute(model_fn, params, X, y, (BatchL2(), DiagGGN()))
    assert streamed(monkeypatch) == []
    assert_close(compute(model_fn, params, X, y, (BatchL2(), DiagGGN())), want, rtol=1e-12)


def test_errors_inside_of_the_backward_pass_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contractions, "LARGEST_BLOCK", 3)
    streamed(monkeypatch)
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    with pytest.raises(NotImplementedError, match=r"parameter '1\.weight' of shape \(4,\) has no Kronecker structure"):
        compute(model_fn, params, torch.randn(5, 4), torch.arange(5) % 3, KFAC(mc_samples=1))


def test_small_models_are_not_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their cotangents are kept: hooks would take longer than what they save."""
    passed: list[int] = []
    monkeypatch.setattr(passes, "stream", lambda *args, **kwargs: passed.append(1))
    model_fn, params = curvfunc.functionalize(nn.Linear(4, 3))
    compute(model_fn, params, torch.randn(5, 4), torch.arange(5) % 3, BatchL2())
    assert passed == []
