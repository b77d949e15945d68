"""What around a model changes what its operations do, or their backward passes: the numbers are right, or it is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, save_on_cpu, saved_tensors_hooks
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode

import curvfunc
from curvfunc import BatchGrad, BatchL2, Grad, compute

pytestmark = pytest.mark.usefixtures("float64")

N = 5
Model = Callable[[dict[str, Tensor], Tensor], Tensor]


def data() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    return {"w": torch.randn(4, 3), "b": torch.randn(4), "v": torch.randn(3, 4)}, torch.randn(N, 3), torch.arange(N) % 3


def verify(model_fn: Model) -> None:
    """Against autograd, one sample at a time, at the first call and at the next."""
    params, X, y = data()
    expected: dict[str, list[Tensor]] = {name: [] for name in params}
    for n in range(N):
        leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
        loss = F.cross_entropy(model_fn(leaves, X[n : n + 1]), y[n : n + 1]) / N
        for name, g in zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True):
            expected[name].append(g)
    gradients = {k: torch.stack(g) for k, g in expected.items()}
    for _ in range(2):
        total, each, norms = compute(model_fn, params, X, y, (Grad(), BatchGrad(), BatchL2()))
        assert_close(each, gradients)
        assert_close(total, {k: g.sum(0) for k, g in gradients.items()})
        assert_close(norms, {k: g.flatten(1).square().sum(1) for k, g in gradients.items()})


def net(p: dict[str, Tensor], x: Tensor, act: Callable[[Tensor], Tensor] = torch.tanh) -> Tensor:
    return F.linear(act(F.linear(x, p["w"], p["b"])), p["v"])


PACKS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "rounds": (lambda t: (4 * t).round() / 4, lambda t: t),
    "halves": (lambda t: t, lambda t: t / 2),
    "mixes samples": (lambda t: t / (1 + t.norm()), lambda t: t),
}


@pytest.mark.parametrize("name", PACKS)
def test_hooks_of_saved_tensors(name: str) -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        with saved_tensors_hooks(*PACKS[name]):
            return net(p, x)

    if name == "mixes samples":
        with pytest.raises(ValueError, match="mixes the samples"):
            verify(model_fn)
    else:
        verify(model_fn)


def test_hooks_of_torch_that_give_back_the_same() -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        with save_on_cpu():
            return net(p, x)

    verify(model_fn)
    params, X, _ = data()
    assert {row.path for row in curvfunc.explain(model_fn, params, X).rows} == {"plain"}


class Tripling(Tensor):
    """Linear maps of these give three times as much."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 3 * out if func is F.linear else out


class Mixing(Tensor):
    """Their tanh has the mean over the first axis taken off."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out - out.mean(0) if func is torch.tanh else out


class Named(Tensor):
    """Does what tensors do."""


@pytest.mark.parametrize("kind", [Tripling, Named])
def test_classes_of_tensors(kind: type[Tensor]) -> None:
    verify(lambda p, x: F.linear(torch.tanh(F.linear(x.as_subclass(kind), p["w"], p["b"])), p["v"]).as_subclass(Tensor))


def test_classes_of_tensors_that_mix_samples_are_refused() -> None:
    params, X, y = data()
    model_fn = lambda p, x: net(p, x, lambda h: torch.tanh(h.as_subclass(Mixing)).as_subclass(Tensor))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples"):
        curvfunc.batch_grad(model_fn, params, X, y)


class Doubling(TorchFunctionMode):
    """Linear maps take twice their input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*((2 * args[0], *args[1:]) if func is F.linear else args), **(kwargs or {}))


def test_modes_around_the_call() -> None:
    def inside(p: dict[str, Tensor], x: Tensor) -> Tensor:
        with Doubling():
            return net(p, x)

    verify(inside)
    with Doubling():
        verify(net)
    params, X, _ = data()
    with torch.device("cpu"):
        verify(net)
        assert {row.path for row in curvfunc.explain(net, params, X).rows} == {"plain"}


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0] ** 2


def test_functions_that_are_differentiable_once() -> None:
    """Of which torch takes the second derivative for zero, where it is asked for some tensors only."""
    model_fn: Model = lambda p, x: net(p, x, Cube.apply)
    verify(model_fn)
    params, X, y = data()
    cubed: Model = lambda p, x: net(p, x, lambda z: z**3)
    assert_close(curvfunc.diag_ggn(model_fn, params, X, y), curvfunc.diag_ggn(cubed, params, X, y))
    for call in (
        lambda: curvfunc.diag_hessian(model_fn, params, X, y),
        lambda: curvfunc.batch_diag_hessian(model_fn, params, X, y),
        lambda: curvfunc.diag_hessian(model_fn, params, X, y, mc_samples=2),
        lambda: curvfunc.hessian_vp(model_fn, params, X, y, params),
        lambda: curvfunc.ggn_vp(model_fn, params, X, y, params),
    ):
        with pytest.raises(NotImplementedError, match="Cube is marked by once_differentiable"):
            call()


# -- hooks, where they are hard to see


def doubled(inputs: Any, outputs: Any) -> Any:
    return tuple(None if g is None else 2 * g for g in inputs)


@pytest.mark.parametrize("mode", [torch.device("cpu"), BaseTorchFunctionMode()], ids=["device", "base"])
def test_hooks_behind_modes_that_pass_calls_on(mode: Any) -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = F.linear(x, p["w"], p["b"])
        with mode:
            if h.grad_fn is not None:
                h.grad_fn.register_hook(doubled)
        return F.linear(h.tanh(), p["v"])

    params, X, y = data()
    with pytest.raises(ValueError, match="changes gradients"):
        curvfunc.batch_grad(model_fn, params, X, y)


def test_hooks_by_gradient_edges() -> None:
    """They are not watched; all parameters are generic, and they run."""

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = F.linear(x, p["w"], p["b"])
        get_gradient_edge(h).node.register_hook(doubled)
        return F.linear(h.tanh(), p["v"])

    verify(model_fn)


@pytest.mark.parametrize("where", ["weight", "bias", "transposed", "block"])
def test_hooks_of_parameters_are_refused(where: str) -> None:
    """The gradient of no sample passes them."""

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        w, b = p["w"], p["b"]
        t = {"weight": w, "bias": b, "transposed": w.t(), "block": w.chunk(2, 0)[0]}[where]
        t.register_hook(lambda g: None)
        h = x @ t if where == "transposed" else F.linear(x, t if where == "block" else w)
        return (h if where == "block" else h + b).tanh().sum(1, keepdim=True) * p["v"][:, 0]

    params, X, y = data()
    with pytest.raises(ValueError, match="registered with a parameter"):
        curvfunc.batch_grad(model_fn, params, X, y)
    compute(model_fn, params, X, y, Grad())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_that_look_at_outputs_without_use() -> None:
    """Of which torch gives them zeros, and takes none back."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.gru(x)[0][:, -1])
            return out

    torch.manual_seed(0)
    module, X, y = Last(), torch.randn(N, 2, 3), torch.arange(N) % 3
    model_fn, params = curvfunc.functionalize(module)
    expected = curvfunc.batch_grad(model_fn, params, X, y)
    module.gru.register_full_backward_hook(lambda m, gi, go: None)
    assert_close(curvfunc.batch_grad(model_fn, params, X, y), expected)


def test_models_that_need_a_graph_run_sample_by_sample() -> None:
    """Under vmap tensors have none: a node that a hook is registered with is missing."""

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = F.linear(x, p["w"], p["b"])
        h.grad_fn.register_hook(lambda inputs, outputs: None)  # type: ignore[union-attr]
        return F.linear(h.tanh(), p["v"])

    verify(model_fn)


def test_kfra_with_hooks_that_look() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    model_fn, params = curvfunc.functionalize(module)
    _, X, y = data()
    expected = curvfunc.kfra(model_fn, params, X, y)
    module[2].register_full_backward_hook(lambda m, gi, go: None)
    assert_close(curvfunc.kfra(model_fn, params, X, y), expected)
