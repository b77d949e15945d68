"""The quantities that tests run over: each public function with its arguments, and its spec for ``compute``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import curvfunc
from curvfunc import reference

__all__ = ["EXACT", "QUANTITIES", "SAMPLED", "Case", "seeded"]


class Case(NamedTuple):
    """One way of calling one function."""

    function: Callable[..., Any]
    reference: Callable[..., Any]
    spec: Any
    kwargs: dict[str, int]


def case(name: str, spec: Any, **kwargs: int) -> Case:
    return Case(getattr(curvfunc, name), getattr(reference, name), spec, kwargs)


EXACT = {
    "batch_grad": case("batch_grad", curvfunc.BatchGrad()),
    "batch_l2": case("batch_l2", curvfunc.BatchL2()),
    "sum_grad_squared": case("sum_grad_squared", curvfunc.SumGradSquared()),
    "variance": case("variance", curvfunc.Variance()),
    "diag_ggn": case("diag_ggn", curvfunc.DiagGGN()),
    "batch_diag_ggn": case("batch_diag_ggn", curvfunc.BatchDiagGGN()),
    "sqrt_ggn": case("sqrt_ggn", curvfunc.SqrtGGN()),
    "kflr": case("kflr", curvfunc.KFLR()),
}
SAMPLED = {
    "diag_ggn, 2 samples": case("diag_ggn", curvfunc.DiagGGN(2), mc_samples=2),
    "batch_diag_ggn, 3 samples": case("batch_diag_ggn", curvfunc.BatchDiagGGN(3), mc_samples=3),
    "sqrt_ggn, 2 samples": case("sqrt_ggn", curvfunc.SqrtGGN(2), mc_samples=2),
    "diag_hessian, 2 samples": case("diag_hessian", curvfunc.DiagHessian(2), mc_samples=2),
    "batch_diag_hessian, 3 samples": case("batch_diag_hessian", curvfunc.BatchDiagHessian(3), mc_samples=3),
    "kfac": case("kfac", curvfunc.KFAC()),
    "kfac, 3 samples": case("kfac", curvfunc.KFAC(3), mc_samples=3),
}
QUANTITIES = EXACT | SAMPLED


def seeded(name: str, seed: int = 7) -> dict[str, torch.Generator]:
    """A fresh generator for the functions that take one."""
    return {"generator": torch.Generator().manual_seed(seed)} if name in SAMPLED else {}
