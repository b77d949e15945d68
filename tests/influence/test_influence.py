"""Scores are g B⁻¹ g with explicit gradients and matrices, on every kind of layer and every path; what does not fit is refused."""

import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from problems import PROBLEMS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvfunc
from curvfunc import accumulate, compute, influence, kronecker
from curvfunc.uses import forms

pytestmark = pytest.mark.usefixtures("float64")

CURVATURES = ["kronecker", "joined", "ekfac", "diagonal"]
curvatures = pytest.mark.parametrize("kind", CURVATURES)
SUM = partial(F.cross_entropy, reduction="sum")


def inverse_of(kind: str, model_fn: Any, params: Any, X: Any, y: Any, loss_fn: Any) -> kronecker.Decomposition:
    structure = kronecker.structure(model_fn, params, X)
    given = {"loss_fn": loss_fn, "mc_samples": 3, "generator": torch.Generator().manual_seed(0)}
    if kind == "diagonal":
        return kronecker.inverse(
            kronecker.of_diagonal(curvfunc.diag_ggn(model_fn, params, X, y, **given), structure), damping=0.1
        )
    K = kronecker.decompose(curvfunc.kfac(model_fn, params, X, y, joined=kind != "kronecker", **given), structure)
    if kind == "ekfac":
        K = kronecker.correct(K, kronecker.ekfac(model_fn, params, X, y, K, loss_fn=loss_fn, empirical=True))
    return kronecker.inverse(K, damping=0.1)


def explicit(inverse: kronecker.Decomposition, left: Any, right: Any) -> Tensor:
    """left B⁻¹ rightᵀ with dense blocks: [N, M]."""
    structure, total = inverse.structure, torch.zeros(())
    rows, columns = [dict(zip(structure.names, structure.flatten("gradients", t), strict=True)) for t in (left, right)]
    for names, block in kronecker.dense(inverse).items():
        flat = [torch.cat([t[n].flatten(1) if t[n].ndim > 1 else t[n][:, None] for n in names], 1) for t in (rows, columns)]
        total = total + flat[0] @ block @ flat[1].mT
    return total


def one_by_one(model_fn: Any, params: Any, X: Tensor, y: Tensor, loss_fn: Any) -> dict[str, Tensor]:
    """The gradient of each sample, by plain autograd."""
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    losses = [loss_fn(model_fn(leaves, X[n : n + 1]), y[n : n + 1]) for n in range(len(X))]
    rows = [torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for loss in losses]
    return {name: torch.stack(g) for name, g in zip(leaves, zip(*rows, strict=True), strict=True)}


def small(problem: str) -> bool:
    return "cross-entropy" not in problem and "custom" not in problem


@pytest.mark.parametrize("kind", ["joined", "diagonal"])
@pytest.mark.parametrize("name", [n for n in PROBLEMS if small(n)])
def test_scores_are_those_of_explicit_gradients(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "BLOCK_BYTES", 64)  # several blocks of rows
    model_fn, params, X, y, loss_fn = PROBLEMS[name].make()
    inverse = inverse_of(kind, model_fn, params, X, y, loss_fn)
    g = curvfunc.batch_grad(model_fn, params, X, y, loss_fn=loss_fn)
    want = explicit(inverse, g, g)
    given = {"loss_fn": loss_fn}
    assert_close(influence.self_influence(model_fn, params, X, y, inverse, **given), want.diagonal())
    query = influence.queries(model_fn, params, X, y, inverse, **given)
    assert_close(influence.influence(model_fn, params, X, y, inverse, query, **given), want)


@curvatures
def test_against_gradients_one_by_one(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))
    model_fn, params = curvfunc.functionalize(model)
    X, y = torch.randn(7, 1, 3, 3), torch.randint(3, (7,))
    inverse = inverse_of(kind, model_fn, params, X, y, SUM)
    g = one_by_one(model_fn, params, X, y, SUM)
    query = influence.queries(model_fn, params, X[:2], y[:2], inverse, loss_fn=SUM)
    got = influence.influence(model_fn, params, X, y, inverse, query, loss_fn=SUM)
    assert_close(got, explicit(inverse, g, {n: t[:2] for n, t in g.items()}), rtol=1e-8)
    assert_close(influence.self_influence(model_fn, params, X, y, inverse, loss_fn=SUM)[:2], got[:2].diagonal(), rtol=1e-8)
    some = influence.self_influence(model_fn, params, X, y, inverse, loss_fn=SUM, subsampling=[4, 4, 1])
    assert_close(some, explicit(inverse, g, g).diagonal()[[4, 4, 1]], rtol=1e-8)


def mlp() -> tuple[Any, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model_fn, params = curvfunc.functionalize(nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3)))
    return model_fn, params, torch.randn(40, 30), torch.randint(3, (40,))


@curvatures
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, SUM], ids=["mean", "sum"])
def test_over_a_data_set(kind: str, loss_fn: Any) -> None:
    model_fn, params, X, y = mlp()
    inverse = inverse_of(kind, model_fn, params, X, y, loss_fn)
    query = influence.queries(model_fn, params, X[:5], y[:5], inverse, loss_fn=loss_fn)
    specs = influence.SelfInfluence(inverse=inverse), influence.Influence(inverse=inverse, queries=query)
    got = accumulate(model_fn, params, DataLoader(TensorDataset(X, y), batch_size=16), specs, loss_fn=loss_fn)
    assert_close(got, compute(model_fn, params, X, y, specs, loss_fn=loss_fn))
    assert_close(sum(got[0].values()), influence.self_influence(model_fn, params, X, y, inverse, loss_fn=loss_fn))


def test_no_gradient_is_formed() -> None:
    """Of layers whose parameters are used at one position."""
    model_fn, params, X, y = mlp()
    for kind in CURVATURES:
        inverse = inverse_of(kind, model_fn, params, X, y, F.cross_entropy)
        found: list[torch.Size] = []

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                found.extend(t.shape for t in optree.tree_leaves(out) if isinstance(t, Tensor))  # noqa: B023
                return out

        with Sizes():
            influence.self_influence(model_fn, params, X, y, inverse)
        assert found
        assert max(s.numel() for s in found) <= 40 * 31  # gradients would have 40 * 20 * 30


def test_under_vmap_and_compiled() -> None:
    model_fn, params, X, y = mlp()
    inverse = inverse_of("joined", model_fn, params, X, y, F.cross_entropy)
    query = influence.queries(model_fn, params, X[:2], y[:2], inverse)

    def scores(params: Any) -> tuple[Tensor, Tensor]:
        return (
            influence.self_influence(model_fn, params, X, y, inverse),
            influence.influence(model_fn, params, X, y, inverse, query),
        )

    assert_close(torch.compile(scores, fullgraph=True, backend="aot_eager")(params), scores(params))
    both = {n: torch.stack([p, 2 * p]) for n, p in params.items()}
    want = [scores({n: p[i] for n, p in both.items()}) for i in range(2)]
    got = torch.func.vmap(scores)(both)
    assert_close(got, tuple([torch.stack(pair) for pair in zip(*want, strict=True)]))


def test_what_does_not_fit() -> None:
    model_fn, params, X, y = mlp()
    inverse = inverse_of("joined", model_fn, params, X, y, F.cross_entropy)
    given = model_fn, params, X, y
    fewer = {n: params[n] for n in ("0.weight", "0.bias")}
    with pytest.raises(ValueError, match=r"the decomposition is of the parameters .*, and params has \['0.weight', '0.bias'\]"):
        influence.self_influence(lambda p, X: model_fn({**params, **p}, X), fewer, X, y, inverse)
    other_fn, others = curvfunc.functionalize(nn.Sequential(nn.Linear(30, 21), nn.Tanh(), nn.Linear(21, 3)))
    with pytest.raises(ValueError, match=r"the factors are of shape \(20, 30\) for parameter '0.weight', which has \(21, 30\)"):
        influence.self_influence(other_fn, others, X, y, inverse)
    structure = kronecker.structure(model_fn, params, X)
    singular = kronecker.of_diagonal({n: torch.zeros_like(p) for n, p in params.items()}, structure)
    with pytest.raises(ValueError, match="inverse has eigenvalues that are not positive for parameter '0.weight'"):
        influence.self_influence(*given, singular)
    with pytest.raises(TypeError, match="a decomposition is needed, from .*; got dict"):
        influence.self_influence(*given, params)  # type: ignore[arg-type]
    query = influence.queries(model_fn, params, X[:2], y[:2], inverse)
    with pytest.raises(ValueError, match="queries do not fit the inverse"):
        influence.influence(*given, inverse_of("kronecker", *given, F.cross_entropy), query)
    with pytest.raises(ValueError, match=r"Queries of several batches .* Pass all of them to influence.queries"):
        accumulate(model_fn, params, [(X, y)], influence.Queries(inverse=inverse))
    with pytest.raises(ValueError, match="need samples and outputs"):
        influence.self_influence(model_fn, params, X[:0], y[:0], inverse, loss_fn=SUM)


def test_the_example_finds_wrong_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(module)
    torch.set_default_dtype(torch.float32)
    folder = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["influence.py", "--epochs", "3", "--out", str(tmp_path)])
    runpy.run_path(str(folder / "influence.py"), run_name="__main__")
    assert (tmp_path / "influence.png").stat().st_size > 10_000
    share = capsys.readouterr().out.partition("(")[2].partition("%")[0]
    assert int(share) >= 80
