"""Linear maps of vectors are contracted by themselves: with the same results as the general forms, and memory of their own."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import curvfunc
from curvfunc import (
    KFAC,
    KFLR,
    BatchDiagGGN,
    BatchGrad,
    BatchJac,
    BatchL2,
    DiagGGN,
    EmpiricalKFAC,
    Grad,
    SqrtGGN,
    SumGradSquared,
    Variance,
    losses,
)
from curvfunc.uses import vectors

pytestmark = pytest.mark.usefixtures("float64")

N, D, C = 5, 4, 3


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(self.inner(x).tanh()).tanh())


class SharedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).tanh()).tanh())


class BehindAnImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(1, 2, 2), nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x.unsqueeze(1)).tanh().flatten(1))


class Flipped(nn.Module):
    """Samples on the last axis, in between."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(D, D)), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.weight @ x.T).tanh().T)


def frozen_bias() -> nn.Module:
    net = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C))
    net[0].bias.requires_grad_(False)
    return net


def plain() -> tuple[Any, dict[str, Tensor]]:
    weights = {"w": torch.randn(D, 6), "b": torch.randn(6), "v": torch.randn(6, C), "s": torch.randn(6)}
    return lambda p, X: (X @ p["w"] + p["b"]).tanh() @ p["v"] + ((X @ p["w"]) @ p["s"])[:, None], weights


def strided() -> tuple[Any, dict[str, Tensor]]:
    weights = {"w": torch.randn(D, 6), "v": torch.randn(6, C)}
    return lambda p, X: ((X.T.contiguous().T @ p["w"]).T.contiguous().T).tanh() @ p["v"], weights


MODELS: dict[str, Any] = {
    "mlp": lambda: nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, C)),
    "no bias": lambda: nn.Sequential(nn.Linear(D, 6, bias=False), nn.Tanh(), nn.Linear(6, C, bias=False)),
    "one layer": lambda: nn.Linear(D, C),
    "one output": lambda: nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 1)),
    "frozen bias": frozen_bias,
    "tied": Tied,
    "shared bias": SharedBias,
    "behind an image": BehindAnImage,
    "samples last": Flipped,
    "products": plain,
    "strided": strided,
}
SPECS: dict[str, Any] = {
    "first order": (Grad(), BatchGrad(), BatchL2(), SumGradSquared(), Variance()),
    "gradients": (BatchGrad(), Grad()),
    "norms": BatchL2(),
    "variance": Variance(),
    "GGN": (Grad(), DiagGGN(), BatchDiagGGN(), BatchGrad()),
    "drawn": (DiagGGN(1), BatchDiagGGN(3), SqrtGGN(1), SqrtGGN(3), KFAC(1), KFAC(3)),
    "root": (SqrtGGN(), BatchJac()),
    "factors": (KFLR(), KFLR("expand"), EmpiricalKFAC("reduce"), KFAC(2, joined=True)),
}


def problem(name: str) -> tuple[Any, Any, Tensor, Tensor, Any]:
    made = MODELS[name]()
    model_fn, params = made if isinstance(made, tuple) else curvfunc.functionalize(made)
    X = torch.randn(N, D)
    if name == "one output":
        return model_fn, params, X, torch.randn(N, 1), F.mse_loss
    return model_fn, params, X, torch.arange(N) % C, F.cross_entropy


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The contractions that were made by themselves."""
    found: list[str] = []
    contract = vectors.contract
    monkeypatch.setattr(vectors, "contract", lambda name, *args: (found.append(name), contract(name, *args))[1])
    return found


@pytest.mark.parametrize("specs", SPECS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("subsampling", [None, [3, 0, 3]])
def test_the_same_as_by_the_general_forms(
    name: str, specs: str, subsampling: list[int] | None, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_fn, params, X, y, loss_fn = problem(name)

    def found() -> Any:
        torch.manual_seed(1)
        return curvfunc.compute(model_fn, params, X, y, SPECS[specs], loss_fn=loss_fn, subsampling=subsampling)

    got = found()
    assert taken
    monkeypatch.setattr(vectors, "fits", lambda *_: False)
    taken.clear()
    want = found()
    assert not taken
    assert_close(got, want, 1e-12)
    tensors = [t for t in torch.utils._pytree.tree_leaves(got) if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]
    for t, own in zip(tensors, before, strict=True):  # whoever changes one changes no other
        assert torch.equal(t, own)
        t.zero_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_takes_the_general_forms(dtype: torch.dtype, taken: list[str]) -> None:
    net = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)).to(dtype)
    model_fn, params = curvfunc.functionalize(net)
    X, y = torch.randn(N, D, dtype=dtype), torch.arange(N) % C
    norms = curvfunc.batch_l2(model_fn, params, X, y)
    assert bool(taken) == (dtype is torch.float32)
    assert {t.dtype for t in norms.values()} == {torch.float32}


def test_autocast_takes_the_general_forms(taken: list[str]) -> None:
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)).float())
    X, y = torch.randn(N, D, dtype=torch.float32), torch.arange(N) % C
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = curvfunc.sum_grad_squared(model_fn, params, X, y)
    assert not taken
    assert {t.dtype for t in got.values()} == {torch.float32}


def test_a_rule_of_ones_own_is_looked_at(taken: list[str]) -> None:
    """What it gives as vectors is not taken: nobody compares it with the inputs."""
    from curvfunc import Outer, operation, rule

    @operation
    def scaled(x: Tensor, w: Tensor) -> Tensor:
        return 2 * (x @ w.T)

    @rule(scaled, parameters="w", samples_first=True)
    def _(x: Tensor, w: Tensor) -> Any:
        inputs, cotangent = lambda: 2 * x[:, None, None], lambda g: g[:, :, None, None]
        return {"w": Outer(inputs, cotangent, w.shape, vectors=x)}

    X, y, params = torch.randn(N, D), torch.arange(N) % C, {"w": torch.randn(C, D)}
    got = curvfunc.sum_grad_squared(lambda p, x: scaled(x, p["w"]), params, X, y)
    assert not taken
    assert_close(got, curvfunc.reference.sum_grad_squared(lambda p, x: 2 * (x @ p["w"].T), params, X, y), 1e-12)


def test_a_large_block_of_a_bias_does_not_go_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvfunc.engine import contractions, passes

    monkeypatch.setattr(contractions, "LARGE_BLOCK", C)
    monkeypatch.setattr(passes, "LARGE_BLOCK", C)
    model_fn, params, X, y, _ = problem("one layer")
    with pytest.warns(UserWarning, match="'bias' of shape"):
        curvfunc.kflr(model_fn, params, X, y)


LAST: dict[str, tuple[Any, Any]] = {
    "cross-entropy": (F.cross_entropy, lambda: torch.arange(N) % C),
    "ignored": (F.cross_entropy, lambda: torch.tensor([0, -100, 2, 1, -100])),
    "weights": (
        partial(F.cross_entropy, weight=torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)),
        lambda: torch.arange(N) % C,
    ),
    "smoothed sum": (partial(F.cross_entropy, label_smoothing=0.2, reduction="sum"), lambda: torch.arange(N) % C),
    "probabilities": (F.cross_entropy, lambda: torch.rand(N, C).softmax(1)),
    "squared error": (F.mse_loss, lambda: torch.randn(N, C)),
    "bits": (F.binary_cross_entropy_with_logits, lambda: torch.rand(N, C)),
}


@pytest.mark.parametrize("subsampling", [None, [4, 0]])
@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", LAST)
def test_a_last_layer_takes_no_columns(
    name: str, chunk_size: int | None, subsampling: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Σ_v S[v]² of the outputs is all that the diagonal of the GGN needs of them."""
    loss_fn, targets = LAST[name]
    net = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C))
    net[0].requires_grad_(False)
    model_fn, params = curvfunc.functionalize(net)
    X, y = torch.randn(N, D), targets()
    made: list[int] = []
    root = losses.exact_root

    def spy(*args: Any, **kwargs: Any) -> losses.Root:
        found = root(*args, **kwargs)
        return replace(found, columns=lambda a, b: (made.append(1), found.columns(a, b))[1])

    monkeypatch.setattr(losses, "exact_root", spy)
    given: dict[str, Any] = {"loss_fn": loss_fn, "subsampling": subsampling}
    specs = (DiagGGN(), BatchDiagGGN())
    got = curvfunc.compute(model_fn, params, X, y, specs, chunk_size=chunk_size, **given)
    assert not made
    of = curvfunc.reference
    assert_close(got, tuple(f(model_fn, params, X, y, **given) for f in (of.diag_ggn, of.batch_diag_ggn)), 1e-10)
    with_columns = curvfunc.compute(model_fn, params, X, y, (*specs, SqrtGGN()), chunk_size=chunk_size, **given)
    assert made
    assert_close(got, with_columns[:2], 1e-10)


def test_a_last_layer_under_transformations() -> None:
    model_fn, params, X, y, _ = problem("one layer")
    trace = lambda p: sum(d.sum() for d in curvfunc.diag_ggn(model_fn, p, X, y).values())
    plain = lambda p: sum(d.sum() for d in curvfunc.reference.diag_ggn(model_fn, p, X, y).values())
    assert_close(torch.func.grad(trace)(params), torch.func.grad(plain)(params), 1e-9)
    several = {k: torch.stack([p, 1.1 * p]) for k, p in params.items()}
    want = [trace({k: p[i] for k, p in several.items()}) for i in range(2)]
    assert_close({"": torch.vmap(trace)(several)}, {"": torch.stack(want)}, 1e-10)


@pytest.mark.parametrize("rows", [1, 3])
def test_one_gradient_is_squared_where_it_is_formed(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(2, 7, 3), nn.Tanh(), nn.Conv2d(7, 4, 2), nn.Flatten(), nn.Linear(36, C))
    model_fn, params = curvfunc.functionalize(net)
    X, y = torch.randn(1, 2, 6, 6), torch.tensor([1])
    monkeypatch.setattr("curvfunc.uses.squares._rows", lambda b: rows)
    specs = (SumGradSquared(), DiagGGN(1), Grad())
    got = curvfunc.compute(model_fn, params, X, y, specs, generator=torch.Generator().manual_seed(1))
    gradient = curvfunc.batch_grad(model_fn, params, X, y)
    assert_close(got[0], {k: g[0].square() for k, g in gradient.items()}, 1e-12)
    column = curvfunc.sqrt_ggn(model_fn, params, X, y, mc_samples=1, generator=torch.Generator().manual_seed(1))
    assert_close(got[1], {k: s[0, 0].square() for k, s in column.items()}, 1e-12)
