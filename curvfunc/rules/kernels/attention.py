"""Attention in operations that can be watched one by one."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`F.scaled_dot_product_attention`; NotImplemented with dropout, shared keys, and arguments that it refuses."""
    if dropout_p or enable_gqa or min(query.ndim, key.ndim, value.ndim) < 2 or (is_causal and attn_mask is not None):
        return NotImplemented
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return torch.softmax(scores.masked_fill(later, float("-inf")), -1) @ value
    if attn_mask is None:
        return torch.softmax(scores, -1) @ value
    masked = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch._safe_softmax(masked, -1) @ value  # zeros where nothing is left
