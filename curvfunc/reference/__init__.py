"""The specification: every quantity in a few obvious lines of torch, slow and independent of the engine.

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

The Hessians add ``H[n, p, q] = R d^2 l_n / d theta[p] d theta[q]``, the second derivative of the loss through one sample's
output, the outputs of the others held fixed. Attention and weight norm run by their definitions there: torch's kernels
have no second derivative or a wrong one. What else has none in torch (``F.hardsigmoid``, ``F.embedding_bag``) has none here.

``subsampling`` (indices, repeats allowed) picks samples *after* J, dL, M and H are formed on the full batch: results per
sample are slices of the full ones, sums run over the picked samples only, R stays that of the full batch.
``chunk_size`` is accepted for the signature's sake and has no effect: it bounds memory and never changes a result.
A parameter that the output does not depend on gets zeros. Inputs are not validated.
"""

from curvfunc.reference.first_order import (
    batch_dot,
    batch_dot_total,
    batch_grad,
    batch_l2,
    clipped_grad,
    sum_grad_squared,
    variance,
)
from curvfunc.reference.gauss_newton import batch_diag_ggn, diag_ggn, ggn_gram, ggn_gram_total, sqrt_ggn
from curvfunc.reference.hessian import batch_diag_hessian, diag_hessian
from curvfunc.reference.jacobians import batch_jac, ntk, ntk_total
from curvfunc.reference.kronecker import kfac, kfac_empirical, kflr, kfra
from curvfunc.reference.products import fisher_vp, ggn_vp, ggnmp, hessian_vp, hmp, jvp, pchmp, vjp

__all__ = [
    "batch_diag_ggn",
    "batch_diag_hessian",
    "batch_dot",
    "batch_dot_total",
    "batch_grad",
    "batch_jac",
    "batch_l2",
    "clipped_grad",
    "diag_ggn",
    "diag_hessian",
    "fisher_vp",
    "ggn_gram",
    "ggn_gram_total",
    "ggn_vp",
    "ggnmp",
    "hessian_vp",
    "hmp",
    "jvp",
    "kfac",
    "kfac_empirical",
    "kflr",
    "kfra",
    "ntk",
    "ntk_total",
    "pchmp",
    "sqrt_ggn",
    "sum_grad_squared",
    "variance",
    "vjp",
]
