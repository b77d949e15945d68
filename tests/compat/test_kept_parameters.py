"""What an extended module remembers of its parameters between calls: every change is noticed, and nothing is kept alive."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from curvfunc.compat import backpack, extend, extensions

pytestmark = pytest.mark.usefixtures("float64")

N = 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.register_module("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(F.linear(x, self.first.weight, getattr(self.first, "extra", None)))
        return self.last(getattr(self, "more", nn.Identity())(x))


def grads(model: nn.Module) -> list[Tensor]:
    """Those of the samples, which is all that is to have any; compared with autograd."""
    torch.manual_seed(0)
    X, y, loss = torch.randn(N, 3), torch.tensor([0, 2, 1]), extend(nn.CrossEntropyLoss(reduction="sum"))
    params = [p for p in model.parameters() if p.requires_grad]
    with backpack(extensions.BatchGrad()):
        loss(model(X), y).backward()
    found = [p.__dict__.pop("grad_batch") for p in params]
    for n in range(N):
        want = torch.autograd.grad(loss(model(X[n : n + 1]), y[n : n + 1]), params)
        assert_close([f[n] for f in found], [*want])
    return found


def _another_name(m: Model) -> None:
    del m.first.bias
    m.first.extra = nn.Parameter(torch.ones(3))


def _another_submodule(m: Model) -> None:
    del m._modules["nothing"]
    m.more = extend(nn.Linear(3, 3))


def _replaced(m: Model) -> None:
    m.inner[0] = extend(nn.Linear(3, 3))


def _new_parameter(m: Model) -> None:
    m.inner[0].weight = nn.Parameter(torch.ones(3, 3))


def _assigned(m: Model) -> None:
    m.load_state_dict({k: t + 1 for k, t in m.state_dict().items()}, assign=True)


def _frozen(m: Model) -> None:
    m.inner[0].weight.requires_grad_(False)


def _without_bias(m: Model) -> None:
    m.last.bias = None  # type: ignore[assignment]


def _without_submodule(m: Model) -> None:
    m.inner[1] = nn.Identity()
    m.inner[0] = m.last


def _tied(m: Model) -> None:
    m.last.weight = m.inner[0].weight


def _shared(m: Model) -> None:
    m.last = m.inner[0]  # type: ignore[assignment]


def _normalized(m: Model) -> None:
    parametrizations.weight_norm(m.inner[0])
    extend(m)


@pytest.mark.parametrize(
    "change",
    [
        _another_name,
        _another_submodule,
        _replaced,
        _new_parameter,
        _assigned,
        _frozen,
        _without_bias,
        _without_submodule,
        _tied,
        _shared,
        _normalized,
    ],
    ids=lambda change: change.__name__,
)
def test_changes(change: Callable[[Model], None]) -> None:
    torch.manual_seed(0)
    model = extend(Model())
    first = grads(model)
    assert_close(grads(model), first)
    change(model)  # type: ignore[arg-type]
    grads(model)
    model.requires_grad_(True)
    grads(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = extend(Model())
    first = grads(model)
    other = copied(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    grads(other)
    assert_close(grads(model), first)


def test_scripted_parts() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    model = extend(nn.Sequential(nn.Linear(3, 3), scripted, nn.Linear(3, 3)))
    assert_close(grads(model), grads(model))


def test_nothing_is_kept_alive() -> None:
    model = extend(Model())
    grads(model)
    gc.collect()
    gc.disable()
    try:
        gone = [weakref.ref(t) for t in (model.inner[0].weight, model.last, model.last.weight)]  # type: ignore[index, union-attr]
        _new_parameter(model)  # type: ignore[arg-type]
        model.last = nn.Linear(3, 3)
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()
