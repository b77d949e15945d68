"""The specification: every quantity in a few obvious lines of ``torch.func``, slow and independent of the engine.

Each function here has the signature, the result and the scale of the function of the same name in :mod:`curvfunc`,
and nothing of its machinery: samples are run through the model one by one, Jacobians and Hessians are dense. What the
two modules disagree about is a bug. Use it to read what a quantity *is*, and to check a new layer or loss on a small
problem; time and memory grow with (samples x outputs x parameters).

Notation: sample ``n`` of N; output entries ``c``, ``d`` of C (all axes of one sample's output, flattened); parameter
entries ``p``, ``q`` of a parameter with P entries; root column ``v`` of V; shared positions ``s``, ``t`` (pixel, time
step); output and input features ``o``, ``k`` of a layer. With the loss ``L(f) = R sum_n l_n(f_n, y_n)`` of the model's
outputs f_n (R = 1/N for a mean, 1 for a sum), everything is made of three things:

- ``J[n, c, p] = d f_n[c] / d theta[p]``, the Jacobian of one sample's output,
- ``dL[n, c] = d L / d f_n[c]``, the gradient of the loss,
- ``M[n, c, d]``, the curvature of the loss: ``d^2 L / d f_n[c] d f_n[d]``, or its Monte-Carlo estimate.

``subsampling`` (indices, repeats allowed) picks samples *after* J, dL and M are formed on the full batch: results per
sample are slices of the full ones, sums run over the picked samples only, R stays that of the full batch.
``chunk_size`` is accepted for the signature's sake and has no effect: it bounds memory and never changes a result.
A parameter that the output does not depend on gets zeros. Inputs are not validated.
"""

from curvfunc.reference.definitions import (
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
from curvfunc.reference.empirical import kfac_empirical
from curvfunc.reference.jacobians import batch_jac, ntk, ntk_total

__all__ = [
    "batch_diag_ggn",
    "batch_grad",
    "batch_jac",
    "batch_l2",
    "diag_ggn",
    "kfac",
    "kfac_empirical",
    "kflr",
    "ntk",
    "ntk_total",
    "sqrt_ggn",
    "sum_grad_squared",
    "variance",
]
