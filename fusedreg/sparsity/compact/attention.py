"""What ``torch.nn.MultiheadAttention`` becomes when heads or inputs were cut out of it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CompactAttention(nn.Module):
    """``torch.nn.MultiheadAttention`` with fewer heads than its width has room for.

    There the heads together are as wide as the inputs; here ``in_proj_weight`` is ``[3 * num_heads * head_dim,
    inputs]`` and ``out_proj.weight`` ``[outputs, num_heads * head_dim]``, whatever inputs and outputs are. Parameters
    have the same names, and ``forward`` has the same arguments, without masks that differ between heads. Where a mask
    leaves a query no key, it gives what torch gives while gradients are on; torch's fused path gives NaN there.
    """

    # Fused paths of torch.nn.TransformerEncoderLayer would take the parameters out and expect the usual widths.
    _qkv_same_embed_dim = False
    bias_k = bias_v = None
    add_zero_attn = False

    def __init__(self, attention: Any, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, attention.head_dim
        self.embed_dim, self.dropout, self.batch_first = attention.embed_dim, attention.dropout, attention.batch_first
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``torch.nn.MultiheadAttention.forward``; weights are those of the heads that are here.

        Raises:
            ValueError: ``attn_mask`` has three dimensions, or is missing where ``is_causal``.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True needs its attn_mask, as in torch.nn.MultiheadAttention")
        if attn_mask is not None and attn_mask.ndim == 3:
            raise ValueError("attn_mask has three dimensions (allowed: one mask for all heads, of two dimensions)")
        is_batched = query.ndim == 3
        if not is_batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = _merged(attn_mask, key_padding_mask, q.dtype)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            attention = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
            out = attention @ v
        else:
            attention, out = None, F.scaled_dot_product_attention(q, k, v, mask, dropout)
        result = self.out_proj(out.transpose(1, 2).flatten(start_dim=2))
        if attention is not None and average_attn_weights:
            attention = attention.mean(dim=1)
        if not is_batched:
            return result.squeeze(0), None if attention is None else attention.squeeze(0)
        return result if self.batch_first else result.transpose(0, 1), attention


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one to add to the scores, [..., queries, keys]."""
    merged = None
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
        merged = mask.to(dtype) if merged is None else merged + mask.to(dtype)
    return merged
