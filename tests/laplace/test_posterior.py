"""Laplace approximations: equal to those of dense matrices, whatever the batches; what has no answer is refused."""

import math
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from problems import PROBLEMS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvfunc
from curvfunc import KFLR, KFRA, DiagGGN, compute, kronecker, laplace
from curvfunc.uses import forms

pytestmark = pytest.mark.usefixtures("float64")

SPECS = {"kronecker": KFLR(), "joined": KFLR(joined=True), "diagonal": DiagGGN()}
specs = pytest.mark.parametrize("kind", SPECS)
SUM = partial(F.cross_entropy, reduction="sum")


def network(*layers: nn.Module) -> tuple[Any, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(layers or (nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))))
    model_fn, params = curvfunc.functionalize(model.double())
    return model_fn, params, torch.randn(11, 4), torch.randint(3, (11,))


def batches(X: Tensor, y: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(X, y), batch_size=4)


def dense(kind: str, model_fn: Any, params: Any, X: Tensor, y: Tensor, loss_fn: Any = SUM) -> dict[tuple[str, ...], Tensor]:
    """K of the sum, written out."""
    if kind == "diagonal":
        return {(n,): d.flatten().diag() for n, d in curvfunc.diag_ggn(model_fn, params, X, y, loss_fn=loss_fn).items()}
    factors = curvfunc.kflr(model_fn, params, X, y, loss_fn=loss_fn, joined=kind == "joined")
    return kronecker.dense(kronecker.decompose(factors, kronecker.structure(model_fn, params, X)))


@specs
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, SUM], ids=["mean", "sum"])
def test_evidence_is_that_of_dense_matrices(kind: str, loss_fn: Any) -> None:
    model_fn, params, X, y = network()
    posterior = laplace.fit(model_fn, params, batches(X, y), curvature=SPECS[kind], loss_fn=loss_fn)
    assert posterior.samples == 11
    assert_close(posterior.loss, SUM(model_fn(params, X), y))
    blocks = dense(kind, model_fn, params, X, y)
    assert_close(kronecker.dense(posterior.curvature), blocks)
    theta = torch.cat([p.flatten() for p in params.values()])

    def explicit(delta: Tensor) -> Tensor:
        logdet = sum(torch.logdet(K + delta * torch.eye(len(K))) for K in blocks.values())
        return -posterior.loss - (delta * theta.square().sum() - len(theta) * delta.log() + logdet) / 2

    for value in (0.1, 3.0):
        delta = torch.tensor(value, requires_grad=True)
        got, want = laplace.log_marginal_likelihood(posterior, delta), explicit(delta)
        assert_close(got, want)
        assert_close(*[torch.autograd.grad(t, delta)[0] for t in (got, want)])
        assert_close(laplace.log_marginal_likelihood(posterior, value), want)


def test_evidence_approximates_the_integral() -> None:
    """For a linear model with squared errors it is exact: the logarithm of N(y; 0, σ² + X Xᵀ / δ), constants aside."""
    model_fn, params = curvfunc.functionalize(nn.Linear(3, 1, bias=False))
    X, y, noise, delta = torch.randn(7, 3), torch.randn(7, 1), 0.3, 0.8
    params = {"weight": torch.linalg.solve(X.mT @ X / noise + delta * torch.eye(3), X.mT @ y / noise).mT}
    given = {"loss_fn": F.mse_loss, "scale": 1 / (2 * noise), "curvature": KFLR()}
    posterior = laplace.fit(model_fn, params, batches(X, y), **given)
    normal = torch.distributions.MultivariateNormal(torch.zeros(7), noise * torch.eye(7) + X @ X.mT / delta)
    constant = 7 / 2 * math.log(2 * math.pi * noise)
    assert_close(laplace.log_marginal_likelihood(posterior, delta) - constant, normal.log_prob(y[:, 0]))


@specs
@pytest.mark.parametrize("name", [n for n in PROBLEMS if "cross-entropy" not in n and "custom" not in n])
def test_covariances_are_those_of_jacobians(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "BLOCK_BYTES", 64)  # several blocks of rows
    model_fn, params, X, y, loss_fn = PROBLEMS[name].make()
    structure = kronecker.structure(model_fn, params, X)
    if kind == "diagonal":
        K = kronecker.of_diagonal(curvfunc.diag_ggn(model_fn, params, X, y, loss_fn=loss_fn), structure)
    else:
        factors = curvfunc.kflr(model_fn, params, X, y, loss_fn=loss_fn, joined=kind == "joined")
        K = kronecker.decompose(factors, structure)
    samples = (
        len(curvfunc.batch_l2(model_fn, params, X, y, loss_fn=loss_fn)[structure.names[0]]) if structure.tree is None else 0
    )
    posterior = laplace.Posterior(params, K, torch.zeros(()), samples)
    J = curvfunc.batch_jac(model_fn, params, X)
    rows = dict(zip(structure.names, structure.flatten("J", J), strict=True))
    shapes = {layout.name: layout.shape for layout in structure.layouts}
    want: Any = 0.0
    for names, block in kronecker.dense(laplace.covariance(posterior, 0.5)).items():
        parts = [rows[n].reshape(len(rows[n]), -1, math.prod(shapes[n])) for n in names]
        flat = torch.cat(parts, 2)
        want = want + flat @ block @ flat.mT
    for chunk_size in (None, 1):
        assert_close(laplace.functional_variance(model_fn, X, posterior, 0.5, chunk_size=chunk_size), want)


def test_no_jacobian_is_formed() -> None:
    model_fn, params, X, y = network(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 3))
    posterior = laplace.fit(model_fn, params, batches(X, y))
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *[t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]])
            return out

    with Sizes():
        laplace.functional_variance(model_fn, X, posterior, 1.0)
    assert 11 * 3 * 50 <= largest <= 50 * 51  # bases and cotangents; Jacobians have 11 * 3 * 50 * 40


@specs
def test_samples(kind: str) -> None:
    model_fn, params, X, y = network(nn.Linear(4, 3))
    posterior = laplace.fit(model_fn, params, batches(X, y), curvature=SPECS[kind])
    draws = laplace.sample(posterior, 20_000, 2.0, generator=torch.Generator().manual_seed(0))
    for names, block in kronecker.dense(laplace.covariance(posterior, 2.0)).items():
        flat = torch.cat([draws[n].flatten(1) - params[n].flatten() for n in names], 1)
        assert_close(flat.mT @ flat / len(flat), block, rtol=0.05)


def test_last_layer_and_given_factors() -> None:
    model_fn, params, X, y = network()
    last = {n: params[n] for n in ("2.weight", "2.bias")}
    some_fn = lambda p, X: model_fn({**params, **p}, X)
    posterior = laplace.fit(some_fn, last, batches(X, y), curvature=DiagGGN())
    D = kronecker.of_diagonal(curvfunc.diag_ggn(some_fn, last, X, y), kronecker.structure(some_fn, last, X))
    given = laplace.fit(some_fn, last, batches(X, y), curvature=D, samples=11)
    assert_close(kronecker.diagonal(given.curvature), kronecker.diagonal(posterior.curvature))
    assert_close(laplace.log_marginal_likelihood(given, 0.7), laplace.log_marginal_likelihood(posterior, 0.7))
    moments = kronecker.decompose(curvfunc.kflr(model_fn, params, X, y), kronecker.structure(model_fn, params, X))
    given = laplace.fit(model_fn, params, batches(X, y), curvature=moments, samples=11)
    assert_close(kronecker.logdet(given.curvature, damping=0.3, split="pi"), kronecker.logdet(
        laplace.fit(model_fn, params, batches(X, y), curvature=KFLR()).curvature, damping=0.3, split="pi"))  # fmt: skip


def test_what_has_no_answer() -> None:
    model_fn, params, X, y = network()
    posterior = laplace.fit(model_fn, params, batches(X, y))
    for wrong in (0.0, -1.0, float("nan"), float("inf"), torch.tensor(-2.0)):
        for ask in (
            lambda p: laplace.log_marginal_likelihood(posterior, p),
            lambda p: laplace.functional_variance(model_fn, X, posterior, p),
            lambda p: laplace.sample(posterior, 2, p),
            lambda p: laplace.covariance(posterior, p),
        ):
            with pytest.raises(ValueError, match="prior_precision must be positive and finite, got"):
                ask(wrong)
    for other in (True, "1", torch.ones(2)):
        with pytest.raises(TypeError, match="prior_precision must be a number or a tensor without axes"):
            laplace.covariance(posterior, other)  # type: ignore[arg-type]
    K = kronecker.decompose(curvfunc.kflr(model_fn, params, X[:7], y[:7]), kronecker.structure(model_fn, params, X))
    fit = partial(laplace.fit, model_fn, params)
    with pytest.raises(ValueError, match="the decomposition is of 7 samples, and the data has 11"):
        fit(batches(X, y), curvature=K, samples=7)
    with pytest.raises(ValueError, match="samples is the number of samples that a decomposition is of"):
        fit(batches(X, y), curvature=K)
    with pytest.raises(ValueError, match="samples is the number of samples that a decomposition is of"):
        fit(batches(X, y), samples=11)
    other_fn, others, *_ = network(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(
        ValueError, match=r"the decomposition has shape \(5, 4\) for parameter '0.weight', and params has \(6, 4\)"
    ):
        laplace.fit(other_fn, others, batches(X, y), curvature=K, samples=11)
    with pytest.raises(ValueError, match="params is of other parameters than the structure"):
        laplace.fit(model_fn, {"0.weight": params["0.weight"]}, batches(X, y), curvature=K, samples=11)
    for spec in (KFRA(), curvfunc.Grad()):
        with pytest.raises(TypeError, match="curvature must be a spec such as"):
            fit(batches(X, y), curvature=spec)
    with pytest.raises(TypeError, match="a list of batches or a DataLoader is needed"):
        fit(iter([(X, y)]))
    with pytest.raises(ValueError, match="FunctionalVariance twice, with data of its own each"):
        twice = laplace.FunctionalVariance(inverse=laplace.covariance(posterior, 1.0))
        compute(model_fn, params, X, y, (twice, twice))


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a short setting: all approximations are better calibrated on turned digits than the plain network."""
    for module in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(module)
    torch.set_default_dtype(torch.float32)
    folder = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["laplace.py", "--epochs", "4", "--test", "60", "--out", str(tmp_path)])
    found = runpy.run_path(str(folder / "laplace.py"), run_name="__main__")
    assert found["ANGLES"]
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
    lines = capsys.readouterr().out.splitlines()
    errors = {line[:24].strip(): float(line.split()[-1]) for line in lines if line.startswith(("plain", "all", "last"))}
    plain = errors.pop("plain network")
    assert len(errors) == 4
    assert all(error < 0.95 * plain for error in errors.values())
