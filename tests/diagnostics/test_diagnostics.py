"""Diagnostics are the formulas of their papers, written as loops over the gradients of samples; also of uneven batches."""

import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

import curvfunc
from curvfunc import BatchGrad, BatchL2, DiagGGN, Grad, SumGradSquared, Variance, accumulate, compute, diagnostics

pytestmark = pytest.mark.usefixtures("float64")

N, C = 13, 3
SPECS = (Grad(), Variance(), BatchGrad(), BatchL2(), SumGradSquared(), DiagGGN())


class Setting(NamedTuple):
    """Results, and the gradients of the samples by plain autograd, one list over all parameters for each sample."""

    grad: Any
    variance: Any
    batch_grad: Any
    norms: Any
    squares: Any
    diagonal: Any
    layers: dict[str, list[Tensor]]
    reduction: str

    @property
    def rows(self) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*self.layers.values(), strict=True)]


@pytest.fixture(params=["one batch", "uneven batches", "a sum", "uneven batches, a sum", "squared error"])
def setting(request: pytest.FixtureRequest) -> Setting:
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))
    model_fn, params = curvfunc.functionalize(module)
    X, y = torch.randn(N, 4), torch.arange(N) % C
    reduction = "sum" if "sum" in request.param else "mean"
    loss_fn: Any = F.cross_entropy
    if "squared" in request.param:  # a mean over entries: a sample's loss is the mean over its own
        loss_fn, y = F.mse_loss, torch.randn(N, C)
    losses = [loss_fn(module(X[n : n + 1]), y[n : n + 1]) for n in range(N)]
    rows = [torch.autograd.grad(loss, list(module.parameters())) for loss in losses]
    layers = {
        "0": [torch.cat([w.flatten(), b]) for w, b, _, _ in rows],
        "2": [torch.cat([w.flatten(), b]) for _, _, w, b in rows],
    }
    given = {"loss_fn": partial(loss_fn, reduction=reduction)}
    if "uneven" in request.param:
        batches = [(X[a:b], y[a:b]) for a, b in ((0, 1), (1, 8), (8, 10), (10, N))]
        results = accumulate(model_fn, params, batches, SPECS, **given)
    else:
        results = compute(model_fn, params, X, y, SPECS, **given)
    return Setting(*results, layers, reduction)


def mean(rows: list[Tensor]) -> Tensor:
    return sum(rows[1:], rows[0]) / len(rows)


def variance(rows: list[Tensor]) -> Tensor:
    m = mean(rows)
    return sum((row - m) ** 2 for row in rows) / (len(rows) - 1)


def test_signal_to_noise(setting: Setting) -> None:
    got = diagnostics.signal_to_noise(setting.grad, setting.variance, N, reduction=setting.reduction)
    want = {layer: mean(rows).square().sum() / variance(rows).sum() for layer, rows in setting.layers.items()}
    assert_close(got, want)


def test_noise_scale(setting: Setting) -> None:
    """From one batch: the paper's estimates from two sizes, with each sample as a small batch."""
    got = diagnostics.noise_scale(setting.grad, setting.variance, N, reduction=setting.reduction)
    small = mean([row.square().sum() for row in setting.rows])
    big = mean(setting.rows).square().sum()
    signal = (N * big - 1 * small) / (N - 1)
    noise = (small - big) / (1 / 1 - 1 / N)
    assert_close(tuple(got), (noise / signal, noise, signal))
    assert_close(got.noise, variance(setting.rows).sum())


def test_noise_scale_of_two_batches(setting: Setting) -> None:
    small = 4
    few = [sum(rows[1:small], rows[0]) / (1 if setting.reduction == "sum" else small) for rows in setting.layers.values()]
    params = {"0": few[0], "2": few[1]}
    all_of = {"0": joined(setting.grad, "0"), "2": joined(setting.grad, "2")}
    got = diagnostics.noise_scale_of_two(params, small, all_of, N, reduction=setting.reduction)
    b, B = (mean(rows).square().sum() for rows in (setting.rows[:small], setting.rows))
    signal, noise = (N * B - small * b) / (N - small), (b - B) / (1 / small - 1 / N)
    assert_close(tuple(got), (noise / signal, noise, signal))


def joined(tree: Any, layer: str) -> Tensor:
    return torch.cat([tree[f"{layer}.weight"].flatten(), tree[f"{layer}.bias"]])


@pytest.mark.parametrize("population", [None, 40, N])
def test_norm_test(setting: Setting, population: int | None) -> None:
    theta = 0.7
    got = diagnostics.norm_test(
        setting.grad, setting.variance, N, theta=theta, population=population, reduction=setting.reduction
    )
    left = variance(setting.rows).abs().sum() / N * (1 if population is None else (population - N) / (population - 1))
    right = theta**2 * mean(setting.rows).square().sum()
    assert_close(got.ratio, left / right)
    assert bool(got.passed) == bool(left <= right)
    n = got.samples
    at = variance(setting.rows).sum() / n * (1 if population is None else (population - n) / (population - 1))
    assert_close(at, right)  # both sides are the same there


def test_inner_products(setting: Setting) -> None:
    got = diagnostics.inner_products(setting.batch_grad, setting.grad)
    R = 1 if setting.reduction == "sum" else 1 / N
    total = R * sum(setting.rows[1:], setting.rows[0])
    assert_close(got, torch.stack([R * row @ total for row in setting.rows]))


def test_inner_product_test(setting: Setting) -> None:
    theta, m = 0.9, mean(setting.rows)
    dots = diagnostics.inner_products(setting.batch_grad, setting.grad)
    got = diagnostics.inner_product_test(setting.grad, dots, theta=theta, reduction=setting.reduction)
    left = sum((row @ m - m @ m) ** 2 for row in setting.rows) / (N - 1) / N
    right = theta**2 * (m @ m) ** 2
    assert_close(got.ratio, left / right)
    assert_close(got.samples, N * left / right)
    assert bool(got.passed) == bool(left <= right)


def test_inner_products_from_a_gram_matrix() -> None:
    model_fn, params = curvfunc.functionalize(nn.Linear(4, C))
    X, y = torch.randn(N, 4), torch.arange(N) % C
    grad, per_sample = compute(model_fn, params, X, y, (Grad(), BatchGrad()))
    assert_close(
        curvfunc.batch_dot_total(model_fn, params, X, y).sum(1),
        diagnostics.inner_products(per_sample, grad),
    )


def test_orthogonality_test(setting: Setting) -> None:
    nu, m = 2.0, mean(setting.rows)
    dots = diagnostics.inner_products(setting.batch_grad, setting.grad)
    got = diagnostics.orthogonality_test(setting.grad, setting.variance, dots, nu=nu, reduction=setting.reduction)
    left = sum((row - (row @ m) / (m @ m) * m).square().sum() for row in setting.rows) / (N - 1) / N
    right = nu**2 * m @ m
    assert_close(got.ratio, left / right)
    assert_close(got.samples, N * left / right)


def test_early_stopping(setting: Setting) -> None:
    got = diagnostics.early_stopping(setting.grad, setting.variance, N, reduction=setting.reduction)
    m, s = mean(setting.rows), variance(setting.rows)
    want = 1 - N / len(m) * sum(m[k] ** 2 / s[k] for k in range(len(m)))
    assert_close(got, want)


def test_early_stopping_without_noise() -> None:
    grad, variances = {"w": torch.tensor([1.0, 0.0, 2.0])}, {"w": torch.tensor([0.5, 0.0, 0.5])}
    two = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, 0.5])}
    assert_close(diagnostics.early_stopping(grad, variances, 5), diagnostics.early_stopping(*two, 5))
    assert diagnostics.early_stopping({"w": torch.ones(2)}, {"w": torch.zeros(2)}, 5) == -torch.inf
    assert diagnostics.early_stopping({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, 5).isnan()


def test_early_stopping_at_the_minimum_of_noise() -> None:
    """Where the true gradient is zero, the expected evidence is that of noise: about 0."""
    rows = torch.randn(2000, 200, 7)  # batches, samples, entries
    found = []
    for batch in rows:
        grad, spread = {"w": batch.mean(0)}, {"w": batch.var(0, correction=0) / 200**2}
        found.append(diagnostics.early_stopping(grad, spread, 200))
    assert abs(float(torch.stack(found).mean())) < 5 * (2 / 7 / 2000) ** 0.5 + 0.02


@pytest.mark.parametrize("of", ["squares", "norms"])
def test_trace_ratio(setting: Setting, of: str) -> None:
    got = diagnostics.trace_ratio(getattr(setting, of), setting.diagonal, N, reduction=setting.reduction)
    curvature = sum(d.sum() for d in setting.diagonal.values()) / (N if setting.reduction == "sum" else 1)
    assert_close(got, mean([row.square().sum() for row in setting.rows]) / curvature)


def test_effective_dimension() -> None:
    values = torch.rand(20)
    want = sum(v / (v + 0.3) for v in values)
    assert_close(diagnostics.effective_dimension(values, 0.3), want)
    assert_close(diagnostics.effective_dimension({"a": values[:12].reshape(3, 4), "b": values[12:]}, 0.3), want)
    A = torch.randn(6, 6)
    A = A @ A.mT
    trace = torch.linalg.solve(A + 0.3 * torch.eye(6), A).trace()
    assert_close(diagnostics.effective_dimension(torch.linalg.eigvalsh(A), 0.3), trace)
    assert diagnostics.effective_dimension(torch.tensor([-1e-17, 1.0]), 1.0) == 0.5
    with pytest.raises(ValueError, match="smallest eigenvalue is -0.5"):
        diagnostics.effective_dimension(torch.tensor([-0.5, 1.0]), 1.0)
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="damping must be positive"):
            diagnostics.effective_dimension(values, damping)


def test_alignment() -> None:
    pytest.importorskip("scipy")
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)))
    X, y = torch.randn(N, 4), torch.arange(N) % C
    operator = curvfunc.hessian_operator(model_fn, params, X, y)
    grad = compute(model_fn, params, X, y, Grad())
    values, vectors = torch.linalg.eigh(operator.dense())
    flat = torch.cat([g.flatten() for g in grad.values()])
    _, top = curvfunc.eigsh(operator, 3, which="LA", tol=1e-12)
    want = torch.stack([(flat @ vectors[:, k]) ** 2 / (flat @ flat) for k in range(-3, 0)])
    assert_close(diagnostics.alignment(grad, top), want, rtol=1e-6)
    assert_close(diagnostics.alignment(grad, vectors).sum(), torch.ones(()))
    assert len(values) == len(flat)
    with pytest.raises(ValueError, match="eigenvectors must be"):
        diagnostics.alignment(grad, top.mT)


# -- what has no answer


def test_wrong_arguments() -> None:
    grad, spread = {"w": torch.ones(2), "b": torch.ones(1)}, {"w": torch.ones(2), "b": torch.ones(1)}
    for samples, error in ((1, ValueError), (0, ValueError), (2.0, TypeError), (True, TypeError)):
        for function in (diagnostics.signal_to_noise, diagnostics.noise_scale, diagnostics.early_stopping):
            with pytest.raises(error, match="samples must be"):
                function(grad, spread, samples)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'"):
        diagnostics.noise_scale(grad, spread, 3, reduction="none")
    with pytest.raises(ValueError, match="both need the same parameters"):
        diagnostics.noise_scale(grad, {"w": torch.ones(2)}, 3)
    with pytest.raises(ValueError, match="variance has shape"):
        diagnostics.noise_scale(grad, {"w": torch.ones(3), "b": torch.ones(1)}, 3)
    with pytest.raises(ValueError, match="theta must be positive"):
        diagnostics.norm_test(grad, spread, 3, theta=0)
    with pytest.raises(ValueError, match="population must be at least 3"):
        diagnostics.norm_test(grad, spread, 3, theta=1, population=2)
    with pytest.raises(ValueError, match="nu must be positive"):
        diagnostics.orthogonality_test(grad, spread, torch.ones(3), nu=-1)
    with pytest.raises(ValueError, match="one inner product for each"):
        diagnostics.inner_product_test(grad, torch.ones(3, 3), theta=1)
    with pytest.raises(ValueError, match="big_samples must be at least 5"):
        diagnostics.noise_scale_of_two(grad, 4, grad, 4)
    with pytest.raises(ValueError, match=r"batch_grad needs \[N"):
        diagnostics.inner_products(grad, grad)
    with pytest.raises(ValueError, match="diagonal has"):
        diagnostics.trace_ratio(grad, {"w": torch.ones(2)}, 3)


# -- the example


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("matplotlib", "sklearn", "scipy", "tqdm"):
        pytest.importorskip(module)
    torch.set_default_dtype(torch.float32)
    folder = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(folder))
    options = ["--iterations", "4", "--batch-size", "32", "--every", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["diagnostics.py", *options])
    runpy.run_path(str(folder / "diagnostics.py"), run_name="__main__")
    assert (tmp_path / "diagnostics.png").stat().st_size > 10_000
    assert "noise scale" in capsys.readouterr().out
