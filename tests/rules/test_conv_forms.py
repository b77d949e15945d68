"""Convolutions whose gradients have a form of their own: grouped ones without patches, transposed ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import reference
from curvfunc.rules import conv

pytestmark = pytest.mark.usefixtures("float64")
N, C = 5, 3

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1, groups=4), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, groups=2), (2, 4, 3, 4)),
    "multiplier": (lambda: nn.Conv2d(3, 6, (3, 2), groups=3, bias=False), (3, 6, 5)),
    "strided": (lambda: nn.Conv2d(3, 3, 3, stride=(2, 1), padding=(1, 2), groups=3), (3, 6, 5)),
    "dilated": (lambda: nn.Conv2d(3, 3, 2, dilation=(1, 2), groups=3), (3, 6, 5)),
    "same": (lambda: nn.Conv2d(3, 3, (2, 4), padding="same", groups=3), (3, 6, 5)),
    "reflected": (lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect", groups=3), (3, 6, 5)),
}


TRANSPOSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 2, 4, stride=3, padding=1, output_padding=2), (3, 4)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 2, (4, 3), stride=2, padding=1, output_padding=(0, 1)), (3, 3, 2)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=(2, 1, 2)), (2, 2, 3, 2)),
    "transposed, stride 1": (lambda: nn.ConvTranspose2d(3, 2, 3, padding=1), (3, 4, 3)),
    "transposed, gaps": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=3), (3, 3, 2)),
    "transposed, dilated": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=2, dilation=3, output_padding=2), (3, 3, 2)),
    "transposed groups": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=2, groups=2), (4, 3, 4)),
    "transposed depthwise": (lambda: nn.ConvTranspose2d(3, 6, 4, stride=2, padding=1, groups=3), (3, 3, 2)),
    "ten channels in a group": (lambda: nn.Conv2d(20, 4, 2, groups=2), (20, 8, 8)),
}


DENSE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Conv2d(3, 4, (3, 2), padding=1), (3, 6, 5)),
    "dense, strided": (lambda: nn.Conv2d(3, 4, 3, stride=(2, 1), padding=(1, 2), bias=False), (3, 6, 5)),
    "dense, dilated": (lambda: nn.Conv2d(3, 2, 2, dilation=(1, 2)), (3, 6, 5)),
    "dense, same": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (3, 6, 5)),
    "dense, one output": (lambda: nn.Conv2d(3, 1, 3, padding="valid"), (3, 6, 5)),
}


class Frames(nn.Module):
    """Several images in each sample."""

    def __init__(self, groups: int = 3) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, groups=groups), nn.Linear(24, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x.flatten(0, 1))).reshape(len(x), -1))


class Twice(nn.Module):
    """One convolution at two places."""

    def __init__(self, groups: int = 3) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1, groups=groups), nn.Linear(48, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.conv(x).tanh()).flatten(1))


def problem(name: str) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    groups = 1 if name.startswith("dense") else 3
    if name.endswith("frames"):
        net, X = Frames(groups), torch.randn(N, 2, 3, 4, 4)
    elif name.endswith("twice"):
        net, X = Twice(groups), torch.randn(N, 3, 4, 4)
    else:
        build, shape = (NETS | TRANSPOSED | DENSE)[name]
        net, X = nn.Sequential(build(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(C)), torch.randn(N, *shape)
        net(X)
    return *curvfunc.functionalize(net), X, torch.arange(N) % C


SPECS = (curvfunc.BatchGrad(), curvfunc.BatchL2(), curvfunc.SumGradSquared(), curvfunc.Variance(), curvfunc.DiagGGN(),
         curvfunc.BatchDiagGGN(), curvfunc.SqrtGGN(), curvfunc.BatchDot())  # fmt: skip


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", [*NETS, *TRANSPOSED, "frames", "twice"])
def test_gradients(name: str, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model_fn, params, X, y = problem(name)
    with monkeypatch.context() as patched:
        unfold = conv.unfold
        made: list[int] = []
        patched.setattr(conv, "unfold", lambda *args, **kwargs: (made.append(1), unfold(*args, **kwargs))[1])
        got = [curvfunc.compute(model_fn, params, X, y, spec, chunk_size=chunk_size) for spec in SPECS]
        assert not made or name in TRANSPOSED
    assert_close(got[0], reference.batch_grad(model_fn, params, X, y), rtol=1e-10)
    assert_close(got[4], reference.diag_ggn(model_fn, params, X, y), rtol=1e-10)
    grads = got[0]
    assert_close(got[1], {k: g.flatten(1).square().sum(1) for k, g in grads.items()}, rtol=1e-10)
    assert_close(got[2], {k: g.square().sum(0) for k, g in grads.items()}, rtol=1e-10)
    columns = got[SPECS.index(curvfunc.SqrtGGN())]
    assert_close(got[5], {k: c.square().sum(0) for k, c in columns.items()}, rtol=1e-10)


@pytest.mark.cpu
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the rule was measured with oneDNN")
@pytest.mark.parametrize("name", [*DENSE, "dense frames", "dense, twice"])
def test_samples_as_groups(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One vector of a dense convolution in single precision needs no patches; several vectors share them."""
    monkeypatch.setattr(conv, "CHANNELS_OF_VECTORS", 1)
    monkeypatch.setattr(conv, "LEAST_POSITIONS", 0)
    model_fn, params, X, y = problem(name)
    wide = reference.batch_grad(model_fn, params, X, y)
    columns = reference.sqrt_ggn(model_fn, params, X, y)
    params, X = {k: p.float() for k, p in params.items()}, X.float()
    made: list[int] = []
    unfold = conv.unfold
    monkeypatch.setattr(conv, "unfold", lambda *args, **kwargs: (made.append(1), unfold(*args, **kwargs))[1])
    grads = {k: g.float() for k, g in wide.items()}
    first = (curvfunc.Grad(), curvfunc.BatchGrad(), curvfunc.BatchL2(), curvfunc.SumGradSquared(), curvfunc.BatchDot())
    total, *got, dot = curvfunc.compute(model_fn, params, X, y, first)
    assert not made
    close: dict[str, float] = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(total, {k: g.sum(0) for k, g in grads.items()}, **close)
    torch.testing.assert_close(got[0], grads, **close)
    torch.testing.assert_close(got[1], {k: g.flatten(1).square().sum(1) for k, g in grads.items()}, **close)
    torch.testing.assert_close(got[2], {k: g.square().sum(0) for k, g in grads.items()}, **close)
    torch.testing.assert_close(dot, {k: g.flatten(1) @ g.flatten(1).mT for k, g in grads.items()}, **close)
    squared = {k: c.square().sum((0, 1)).float() for k, c in columns.items()}
    for chunk_size in (None, 1, 2):  # of which the last has one vector
        made.clear()
        spec = (curvfunc.DiagGGN(), curvfunc.SqrtGGN())
        diagonal, root = curvfunc.compute(model_fn, params, X, y, spec, chunk_size=chunk_size)
        assert made
        torch.testing.assert_close(diagonal, squared, **close)
        torch.testing.assert_close({k: c.square().sum((0, 1)) for k, c in root.items()}, squared, **close)
    out = {k: torch.empty_like(g) for k, g in grads.items()}
    curvfunc.compute(model_fn, params, X, y, curvfunc.BatchGrad(), out=out)
    torch.testing.assert_close(out, grads, **close)


def test_where_samples_are_groups() -> None:
    """Only where that was found to pay."""
    x = torch.zeros(8, 64, 32, 32, dtype=torch.float32)

    def pays(x: Tensor, *shape: int, **settings: Any) -> bool:
        return conv._samples_as_groups(conv.Call(x, torch.Size(shape), len(shape) - 2, **settings))

    assert pays(x, 64, 64, 3, 3)
    assert pays(x, 450, 64, 3, 3)  # 900 positions
    assert not pays(x, 451, 64, 3, 3)
    assert pays(x, 512, 64, 3, 3, padding="same")
    assert pays(x, 112, 64, 3, 3, stride=2)
    assert not pays(x, 113, 64, 3, 3, stride=2)
    assert not pays(x, 64, 8, 3, 3)
    assert not pays(x.flatten(2), 64, 64, 3)
    assert not pays(x.double(), 64, 64, 3, 3)
    assert not pays(x.to("meta"), 64, 64, 3, 3)
    assert not pays(x.repeat(64, 1, 1, 1), 64, 64, 3, 3)  # too large to be formed at once


@pytest.mark.parametrize("name", [*NETS, *TRANSPOSED, "frames", "twice"])
def test_hessian(name: str) -> None:
    model_fn, params, X, y = problem(name)
    hessian = torch.func.hessian(lambda p: F.cross_entropy(model_fn(p, X), y))(params)
    want = {k: hessian[k][k].reshape(p.numel(), p.numel()).diagonal().reshape(p.shape) for k, p in params.items()}
    assert_close(curvfunc.diag_hessian(model_fn, params, X, y), want, rtol=1e-9)


@pytest.mark.parametrize("subsampling", [None, [2, 0]])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_factors_of_transposed_convolutions(name: str, subsampling: list[int] | None) -> None:
    model_fn, params, X, y = problem(name)
    want = reference.kflr(model_fn, params, X, y, subsampling=subsampling)
    assert [len(factors) for factors in want.values()][:2] == [2, 1]
    assert_close(curvfunc.kflr(model_fn, params, X, y, subsampling=subsampling), want, rtol=1e-10)


@pytest.mark.parametrize("name", ["conv2d", "multiplier", "frames"])
def test_factors_beside_other_quantities(name: str) -> None:
    """Those need the patches, and so share them with what would do without."""
    model_fn, params, X, y = problem(name)
    both = curvfunc.compute(model_fn, params, X, y, (curvfunc.KFLR(), curvfunc.DiagGGN()))
    assert_close(both[0], curvfunc.kflr(model_fn, params, X, y), rtol=1e-10)
    assert_close(both[1], curvfunc.diag_ggn(model_fn, params, X, y), rtol=1e-10)


@pytest.mark.parametrize("name", ["transposed 1d", "transposed 2d", "transposed depthwise", "ten channels in a group"])
def test_memory_of_results(name: str) -> None:
    model_fn, params, X, y = problem(name)
    out = {k: torch.empty(N, *p.shape) for k, p in params.items()}
    curvfunc.compute(model_fn, params, X, y, curvfunc.BatchGrad(), out=out)
    assert_close(out, reference.batch_grad(model_fn, params, X, y), rtol=1e-10)


@pytest.mark.parametrize("name", ["multiplier", "transposed 2d", "transposed groups"])
def test_transformations(name: str) -> None:
    model_fn, params, X, y = problem(name)

    def total(params: Any) -> Tensor:
        return sum(g.pow(3).sum() for g in curvfunc.batch_grad(model_fn, params, X, y).values())

    def naive(params: Any) -> Tensor:
        return sum(g.pow(3).sum() for g in reference.batch_grad(model_fn, params, X, y).values())

    assert_close(torch.func.grad(total)(params), torch.func.grad(naive)(params), rtol=1e-9)
    ensemble = {k: torch.stack([v, 1.1 * v]) for k, v in params.items()}
    got = torch.vmap(lambda p: curvfunc.diag_ggn(model_fn, p, X, y))(ensemble)
    each = [curvfunc.diag_ggn(model_fn, {k: v[i] for k, v in ensemble.items()}, X, y) for i in range(2)]
    assert_close(got, {k: torch.stack([e[k] for e in each]) for k in params}, rtol=1e-10)
    torch._dynamo.reset()
    step = torch.compile(lambda p, X, y: curvfunc.diag_ggn(model_fn, p, X, y), fullgraph=True, backend="aot_eager")
    assert_close(step(params, X, y), curvfunc.diag_ggn(model_fn, params, X, y), rtol=1e-10)


def test_low_precision_is_summed_in_single() -> None:
    torch.set_default_dtype(torch.float32)
    model_fn, params, X, y = problem("conv2d")
    want = curvfunc.sum_grad_squared(model_fn, params, X, y)
    low = curvfunc.sum_grad_squared(model_fn, {k: p.bfloat16() for k, p in params.items()}, X.bfloat16(), y)
    assert low["0.weight"].dtype == torch.float32
    assert_close({k: v.float() for k, v in low.items()}, want, rtol=0.1)


def test_the_shim() -> None:
    from curvfunc.compat import backpack, extend, extensions

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Tanh(), nn.Flatten(), nn.Linear(48, C))
    X, y = torch.randn(N, 3, 4, 4), torch.arange(N) % C
    problem = (*curvfunc.functionalize(net), X, y)
    want = {"grad_batch": curvfunc.batch_grad(*problem), "diag_ggn_exact": curvfunc.diag_ggn(*problem)}
    rows = curvfunc.batch_grad(*problem, subsampling=[3, 1])
    model, loss_fn = extend(net), extend(nn.CrossEntropyLoss())
    with backpack(extensions.BatchGrad(), extensions.DiagGGNExact()):
        loss_fn(model(X), y).backward()
    for field, values in want.items():
        assert_close({k: getattr(p, field) for k, p in model.named_parameters()}, values, rtol=1e-10)
    with backpack(extensions.BatchGrad(subsampling=[3, 1])):
        loss_fn(model(X), y).backward()
    assert_close({k: p.grad_batch for k, p in model.named_parameters()}, rows, rtol=1e-10)
