"""Second moments of patches from products of rows: those of the patches themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc.rules import conv, patches

CASES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((3, 2, 9), (4,), {}),
    ((3, 2, 9), (3,), {"padding": 2}),
    ((2, 3, 7, 6), (3, 3), {"padding": 1}),
    ((2, 3, 7, 6), (5, 2), {"padding": (2, 0), "stride": (1, 2)}),
    ((2, 3, 7, 8), (2, 3), {"dilation": (1, 2), "padding": "same"}),
    ((2, 1, 4, 5), (4, 3), {}),  # one window
    ((2, 1, 5, 5), (4, 5), {}),  # windows with nothing in common
    ((2, 2, 5, 4, 6), (3, 2, 3), {"padding": (1, 0, 1), "stride": (1, 2, 1)}),
]


def options(given: dict[str, Any]) -> tuple[Any, Any, Any]:
    return given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1)


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize(("shape", "kernel", "given"), CASES)
def test_is_the_moment_of_the_patches(
    shape: tuple[int, ...], kernel: tuple[int, ...], given: dict[str, Any], transformed: bool
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    found = patches.unfold(x, kernel, *options(given))  # [n, k, s]
    want = torch.einsum("nks,njs->kj", found, found)

    def moment(x: Tensor) -> Tensor:
        return patches.patch_moment(x, kernel, *options(given))

    with torch.no_grad():
        got = torch.vmap(moment)(x[None])[0] if transformed else moment(x)
    assert_close(got, want, rtol=1e-12)


def test_pays_where_rows_recur(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "MOMENT_PRODUCTS", 0)
    assert patches.moment_pays((8, 3, 9, 9), (3, 3), 1, 1, 1)
    assert not patches.moment_pays((8, 3, 9, 9), (1, 3), 1, 0, 1)
    assert not patches.moment_pays((8, 3, 9, 9), (3, 3), (2, 1), 1, 1)
    assert not patches.moment_pays((8, 3, 9, 9), (3, 3), 1, 0, (2, 1))
    assert not patches.moment_pays((1, 64, 4, 4), (3, 3), 1, 0, 1)  # four patches of 576 features
    monkeypatch.setattr(patches, "MOMENT_PRODUCTS", 2 * 10**8)
    assert patches.moment_pays((32, 32, 14, 14), (5, 5), 1, 2, 1)
    assert not patches.moment_pays((32, 1, 28, 28), (5, 5), 1, 2, 1)


TRANSPOSED: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((3, 2, 4), (4,), {"stride": 2}),
    ((3, 2, 4), (4,), {"stride": 3, "padding": 1, "output_padding": 2}),
    ((3, 2, 3), (2,), {"stride": 5}),  # outputs that see nothing
    ((3, 2, 4), (3,), {"padding": 2}),
    ((3, 2, 1), (5,), {"stride": 2, "padding": 2}),
    ((2, 3, 3, 4), (4, 3), {"stride": (2, 1), "padding": (1, 0)}),
    ((2, 3, 3, 4), (3, 3), {"stride": 2, "padding": 3, "output_padding": 1}),  # outputs without any of the first inputs
    ((2, 2, 2, 3, 2), (2, 3, 2), {"stride": (2, 3, 1), "output_padding": (1, 2, 0)}),
]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize(("shape", "kernel", "given"), TRANSPOSED)
def test_is_the_moment_of_the_patches_of_a_transposed_convolution(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    given: dict[str, Any],
    transformed: bool,
    rows: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if rows:
        monkeypatch.setattr(patches, "MOMENT_PRODUCTS", 0)
    x = torch.randn(shape, dtype=torch.float64)
    settings = given.get("stride", 1), given.get("padding", 0), given.get("output_padding", 0)
    found = patches.unfold_transpose(x, kernel, *settings, 1)
    want = torch.einsum("nks,njs->kj", found, found)

    def moment(x: Tensor) -> Tensor:
        return patches.transposed_moment(x, kernel, *settings)

    with torch.no_grad():
        got = torch.vmap(moment)(x[None])[0] if transformed else moment(x)
    assert_close(got, want, rtol=1e-12)


NETS: dict[str, Callable[[], nn.Module]] = {
    "conv1d": lambda: nn.Sequential(nn.Unflatten(1, (3, 32)), nn.Conv1d(3, 4, 5, padding=2), nn.Tanh(), nn.Flatten(), nn.Linear(128, 3)),
    "conv2d": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 8, 6)), nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, (3, 2)), nn.Flatten(), nn.Linear(120, 3)
    ),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (2, 4, 4, 3)), nn.Conv3d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3)),
    "grouped": lambda: nn.Sequential(nn.Unflatten(1, (2, 8, 6)), nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(96, 3)),
    "two groups of two": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 6, 4)), nn.Conv2d(4, 6, 2, groups=2, padding=1), nn.Flatten(), nn.Linear(210, 3)
    ),
}  # fmt: skip


class Twice(nn.Module):
    """One convolution at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(96, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.conv(x.unflatten(1, (2, 8, 6))).tanh()).flatten(1))


@pytest.mark.cpu
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("approximation", [None, "expand", "reduce"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", [*NETS, "twice"])
def test_factors_are_the_same(name: str, joined: bool, approximation: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model_fn, params = curvfunc.functionalize(Twice() if name == "twice" else NETS[name]())
    X, y = torch.randn(5, 96), torch.arange(5) % 3
    made: list[int] = []
    moment = conv.patch_moment
    monkeypatch.setattr(conv, "patch_moment", lambda *args: (made.append(1), moment(*args))[1])

    def found(**kwargs: Any) -> Any:
        given: dict[str, Any] = {"kfac_approx": approximation, "joined": joined}
        specs = (curvfunc.KFLR(**given), curvfunc.KFAC(mc_samples=2, **given))
        return curvfunc.compute(model_fn, params, X, y, specs, generator=torch.Generator().manual_seed(1), **kwargs)

    monkeypatch.setattr(patches, "MOMENT_PRODUCTS", 10**15)
    want = found()
    assert made == []
    monkeypatch.setattr(patches, "MOMENT_PRODUCTS", 0)
    assert_close(found(), want, rtol=1e-12)
    assert_close(found(chunk_size=1), want, rtol=1e-12)
    assert bool(made) == (name != "twice" and approximation != "reduce")


@pytest.mark.cpu
@pytest.mark.usefixtures("float64")
def test_the_shim_shares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvfunc.compat import backpack, extend, extensions

    torch.manual_seed(2)
    net, X, y = NETS["conv2d"](), torch.randn(5, 96), torch.arange(5) % 3
    model_fn, params = curvfunc.functionalize(net)
    want = curvfunc.kflr(model_fn, params, X, y)
    made: list[int] = []
    moment = conv.patch_moment
    monkeypatch.setattr(patches, "MOMENT_PRODUCTS", 0)
    monkeypatch.setattr(conv, "patch_moment", lambda *args: (made.append(1), moment(*args))[1])
    model, loss_fn = extend(net), extend(nn.CrossEntropyLoss())
    with backpack(extensions.KFLR()):
        loss_fn(model(X), y).backward()
    assert made == [1, 1]
    assert_close({n: tuple(p.kflr) for n, p in model.named_parameters()}, want, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_can_be_differentiated_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model_fn, params = curvfunc.functionalize(NETS["conv2d"]())
    X, y = torch.randn(5, 96), torch.arange(5) % 3

    def total(params: Any) -> Tensor:
        factors = curvfunc.kflr(model_fn, params, X, y)
        return sum(f.square().sum() for pair in factors.values() for f in pair)

    monkeypatch.setattr(patches, "MOMENT_PRODUCTS", 10**15)
    want = torch.func.grad(total)(params)
    monkeypatch.setattr(patches, "MOMENT_PRODUCTS", 0)
    assert_close(torch.func.grad(total)(params), want, rtol=1e-10)
    compiled = torch.compile(lambda p, X, y: curvfunc.kflr(model_fn, p, X, y), backend="aot_eager")
    assert_close(compiled(params, X, y), curvfunc.kflr(model_fn, params, X, y), rtol=1e-10)
