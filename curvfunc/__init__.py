"""Per-sample gradients, curvature and Kronecker factors as pure functions of a model and its parameters."""

from curvfunc import reference
from curvfunc.compute import compute
from curvfunc.contractions import Direct, Outer, Rows
from curvfunc.explain import Explanation, explain
from curvfunc.model import ModelFunction, functionalize
from curvfunc.quantities import (
    KFAC,
    KFLR,
    BatchDiagGGN,
    BatchGrad,
    BatchL2,
    DiagGGN,
    Grad,
    Loss,
    Output,
    SqrtGGN,
    SumGradSquared,
    Variance,
    batch_diag_ggn,
    batch_grad,
    batch_l2,
    diag_ggn,
    kfac,
    kflr,
    sqrt_ggn,
    sum_grad_squared,
    variance,
)
from curvfunc.rules import operation, rule

__all__ = [
    "KFAC",
    "KFLR",
    "BatchDiagGGN",
    "BatchGrad",
    "BatchL2",
    "DiagGGN",
    "Direct",
    "Explanation",
    "Grad",
    "Loss",
    "ModelFunction",
    "Outer",
    "Output",
    "Rows",
    "SqrtGGN",
    "SumGradSquared",
    "Variance",
    "batch_diag_ggn",
    "batch_grad",
    "batch_l2",
    "compute",
    "diag_ggn",
    "explain",
    "functionalize",
    "kfac",
    "kflr",
    "operation",
    "reference",
    "rule",
    "sqrt_ggn",
    "sum_grad_squared",
    "variance",
]
