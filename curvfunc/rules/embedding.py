"""Tables whose rows are looked up: z[n,s] = W[i[n,s]]. Their gradients stay sparse in the rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.rules.registry import rule
from curvfunc.uses.forms import Rows


@rule(
    F.embedding,
    arguments="input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
    parameters="weight",
)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """dW[v,n,r] = Σ_{s: i[n,s]=r} g[v,n,s]; i [n, *s], g [v, n, *s, d]. Padding gets no gradient."""
    if max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    return {
        "weight": Rows(
            inputs=lambda: _without(input.reshape(input.shape[0], -1), padding_idx, weight.shape[0]),
            cotangent=lambda g: g.reshape(*g.shape[:2], -1, g.shape[-1]),
            shape=weight.shape,
        )
    }


@rule(
    F.embedding_bag,
    arguments="input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights "
    "include_last_offset padding_idx",
    parameters="weight per_sample_weights",
)
def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Bags i [n, *b, s] of rows, summed or averaged: every row of a bag gets the bag's g [v, n, *b, d]."""
    declined = offsets is not None or max_norm is not None or scale_grad_by_freq or per_sample_weights is not None
    if declined or mode not in ("sum", "mean") or input.ndim < 2:
        return NotImplemented
    rows = _without(input, padding_idx, weight.shape[0])

    def cotangent(g: Tensor) -> Tensor:
        if mode == "mean":
            g = g / (rows >= 0).sum(-1, keepdim=True).clamp_min(1)
        g = g.unsqueeze(-2).expand(*g.shape[:-1], rows.shape[-1], g.shape[-1])
        return g.reshape(*g.shape[:2], -1, g.shape[-1])

    return {
        "weight": Rows(
            inputs=lambda: rows.reshape(rows.shape[0], -1),
            cotangent=cotangent,
            shape=weight.shape,
        )
    }


def _without(rows: Tensor, padding_idx: int | None, size: int) -> Tensor:
    """The rows with padding as -1."""
    if padding_idx is None:
        return rows.long()
    return torch.where(rows == padding_idx % size, -1, rows).long()
