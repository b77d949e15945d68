"""Projections of per-sample gradients: the same matrices for all batches and forms of use, and inner products that are unbiased."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from problems import PROBLEMS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvfunc
from curvfunc import BatchGrad, accumulate, compute, influence
from curvfunc.influence import BatchProjection
from curvfunc.uses.projections import Sketch

pytestmark = pytest.mark.usefixtures("float64")


def matrices(spec: BatchProjection, name: str, p: Tensor) -> tuple[Tensor, Tensor]:
    """P and Q, written out."""
    sketch: Sketch = spec.operands([name])["projected"][0]
    shape = (p.numel(), 1) if p.ndim < 2 else (len(p), p[0].numel())
    found = [sketch.matrix(side, r, n, p) for side, r, n in zip((0, 1), sketch.sizes(p.shape), shape, strict=True)]
    P, Q = [torch.eye(n) if M is None else M for M, n in zip(found, shape, strict=True)]
    return P, Q


def explicit(spec: BatchProjection, g: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, p in params.items():
        P, Q = matrices(spec, name, p)
        found[name] = (P @ g[name].reshape(len(g[name]), len(P.mT), len(Q.mT)) @ Q.mT).flatten(1)
    return found


@pytest.mark.parametrize("name", [n for n in PROBLEMS if "cross-entropy" not in n])
def test_projections_of_explicit_gradients(name: str) -> None:
    model_fn, params, X, y, loss_fn = PROBLEMS[name].make()
    if not isinstance(params, dict) or not all(isinstance(p, Tensor) for p in params.values()):
        pytest.skip("parameters are no flat dictionary")
    spec = BatchProjection((1, 3), torch.Generator().manual_seed(1))
    got, g = compute(model_fn, params, X, y, (spec, BatchGrad()), loss_fn=loss_fn)
    assert_close(got, explicit(spec, g, params))


def test_matrices_are_unbiased() -> None:
    like, total, num = torch.zeros(()), [torch.zeros(5, 5), torch.zeros(7, 7), torch.zeros(7, 5)], 4000
    for seed in range(num):
        sketch = Sketch((3, 2), seed, 11)
        P, Q = sketch.matrix(0, 3, 5, like), sketch.matrix(1, 2, 7, like)
        assert P is not None
        assert Q is not None
        assert_close(P.abs(), torch.full((3, 5), 3**-0.5))
        total = [t + s for t, s in zip(total, (P.mT @ P, Q.mT @ Q, Q[:1].mT @ P[:1]), strict=True)]
    for mean, want in zip(total, (torch.eye(5), torch.eye(7), torch.zeros(7, 5)), strict=True):
        assert (mean / num - want).abs().max() < 5 * num**-0.5


def test_inner_products_are_unbiased() -> None:
    torch.manual_seed(0)
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    X, y = torch.randn(4, 6), torch.arange(4) % 3
    want = curvfunc.batch_dot_total(model_fn, params, X, y)
    draws, generator = [], torch.Generator().manual_seed(0)
    for _ in range(1500):
        flat = torch.cat(list(influence.batch_projection(model_fn, params, X, y, 2, generator=generator).values()), 1)
        draws.append(flat @ flat.mT)
    found = torch.stack(draws)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - want).abs() <= 4 * error).all()
    assert (error < want.diagonal().mean()).all()


def test_over_a_data_set(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    X, y = torch.randn(11, 6), torch.arange(11) % 3
    spec = BatchProjection(2, torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(X, y), batch_size=4)
    want = compute(model_fn, params, X, y, spec)
    assert {n: t.shape[1] for n, t in want.items()} == {"0.weight": 4, "0.bias": 4, "2.weight": 4, "2.bias": 3}
    assert_close(accumulate(model_fn, params, data, spec), want)
    assert_close(accumulate(model_fn, params, data, BatchProjection(2, seed=spec.seed), out=tmp_path), want)
    sums = partial(F.cross_entropy, reduction="sum")
    part = compute(model_fn, params, X[4:8], y[4:8], spec, loss_fn=sums)
    assert_close(part, {n: t[4:8] for n, t in compute(model_fn, params, X, y, spec, loss_fn=sums).items()})


def test_under_vmap_and_compiled(compile_backend: str) -> None:
    torch.manual_seed(0)
    model_fn, params = curvfunc.functionalize(nn.Linear(6, 5))
    X, y = torch.randn(4, 6), torch.arange(4)
    spec = BatchProjection(2, seed=2**62 + 3)
    project = lambda params: compute(model_fn, params, X, y, spec)
    assert_close(torch.compile(project, fullgraph=True, backend=compile_backend)(params), project(params))
    both = {n: torch.stack([p, 2 * p]) for n, p in params.items()}
    want = [project({n: p[i] for n, p in both.items()}) for i in range(2)]
    assert_close(torch.func.vmap(project)(both), {n: torch.stack([w[n] for w in want]) for n in params})


def test_what_does_not_fit() -> None:
    for rank in (0, -1, True, (2, 0), (1, 2, 3), 1.5):
        with pytest.raises(ValueError, match="rank must be a positive int, or a pair of them"):
            BatchProjection(rank)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="generator"):
        BatchProjection(2, generator=3)  # type: ignore[arg-type]
