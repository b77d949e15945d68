"""Affine maps: a weight that has an `Outer` form, and a bias that is added to the product."""

from torch import Tensor

from curvfunc.uses.forms import Direct, Form, Outer

__all__ = ["affine"]


def affine(weight: Outer, bias: Tensor | None, behind: int = 0) -> dict[str, Form]:
    """The forms of z[n,s,o] = Σ_k W[o,k] x[n,s,k] + b[o] from that of W.

    db[v,n] = Σ_s g[v,n,s], so that both have one Kronecker factor of the outputs in common.

    Args:
        weight: The form of W.
        bias: The bias b, if there is one.
        behind: How many of the shared axes stand behind the features, as those of images; all others are in front.
    """
    if bias is None:
        return {"weight": weight}

    def gradient(g: Tensor) -> Tensor:  # [v, n, *s, o, *s] to [v, n, o]
        g = g.flatten(-behind).sum(-1) if behind else g
        return g.flatten(2, -2).sum(2) if g.ndim > 3 else g

    return {"weight": weight, "bias": Direct(gradient, bias.shape, sums=weight, reads=False)}
