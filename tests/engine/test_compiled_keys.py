"""What model and loss read is part of the key of compiled code: a change compiles anew, or the call is refused."""

import contextlib
import functools
import random
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import curvfunc
from curvfunc import BatchGrad, DiagGGN, Grad, Loss, functionalize

pytestmark = pytest.mark.usefixtures("float64")

N, D, C = 4, 3, 3
Unsupported = torch._dynamo.exc.Unsupported


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D), torch.tensor([0, 1, 2, 0])


def check(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    changes: list[Callable[[], Any]],
    compiles: int | None = None,
    **kwargs: Any,
) -> None:
    """The compiled call gives what the call gives, first and after each change; compiled at most once more each time.

    Nothing compiles anew where nothing was changed.
    """
    counter = CompileCounterWithBackend(kwargs.pop("backend", "aot_eager"))
    compiled = torch.compile(call, backend=counter, **{"fullgraph": True, **kwargs})
    before = None
    for change in [lambda: None, *changes]:
        change()
        torch.manual_seed(1)
        got = compiled(*args)
        torch.manual_seed(1)
        want = call(*args)
        assert_close(got, want)
        count = counter.frame_count
        torch.manual_seed(1)
        assert_close(compiled(*args), want)
        assert counter.frame_count == count
        if before is not None:
            flat = [torch.cat([t.flatten() for t in torch.utils._pytree.tree_leaves(r)]) for r in (before, want)]
            assert not torch.allclose(*flat, rtol=1e-3, atol=0.0), "the change has no effect"
        before = want
    if compiles is not None:
        assert counter.frame_count == compiles


# --- models and what may change -----------------------------------------------------------------------------------------


class Shift(nn.Module):
    """Adds a buffer."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.register_buffer("by", torch.full((C,), by))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Scaled(nn.Module):
    """Reads whatever it has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.shift = nn.Linear(D, C), Shift(0.5)
        self.scale, self.power, self.flag, self.name = 1.5, 2, False, "tanh"
        self.table = {"a": 1.0, "b": [2.0, (3.0, {"c": 1.0})]}
        self.options = types.SimpleNamespace(x=1.0)
        self.mask = torch.rand(C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.shift(self.linear(x)) * self.scale + self.table["b"][1][1]["c"]  # type: ignore[index]
        h = h.sin() if self.flag else h
        return getattr(torch, self.name)(h / 8) * self.power * self.table["a"] * self.table["b"][0] * self.options.x * self.mask  # type: ignore[index,operator]


class Case(NamedTuple):
    """A model and a loss, two changes, and how often it compiles with them if not three times."""

    model_fn: Any
    params: Any
    changes: list[Callable[[], Any]]
    compiles: int | None = 3
    loss_fn: Any = F.cross_entropy


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Put it in the table."""
    CASES[make.__name__.strip("_").replace("_", " ")] = make
    return make


@case
def numbers_and_containers() -> Case:
    module = Scaled()

    def change_all() -> None:
        module.scale, module.power = 3.5, 4
        module.table.update(a=3.0)
        module.table["b"][1][1].update(c=3.0)  # type: ignore[index]

    changes = [
        lambda: setattr(module, "scale", 2.5),
        lambda: setattr(module, "power", 3),
        lambda: setattr(module, "flag", True),
        lambda: setattr(module, "name", "sigmoid"),
        lambda: module.table.update(a=2.0),
        lambda: module.table["b"][1][1].update(c=2.0),  # type: ignore[index]
        change_all,  # what has changed before would be a symbol now
    ]
    return Case(*functionalize(module), changes, 8)


@case
def objects_tensors_and_modules() -> Case:
    module = Scaled()
    changes = {
        lambda: setattr(module.options, "x", 2.0): True,
        lambda: setattr(module, "options", types.SimpleNamespace(x=3.0)): True,
        lambda: module.mask.mul_(2): False,
        lambda: setattr(module, "mask", torch.rand(C)): False,
        lambda: setattr(module, "shift", Shift(2.0)): True,
        lambda: setattr(module, "shift", nn.Tanh()): True,
        lambda: setattr(module, "forward", lambda x: module.linear(x) * 2): True,
        lambda: setattr(module, "forward", lambda x: module.linear(x) * 3): True,
    }
    return Case(*functionalize(module), list(changes), 1 + sum(changes.values()))


@case
def hooks() -> Case:
    module, handles = Scaled(), []
    add = lambda: handles.append(module.linear.register_forward_hook(lambda m, x, out: out * 2))
    return Case(*functionalize(module), [add, lambda: handles.pop().remove()], 2)


@case
def hooks_before_the_forward_pass() -> Case:
    module, handles = Scaled(), []
    add = lambda: handles.append(module.register_forward_pre_hook(lambda m, x: (x[0] * 2,)))
    return Case(*functionalize(module), [add, lambda: handles.pop().remove()], 2)


@case
def hooks_of_all_modules() -> Case:
    handles: list[Any] = []
    hook = lambda m, x, out: out * 2 if type(m) is nn.Linear else None
    add = lambda: handles.append(nn.modules.module.register_module_forward_hook(hook))
    return Case(*functionalize(Scaled()), [add, lambda: handles.pop().remove()], 2)


@case
def dropout_and_statistics() -> Case:
    """Flags and numbers of torch's own modules."""
    net = nn.Sequential(nn.Linear(D, C), nn.BatchNorm1d(C), nn.Dropout(0.5)).eval()
    changes = [
        lambda: net[2].train(),
        lambda: setattr(net[2], "p", 0.2),
        lambda: setattr(net[1], "eps", 2.0),
        lambda: net[1].running_var.mul_(2),
        lambda: net.eval(),
    ]
    return Case(*functionalize(net), changes, 5)


@case
def output_function() -> Case:
    options = types.SimpleNamespace(x=2.0)
    model_fn, params = functionalize(nn.Linear(D, C), output_fn=lambda out: (out * options.x).tanh())
    return Case(model_fn, params, [lambda: setattr(options, "x", 3.0), lambda: setattr(options, "x", 4.0)])


def weights() -> dict[str, Tensor]:
    return {"w": torch.randn(D, C)}


@case
def closure() -> Case:
    a, b, options, frozen = 1.0, 2, {"x": [1.0]}, torch.randn(D, D)

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return (x @ frozen @ p["w"]).tanh() * a * b + options["x"][0]

    def change() -> None:
        nonlocal a, b, frozen
        a, b, frozen = a + 1, b + 1, torch.randn(D, D)
        options["x"][0] += 1

    return Case(model_fn, weights(), [change] * 2)


SCALE, POWER, OPTIONS, FROZEN = 1.0, 2, {"x": [1.0]}, torch.ones(D)


@case
def globals_() -> Case:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return ((x * FROZEN) @ p["w"]).tanh() * SCALE * POWER + OPTIONS["x"][0]

    def change() -> None:
        global SCALE, POWER, FROZEN
        SCALE, POWER, FROZEN = SCALE + 1, POWER + 1, torch.randn(D)
        OPTIONS["x"][0] += 1

    return Case(model_fn, weights(), [change] * 2)


@case
def default_arguments() -> Case:
    def model_fn(p: Any, x: Tensor, a: float = 1.0, *, b: float = 2.0) -> Tensor:
        return (x @ p["w"]).tanh() * a + b

    def change() -> None:
        model_fn.__defaults__ = (model_fn.__defaults__[0] + 1,)  # type: ignore[index]
        model_fn.__kwdefaults__ = {"b": model_fn.__kwdefaults__["b"] + 1}

    return Case(model_fn, weights(), [change] * 2)


class Object:
    """A model in the form of an object."""

    offset = 0.5

    def __init__(self) -> None:
        self.scale, self.options, self.frozen = 1.0, types.SimpleNamespace(x=2), torch.randn(D, D)

    def __call__(self, p: Any, x: Tensor) -> Tensor:
        return (x @ self.frozen @ p["w"]).tanh() * self.scale * self.options.x + self.offset

    def method(self, p: Any, x: Tensor) -> Tensor:
        return self(p, x) * 2

    def with_factor(self, factor: float, p: Any, x: Tensor, frozen: Tensor) -> Tensor:
        return self(p, x) * factor * frozen

    @classmethod
    def of_the_class(cls, p: Any, x: Tensor) -> Tensor:
        return (x @ p["w"]).tanh() * cls.offset

    def change(self) -> None:
        self.scale, self.frozen = self.scale + 1, torch.randn(D, D)
        self.options.x += 1

    def step(self, params: Any, X: Tensor, y: Tensor) -> Any:
        return curvfunc.batch_grad(self.method, params, X, y)


class Steep(torch.autograd.Function):
    """The identity with another slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * OPTIONS["x"][0]


@case
def backward_function() -> Case:
    """Of the model and of the loss."""
    change = lambda: OPTIONS.update(x=[OPTIONS["x"][0] + 1])
    loss_fn = lambda out, y: F.cross_entropy(Steep.apply(out), y)
    return Case(lambda p, x: Steep.apply(x @ p["w"]).tanh(), weights(), [change] * 2, loss_fn=loss_fn)


@case
def what_is_read_with_gradients_only() -> Case:
    """The engine has them enabled, whatever the caller has."""
    options = {"a": 1.0, "b": 1.0}

    def model_fn(p: Any, x: Tensor) -> Tensor:
        h = (x @ p["w"]).tanh() * (options["a"] if torch.is_grad_enabled() else 1.0)
        return h * options["b"] if p["w"].requires_grad else h

    changes = [lambda: options.update(a=2.0), lambda: options.update(b=2.0)]
    return Case(model_fn, weights(), changes)


@case
def callable_object() -> Case:
    model_fn = Object()
    return Case(model_fn, weights(), [model_fn.change] * 2)


@case
def bound_method() -> Case:
    model = Object()
    return Case(model.method, weights(), [model.change] * 2)


@case
def partial_of_a_method() -> Case:
    model = Object()
    return Case(functools.partial(model.with_factor, 3.0, frozen=torch.rand(C)), weights(), [model.change] * 2)


@case
def class_method() -> Case:
    class Own(Object):
        pass

    change = lambda: setattr(Own, "offset", Own.offset + 1)
    return Case(Own().of_the_class, weights(), [change] * 2)


def plain(p: Any, x: Tensor) -> Tensor:
    return (x @ p["w"]).tanh()


@case
def loss_function() -> Case:
    options, target = {"x": 1.0}, torch.randn(C)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return ((out - target).square().sum(-1) * options["x"]).mean()

    def change() -> None:
        nonlocal target
        options["x"], target = options["x"] + 1, torch.randn(C)

    return Case(plain, weights(), [change] * 2, loss_fn=loss_fn)


class OwnLoss(nn.Module):
    """With an attribute and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.register_buffer("weight", torch.rand(C))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return ((out - F.one_hot(y, C)).square() * self.weight).sum(-1).mean() * self.scale

    def change(self) -> None:
        self.scale += 1
        self.weight = torch.rand(C)


@case
def loss_module() -> Case:
    loss_fn = OwnLoss()
    return Case(plain, weights(), [loss_fn.change] * 2, loss_fn=loss_fn)


@case
def loss_method() -> Case:
    loss_fn = OwnLoss()
    return Case(plain, weights(), [loss_fn.change] * 2, loss_fn=loss_fn.forward)


@case
def loss_of_torch() -> Case:
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    change = lambda: setattr(loss_fn, "label_smoothing", loss_fn.label_smoothing + 0.1)
    return Case(plain, weights(), [change] * 2, None, loss_fn)  # dynamo makes a symbol of the number first


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_changes_are_seen(name: str) -> None:
    """The second change finds numbers that dynamo has made symbols of, had it been left to itself."""
    model_fn, params, changes, compiles, loss_fn = CASES[name]()
    X, y = data()
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.callback(nn.modules.module._global_forward_hooks.clear)
        call = lambda params, X, y: curvfunc.batch_grad(model_fn, params, X, y, loss_fn=loss_fn)
        check(call, (params, X, y), changes, compiles)


# --- every function -----------------------------------------------------------------------------------------------------


def everything(model_fn: Any, params: Any, X: Tensor, y: Tensor) -> Any:
    """Functions of each kind, in one call."""
    args = (model_fn, params, X, y)
    return (
        curvfunc.compute(*args, (Loss(), Grad(), BatchGrad(), DiagGGN())),
        curvfunc.kfac(*args),
        curvfunc.ggn_vp(*args, params),
        curvfunc.hessian_vp(*args, params),
        curvfunc.jvp(model_fn, params, X, params),
    )


class Net(nn.Module):
    """Batch normalization and dropout, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, C), nn.BatchNorm1d(C), nn.Tanh(), nn.Dropout(0.5))
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


def test_every_function_follows_the_module() -> None:
    """From evaluation to dropout and another number; and back, to what was compiled."""
    net = Net().eval()
    model_fn, params = functionalize(net)
    changes = [lambda: (net.layers[3].train(), setattr(net, "scale", 2.0)), lambda: (net.eval(), setattr(net, "scale", 1.0))]
    check(lambda params, X, y: everything(model_fn, params, X, y), (params, *data()), changes, compiles=2)


@pytest.mark.parametrize("function", ["batch_grad", "kfac", "hessian_vp"])
def test_batch_normalization_set_to_train_is_refused(function: str) -> None:
    """By the compiled code, too, and with the same words; set back, the code of before runs."""
    net = Net().eval()
    model_fn, params = functionalize(net)
    X, y = data()
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(params: Any, X: Tensor, y: Tensor) -> Any:
        more = (params,) if function.endswith("vp") else ()
        return getattr(curvfunc, function)(model_fn, params, X, y, *more)

    compiled(params, X, y)
    net.train()
    with pytest.raises(Unsupported, match=r"ValueError: batch normalization in training mode mixes"):
        compiled(params, X, y)
    net.eval()
    compiled(params, X, y)
    assert counter.frame_count == 1


def test_parameters_and_statistics_change_in_place() -> None:
    """Nothing compiles anew, and the step of an optimizer inside works on what it is given."""
    net = Net().eval()
    model_fn, params = functionalize(net)
    X, y = data()
    state = {k: t.clone() for k, t in net.state_dict().items()}

    def step(params: Any, X: Tensor, y: Tensor) -> Any:
        results = curvfunc.compute(model_fn, params, X, y, (Grad(), DiagGGN()))
        for name, p in params.items():
            p.sub_(0.1 * results[0][name])
        return results

    def run(step: Any) -> Any:
        net.load_state_dict(state)
        found = []
        for _ in range(3):
            found.append([{k: t.clone() for k, t in r.items()} for r in step(params, X, y)])
            net.layers[1].running_mean.add_(0.5)  # type: ignore[operator]
        return found, {k: t.double() for k, t in net.state_dict().items()}

    want = run(step)
    counter = CompileCounterWithBackend("aot_eager")
    assert_close(run(torch.compile(step, backend=counter, fullgraph=True)), want)
    assert counter.frame_count == 1


def test_looking_draws_nothing_and_updates_nothing() -> None:
    """Random state and running statistics are those of one forward pass per call."""
    net = Net().train()
    model_fn, params = functionalize(net)
    X, y = data()
    state = {k: t.clone() for k, t in net.state_dict().items()}
    call = lambda params, X, y: curvfunc.compute(model_fn, params, X, y, (Loss(), Grad()))

    def run(call: Any) -> Any:
        net.load_state_dict(state)
        torch.manual_seed(2)
        return [call(params, X, y) for _ in range(3)], torch.rand(1), {k: t.double() for k, t in net.state_dict().items()}

    assert_close(run(torch.compile(call, backend="aot_eager", fullgraph=True)), run(call))


# --- where the model comes from -----------------------------------------------------------------------------------------


def test_functions_of_the_same_code() -> None:
    """Dynamo tells functions apart by code and by what they read; so the tensors are those of the function at hand."""

    def make(scale: float, frozen: Tensor, module: nn.Module) -> Any:
        return lambda p, x: module((x @ frozen @ p["w"]).tanh()) * scale

    X, y = data()
    params = weights()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(curvfunc.batch_grad, backend=counter, fullgraph=True)
    for scale, count in (1.0, 1), (1.0, 1), (2.0, 2), (3.0, 3), (1.0, 3):
        model_fn = make(scale, torch.randn(D, D), nn.Linear(C, C))
        assert_close(compiled(model_fn, params, X, y), curvfunc.batch_grad(model_fn, params, X, y))
        assert counter.frame_count == count


def test_models_made_inside() -> None:
    """Methods looked up, partials and functions of what is there before."""
    model, frozen = Object(), torch.rand(C)
    X, y = data()
    params = weights()
    check(model.step, (params, X, y), [model.change] * 2)

    def call(params: Any, X: Tensor, y: Tensor, frozen: Tensor) -> Any:
        partial = functools.partial(model.with_factor, 3.0, frozen=frozen)
        return [curvfunc.batch_grad(f, params, X, y) for f in (model.method, partial, lambda p, x: model(p, x) * frozen)]

    check(call, (params, X, y, frozen), [model.change, lambda: frozen.mul_(2)], compiles=2)


def test_models_of_values_inside_are_refused() -> None:
    X, y = data()

    def call(params: Any, factor: Tensor) -> Any:
        square = factor**2
        return curvfunc.batch_grad(lambda p, x: plain(p, x) * square, params, X, y)

    with pytest.raises(Unsupported, match="(?s)model_fn is made inside the compiled function, of values.*Make it outside"):
        torch.compile(call, backend="eager", fullgraph=True)(weights(), torch.rand(C))


FACTOR = 2.0


@pytest.mark.parametrize(("start", "dynamic"), [(2, True), (2.0, None)])
def test_numbers_that_dynamo_has_made_symbols_of(start: float, dynamic: bool | None) -> None:
    """The compiled function reads the number itself, and may keep it as a symbol; the model has to know it."""
    X, y = data()

    def add() -> None:
        global FACTOR
        FACTOR += 1

    global FACTOR
    FACTOR = start
    model_fn = lambda p, x: plain(p, x) * FACTOR
    check(
        lambda p, X, y: curvfunc.batch_grad(model_fn, p, X * FACTOR, y),
        (weights(), X, y),
        [add] * 2,
        compiles=None,
        dynamic=dynamic,
    )


def test_captured_tensors_under_transformations() -> None:
    X, y = data()
    frozen = torch.randn(D, D)
    model_fn = lambda p, x: (x @ frozen @ p["w"]).tanh()
    change = lambda: frozen.mul_(1.5)
    ensemble = torch.vmap(lambda p: curvfunc.batch_grad(model_fn, p, X, y))
    check(ensemble, ({"w": torch.randn(2, D, C)},), [change] * 2, compiles=1)
    check(torch.func.grad(lambda p: curvfunc.batch_l2(model_fn, p, X, y)["w"].sum()), (weights(),), [change] * 2, compiles=1)


def test_a_captured_tensor_that_is_a_parameter() -> None:
    """It stays a constant for the derivative, as it is without compilation."""
    X, y = data()
    params = {"w": torch.randn(D, D)}
    model_fn = lambda p, x: x @ params["w"] @ p["w"]
    check(lambda p: curvfunc.batch_grad(model_fn, p, X, y), (params,), [lambda: params["w"].mul_(1.5)], compiles=1)


def test_other_types_than_the_module() -> None:
    """Parameters of another precision than the module's own."""
    net = nn.Sequential(nn.Linear(D, C), nn.LeakyReLU(0.1))
    model_fn, params = functionalize(net)
    X, y = data()
    net.float()
    change = lambda: setattr(net[1], "negative_slope", 0.5)
    check(lambda p, X: curvfunc.batch_grad(model_fn, p, X, y), (params, X), [change], compiles=2)


def test_recurrent_modules_keep_their_own_weights() -> None:
    module = nn.LSTM(D, C, batch_first=True)
    model_fn, params = functionalize(module, output_fn=lambda out: out[0][:, -1])
    X, y = torch.randn(N, 2, D), data()[1]
    own = list(module.parameters())
    for call in (curvfunc.batch_grad, torch.compile(curvfunc.batch_grad, backend="aot_eager", fullgraph=True)):
        call(model_fn, params, X, y)
        assert all(kept is p for kept, p in zip(module._flat_weights, own, strict=True))
        assert all(ref() is p for ref, p in zip(module._flat_weight_refs, own, strict=True))


def test_by_the_default_backend(compile_backend: str) -> None:
    """Captured tensors are arguments of the generated code."""
    model = Object()
    X, y = data()
    check(model.step, (weights(), X, y), [lambda: model.frozen.mul_(2)], compiles=1, backend=compile_backend)


# --- what cannot be followed ----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Changes an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(D, C), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


class Scale(torch.autograd.Function):
    """x t, as nobody sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return x * t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.saved_tensors[0], None


class Refusal(NamedTuple):
    """A call, its parameters, what the error says, and a change that the eager call has to see."""

    call: Callable[..., Any]
    params: Any
    match: str
    change: Callable[[], Any]


REFUSALS: dict[str, Callable[[], Refusal]] = {}


def refusal(make: Callable[[], Refusal]) -> Callable[[], Refusal]:
    """Put it in the table."""
    REFUSALS[make.__name__.replace("_", " ")] = make
    return make


X_FIXED, Y_FIXED = torch.linspace(-1, 1, N * D, dtype=torch.float64).view(N, D), torch.tensor([0, 1, 2, 0])


def batch_grad(model_fn: Any) -> Callable[[Any], Any]:
    return lambda params: curvfunc.batch_grad(model_fn, params, X_FIXED, Y_FIXED)


@refusal
def train_inside() -> Refusal:
    net = nn.Sequential(nn.Linear(D, C), nn.Dropout(0.5)).eval()
    model_fn, params = functionalize(net)

    def call(params: Any) -> Any:
        net.train()
        result = curvfunc.batch_grad(model_fn, params, X_FIXED, Y_FIXED)
        net.eval()
        return result

    return Refusal(call, params, "An object of type Dropout.*was changed inside.*outside", lambda: setattr(net[1], "p", 0.2))


@refusal
def an_attribute_inside() -> Refusal:
    module = Scaled()
    model_fn, params = functionalize(module)

    def call(params: Any) -> Any:
        module.scale = 4.0
        return curvfunc.ggn_vp(model_fn, params, X_FIXED, Y_FIXED, params)

    return Refusal(call, params, "An object of type Scaled.*was changed inside", lambda: setattr(module, "power", 3))


@refusal
def a_dictionary_inside() -> Refusal:
    options = {"x": 1.0, "z": 1.0}
    model_fn = lambda p, x: plain(p, x) * options["x"] * options["z"]

    def call(params: Any) -> Any:
        options["x"] = 3.0
        return curvfunc.batch_grad(model_fn, params, X_FIXED, Y_FIXED)

    return Refusal(call, weights(), "An object of type dict.*was changed inside", lambda: options.update(z=2.0))


COUNT = 1.0


@refusal
def a_global_inside() -> Refusal:
    options = {"x": 1.0}
    model_fn = lambda p, x: plain(p, x) * COUNT * options["x"]

    def call(params: Any) -> Any:
        global COUNT
        COUNT = 3.0
        return curvfunc.batch_grad(model_fn, params, X_FIXED, Y_FIXED)

    return Refusal(call, weights(), "The global 'COUNT'.*was changed inside", lambda: options.update(x=2.0))


@refusal
def a_variable_inside() -> Refusal:
    options, factor = {"x": 1.0}, 1.0
    model_fn = lambda p, x: plain(p, x) * factor * options["x"]

    def call(params: Any) -> Any:
        nonlocal factor
        factor = 3.0
        return curvfunc.batch_grad(model_fn, params, X_FIXED, Y_FIXED)

    return Refusal(call, weights(), "An object of type cell.*was changed inside", lambda: options.update(x=2.0))


@refusal
def a_module_that_changes() -> Refusal:
    module = Counting()
    return Refusal(
        batch_grad(functionalize(module)[0]),
        functionalize(module)[1],
        "The forward pass changes an object",
        lambda: module.double(),
    )


@refusal
def an_array() -> Refusal:
    array = np.ones(C)
    return Refusal(
        batch_grad(lambda p, x: plain(p, x) * torch.from_numpy(array)),
        weights(),
        "array or number of numpy",
        lambda: array.fill(2.0),
    )


@refusal
def python_draws() -> Refusal:
    options = {"x": 1}
    model_fn = lambda p, x: plain(p, x) * options["x"] * random.randint(2, 2)
    return Refusal(batch_grad(model_fn), weights(), "draws from Python's random", lambda: options.update(x=2))


@refusal
def a_tensor_where_nobody_sees_it() -> Refusal:
    frozen = torch.rand(C)
    model_fn = lambda p, x: Scale.apply(x @ p["w"], frozen)
    return Refusal(
        batch_grad(model_fn),
        weights(),
        "NotImplementedError: .*autograd.Function.*register it as a buffer",
        lambda: frozen.mul_(2),
    )


@refusal
def what_dynamo_does_not_trace() -> Refusal:
    options = {"x": 1.0}
    model_fn = lambda p, x: (print(end=""), plain(p, x) * options["x"])[1]
    return Refusal(batch_grad(model_fn), weights(), "print", lambda: options.update(x=2.0))


@refusal
def operators() -> Refusal:
    module = Scaled()
    model_fn, params = functionalize(module)
    call = lambda params: curvfunc.ggn_operator(model_fn, params, X_FIXED, Y_FIXED) @ params
    return Refusal(call, params, "keep a graph. Use hessian_vp", lambda: setattr(module, "scale", 3.0))


@refusal
def products_of_blocks() -> Refusal:
    module = Scaled()
    model_fn, params = functionalize(module)
    call = lambda params: curvfunc.hmp(model_fn, params, X_FIXED, Y_FIXED)["linear.bias"](params["linear.bias"][None])
    return Refusal(call, params, "keep a graph. Use hessian_vp", lambda: setattr(module, "scale", 3.0))


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_what_cannot_be_followed_is_refused(name: str) -> None:
    """With ``fullgraph=True``; without, it runs eagerly, and sees what changes."""
    call, params, match, change = REFUSALS[name]()
    with pytest.raises(Unsupported, match=f"(?s){match}"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(params)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager")
    for _ in range(2):
        torch.manual_seed(3)
        want = call(params)
        torch.manual_seed(3)
        assert_close(compiled(params), want)
        change()


def test_what_does_not_matter_may_change_inside() -> None:
    """A mode that is set to what it is, swapped parameters that are back in their place, and lists of other things."""
    net = Net().eval()
    model_fn, params = functionalize(net)
    X, y = data()
    log = Object()

    def call(params: Any, X: Tensor, y: Tensor) -> Any:
        net.eval()
        log.scale = 5.0
        before = torch.func.functional_call(net, params, (X,))
        found = curvfunc.hessian_vp(model_fn, params, X, y, params)
        log.offset = 6.0
        return before, found, net(X)

    check(call, (params, X, y), [lambda: setattr(net, "scale", 2.0)])
    assert (log.scale, log.offset) == (5.0, 6.0)
