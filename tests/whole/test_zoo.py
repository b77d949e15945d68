"""Every architecture of the zoo, every kind of quantity, against the reference in float64."""

from functools import cache
from typing import Any

import pytest
import torch
from helpers import assert_close
from zoo import ZOO, Problem

import curvfunc
from curvfunc import KFAC, BatchGrad, BatchL2, DiagGGN, compute, reference

SEED = 7
MC = 2

architectures = pytest.mark.parametrize("name", ZOO)


@cache
def problem(name: str) -> Problem:
    return ZOO[name]()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def by_engine(name: str, spec: Any) -> dict[str, Any]:
    model_fn, params, X, y, loss_fn, _ = problem(name)
    return compute(model_fn, params, X, y, spec, loss_fn=loss_fn, generator=generator())


def by_reference(name: str, quantity: str, **options: Any) -> dict[str, Any]:
    model_fn, params, X, y, loss_fn, _ = problem(name)
    return getattr(reference, quantity)(model_fn, params, X, y, loss_fn=loss_fn, **options)


def test_the_zoo_is_large() -> None:
    assert len(ZOO) >= 28


@architectures
def test_first_order(name: str) -> None:
    want = by_reference(name, "batch_grad")
    assert all(g.abs().max() > 1e-8 for g in want.values()), "a parameter without influence tests nothing"
    grads, norms = by_engine(name, (BatchGrad(), BatchL2()))
    assert_close(grads, want)
    assert_close(norms, {k: g.reshape(len(g), -1).square().sum(1) for k, g in want.items()})


@architectures
def test_diag_ggn(name: str) -> None:
    assert_close(by_engine(name, DiagGGN()), by_reference(name, "diag_ggn"))


@architectures
def test_diag_ggn_mc(name: str) -> None:
    want = by_reference(name, "diag_ggn", mc_samples=MC, generator=generator())
    assert_close(by_engine(name, DiagGGN(mc_samples=MC)), want)


@architectures
def test_kfac(name: str) -> None:
    """Factors where both sides mean the same: weights of linear and convolution layers, exact blocks of vectors.

    The reference sees a layer only where it is called as such: of the matrices in `nn.LSTM` it knows the exact block.
    """
    want = by_reference(name, "kfac", mc_samples=MC, generator=generator())
    alike = {k for k, p in problem(name).params.items() if p.ndim <= 1 or len(want[k]) == 2}
    assert alike
    got = by_engine(name, KFAC(mc_samples=MC))
    assert_close({k: got[k] for k in alike}, {k: want[k] for k in alike})


@architectures
def test_explain_shows_the_fast_path(name: str) -> None:
    model_fn, params, X, _, _, fast = problem(name)
    rows = curvfunc.explain(model_fn, params, X).rows
    assert [row.name for row in rows] == list(params)
    assert all(row.path in ("plain", "vmap", "loop") for row in rows)
    assert {row.name: row.why for row in rows if row.name in fast and row.rule == "generic"} == {}
