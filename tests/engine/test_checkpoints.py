"""Activation checkpoints: what runs again in a backward pass is the function that was called, at the values it was called with."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import curvfunc
from curvfunc.engine.model import without_recomputation

pytestmark = pytest.mark.usefixtures("float64")
N, D = 4, 3


@contextmanager
def scaled(factor: float) -> Iterator[None]:
    """What a checkpoint's context may do: linear layers inside have another input."""

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(factor * args[0], *args[1:], **(kwargs or {})) if func is F.linear else func(*args, **(kwargs or {}))

    with Mode():
        yield


def selective() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])


KINDS: dict[str, Callable[["Net", Tensor], Tensor]] = {
    "again": lambda m, h: checkpoint(m.part, h, use_reentrant=False),
    "reentrant": lambda m, h: checkpoint(m.part, h, use_reentrant=True),
    "sequential": lambda m, h: checkpoint_sequential([m.second, nn.Tanh(), m.third], 3, h, use_reentrant=False),
    "reentrant sequential": lambda m, h: checkpoint_sequential([m.second, nn.Tanh(), m.third], 3, h, use_reentrant=True),
    "nested": lambda m, h: checkpoint(
        lambda h: m.third(checkpoint(lambda h: m.second(h).tanh(), h, use_reentrant=False)), h, use_reentrant=False
    ),
    "nested reentrant": lambda m, h: checkpoint(
        lambda h: m.third(checkpoint(lambda h: m.second(h).tanh(), h, use_reentrant=False)), h, use_reentrant=True
    ),
    "selective": lambda m, h: checkpoint(m.part, h, use_reentrant=False, context_fn=selective),
    "context": lambda m, h: checkpoint(
        lambda h: m.part(h), 0.5 * h, use_reentrant=False, context_fn=lambda: (scaled(2.0), scaled(2.0))
    ),
}


class Net(nn.Module):
    """Layers, some of them in a checkpoint of some kind; with none, the same function (but for a context that scales)."""

    def __init__(self, kind: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third, self.kind = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), kind

    def part(self, h: Tensor) -> Tensor:
        return self.third(self.second(h).tanh())

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.kind == "context of none":
            return h + self.third(2 * self.second(h).tanh())
        return h + (self.part(h) if self.kind is None else KINDS[self.kind](self, h))


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D), torch.tensor([0, 1, 2, 0])


def functions(kind: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """A model as a plain function, the same without checkpoints, and values that the module does not have."""
    module, plain = Net(kind), Net("context of none" if kind == "context" else None)
    model = lambda p, x: functional_call(module, p, (x,))
    params = {k: p.detach() + torch.randn_like(p) for k, p in module.named_parameters()}
    return model, lambda p, x: functional_call(plain, p, (x,)), params


QUANTITIES: dict[str, Callable[..., Any]] = {
    "batch_grad": curvfunc.batch_grad,
    "gradient": lambda f, p, X, y: curvfunc.compute(f, p, X, y, curvfunc.Grad()),
    "diag_ggn": curvfunc.diag_ggn,
    "kfac": lambda f, p, X, y: curvfunc.kfac(f, p, X, y, mc_samples=0),
    "diag_hessian": curvfunc.diag_hessian,
    "batch_jac": lambda f, p, X, y: curvfunc.batch_jac(f, p, X),
    "subset": lambda f, p, X, y: curvfunc.batch_grad(f, p, X, y, subsampling=[3, 0, 0]),
    "hessian_vp": lambda f, p, X, y: curvfunc.hessian_vp(f, p, X, y, p),
    "ggn_vp": lambda f, p, X, y: curvfunc.ggn_vp(f, p, X, y, p),
    "jvp": lambda f, p, X, y: curvfunc.jvp(f, p, X, p),
    "vjp": lambda f, p, X, y: curvfunc.vjp(f, p, X, torch.ones(N, D)),
    "hmp": lambda f, p, X, y: {k: h(p[k][None]) for k, h in curvfunc.hmp(f, p, X, y).items()},
    "operator": lambda f, p, X, y: curvfunc.ggn_operator(f, p, X, y) @ p,
}


@pytest.mark.parametrize("kind", KINDS)
def test_functions_of_modules_at_other_values(kind: str) -> None:
    """torch's own functional_call is silently wrong here: the backward pass runs a part again at the module's values."""
    (X, y), (model, plain, params) = data(), functions(kind)
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    out, rows = plain(leaves, X), []
    for n in range(N):
        term = F.cross_entropy(out[n], y[n]) / N
        rows.append(torch.autograd.grad(term, list(leaves.values()), retain_graph=True))
    want = {k: torch.stack(row) for k, row in zip(leaves, zip(*rows, strict=True), strict=True)}
    assert_close(curvfunc.batch_grad(model, params, X, y), want)
    for name, quantity in QUANTITIES.items():
        try:
            assert_close(quantity(model, params, X, y), quantity(plain, params, X, y))
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error
    stacked = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    got = torch.vmap(lambda p: curvfunc.batch_grad(model, p, X, y))(stacked)
    assert_close({k: g[0] for k, g in got.items()}, want)


@pytest.mark.parametrize("kind", ["again", "reentrant", "nested"])
@pytest.mark.parametrize("path", ["vmap", "loop"])
def test_functions_that_run_sample_by_sample(kind: str, path: str) -> None:
    (X, y), (model, plain, params) = data(), functions(kind)
    ends: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "vmap": lambda p, h: torch.maximum(h, p["first.bias"]),
        "loop": lambda p, h: torch.maximum(h * float(h.detach().isfinite().all()), p["first.bias"]),
    }
    got, want = ((lambda p, x, f=f: ends[path](p, f(p, x))) for f in (model, plain))
    assert {row.path for row in curvfunc.explain(got, params, X).rows} == {path}
    for quantity in (curvfunc.batch_grad, curvfunc.diag_ggn, curvfunc.diag_hessian):
        assert_close(quantity(got, params, X, y), quantity(want, params, X, y))


def test_check_knows_it() -> None:
    (X, y), (model, _, params) = data(), functions("again")
    curvfunc.check(model, params, X, y).raise_if_wrong()


def test_what_compiled_code_calls() -> None:
    (X, y), (model, plain, params) = data(), functions("again")
    compiled = torch.compile(lambda p: curvfunc.batch_grad(model, p, X, y), backend="aot_eager")
    assert_close(compiled(params), curvfunc.batch_grad(plain, params, X, y))


@pytest.mark.parametrize("kind", ["again", "reentrant"])
def test_other_threads_have_their_checkpoints(kind: str) -> None:
    """In the middle of a checkpoint's forward pass, another thread switches its own off."""
    (X, y), module = data(), Net(kind)
    runs, inside, go = [], threading.Event(), threading.Event()

    def part(h: Tensor) -> Tensor:
        runs.append(torch.is_grad_enabled())
        if threading.current_thread().name.startswith("first") and not go.is_set():
            inside.set()
            assert go.wait(60)
        return Net.part(module, h)

    module.part = part  # type: ignore[method-assign]
    model_fn, params = curvfunc.functionalize(module)

    def other() -> None:
        assert inside.wait(60)
        with without_recomputation():
            go.set()
            assert done.wait(60)

    done = threading.Event()
    with ThreadPoolExecutor(1, "first") as pool, ThreadPoolExecutor(1, "second") as second:
        waiting = second.submit(other)
        got = pool.submit(curvfunc.batch_grad, model_fn, params, X, y).result(60)
        done.set()
        waiting.result(60)
    want = curvfunc.batch_grad(*curvfunc.functionalize(Net(None)), X, y)
    assert_close(got, want)

    runs.clear()

    def off() -> None:
        with without_recomputation():
            inside.set()
            assert done.wait(60)

    done.clear(), inside.clear()
    with ThreadPoolExecutor(1, "second") as second:
        waiting = second.submit(off)
        assert inside.wait(60)
        F.cross_entropy(module(X), y).backward()
        done.set()
        waiting.result(60)
    assert len(runs) == 2, "its part runs again in the backward pass"


class Keeps(nn.Module):
    """Keeps a tensor made of its parameter, as LeViT does; under a reentrant checkpoint it is made without a graph."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.b, self.kept, self.reentrant = nn.Linear(D, D), nn.Parameter(torch.randn(D)), {}, reentrant  # type: ignore[var-annotated]

    def part(self, h: Tensor) -> Tensor:
        if "b" not in self.kept:
            self.kept["b"] = self.b.exp()
        return (h + self.kept["b"]).tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.part(h) if self.reentrant is None else checkpoint(self.part, h, use_reentrant=self.reentrant)


def test_what_a_reentrant_checkpoint_keeps() -> None:
    """The derivative is that of the function; plain autograd, which keeps the value without a graph, loses it."""
    (X, y), module = data(), Keeps(True)
    model_fn, params = curvfunc.functionalize(module)
    values = [params, {k: 1.5 * p for k, p in params.items()}, params]
    for p in values:  # a second call does not meet what the first one kept
        fresh = lambda b, p=p: torch.tanh(F.linear(X, p["first.weight"], p["first.bias"]) + b.exp())
        terms = lambda b: F.cross_entropy(fresh(b), y, reduction="none") / N  # noqa: B023
        step = 1e-5 * torch.eye(D)
        differences = torch.stack([(terms(p["b"] + e) - terms(p["b"] - e)) / 2e-5 for e in step], 1)
        got = curvfunc.batch_grad(model_fn, p, X, y)
        assert_close(got["b"], differences, 1e-7)
        assert not module.kept
        assert_close(curvfunc.hessian_vp(model_fn, p, X, y, p), curvfunc.hessian_vp(*same(None, p), X, y, p))
        assert_close(curvfunc.diag_ggn(model_fn, p, X, y), curvfunc.diag_ggn(*same(None, p), X, y))


def same(reentrant: bool | None, p: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    return curvfunc.functionalize(Keeps(reentrant))[0], p


def test_compiled_parts_in_products() -> None:
    """Compiled code has one derivative; products, which want another one, run it eagerly."""
    torch._dynamo.reset()
    (X, y), module = data(), Net(None)
    want = {k: QUANTITIES[k](*curvfunc.functionalize(module), X, y) for k in ("hessian_vp", "ggn_vp", "jvp", "hmp")}
    module.second.compile(backend="aot_eager")
    for k, result in want.items():
        assert_close(QUANTITIES[k](*curvfunc.functionalize(module), X, y), result)


def test_compiled_parts_in_products_of_models_with_a_counter() -> None:
    """A second run would count twice, and multiply by another number."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 3), nn.Tanh())
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.second(self.first(x)) * self.calls

    module, X, y = Counting(), torch.randn(4, 3), torch.arange(4) % 3
    model_fn, params = curvfunc.functionalize(module)
    want = curvfunc.hessian_vp(model_fn, params, X, y, params)
    module.second.compile(backend="aot_eager")
    module.calls.zero_()
    with pytest.raises(NotImplementedError, match="changes buffers"):
        curvfunc.hessian_vp(model_fn, params, X, y, params)
    module.calls.zero_()
    with torch.compiler.set_stance("force_eager"):
        assert_close(curvfunc.hessian_vp(model_fn, params, X, y, params), want)
