"""Plain torch definitions of every token operation; the judge of the Triton kernels.

Shapes: B rows, N tokens, K kept tokens, D features, H query heads, G key heads, R query rows, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """``out[b, k] = x[b, index[b, k]]``.

    Args:
        x: [B, N, D], any dtype, any strides.
        index: [B, K] int64 in [0, N).

    Returns:
        [B, K, D], contiguous.
    """
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def merge_tokens(x: Tensor, into: Tensor, weight: Tensor, n_out: int) -> Tensor:
    """Weighted sum of tokens into slots: ``out[b, s] = sum over j with into[b, j] == s of weight[b, j] x[b, j]``.

    Args:
        x: [B, N, D].
        into: [B, N] int64 slot of every token, -1 for dropped tokens.
        weight: [B, N] coefficients, used as they are (a mean has weights that sum to one per slot).
        n_out: number of slots.

    Returns:
        [B, n_out, D] in x's dtype, accumulated in float32 or wider.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    weighted = x.to(acc) * (weight * (into >= 0)).to(acc).unsqueeze(-1)
    out = weighted.new_zeros(x.shape[0], n_out, x.shape[-1])
    slot = into.clamp(min=0).unsqueeze(-1).expand_as(weighted)
    return out.scatter_add(1, slot, weighted).to(x.dtype)


def attention_rows(q: Tensor, k: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """Softmax attention of a few query rows over all keys, one matrix product, never N x N.

    Args:
        q: [B, H, R, d] queries, after any rotary embedding.
        k: [B, G, N, d] keys, G dividing H (grouped-query attention).
        scale: factor on the logits.
        visible: [B, N] or [B, R, N] bool, False for keys the query may not see.

    Returns:
        [B, H, R, N] float32 probabilities.
    """
    b, h, r, d = q.shape
    g = k.shape[1]
    logits = (q.reshape(b, g, h // g * r, d) @ k.transpose(-1, -2)).float() * scale
    logits = logits.view(b, h, r, -1)
    if visible is not None:
        visible = visible[:, None, None, :] if visible.ndim == 2 else visible[:, None]
        logits = logits.masked_fill(~visible, float("-inf"))
    return logits.softmax(-1)


def received_attention(
    q: Tensor, k: Tensor, scale: float, valid: Tensor | None = None, chunk: int = 256
) -> Tensor:
    """Mean over all queries of the attention each key receives (column mean of the softmax matrix).

    Args:
        q, k: [B, H, N, d].
        scale: factor on the logits.
        valid: [B, N] bool, False for padding, which neither gives nor receives.
        chunk: query rows per step; memory is B x H x chunk x N.

    Returns:
        [B, H, N] float32, summing to one over N.
    """
    n = q.shape[2]
    total = torch.zeros(*q.shape[:2], k.shape[2], device=q.device)
    for start in range(0, n, chunk):
        rows = attention_rows(q[:, :, start : start + chunk], k, scale, valid)
        if valid is not None:
            rows = rows * valid[:, None, start : start + chunk, None]
        total += rows.sum(2)
    return total / (n if valid is None else valid.sum(1)[:, None, None])


def compact(keep: Tensor, n_out: int, left: bool) -> tuple[Tensor, Tensor]:
    """Positions of the kept tokens of every row in ascending order, padded to a rectangle.

    Args:
        keep: [B, N] bool.
        n_out: columns of the result, at least the largest row count.
        left: put the padding before the tokens (as generation needs) instead of behind them.

    Returns:
        index [B, n_out] int64 (padding points at token 0) and valid [B, n_out] bool.
    """
    counts = keep.sum(1, keepdim=True)
    # A stable sort of "dropped" brings the kept positions to the front in their own order.
    order = torch.sort((~keep).to(torch.uint8), dim=1, stable=True).indices[:, :n_out]
    if order.shape[1] < n_out:
        order = torch.nn.functional.pad(order, (0, n_out - order.shape[1]))
    slot = torch.arange(n_out, device=keep.device).expand(keep.shape[0], -1)
    if left:
        slot = slot - (n_out - counts)
    valid = (slot >= 0) & (slot < counts)
    index = order.gather(1, slot.clamp(min=0))
    return torch.where(valid, index, torch.zeros_like(index)), valid
