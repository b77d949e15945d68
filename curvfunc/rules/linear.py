"""Linear maps: z[n,s,o] = Σ_i W[o,i] x[n,s,i] + b[o], with any number of shared axes s."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from curvfunc.rules.affine import affine
from curvfunc.rules.registry import rule
from curvfunc.uses.forms import Direct, Form, Outer, sum_to_shape


@rule(F.linear, arguments="input weight bias", parameters="weight bias")
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, Form]:
    """dW[v,n] = Σ_s g[v,n,s] x[n,s]ᵀ and db[v,n] = Σ_s g[v,n,s]; x [n, *s, i], g [v, n, *s, o]."""
    vectors = input if input.ndim == 2 else None
    outer = Outer(lambda: _positions(input, 1), lambda g: _positions(g, 2), weight.shape, vectors=vectors)
    if bias is None or bias.shape == weight.shape[:1]:
        return affine(outer, bias)
    if bias.ndim > 1:
        return {"weight": outer}
    gradient: Callable[[Tensor], Tensor] = lambda g: sum_to_shape(g, bias.shape)  # one number for all features
    return {"weight": outer, "bias": Direct(gradient, bias.shape, reads=False)}


def _positions(t: Tensor, batch_dims: int) -> Tensor:
    """[..., *s, f] as [..., 1, s, f]: one group, the shared axes as one."""
    return t.reshape(*t.shape[:batch_dims], 1, -1, t.shape[-1])
