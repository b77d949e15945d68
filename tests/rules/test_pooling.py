"""Max pooling by another kernel: the same values, the same gradients, at ties and NaNs too, and only where that is safe."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvfunc
from curvfunc import reference
from curvfunc.rules import pooling

SHAPES = [(3, 4, 9, 11), (2, 1, 8, 8), (1, 17, 7, 7), (2, 3, 1, 9), (4, 33, 12, 5)]
WINDOWS = [(2,), (3, 2), (3, 2, 1), (3, 1, 1, 1, True), (3, 2, 1, 1, True), ((2, 3), (1, 2), (1, 1)), (2, 1, 0, 2), ([2],)]
VALUES = {
    "distinct": lambda x: x,
    "ties": lambda x: x.round(),
    "rectified": lambda x: x.relu(),
    "nan": lambda x: torch.where(x > 1, torch.nan, x),
    "infinite": lambda x: torch.full_like(x, -torch.inf),
}


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Small inputs too; gives the number of inputs so far."""
    calls: list[int] = []
    pays = pooling._pays
    monkeypatch.setattr(pooling, "SMALLEST", 0)
    monkeypatch.setattr(pooling, "_pays", lambda x: pays(x) and not calls.append(1))
    return calls


@pytest.mark.cpu
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(dtype: torch.dtype, window: tuple[object, ...], values: str, always: list[int]) -> None:
    for shape in SHAPES:
        x = VALUES[values](torch.randn(shape)).to(dtype).requires_grad_()
        try:
            want = F.max_pool2d(x, *window)  # type: ignore[arg-type]
        except RuntimeError:  # the window does not fit
            with pytest.raises(RuntimeError):
                pooling.FASTER[F.max_pool2d](x, *window)
            continue
        got = pooling.FASTER[F.max_pool2d](x, *window)
        g = torch.randn_like(want)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert got.is_contiguous()
        assert torch.equal(*(torch.autograd.grad(out, x, g)[0] for out in (got, want)))
    assert len(always) == len(SHAPES)


def net(checkpointed: bool = False) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(12, 3)

        def features(self, x: Tensor) -> Tensor:
            return F.max_pool2d(self.conv(x).relu(), 3, 2, ceil_mode=True)

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.features, x, use_reentrant=False) if checkpointed else self.features(x)
            return self.head(h.flatten(1))

    return Net()


@pytest.mark.cpu
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_quantities_of_nets_with_pooling(checkpointed: bool, always: list[int]) -> None:
    model_fn, params = curvfunc.functionalize(net(checkpointed))
    plain_fn = curvfunc.functionalize(net())[0]
    X, y = torch.randn(5, 2, 7, 7), torch.arange(5) % 3
    for quantity in ("batch_grad", "variance", "diag_ggn", "sqrt_ggn"):
        always.clear()
        got = getattr(curvfunc, quantity)(model_fn, params, X, y)
        assert bool(always) != checkpointed
        assert_close(got, getattr(reference, quantity)(plain_fn, params, X, y), rtol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("quantity", ["kfra", "diag_hessian"])
def test_quantities_that_read_the_graph_keep_the_operation(
    quantity: str, always: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_fn, params = curvfunc.functionalize(net())
    X, y = torch.randn(5, 2, 7, 7), torch.arange(5) % 3
    got = getattr(curvfunc, quantity)(model_fn, params, X, y)
    assert not always
    monkeypatch.setattr(pooling, "FASTER", {})
    assert_close(got, getattr(curvfunc, quantity)(model_fn, params, X, y), rtol=0)


@pytest.mark.usefixtures("float64")
def test_results_can_be_differentiated(always: list[int]) -> None:
    model_fn, params = curvfunc.functionalize(net())
    params = {k: p.requires_grad_() for k, p in params.items()}
    X, y = torch.randn(5, 2, 7, 7), torch.arange(5) % 3

    def gradients(module: object) -> tuple[Tensor, ...]:
        found = module.diag_ggn(model_fn, params, X, y)  # type: ignore[attr-defined]
        return torch.autograd.grad(sum(d.square().sum() for d in found.values()), list(params.values()))

    got = gradients(curvfunc)
    assert always
    assert_close(list(got), list(gradients(reference)), rtol=1e-9)
