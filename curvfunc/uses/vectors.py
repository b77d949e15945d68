"""Contractions of linear maps of vectors, dW[n] = g[n] x[n]ᵀ, and of the biases beside them, db[n] = g[n].

The same as of an `Outer` form with one group and one position, without the axes for these: in small networks the views that
make them take as long as the work, and what a weight and its bias have in common is formed once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvfunc.uses.forms import Outer, outer
from curvfunc.uses.second_moments import InputFactor, second_moment

__all__ = ["COVERED", "contract", "fits"]

SQUARES = frozenset({"squares", "sample_squares", "sample_norms"})
OUTPUTS = frozenset({"output_factor", "output_factor_expand", "output_factor_reduce"})
INPUTS = frozenset({"input_factor", "input_factor_expand", "input_factor_reduce"})
COVERED = SQUARES | OUTPUTS | INPUTS | {"per_sample"}

PRECISE = (torch.float32, torch.float64)


def fits(form: Outer, g: Tensor) -> bool:
    """Whether a cotangent [n, o] or [v, n, o] is of the type of the inputs, in single precision at least."""
    x = form.vectors
    return x is not None and g.dtype is x.dtype and g.dtype in PRECISE


def contract(names: Sequence[str], form: Outer, g: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each contraction for the weight, and for a bias beside it.

    Args:
        names: Among `COVERED`.
        form: The use of the weight, with ``vectors``.
        g: The cotangent [n, o] of the output, or those of several vectors [v, n, o].
    """
    x = form.vectors
    assert x is not None
    weight: dict[str, Any] = {}
    bias: dict[str, Any] = {}
    squared = None if SQUARES.isdisjoint(names) else g.square() if g.ndim == 2 else g.square().sum(0)
    for name in names:
        if name == "per_sample":
            column, row = g.unsqueeze(-1), x.unsqueeze(-2)
            found = outer(x.unsqueeze(-1), g.unsqueeze(-2), None) if form.inputs_first else outer(column, row, None)
            weight[name], bias[name] = (found[None], g[None]) if g.ndim == 2 else (found, g)
        elif name in OUTPUTS:
            B = second_moment((g if g.ndim == 2 else g.flatten(0, 1)).mT)
            weight[name], bias[name] = B, B.clone()  # whoever gets one may change it
        elif name in INPUTS:
            weight[name], bias[name] = InputFactor(second_moment(x.mT, 1 / len(x)), form.inputs_first), None
        else:
            assert squared is not None
            if name == "sample_norms":
                norms = squared.sum(1)
                weight[name], bias[name] = norms * x.square().sum(1), norms
            elif name == "squares":
                xx = x.square()
                weight[name] = xx.mT @ squared if form.inputs_first else squared.mT @ xx
                bias[name] = squared.sum(0)
            else:
                xx = x.square()
                a, b = (xx, squared) if form.inputs_first else (squared, xx)
                weight[name], bias[name] = outer(a.unsqueeze(-1), b.unsqueeze(-2), None), squared
    return weight, bias
