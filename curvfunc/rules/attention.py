"""Multi-head attention, written out: projections by `F.linear`, the fused attention between them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc.rules.registry import DECOMPOSITIONS


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` on queries [t, n, e], keys and values [u, n, *]; also without n."""
    if static_k is not None or static_v is not None:
        raise NotImplementedError("multi-head attention with static_k or static_v is not supported; pass key and value.")
    batched = query.ndim == 3
    if not batched:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    q, k, v = _project(
        query,
        key,
        value,
        (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight,
        in_proj_bias,
    )
    t, n, e = q.shape
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, n, -1)])
        v = torch.cat([v, bias_v.expand(1, n, -1)])
    extra = int(bias_k is not None) + int(add_zero_attn)
    heads = [x.reshape(x.shape[0], n, num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v)]  # [n, h, t, e / h]
    if add_zero_attn:
        heads[1:] = [torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for x in heads[1:]]
    if attn_mask is None and key_padding_mask is None and is_causal:
        raise ValueError("multi-head attention: is_causal needs attn_mask, as in torch.")
    mask = _mask(attn_mask, key_padding_mask, n, num_heads, extra, q.dtype)
    p = dropout_p if training else 0.0
    if need_weights:
        scores = heads[0] @ heads[1].mT / (e // num_heads) ** 0.5
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), p, p > 0)
        attended = weights @ heads[2]
    else:
        weights = None
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask, dropout_p=p)
    out = F.linear(attended.permute(2, 0, 1, 3).reshape(t, n, e), out_proj_weight, out_proj_bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if not batched:
        return out.squeeze(1), None if weights is None else weights.squeeze(0)
    return out, weights


def _project(
    query: Tensor, key: Tensor, value: Tensor, weight: Any, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, ...]:
    """Queries, keys and values; one product where they share their input."""
    if isinstance(weight, Tensor) and query is key and key is value:
        return F.linear(query, weight, bias).chunk(3, -1)
    weights = weight.chunk(3) if isinstance(weight, Tensor) else weight
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))


def _mask(
    attn_mask: Tensor | None, padding: Tensor | None, n: int, heads: int, extra: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one to be added, [n or 1, h or 1, t or 1, u + extra]; what was appended to the keys is not masked."""
    parts = []
    if attn_mask is not None:
        part = _additive(attn_mask, dtype)
        parts.append(part.reshape(n, heads, *part.shape[1:]) if part.ndim == 3 else part)
    if padding is not None:
        parts.append(_additive(padding, dtype)[:, None, None, :])
    if not parts:
        return None
    mask = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return F.pad(mask, (0, extra)) if extra else mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


DECOMPOSITIONS[F.multi_head_attention_forward] = multi_head_attention
