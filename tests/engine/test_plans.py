"""A forward pass takes decisions over from the one before: only where all that they depend on is the same again."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from one_by_one import verify
from torch import Tensor, nn

import curvfunc
from curvfunc import KFLR, BatchGrad, BatchL2, DiagGGN, Grad, compute
from curvfunc.compat import backpack, extend, extensions
from curvfunc.engine import plans

pytestmark = pytest.mark.usefixtures("float64", "no_plans")

N = 3
SPECS: tuple[Any, ...] = (Grad(), BatchGrad(), BatchL2(), DiagGGN(), KFLR())


@pytest.fixture
def no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_PLANS", {})


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each decision that is taken over, from here on."""
    counted: list[int] = []
    original = plans.Plan.taken
    monkeypatch.setattr(plans.Plan, "taken", lambda self: (counted.append(1), original(self))[1])
    return counted


def data() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Three samples, three features, three classes: no size tells what an axis is."""
    torch.manual_seed(0)
    return {"a": torch.randn(3, 3), "b": torch.randn(3, 3), "c": torch.randn(3)}, torch.randn(N, 3), torch.tensor([0, 2, 1])


CONSTANT = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TANGENT = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def without_grad(h: Tensor, a: Tensor) -> Tensor:
    with torch.no_grad():
        return F.linear(h, a)


def layer(inner: Callable[[dict[str, Tensor], Tensor], Tensor]) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The same code around something that differs."""

    def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = F.linear(x, p["a"], p["c"])
        h = inner(p, h)
        return F.linear(h, p["b"])

    return model


INNER: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
    "relu": lambda p, h: F.relu(h),
    "tanh": lambda p, h: torch.tanh(h),
    "nothing": lambda p, h: h,
    "a constant factor": lambda p, h: h * 2,
    "another constant factor": lambda p, h: h * 3.5,
    "a factor per feature": lambda p, h: h * CONSTANT[0],
    "a parameter": lambda p, h: h * p["c"],
    "another layer": lambda p, h: F.linear(h, p["a"]),
    "another layer, another parameter": lambda p, h: F.linear(h, p["b"]),
    "another layer with a bias": lambda p, h: F.linear(h, p["a"], p["c"]),
    "a layer of constants": lambda p, h: h + F.linear(CONSTANT, p["a"]),
    "a layer of a transposed parameter": lambda p, h: F.linear(h, p["a"].t()),
    "a layer of a scaled parameter": lambda p, h: F.linear(h, p["a"] * 2),
    "a layer without graph": lambda p, h: h + without_grad(h, p["a"]),
    "a layer of detached features": lambda p, h: h + F.linear(h.detach(), p["a"]),
    "softmax": lambda p, h: F.softmax(h, 1),
    "softmax by keyword": lambda p, h: F.softmax(h, dim=-1),
    "a sum": lambda p, h: h.sum(1, keepdim=True).expand(-1, 3),
    "a mean": lambda p, h: h.mean(-1, keepdim=True) + h,
    "turned and back": lambda p, h: F.softmax(h.t(), 0).t(),
    "in place": lambda p, h: h.add_(1.0),
    "in place, by a parameter": lambda p, h: h.mul_(p["c"]),
    "a derivative": lambda p, h: torch.func.jvp(torch.sin, (h,), (TANGENT[:1].expand_as(h),))[1],
    "parts": lambda p, h: torch.cat([h[:, :1], h[:, 1:] * 2], dim=1),
    "the same tensor": lambda p, h: h.contiguous(),
    "a copy": lambda p, h: h.clone(),
}
ONE_BY_ONE = {"a layer of constants"}  # a constant with N rows is no model of one sample

INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "the samples": lambda x: x,
    "constants with as many rows": lambda x: CONSTANT,
    "one row": lambda x: x[:, :1].expand(-1, 3),
    "samples and constants": lambda x: x + CONSTANT[:1],
    "constants that were written into": lambda x: CONSTANT.contiguous().mul_(1.0),
    "a copy of constants that was written into": lambda x: CONSTANT.t().contiguous().mul_(2.0),
    "integers": lambda x: x.long().double(),
}

MIXING: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
    "a mean over samples": lambda p, h: h.mean(0, keepdim=True) + h,
    "softmax over samples": lambda p, h: F.softmax(h, 0),
    "turned": lambda p, h: h.t(),
    "products of samples": lambda p, h: h @ h.t(),
}


@pytest.mark.parametrize("name", INNER)
def test_a_model_that_becomes_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, X, y = data()
    for earlier in INNER:
        for _ in range(2):
            compute(layer(INNER[earlier]), params, X, y, SPECS)
        got = compute(layer(INNER[name]), params, X, y, SPECS)
        with monkeypatch.context() as patch:
            patch.setattr(plans, "expected", lambda *given: None)
            want = compute(layer(INNER[name]), params, X, y, SPECS)
        assert_close(got, want, rtol=1e-13)
    if name not in ONE_BY_ONE:
        verify(layer(INNER[name]), params, X, y)


def test_fewer_parameters() -> None:
    params, X, y = data()

    def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(F.linear(x, p["a"]).tanh(), p["b"], p.get("c"))

    for names in ("abc", "ab", "abc", "cab"):
        verify(model, {name: params[name] for name in names}, X, y)


@pytest.mark.parametrize("name", INPUTS)
def test_other_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, X, y = data()

    def model(inner: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        return lambda p, x: F.linear(F.linear(inner(x), p["a"], p["c"]).tanh() + x, p["b"])

    before = CONSTANT.clone()
    for earlier in INPUTS:
        for _ in range(2):
            compute(model(INPUTS[earlier]), params, X, y, SPECS)
        got = compute(model(INPUTS[name]), params, X, y, SPECS)
        with monkeypatch.context() as patch:
            patch.setattr(plans, "expected", lambda *given: None)
            assert_close(got, compute(model(INPUTS[name]), params, X, y, SPECS), rtol=1e-13)
    assert torch.equal(CONSTANT, before)


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_begins_to_mix_samples(name: str) -> None:
    params, X, y = data()
    for earlier in INNER:
        for _ in range(2):
            compute(layer(INNER[earlier]), params, X, y, SPECS)
        with pytest.raises(ValueError, match="sample"):
            compute(layer(MIXING[name]), params, X, y, SPECS)


def test_decisions_are_taken_over(taken: list[int]) -> None:
    params, X, y = data()
    model = layer(INNER["relu"])
    first = compute(model, params, X, y, SPECS)
    assert not taken
    assert_close(compute(model, params, X, y, SPECS), first, rtol=0)
    assert len(taken) == 3
    compute(layer(INNER["tanh"]), params, X, y, SPECS)
    assert len(taken) == 4
    compute(model, {k: p.clone() for k, p in params.items()}, X + 1, y, SPECS)
    assert len(taken) == 5  # up to the first difference; then it is as if nothing had been remembered
    compute(model, params, X, y, SPECS)
    assert len(taken) == 8


def test_steps_of_training_take_decisions_over(taken: list[int]) -> None:
    _, X, y = data()
    module = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    for step in range(4):
        model_fn, params = curvfunc.functionalize(module)
        for p in compute(model_fn, params, X, y, Grad()).values():
            assert p.isfinite().all()
        verify(model_fn, params, X, y, hessian=False)
        before = len(taken)
        compute(model_fn, params, X, y, (Grad(), BatchGrad()))
        assert len(taken) == before + 6
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * step + 0.1)


class Changing(nn.Module):
    """All that may change from one call to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3))
        self.norm = nn.BatchNorm1d(3)
        self.flag, self.factor, self.times = False, 1.0, 1
        self.mask: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x)) * self.scale
        h = self.norm(h)
        for _ in range(self.times):
            h = self.last(h)
        if self.flag:
            h = h.sin()
        if self.mask is not None:
            h = h.masked_fill(self.mask, 0.0)
        return h * self.factor


def _buffer(m: Changing) -> None:
    m.scale = torch.tensor([1.0, -2.0, 3.0])


def _submodule(m: Changing) -> None:
    m.act = nn.Sigmoid()


def _flag(m: Changing) -> None:
    m.flag = True


def _attribute(m: Changing) -> None:
    m.factor = -3.0


def _loop(m: Changing) -> None:
    m.times = 3


def _shared(m: Changing) -> None:
    m.last.weight = m.first.weight


def _frozen(m: Changing) -> None:
    m.first.weight.requires_grad_(False)


def _without_bias(m: Changing) -> None:
    m.first = nn.Linear(3, 3, bias=False)


def _statistics(m: Changing) -> None:
    m.norm.running_mean = torch.tensor([1.0, 2.0, 3.0])
    m.norm.eps = 0.5


def _mask(m: Changing) -> None:
    m.mask = torch.tensor([True, False, False])


CHANGES = [_buffer, _submodule, _flag, _attribute, _loop, _shared, _frozen, _without_bias, _statistics, _mask]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_module_that_changes(change: Callable[[Changing], None]) -> None:
    torch.manual_seed(0)
    _, X, y = data()
    module = Changing().eval()
    for _ in range(2):
        compute(*curvfunc.functionalize(module), X, y, SPECS)
    change(module)
    verify(*curvfunc.functionalize(module), X, y)
    with torch.no_grad():
        module.factor *= 0.5
        module.scale += 1
    verify(*curvfunc.functionalize(module), X, y)


def test_a_module_that_goes_to_training_mode() -> None:
    _, X, y = data()
    module = Changing().eval()
    model_fn, params = curvfunc.functionalize(module)
    for _ in range(2):
        compute(model_fn, params, X, y, SPECS)
    module.train()
    with pytest.raises(ValueError, match="batch normalization in training mode"):
        compute(model_fn, params, X, y, SPECS)


@pytest.mark.parametrize("axes", ["samples, features", "samples, positions, features"])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_other_shapes(axes: str, batch: int) -> None:
    params, X, y = data()
    model = layer(lambda p, h: h.tanh() if h.ndim == 2 else h.mean(1))
    compute(model, params, X, y, SPECS)
    other = torch.randn(batch, *[2] * axes.count("positions"), 3)
    verify(model, params, other, torch.arange(batch) % 3)
    verify(model, params, X, y)


@pytest.mark.parametrize("name", ["BatchGrad", "DiagGGNExact", "DiagHessian", "KFLR"])
def test_extended_modules_that_change(name: str, taken: list[int]) -> None:
    torch.manual_seed(0)
    _, X, y = data()
    extension = getattr(extensions, name)

    def results(m: nn.Module, loss: nn.Module) -> list[Any]:
        torch.manual_seed(1)
        with backpack(extension()):
            loss(m(X), y).backward()
        return [getattr(p, extension().savefield, None) for p in m.parameters()]

    module, loss = extend(Changing().eval()), extend(nn.CrossEntropyLoss())
    for change in [_attribute, _submodule, _flag, _loop, _mask]:
        results(module, loss)
        before = len(taken)
        results(module, loss)
        assert len(taken) > before
        change(module)  # type: ignore[arg-type]
        extend(module)
        fresh = Changing().eval()
        fresh.load_state_dict(module.state_dict())
        fresh.act, fresh.flag, fresh.factor, fresh.times, fresh.mask = (
            type(module.act)(),  # type: ignore[operator]
            *(getattr(module, k) for k in ("flag", "factor", "times", "mask")),
        )
        got = results(module, loss)
        plans._PLANS.clear()
        assert_close(got, results(extend(fresh), extend(nn.CrossEntropyLoss())), rtol=1e-12)


def test_plans_hold_no_tensors() -> None:
    params, X, y = data()
    hidden = torch.ones(3)
    model = layer(lambda p, h, by=hidden: h * by)
    for _ in range(2):
        compute(model, params, X, y, SPECS)
    refs = [weakref.ref(t) for t in (*params.values(), X, y, hidden, model)]
    del model, params, X, y, hidden
    gc.collect()
    assert plans._PLANS
    assert all(r() is None for r in refs)


def test_there_are_not_ever_more_plans() -> None:
    params, X, y = data()
    for k in range(2 * plans.MANY):
        code = f"lambda p, x: F.linear(F.linear(x, p['a'], p['c']) * {k + 1}, p['b'])"
        compute(eval(code), params, X, y, BatchGrad())
    assert len(plans._PLANS) <= plans.MANY


def test_models_in_threads() -> None:
    params, X, y = data()
    wanted = {name: compute(layer(INNER[name]), params, X, y, SPECS) for name in ("relu", "tanh", "another layer", "parts")}
    failed: list[Any] = []

    def work(name: str) -> None:
        try:
            for _ in range(20):
                assert_close(compute(layer(INNER[name]), params, X, y, SPECS), wanted[name], rtol=0)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


AXES = [1]


def test_lists_that_change() -> None:
    params, X, y = data()
    model = layer(lambda p, h: h.flip(AXES).tanh())
    for _ in range(2):
        verify(model, params, X, y, hessian=False)
    AXES[0] = 0
    try:
        with pytest.raises(ValueError, match="mixes the samples"):
            compute(model, params, X, y, SPECS)
    finally:
        AXES[0] = 1


def test_arguments_by_position_after_those_by_keyword() -> None:
    params, X, y = data()
    for _ in range(2):
        compute(layer(lambda p, h: torch.roll(h, dims=1, shifts=0).tanh()), params, X, y, SPECS)
    with pytest.raises(ValueError, match="mixes the samples"):
        compute(layer(lambda p, h: torch.roll(h, 1, 0).tanh()), params, X, y, SPECS)


class Longer(nn.Linear):
    def __len__(self) -> int:
        raise RuntimeError("it has no length")


class Holder:
    """A model with an attribute that has nothing to do with modules."""

    def __init__(self) -> None:
        self.module = torch.ones(3)

    def __call__(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, p["a"]) * self.module


def test_models_without_a_truth_value() -> None:
    params, X, y = data()
    verify(*curvfunc.functionalize(Longer(3, 3)), X, y)
    verify(Holder(), {"a": params["a"]}, X, y)
