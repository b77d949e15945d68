"""What training looks like from the inside: formulas of quantities that are there already, from the papers that found them.

Arguments are results of `curvfunc.compute` or `curvfunc.accumulate`: trees by parameter, and the number of samples N that they
are of. In the formulas ∇ℓₙ is the gradient of a sample, m their mean and s² their variance with N − 1 below, entry by entry:

    m = (1/N) Σₙ ∇ℓₙ,    s² = 1/(N−1) Σₙ (∇ℓₙ − m)².

Of a mean loss, `Grad` is m, `Variance` (N−1)/N³ s², and `BatchGrad` ∇ℓₙ/N; this scale is taken out here, and so is that of a
loss that is a sum (``reduction="sum"``). For any other mean (over pixels, or weights) ∇ℓₙ is N times the sample's part of the
gradient.

>>> from curvfunc import Grad, Variance
>>> model_fn, params = functionalize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
>>> batches = [(torch.randn(n, 4), torch.arange(n) % 3) for n in (8, 8, 5)]
>>> grad, variance = accumulate(model_fn, params, batches, (Grad(), Variance()))
>>> list(diagnostics.signal_to_noise(grad, variance, samples=21))
['0', '2']
>>> diagnostics.noise_scale(grad, variance, samples=21).scale.shape
torch.Size([])

Results are scalar tensors. A layer has the parameters whose names are the same up to the last dot.
"""

from curvfunc.diagnostics.curvature import alignment, effective_dimension, trace_ratio
from curvfunc.diagnostics.noise import (
    NoiseScale,
    early_stopping,
    noise_scale,
    noise_scale_of_two,
    signal_to_noise,
)
from curvfunc.diagnostics.sampling import Verdict, inner_product_test, inner_products, norm_test, orthogonality_test

__all__ = [
    "NoiseScale",
    "Verdict",
    "alignment",
    "early_stopping",
    "effective_dimension",
    "inner_product_test",
    "inner_products",
    "noise_scale",
    "noise_scale_of_two",
    "norm_test",
    "orthogonality_test",
    "signal_to_noise",
    "trace_ratio",
]
