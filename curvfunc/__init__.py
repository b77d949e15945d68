"""Per-sample gradients, curvature and Kronecker factors as pure functions of a model and its parameters."""

from curvfunc import reference
from curvfunc.checks.checking import Comparison, Report, check
from curvfunc.checks.rule_report import RuleReport, check_rule
from curvfunc.data.loop import accumulate
from curvfunc.data.merging import Accumulation, accumulation, merge
from curvfunc.engine.model import ModelFunction, functionalize
from curvfunc.operators.estimators import (
    Spectrum,
    eigsh,
    hutchinson_diag,
    hutchinson_trace,
    hutchpp_trace,
    spectral_density,
    xdiag,
)
from curvfunc.operators.linear_operators import LinearOperator, fisher_operator, ggn_operator, hessian_operator
from curvfunc.operators.products import fisher_vp, ggn_vp, ggnmp, hessian_vp, hmp, jvp, pchmp, vjp
from curvfunc.quantities.call import compute
from curvfunc.quantities.explain import Explanation, explain
from curvfunc.quantities.functions import (
    batch_diag_ggn,
    batch_diag_hessian,
    batch_grad,
    batch_l2,
    diag_ggn,
    diag_hessian,
    kfac,
    kflr,
    kfra,
    sqrt_ggn,
    sum_grad_squared,
    variance,
)
from curvfunc.quantities.gram import BatchDot, GGNGram, batch_dot, batch_dot_total, ggn_gram, ggn_gram_total
from curvfunc.quantities.quantity import Quantity
from curvfunc.quantities.specs import (
    KFAC,
    KFLR,
    KFRA,
    BatchDiagGGN,
    BatchDiagHessian,
    BatchGrad,
    BatchL2,
    DiagGGN,
    DiagHessian,
    Grad,
    Loss,
    Output,
    SqrtGGN,
    SumGradSquared,
    Variance,
)
from curvfunc.rules import operation, rule
from curvfunc.uses.forms import Direct, Outer, Rows

__version__ = "0.1.0"

__all__ = [
    "KFAC",
    "KFLR",
    "KFRA",
    "Accumulation",
    "BatchDiagGGN",
    "BatchDiagHessian",
    "BatchDot",
    "BatchGrad",
    "BatchL2",
    "Comparison",
    "DiagGGN",
    "DiagHessian",
    "Direct",
    "Explanation",
    "GGNGram",
    "Grad",
    "LinearOperator",
    "Loss",
    "ModelFunction",
    "Outer",
    "Output",
    "Quantity",
    "Report",
    "Rows",
    "RuleReport",
    "Spectrum",
    "SqrtGGN",
    "SumGradSquared",
    "Variance",
    "accumulate",
    "accumulation",
    "batch_diag_ggn",
    "batch_diag_hessian",
    "batch_dot",
    "batch_dot_total",
    "batch_grad",
    "batch_l2",
    "check",
    "check_rule",
    "compute",
    "diag_ggn",
    "diag_hessian",
    "eigsh",
    "explain",
    "fisher_operator",
    "fisher_vp",
    "functionalize",
    "ggn_gram",
    "ggn_gram_total",
    "ggn_operator",
    "ggn_vp",
    "ggnmp",
    "hessian_operator",
    "hessian_vp",
    "hmp",
    "hutchinson_diag",
    "hutchinson_trace",
    "hutchpp_trace",
    "jvp",
    "kfac",
    "kflr",
    "kfra",
    "merge",
    "operation",
    "pchmp",
    "reference",
    "rule",
    "spectral_density",
    "sqrt_ggn",
    "sum_grad_squared",
    "variance",
    "vjp",
    "xdiag",
]
