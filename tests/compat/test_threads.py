"""The shim in threads: what is active in one of them is nothing to the others."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc.compat import CTX, backpack, disable, extend
from curvfunc.compat.context import state
from curvfunc.compat.extensions import HMP, KFLR, BatchGrad, DiagGGNExact, DiagHessian, Variance

pytestmark = pytest.mark.usefixtures("float64")
N = 6
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "grad_batch": curvfunc.batch_grad,
    "variance": curvfunc.variance,
    "diag_ggn_exact": curvfunc.diag_ggn,
    "diag_h": curvfunc.diag_hessian,
}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def data(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(seed)), torch.arange(N) % 3


def together(*functions: Callable[[], Any]) -> list[Any]:
    """Run functions in threads of their own, and raise what they raise."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(60) for future in [pool.submit(f) for f in functions]]


def test_each_thread_has_its_extensions() -> None:
    """All blocks are open and all backward passes run at the same time; the block that was entered first ends first."""
    exts = [BatchGrad(), DiagGGNExact(), DiagHessian(), Variance()]
    meet = threading.Barrier(len(exts), timeout=60)
    entered, left = ([threading.Event() for _ in range(len(exts) + 1)] for _ in range(2))
    entered[0].set()
    left[0].set()
    models = [extend(mlp()) for _ in exts]

    def work(k: int) -> None:
        X, y = data(k)
        loss_fn = extend(nn.CrossEntropyLoss())
        assert entered[k].wait(60)
        with backpack(exts[k], extension_hook=lambda module: meet.wait()):
            entered[k + 1].set()
            meet.wait()
            assert CTX.get_active_exts() == CTX.active_exts == (exts[k],)
            loss_fn(models[k](X), y).backward()
            assert left[k].wait(60)
        left[k + 1].set()
        assert not CTX.is_active()

    together(*[lambda k=k: work(k) for k in range(len(exts))])
    assert not CTX.is_active()
    for k, (model, ext) in enumerate(zip(models, exts, strict=True)):
        want = FUNCTIONS[ext.savefield](*curvfunc.functionalize(model), *data(k))
        assert_close({name: getattr(p, ext.savefield) for name, p in model.named_parameters()}, want)
        for other in exts:
            assert other is ext or not any(hasattr(p, other.savefield) for p in model.parameters())


def test_one_model_in_two_threads() -> None:
    """Each of them has results of its own kind, though the graphs of both are there at the same time."""
    model = extend(mlp())
    meet = threading.Barrier(2, timeout=60)

    def work(ext: Any, seed: int) -> None:
        X, y = data(seed)
        loss = extend(nn.CrossEntropyLoss())(model(X), y)
        meet.wait()
        for _ in range(20):
            with backpack(ext):
                torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)

    together(lambda: work(BatchGrad(), 1), lambda: work(DiagGGNExact(), 2))
    for field, seed in (("grad_batch", 1), ("diag_ggn_exact", 2)):
        want = FUNCTIONS[field](*curvfunc.functionalize(model), *data(seed))
        assert_close({name: getattr(p, field) for name, p in model.named_parameters()}, want)


def test_forward_passes_come_and_go_in_other_threads() -> None:
    """What was recorded is noted for all threads, and each backward pass looks through these notes."""
    models, shared = [extend(mlp()) for _ in range(4)], extend(mlp())

    def work(k: int) -> None:
        X, y = data(k)
        for _ in range(30):
            shared(X)  # its graph goes at once
            with backpack(BatchGrad()):
                F.cross_entropy(models[k](X), y).backward()

    together(*[lambda k=k: work(k) for k in range(len(models))])
    for k, model in enumerate(models):
        want = curvfunc.batch_grad(*curvfunc.functionalize(model), *data(k))
        assert_close({name: p.grad_batch for name, p in model.named_parameters()}, want)


def test_a_block_that_ends_leaves_the_passes_of_other_threads() -> None:
    """A model with two calls has its results at the end of the pass, which another thread must not forget."""
    X, y = data(0)
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    inside, ended = threading.Event(), threading.Event()

    def wait(module: nn.Module) -> None:
        inside.set()
        assert ended.wait(60)

    def long() -> None:
        with backpack(BatchGrad(), extension_hook=wait):
            (loss_fn(model(X), y) + F.cross_entropy(model(X), y)).backward()

    def short() -> None:
        assert inside.wait(60)
        with backpack(KFLR()):
            pass
        ended.set()

    together(long, short)
    want = curvfunc.batch_grad(*curvfunc.functionalize(model), X, y)
    assert_close({name: p.grad_batch / 2 for name, p in model.named_parameters()}, want)


def test_a_thread_that_is_started_inside_of_a_block_has_nothing_active() -> None:
    (X, y), model = data(0), extend(mlp())
    with backpack(BatchGrad(), debug=True), disable():
        assert together(lambda: (CTX.is_active(), CTX.get_debug(), disable.should_store_io())) == [(False, False, True)]
        together(lambda: F.cross_entropy(model(X), y).backward())
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())


def test_a_forward_pass_in_another_thread() -> None:
    (X, y), model, loss_fn = data(0), extend(mlp()), extend(nn.CrossEntropyLoss())
    (loss,) = together(lambda: loss_fn(model(X), y))
    with backpack(BatchGrad(), DiagGGNExact()):
        loss.backward()
    for field in ("grad_batch", "diag_ggn_exact"):
        want = FUNCTIONS[field](*curvfunc.functionalize(model), X, y)
        assert_close({name: getattr(p, field) for name, p in model.named_parameters()}, want)


class Nested(torch.autograd.Function):
    """Runs a backward pass in its backward pass; where many are nested, autograd goes on in threads of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, last: Callable[[], None]) -> Tensor:
        ctx.depth, ctx.last = depth, last
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        with torch.enable_grad():
            if ctx.depth:
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.last).backward()
            else:
                ctx.last()
        return g, None, None


def test_hooks_that_run_in_autograds_own_threads() -> None:
    (X, y), model, loss_fn = data(0), extend(mlp()), extend(nn.CrossEntropyLoss())
    threads = []

    def last() -> None:
        loss = loss_fn(model(X), y)
        loss.grad_fn.register_prehook(lambda g: threads.append(threading.get_ident()))
        loss.backward()

    with backpack(BatchGrad(), DiagGGNExact(), HMP()):
        Nested.apply(torch.ones(1, requires_grad=True), 100, last).backward()
    assert threads != [threading.get_ident()]
    for field in ("grad_batch", "diag_ggn_exact"):
        want = FUNCTIONS[field](*curvfunc.functionalize(model), X, y)
        assert_close({name: getattr(p, field) for name, p in model.named_parameters()}, want)
    assert all(hasattr(p, "hmp") for p in model.parameters())
    assert state().running == {}


@pytest.mark.gpu
def test_hooks_that_run_in_the_thread_of_a_gpu() -> None:
    """Two threads with different extensions, and passes of both through the thread that autograd has for the device."""
    exts = [BatchGrad(), DiagGGNExact()]
    models = [extend(mlp().cuda()) for _ in exts]
    meet = threading.Barrier(2, timeout=60)

    def work(k: int) -> None:
        X, y = (t.cuda() for t in data(k))
        loss_fn = extend(nn.CrossEntropyLoss())
        with backpack(exts[k]):
            for _ in range(20):
                meet.wait()
                loss_fn(models[k](X), y).backward()
        assert not CTX.is_active()

    together(lambda: work(0), lambda: work(1))
    for k, (model, ext) in enumerate(zip(models, exts, strict=True)):
        want = FUNCTIONS[ext.savefield](*curvfunc.functionalize(model), *(t.cuda() for t in data(k)))
        assert_close({name: getattr(p, ext.savefield) for name, p in model.named_parameters()}, want)
        assert not any(hasattr(p, exts[1 - k].savefield) for p in model.parameters())
