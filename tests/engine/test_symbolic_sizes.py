"""Compiled for batches of any size, traced by ``make_fx``, and without a look at values."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import curvfunc
from curvfunc import DiagGGN, DiagHessian, compute
from curvfunc.engine.cotangents import CHUNK_BYTES
from curvfunc.rules.patches import moment_pays
from curvfunc.tensors.sizes import room

pytestmark = pytest.mark.usefixtures("float64")
SPECS = (
    curvfunc.Loss(),
    curvfunc.Grad(),
    curvfunc.BatchGrad(),
    curvfunc.BatchL2(),
    curvfunc.Variance(),
    curvfunc.DiagGGN(),
    curvfunc.SqrtGGN(),
    curvfunc.KFLR(),
    curvfunc.DiagHessian(),
)
SIZES = (8, 5, 12, 7, 3, 20, 31, 6, 9, 10)


@pytest.fixture(autouse=True)
def _anew() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def mlp() -> tuple[Any, Any]:
    return curvfunc.functionalize(nn.Sequential(nn.Linear(4, 11), nn.Tanh(), nn.Linear(11, 3)))


def cnn() -> tuple[Any, Any]:
    return curvfunc.functionalize(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(32, 3)))


def normalized() -> tuple[Any, Any]:
    """With windows that overlap, and running statistics."""
    convolutions = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.Conv2d(2, 2, 3), nn.Tanh()
    return curvfunc.functionalize(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(18, 3)).eval())


def images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 5, 5), torch.arange(n) % 3


def rows(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), torch.arange(n) % 3


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def flat(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), y.flatten())


def smooth(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y) + out.square().mean()


@pytest.mark.parametrize(("make", "data", "specs"), [(mlp, rows, SPECS), (cnn, images, (curvfunc.BatchGrad(), DiagGGN()))])
def test_the_second_size_is_the_last_to_be_compiled(make: Any, data: Any, specs: Any) -> None:
    model_fn, params = make()
    step = torch.compile(lambda p, X, y: compute(model_fn, p, X, y, specs), fullgraph=True, backend="aot_eager")
    for n in SIZES if make is mlp else [n for n in SIZES if n < 16]:  # torch guards on that itself, in convolutions on CPU
        X, y = data(n)
        assert_close(step(params, X, y), compute(model_fn, params, X, y, specs), 1e-9)
    assert graphs() == 2


@pytest.mark.parametrize("name", ["kfac", "kfra", "batch_diag_hessian", "batch_diag_ggn"])
def test_other_quantities_at_all_sizes(name: str) -> None:
    model_fn, params = mlp()
    function = getattr(curvfunc, name)
    step = torch.compile(lambda p, X, y: function(model_fn, p, X, y), fullgraph=True, backend="eager")
    for n in SIZES[:5]:
        X, y = rows(n)
        got = step(params, X, y)
        if name != "kfac":
            assert_close(got, function(model_fn, params, X, y), 1e-9)
    assert graphs() == 2


def test_losses_of_ones_own_at_all_sizes() -> None:
    model = curvfunc.functionalize(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6)))
    for (model_fn, params), loss_fn, data in (
        (model, flat, lambda n: (torch.randint(7, (n, 3)), torch.randint(6, (n, 3)))),
        (mlp(), smooth, rows),
    ):
        specs = (curvfunc.BatchGrad(), DiagGGN())
        step = torch.compile(
            lambda p, X, y: compute(model_fn, p, X, y, specs, loss_fn=loss_fn),  # noqa: B023
            fullgraph=True,
            backend="eager",
        )
        torch._dynamo.utils.counters.clear()
        for n in SIZES[:5]:
            X, y = data(n)
            assert_close(step(params, X, y), compute(model_fn, params, X, y, specs, loss_fn=loss_fn), 1e-9)
        assert graphs() == 2


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_symbolic_from_the_first(how: str) -> None:
    model_fn, params = mlp()
    step = torch.compile(
        lambda p, X, y: compute(model_fn, p, X, y, SPECS),
        fullgraph=True,
        backend="eager",
        dynamic=how == "dynamic=True" or None,
    )
    for n in (7, 12, 5, 9):
        X, y = rows(n)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(X, 0)
            torch._dynamo.mark_dynamic(y, 0)
        assert_close(step(params, X, y), compute(model_fn, params, X, y, SPECS), 1e-9)
    assert graphs() == 1


def test_numbers_in_specs_and_options_are_constants() -> None:
    model_fn, params = mlp()
    X, y = rows(6)

    @torch.compile(fullgraph=True, backend="eager")
    def step(params: Any, X: Tensor, y: Tensor, mc: int, chunk: int, index: int, smoothing: float) -> Any:
        loss_fn = partial(F.cross_entropy, label_smoothing=smoothing)
        given = {"chunk_size": chunk, "subsampling": [0, index], "loss_fn": loss_fn}
        return compute(model_fn, params, X, y, (DiagGGN(mc), DiagGGN(), DiagHessian()), **given)

    for mc, chunk, index, smoothing in (
        (1, 1, 1, 0.0),
        (2, 1, 1, 0.0),
        (2, 3, 1, 0.0),
        (2, 3, 4, 0.0),
        (2, 3, 4, 0.1),
        (5, 2, 2, 0.3),
    ):
        _, ggn, hessian = step(params, X, y, mc, chunk, index, smoothing)
        loss_fn = nn.CrossEntropyLoss(label_smoothing=smoothing)
        given = {"subsampling": [0, index], "loss_fn": loss_fn}
        assert_close((ggn, hessian), compute(model_fn, params, X, y, (DiagGGN(), DiagHessian()), **given), 1e-9)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("spec", [*SPECS, curvfunc.KFAC()], ids=lambda s: type(s).__name__)
def test_make_fx(spec: Any, mode: str) -> None:
    model_fn, params = mlp()
    quantity = lambda p, X, y: compute(model_fn, p, X, y, spec)
    graph = make_fx(quantity, tracing_mode=mode)(params, *rows(5))
    data = rows(9 if mode == "symbolic" else 5)
    got = graph(params, *data)
    if not isinstance(spec, curvfunc.KFAC):
        assert_close(got, quantity(params, *data), 1e-9)


@pytest.mark.parametrize("spec", [*SPECS, curvfunc.BatchDot()], ids=lambda s: type(s).__name__)
def test_exported_for_any_number_of_samples(spec: Any, tmp_path: Any) -> None:
    model_fn, params = cnn()
    quantity = lambda p, X, y: compute(model_fn, p, X, y, spec)
    graph = make_fx(quantity, tracing_mode="symbolic")(params, *images(5))
    samples = torch.export.Dim("samples", min=2, max=1024)
    shapes = (dict.fromkeys(params), {0: samples}, {0: samples})
    torch.export.save(torch.export.export(graph, (params, *images(5)), dynamic_shapes=shapes), tmp_path / "quantity.pt2")
    loaded = torch.export.load(tmp_path / "quantity.pt2").module()
    data = images(9)
    assert_close(loaded(params, *data), quantity(params, *data), 1e-10)


class Exported(nn.Module):
    def forward(self, params: Any, X: Tensor, y: Tensor) -> Any:
        return curvfunc.batch_l2(mlp()[0], params, X, y)


class ExportedProduct(nn.Module):
    def forward(self, params: Any, X: Tensor, y: Tensor) -> Any:
        return curvfunc.ggn_vp(mlp()[0], params, X, y, params)


@pytest.mark.parametrize("module", [Exported(), ExportedProduct()])
def test_what_to_do_instead_of_exporting_a_call(module: nn.Module) -> None:
    with pytest.raises(NotImplementedError, match="(?s)Trace the call into operations first.*make_fx"):
        torch.export.export(module, (mlp()[1], *rows(5)), strict=False)


class NoLook(TorchDispatchMode):
    """Fails where a GPU would have to wait for its results, or where shapes depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "aten::equal" and args[0].dtype == torch.uint8:  # states of generators, which are on the CPU
            return func(*args)
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"), name
        assert name != "aten::lift_fresh" or not args[0].ndim, "numbers of Python's are copied"
        assert name not in ("aten::masked_select", "aten::unique_dim", "aten::_unique2"), name
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("make", [mlp, cnn, normalized])
def test_nothing_waits_for_values(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model_fn, params = make()
    X, y = (rows if make is mlp else images)(6)
    want = compute(model_fn, params, X, y, SPECS)
    monkeypatch.setattr("curvfunc.rules.patches.MOMENT_ENTRIES", 0)  # products of overlapping windows, as for large images
    # what is checked on the CPU only
    for place in ("normal_form", "closed_forms", "custom"):
        monkeypatch.setattr(f"curvfunc.losses.{place}.values_visible", lambda *_: False)
    with NoLook():
        got = compute(model_fn, params, X, y, (*SPECS, curvfunc.KFAC()))
    assert_close(got[:-1], want, 1e-10)


class Counted(TorchDispatchMode):
    """How many operations run, each of which is a launch on a GPU."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.name() not in ("aten::view", "aten::detach", "aten::t")
        return func(*args, **kwargs or {})


@pytest.mark.cpu
@pytest.mark.parametrize("spec", [curvfunc.BatchL2(), curvfunc.SumGradSquared(), DiagGGN()])
def test_what_goes_together_on_a_gpu(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that stay in the CPU's cache would be hundreds of launches."""
    convolutions = nn.Conv2d(8, 96, 3), nn.Tanh(), nn.Conv2d(96, 96, 3, padding=1), nn.Tanh()
    wide = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(9600, 3))
    model_fn, params = curvfunc.functionalize(wide)
    data = torch.randn(24, 8, 12, 12), torch.arange(24) % 3
    with Counted() as in_cache:
        want = compute(model_fn, params, *data, spec)
    elsewhere = lambda size, t: room(size, torch.empty(0, device="meta"))
    for place in ("uses.forms", "uses.squares", "uses.second_moments", "losses.roots"):
        monkeypatch.setattr(f"curvfunc.{place}.room", elsewhere)
    monkeypatch.setattr("curvfunc.rules.conv.moment_pays", lambda *given: moment_pays(*given[:5], on_gpu=True))
    monkeypatch.setitem(CHUNK_BYTES, "cpu", CHUNK_BYTES["cuda"])
    with Counted() as counted:
        got = compute(model_fn, params, *data, spec)
    assert_close(got, want, 1e-10)
    assert counted.number < 0.85 * in_cache.number
