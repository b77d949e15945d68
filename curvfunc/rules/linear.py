"""Linear maps: z[n,s,o] = Σ_i W[o,i] x[n,s,i] + b[o], with any number of shared axes s."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from curvfunc.rules.registry import rule
from curvfunc.uses.forms import Direct, Form, Outer


@rule(F.linear, arguments="input weight bias", parameters="weight bias")
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, Form]:
    """dW[v,n] = Σ_s g[v,n,s] x[n,s]ᵀ and db[v,n] = Σ_s g[v,n,s]; x [n, *s, i], g [v, n, *s, o]."""
    outer = Outer(inputs=lambda: _positions(input, 1), cotangent=lambda g: _positions(g, 2), shape=weight.shape)
    forms: dict[str, Form] = {"weight": outer}
    if bias is not None:
        sums: Callable[[Tensor], Tensor] = lambda g: g.flatten(2, -2).sum(2) if g.ndim > 3 else g
        forms["bias"] = Direct(sums, bias.shape, sums=outer, reads=False)
    return forms


def _positions(t: Tensor, batch_dims: int) -> Tensor:
    """[..., *s, f] as [..., 1, s, f]: one group, the shared axes as one."""
    return t.reshape(*t.shape[:batch_dims], 1, -1, t.shape[-1])
