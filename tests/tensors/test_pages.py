"""Memory of large results: advice to the system, and results of the shim in the memory of those that they replace."""

import mmap
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import curvfunc
from curvfunc.compat import backpack, extend, extensions, memory
from curvfunc.tensors import pages

# -- memory that stays

FAULTS = """
import resource, sys, torch
if sys.argv[1] == "with":
    import curvfunc
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
kept = [torch.ones(1 << 18) for _ in range(4)]
before = faults()
for _ in range(10):
    torch.ones(5 << 20)  # 20 MiB, 5120 pages
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have their own ways")
def test_memory_that_is_freed_is_used_again() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}

    def count(curvfunc: str) -> int:
        run = [sys.executable, "-c", FAULTS, curvfunc]
        return int(subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout)

    # in few runs, some of the first blocks still go: it depends on where in memory the imports left free space
    assert min(count("with") for _ in range(3)) < 2 * 5120
    assert count("without") > 5 * 5120  # else there is nothing to gain


# -- huge pages


def test_advice_stays_inside_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "MADVISE", lambda *args: asked.append(args))
    monkeypatch.setattr(pages, "LEAST_BYTES", 1 << 16)
    pages.empty_cache()
    large = pages.empty(torch.empty(0, dtype=torch.float64), 30, 1000)
    pages.empty(large, 10, 10)
    ((start, size, advice),) = asked
    assert large.shape == (30, 1000)
    assert large.dtype == torch.float64
    assert start % mmap.PAGESIZE == 0
    assert advice == pages.HUGE
    assert large.data_ptr() <= start < start + size <= large.data_ptr() + large.nbytes
    assert size > large.nbytes - 2 * mmap.PAGESIZE


@pytest.mark.parametrize("system", ["with advice", "without"])
def test_results_do_not_depend_on_it(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 300)))
    X, y = torch.randn(70, 2, 6, 6), torch.arange(70)
    specs = (curvfunc.BatchGrad(), curvfunc.SumGradSquared(), curvfunc.BatchDiagGGN(mc_samples=0), curvfunc.KFAC())

    def found() -> Any:
        return curvfunc.compute(model_fn, params, X, y, specs, generator=torch.Generator().manual_seed(0))

    want = found()
    monkeypatch.setattr(pages, "LEAST_BYTES", 1)
    if system == "without":
        monkeypatch.setattr(pages, "MADVISE", None)
    assert_close(found(), want, rtol=1e-7)


@pytest.mark.usefixtures("float64")
def test_compiled_code_asks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an operation that is opaque to the compiler; where results are small there is none."""
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    X, y = torch.randn(7, 6), torch.arange(7) % 3
    specs = (curvfunc.BatchGrad(), curvfunc.BatchDiagGGN())
    want = curvfunc.compute(model_fn, params, X, y, specs)
    for least, count in ((1 << 25, 0), (1, 4)):
        called: list[str] = []

        def backend(graph: Any, inputs: Any, called: list[str] = called) -> Any:
            called += [str(node.target) for node in graph.graph.nodes]
            return graph.forward

        monkeypatch.setattr(pages, "LEAST_BYTES", least)
        torch.compiler.reset()
        traced = aot_autograd(fw_compiler=backend)
        compiled = torch.compile(lambda p, X, y: curvfunc.compute(model_fn, p, X, y, specs), backend=traced)
        with torch.no_grad():
            assert_close(compiled(params, X, y), want, rtol=1e-12)
        assert sum("large_outer" in name for name in called) == count
    torch.compiler.reset()


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")  # of dynamic shapes only
def test_sizes_may_be_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LEAST_BYTES", 4000)  # between the results of the two batches
    model_fn, params = curvfunc.functionalize(nn.Linear(6, 3))
    compiled = torch.compile(lambda p, X, y: curvfunc.batch_grad(model_fn, p, X, y), backend="aot_eager", dynamic=True)
    for samples in (7, 70, 9):
        X, y = torch.randn(samples, 6), torch.arange(samples) % 3
        assert_close(compiled(params, X, y), curvfunc.batch_grad(model_fn, params, X, y), rtol=1e-12)


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "name": lambda t: t,
    "list": lambda t: [t],
    "view": lambda t: t[1:],
    "detached": lambda t: t.detach(),
    "array": lambda t: t.numpy(),
    "memory": lambda t: t.untyped_storage(),
    "graph": lambda t: (t * torch.ones((), requires_grad=True)).sum(),
    "capsule": torch.utils.dlpack.to_dlpack,
}
SEEN = HOLDERS | {"shared": lambda t: t.share_memory_(), "typed": lambda t: memoryview(t.numpy())}


# -- memory that is kept


def kept(shape: tuple[int, ...] = (30, 1000)) -> Tensor:
    return pages.empty(torch.empty(0), *shape)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Results of any size come from blocks of memory, of which there are none yet."""
    monkeypatch.setattr(pages, "LEAST_BYTES", 1)
    monkeypatch.setattr(pages, "_BLOCKS", pages._Blocks())
    return pages._BLOCKS


def test_memory_that_nobody_holds_is_taken_again(blocks: Any) -> None:
    first = kept().fill_(1.0)
    address = first.data_ptr()
    second = kept()
    assert second.data_ptr() != address
    del first
    third = kept((1000, 30))
    assert third.data_ptr() == address
    assert third.shape == (1000, 30)
    assert third.is_contiguous()
    assert third._base is None
    assert kept((31, 1000)).data_ptr() not in (address, second.data_ptr())


@pytest.mark.parametrize("holder", [*SEEN])
def test_memory_that_somebody_holds_is_not(holder: str, blocks: Any) -> None:
    result = kept().fill_(1.0)
    held = SEEN[holder](result)
    address = result.data_ptr()  # sharing moves it
    del result
    assert kept().data_ptr() != address
    del held
    assert holder in ("graph", "capsule", "shared") or kept().data_ptr() == address


def test_memory_is_given_back(blocks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size = kept().nbytes
    used = kept()
    assert [b.nbytes() for b in blocks._blocks] == [size]  # the first one was free
    other = kept()
    del used
    pages.empty_cache()
    assert [b.data_ptr() for b in blocks._blocks] == [other.data_ptr()]
    del other
    monkeypatch.setattr(pages, "_is_short", lambda size: True)
    held = kept((10, 10))
    assert [b.data_ptr() for b in blocks._blocks] == [held.data_ptr()]  # the free one went


def test_memory_that_is_kept_is_bounded(blocks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MOST_BYTES", 300_000)
    held = [kept() for _ in range(4)]
    assert [b.data_ptr() for b in blocks._blocks] == [t.data_ptr() for t in held[2:]]
    assert kept((100, 1000)).nbytes == 400_000
    assert len(blocks._blocks) == 2


def test_results_in_kept_memory_share_it_with_nothing(blocks: Any) -> None:
    """Those of a second call are right while those of the first are held, and take their memory afterwards."""
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    X, y = torch.randn(2, 7, 6), torch.arange(7) % 3
    first = curvfunc.batch_grad(model_fn, params, X[0], y)
    want = {name: g.clone() for name, g in first.items()}
    second = curvfunc.batch_grad(model_fn, params, X[1], y)
    assert_close(first, want, rtol=0.0)
    address = first["0.weight"].data_ptr()
    del first
    assert address in [g.data_ptr() for g in curvfunc.batch_grad(model_fn, params, X[0], y).values()]
    assert_close(curvfunc.batch_grad(model_fn, params, X[0], y), want, rtol=1e-6)
    assert_close(second, curvfunc.batch_grad(model_fn, params, X[1], y), rtol=1e-6)


def test_threads_have_memory_of_their_own(blocks: Any) -> None:
    def work(number: int) -> bool:
        for _ in range(200):
            t = kept().fill_(number)
            if not bool((t == number).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


# -- results that replace others

EXTENSIONS = ["BatchGrad", "BatchDiagGGNExact", "BatchDiagGGNMC", "SqrtGGNExact", "SqrtGGNMC"]


class Steps:
    """Backward passes with one extension."""

    def __init__(self, extension: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "LEAST_BYTES", 1)
        net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5))
        self.model, self.loss_fn = extend(net), extend(nn.CrossEntropyLoss())
        self.extension = getattr(extensions, extension)()
        self.weights = [net[0].weight, net[3].weight]

    def step(self, X: Tensor, **options: Any) -> None:
        torch.manual_seed(3)
        with backpack(self.extension), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about create_graph
            self.loss_fn(self.model(X), torch.arange(len(X)) % 5).backward(**options)

    def results(self) -> list[Tensor]:
        return [getattr(p, self.extension.savefield) for p in self.weights]

    def addresses(self) -> list[int]:
        return [r.data_ptr() for r in self.results()]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_result_takes_the_place_of_the_one_before(extension: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, X = Steps(extension, monkeypatch), torch.randn(6, 2, 6)
    steps.step(torch.randn(6, 2, 6))
    for _ in range(3):
        before = steps.addresses()
        steps.step(X)
        assert steps.addresses() == before
    got = [r.clone() for r in steps.results()]
    for p in steps.weights:
        delattr(p, steps.extension.savefield)
    steps.step(X)
    assert_close(steps.results(), got, rtol=1e-6)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_what_somebody_holds_is_not_overwritten(extension: str, holder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(extension, monkeypatch)
    steps.step(torch.randn(6, 2, 6))
    before, copies = steps.addresses(), [r.clone() for r in steps.results()]
    held = [HOLDERS[holder](r) for r in steps.results()]
    steps.step(torch.randn(6, 2, 6))
    assert not {*steps.addresses()} & {*before}
    if holder == "name":
        assert_close(held, copies, rtol=0.0)


def test_without_counts_nothing_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no public interface: another version of torch may not have them."""
    steps = Steps("BatchGrad", monkeypatch)
    steps.step(torch.randn(6, 2, 6))
    held = [r.detach() for r in steps.results()]
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    copies = [r.clone() for r in held]
    steps.step(torch.randn(6, 2, 6))
    assert_close(held, copies, rtol=0.0)


@pytest.mark.parametrize("change", ["samples", "type", "graph"])
def test_what_does_not_fit_is_new(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps("BatchGrad", monkeypatch)
    steps.step(torch.randn(6, 2, 6))
    if change == "type":
        steps.model.double()
    X = torch.randn(5 if change == "samples" else 6, 2, 6, dtype=torch.float64 if change == "type" else torch.float32)
    steps.step(X, create_graph=change == "graph")
    for p, r in zip(steps.weights, steps.results(), strict=True):
        assert r.shape == (len(X), *p.shape)
        assert r.dtype == p.dtype
        assert r.requires_grad == (change == "graph")
    for p in steps.model.parameters():
        p.grad = None
