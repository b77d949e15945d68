"""Private steps: clipped sums with noise, batches by chance, and what has no answer."""

import math
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import ClippedGrad, accumulate, private, reference
from curvfunc.private.noise import uniform

pytestmark = pytest.mark.usefixtures("float64")

N, C = 12, 3


def setting() -> tuple[Any, Any, Tensor, Tensor]:
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)))
    return model_fn, params, torch.randn(N, 4), torch.arange(N) % C


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


GIVEN: dict[str, Any] = {"max_norm": 0.5, "noise_multiplier": 1.3, "denominator": 8.0}


@pytest.mark.parametrize("bounds", [{"max_norm": 0.5}, {"max_norm": 0.5, "per_layer": True}], ids=str)
def test_a_step_is_clipping_noise_and_a_fixed_denominator(bounds: Any) -> None:
    model_fn, params, X, y = setting()
    got = private.noisy_grad(model_fn, params, X, y, **GIVEN | bounds, generator=seeded())
    clipped, draws = reference.clipped_grad(model_fn, params, X, y, **bounds), seeded()
    noise = {name: 1.3 * 0.5 * torch.randn(p.shape, generator=draws) for name, p in sorted(params.items())}
    assert_close(got, {name: (clipped[name] + noise[name]) / 8 for name in params})


def test_bounds_by_name_have_noise_for_all_of_them() -> None:
    model_fn, params, X, y = setting()
    given = GIVEN | {"max_norm": {"0": 0.3, "2": 0.4}}
    without = private.noisy_grad(model_fn, params, X, y, **given | {"noise_multiplier": 0})
    torch.manual_seed(0)
    got = private.noisy_grad(model_fn, params, X, y, **given)
    torch.manual_seed(0)
    noise = {name: 1.3 * 0.5 * torch.randn(p.shape) / 8 for name, p in sorted(params.items())}
    assert_close(got, {name: without[name] + noise[name] for name in params})


@pytest.mark.parametrize("loss_fn", [None, lambda out, y: F.cross_entropy(out, y, reduction="sum")], ids=["named", "custom"])
def test_an_empty_batch_is_noise_alone(loss_fn: Any) -> None:
    """Also for a model that cannot run on nothing."""
    model_fn, params, X, y = setting()

    def unwilling(params: Any, X: Any) -> Tensor:
        return model_fn(params, X) * X.max()

    given = GIVEN if loss_fn is None else GIVEN | {"loss_fn": loss_fn}
    draws = seeded()
    want = {name: 1.3 * 0.5 * torch.randn(p.shape, generator=draws) / 8 for name, p in sorted(params.items())}
    assert_close(private.noisy_grad(unwilling, params, X[:0], y[:0], **given, generator=seeded()), want)
    with pytest.raises(ValueError, match="cross_entropy averages"):
        private.noisy_grad(model_fn, params, X[:0], y[:0], **GIVEN, loss_fn=F.cross_entropy)


def test_large_batches_in_parts() -> None:
    """Clipped sums add up, and the noise comes once."""
    model_fn, params, X, y = setting()
    spec = ClippedGrad(0.5)
    loss_fn = partial(F.cross_entropy, reduction="sum")
    clipped = accumulate(model_fn, params, [(X[:5], y[:5]), (X[5:], y[5:])], spec, loss_fn=loss_fn)
    noisy = private.add_noise(clipped, 1.3 * spec.sensitivity, generator=seeded())
    got = optree.tree_map(lambda t: t / 8, noisy)
    assert_close(got, private.noisy_grad(model_fn, params, X, y, **GIVEN, generator=seeded()))


def test_parameters_that_require_gradients_and_compiled_steps() -> None:
    model_fn, params, X, y = setting()
    live = {name: p.clone().requires_grad_() for name, p in params.items()}
    got = private.noisy_grad(model_fn, live, X, y, **GIVEN | {"noise_multiplier": 0})
    assert not any(g.requires_grad for g in got.values())
    step = torch.compile(partial(private.noisy_grad, model_fn), fullgraph=True, backend="aot_eager")
    assert_close(step(params, X, y, **GIVEN | {"noise_multiplier": 0}), got)
    first, second = (step(params, X, y, **GIVEN)["0.weight"] for _ in range(2))
    assert not torch.equal(first, second)
    for options in ({"secure": True}, {"generator": seeded()}):
        torch._dynamo.reset()
        call = partial(private.noisy_grad, model_fn, **GIVEN, **options)
        with pytest.raises(Exception, match="compiled code draws from torch's default generators alone"):
            torch.compile(call, fullgraph=True, backend="aot_eager")(params, X, y)


# -- chance


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_normal(secure: bool) -> None:
    """Mean, variance, fourth moment, tails and the correlation of neighbours, within five standard errors."""
    size = 200_001
    z = private.add_noise(torch.full((size,), 2.0), 3.0, generator=None if secure else seeded(), secure=secure)
    z = (z - 2) / 3
    for value, want, error in (
        (z.mean(), 0, 1),
        (z.square().mean(), 1, 2**0.5),
        (z.pow(4).mean(), 3, 96**0.5),
        ((z.abs() > 3).double().mean(), math.erfc(3 / 2**0.5), 0.052),
        ((z[1:] * z[:-1]).mean(), 0, 1),
        ((z[: size // 2] * z[-(size // 2) :]).mean(), 0, 2**0.5),
    ):
        assert abs(float(value) - want) < 5 * error / size**0.5


def test_secure_noise_is_nobodys() -> None:
    torch.manual_seed(0)
    first = private.add_noise({"w": torch.zeros(3, 2, dtype=torch.float32)}, 1.0, secure=True)["w"]
    torch.manual_seed(0)
    second = private.add_noise({"w": torch.zeros(3, 2, dtype=torch.float32)}, 1.0, secure=True)["w"]
    assert not torch.equal(first, second)
    assert first.dtype == torch.float32
    assert private.add_noise(torch.zeros(()), 1.0, secure=True).shape == ()
    assert private.add_noise(torch.zeros(0), 1.0, secure=True).shape == (0,)
    draws = uniform(100_000)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5


@pytest.mark.parametrize("secure", [False, True])
def test_batches_are_poissons(secure: bool) -> None:
    """Sizes are binomial, samples are in a batch by themselves, and some batches are empty."""
    steps, rate = 3000, 0.15
    batches = list(private.poisson_batches(N, rate, steps=steps, generator=None if secure else seeded(), secure=secure))
    assert len(batches) == steps
    members = torch.zeros(steps, N)
    for row, batch in zip(members, batches, strict=True):
        assert batch.dtype == torch.int64
        row[batch] = 1
        assert len(batch) == row.sum()
    error = 5 * (rate * (1 - rate) / steps) ** 0.5
    assert (members.mean(0) - rate).abs().max() < error
    together = members.mT @ members / steps - rate**2
    assert (together - together.diag().diag()).abs().max() < 5 * rate / steps**0.5
    empty = (members.sum(1) == 0).double().mean()
    assert abs(empty - (1 - rate) ** N) < 5 * 0.35 / steps**0.5
    assert all(torch.equal(batch, torch.arange(N)) for batch in private.poisson_batches(N, 1.0, steps=2))
    with pytest.raises(StopIteration):
        next(private.poisson_batches(N, 0.5, steps=0))


def test_batches_repeat_with_their_generator() -> None:
    first, second = (list(private.poisson_batches(N, 0.5, steps=4, generator=seeded())) for _ in range(2))
    assert all(map(torch.equal, first, second))


# -- what has no answer


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_norm": 0.0}, "max_norm must be positive"),
        ({"max_norm": -1.0}, "max_norm must be positive"),
        ({"noise_multiplier": -0.1}, "noise_multiplier must be at least 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be at least 0"),
        ({"denominator": 0}, "denominator must be positive"),
        ({"denominator": math.inf}, "denominator must be positive"),
        ({"loss_fn": F.cross_entropy}, "cross_entropy averages"),
        ({"loss_fn": nn.CrossEntropyLoss()}, "cross_entropy averages"),
        ({"loss_fn": lambda out, y: F.cross_entropy(out, y)}, "is no sum over samples"),
        ({"secure": True, "generator": torch.Generator()}, "Pass one of them"),
    ],
)
def test_wrong_numbers(given: dict[str, Any], message: str) -> None:
    model_fn, params, X, y = setting()
    with pytest.raises(ValueError, match=message):
        private.noisy_grad(model_fn, params, X, y, **GIVEN | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"denominator": "8"}, "denominator must be a number"),
        ({"noise_multiplier": True}, "noise_multiplier must be a number"),
        ({"max_norm": None}, "max_norm must be a number"),
        ({"secure": 1}, "secure must be True or False"),
        ({"generator": 3}, "generator must be a torch.Generator"),
    ],
)
def test_wrong_types(given: dict[str, Any], message: str) -> None:
    model_fn, params, X, y = setting()
    with pytest.raises(TypeError, match=message):
        private.noisy_grad(model_fn, params, X, y, **GIVEN | given)


def test_wrong_batches() -> None:
    for rate in (0.0, 1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"rate must be in \(0, 1\]"):
            private.poisson_batches(N, rate, steps=1)
    with pytest.raises(TypeError, match="rate must be a number"):
        private.poisson_batches(N, "0.1", steps=1)
    with pytest.raises(ValueError, match="samples must be positive"):
        private.poisson_batches(0, 0.5, steps=1)
    with pytest.raises(TypeError, match="steps must be an int"):
        private.poisson_batches(N, 0.5, steps=1.5)
    with pytest.raises(ValueError, match="std must be at least 0"):
        private.add_noise({}, -1.0)


# -- the example


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(module)
    torch.set_default_dtype(torch.float32)
    folder = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["private.py", "--steps", "4", "--rate", "0.02", "--out", str(tmp_path)])
    runpy.run_path(str(folder / "private.py"), run_name="__main__")
    assert (tmp_path / "private.png").stat().st_size > 10_000
    assert "epsilon" in capsys.readouterr().out
