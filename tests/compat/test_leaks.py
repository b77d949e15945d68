"""Memory stays where it is: 500 steps leave no more than ten."""

import gc
import resource
import tracemalloc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvfunc.compat import CTX, backpack, extend
from curvfunc.compat.context import state
from curvfunc.compat.delivery import REGIONS
from curvfunc.compat.extensions import HMP, KFAC, BatchGrad, BatchL2Grad, DiagGGNMC, DiagHessian, Variance
from curvfunc.compat.graphs import GraphProduct

pytestmark = pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
STEPS = 500


class Words(nn.Module):
    """Recurrence, attention, a norm, an embedding: rules of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)
        self.attention, self.norm, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.rnn(self.embedding(tokens))[0]
        return self.head(self.norm(h + self.attention(h, h, h)[0]).mean(1))


class NoRule(nn.Module):
    """Has a parameter without a rule, so that the functional core runs in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(256, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.atan2(self.fc(x), self.scale)


MODELS: dict[str, Any] = {
    "wide": (lambda: nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 3)), lambda: torch.randn(128, 256)),
    "words": (Words, lambda: torch.randint(20, (16, 4))),
    "no rule": (NoRule, lambda: torch.randn(128, 256)),
}


def resident() -> int:
    """Bytes of memory that the process has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def counts() -> tuple[int, int]:
    """Tensors that Python knows, and autograd functions."""
    gc.collect()
    objects = gc.get_objects()
    return sum(issubclass(type(o), Tensor) for o in objects), len(objects)


STEPS_OF = {"wide": STEPS, "words": 60, "no rule": 60}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_steps_leave_memory_as_it_was(name: str, create_graph: bool) -> None:
    build, draw = MODELS[name]
    gc.collect()  # what earlier tests have left
    before = len(REGIONS)
    model, loss_fn = extend(build()), extend(nn.CrossEntropyLoss())
    X = draw()
    y = torch.arange(len(X)) % 3
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    exts = (BatchL2Grad(), Variance()) if create_graph else (BatchGrad(), Variance(), DiagGGNMC(), KFAC())

    def step() -> None:
        optimizer.zero_grad()
        loss = loss_fn(model(X), y)
        with backpack(*exts):
            loss.backward(create_graph=create_graph)
        if create_graph:
            sum(p.variance.sum() for p in model.parameters()).backward()
        optimizer.step()

    for _ in range(10):
        step()
    tensors, objects = counts()
    memory = resident()
    for _ in range(STEPS_OF[name]):
        step()
    more_tensors, more_objects = counts()
    assert more_tensors <= tensors  # fewer, if something that an earlier test has left goes now
    assert more_objects - objects < 50
    grown = resident() - memory
    assert grown < 10e6, f"{grown / 1e6:.0f} MB more after {STEPS_OF[name]} steps"  # one activation is 0.13 MB
    del step
    for p in model.parameters():  # torch's own cycle, parameter -> gradient -> graph -> parameter
        vars(p).clear()
        p.grad = None
    gc.collect()
    assert len(REGIONS) == before
    assert state().running == {}


def test_python_memory_does_not_grow() -> None:
    model, loss_fn, X = extend(nn.Linear(8, 3)), extend(nn.CrossEntropyLoss()), torch.randn(4, 8)
    y = torch.arange(4) % 3

    def step() -> None:
        with backpack(BatchGrad(), KFAC()):
            loss_fn(model(X), y).backward()

    tracemalloc.start()
    for _ in range(900):  # Python's own free lists fill
        step()
    grown = []
    for _ in range(3):  # what a step leaves behind shows each time, and what free lists take once
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(STEPS):
            step()
        gc.collect()
        grown.append(tracemalloc.get_traced_memory()[0] - before)
    tracemalloc.stop()
    assert min(grown) < 10_000, f"{grown} bytes more after {STEPS} steps each"


@pytest.mark.parametrize("used", [True, False])
def test_graphs_go_with_the_loss(used: bool) -> None:
    """Without the garbage collector, whether a backward pass ran or not."""
    model, loss_fn, X = extend(Words()), extend(nn.CrossEntropyLoss()), torch.randint(20, (4, 3))
    gc.collect()
    before = len(REGIONS)
    gc.disable()
    try:
        out = model(X)
        loss = loss_fn(out, torch.arange(4) % 3)
        assert len(REGIONS) == before + 1
        if used:
            with backpack(BatchGrad(), DiagGGNMC()):
                loss.backward(retain_graph=True)
        del out, loss
        assert len(REGIONS) == before
    finally:
        gc.enable()


def test_models_go_with_their_last_reference() -> None:
    """Without the garbage collector: extending makes no cycle."""
    gc.collect()
    gc.disable()
    try:
        model = extend(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        with backpack(BatchGrad()):
            F.cross_entropy(model(torch.randn(5, 4)), torch.arange(5) % 2).backward()
        gone = [weakref.ref(m) for m in model.modules()]
        handles = len(CTX.hook_handles)
        del model
        assert not any(r() for r in gone)
        extend(nn.Linear(1, 1))
        assert len(CTX.hook_handles) <= handles - len(gone) + 2
    finally:
        gc.enable()


@pytest.mark.parametrize("create_graph", [False, True])
def test_products_on_the_graph_leave_memory_as_it_was(create_graph: bool) -> None:
    """Their functions hold a graph until the next step; without the garbage collector."""
    model, loss_fn = extend(nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 3))), extend(nn.CrossEntropyLoss())
    X, y = torch.randn(128, 256), torch.arange(128) % 3

    def step() -> None:
        with backpack(HMP()):
            loss_fn(model(X), y).backward(create_graph=create_graph)
        for p in model.parameters():
            p.grad = None

    for _ in range(10):
        step()
    before = counts(), resident(), len(REGIONS)
    gc.disable()
    try:
        for _ in range(STEPS):
            step()
        assert resident() - before[1] < 10e6
        assert len(REGIONS) == before[2]
    finally:
        gc.enable()
    assert counts()[0] <= before[0][0]
    assert isinstance(model[0].weight.hmp, GraphProduct)


def test_what_is_kept_for_products_goes_with_the_next() -> None:
    model, loss_fn, X = (
        extend(nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 3))),
        extend(nn.CrossEntropyLoss()),
        torch.randn(128, 256),
    )
    y = torch.arange(128) % 3

    def step() -> None:
        with backpack(HMP(), DiagHessian()):
            loss_fn(model(X), y).backward()

    for _ in range(3):
        step()
    tensors, _ = counts()
    for _ in range(10):
        step()
    assert counts()[0] == tensors


def test_a_loss_that_is_kept_does_not_keep_what_was_recorded() -> None:
    model, loss_fn, X = extend(nn.Linear(64, 3)), extend(nn.CrossEntropyLoss()), torch.randn(8, 64)
    kept = []
    for _ in range(5):
        x = X.clone()
        gone = weakref.ref(x)
        loss = loss_fn(model(x), torch.arange(8) % 3)
        with backpack(BatchGrad()):
            loss.backward()
        kept.append(loss)
        del x
        assert gone() is None


def test_a_backward_pass_that_fails_leaves_nothing() -> None:
    model, X = extend(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))), torch.randn(5, 4)
    gc.collect()
    before = len(REGIONS)

    def fail(module: nn.Module) -> None:
        raise ArithmeticError("in the hook")

    with pytest.raises(ArithmeticError) as caught, backpack(BatchGrad(), extension_hook=fail):
        model(X).sum().backward()
    del caught  # its traceback holds the frames
    assert state().running == {}
    gc.collect()
    assert len(REGIONS) == before
