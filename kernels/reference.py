"""Plain torch definitions of every token operation; the judge of the Triton kernels.

Shapes: B rows, N tokens, K kept tokens, D features, H query heads, G key heads, R query rows, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Share of a token's own weight below which nothing of it is left to explain.
EXHAUSTED = 1e-6


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """``out[b, k] = x[b, index[b, k]]``.

    Args:
        x: [B, N, D], any dtype, any strides.
        index: [B, K] int64 in [0, N).

    Returns:
        [B, K, D], contiguous.
    """
    return gather_many([x], [index])[0].contiguous()


def gather_many(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], valid: Tensor | None = None
) -> list[Tensor]:
    """Tokens of several tensors: ``out[..., b, k, :] = x[..., b, index[b, k], :]``.

    Hidden states are [B, N, D], rotary tables [B or 1, N, D] or [3, B, N, D], position ids [3, B, N, 1] (unsqueezed),
    keys and values [H, B, N, d] (transposed views; the result has their memory order).

    Args:
        tensors: each [..., B or 1, N, D], any dtype, any strides.
        indices: for each its index [B, K] int64 in [0, N), the same B and K for all.
        valid: [B, K] bool, False where zeros are written instead of a token; None where there is no such place.

    Returns:
        Each [..., B, K, D].
    """
    out = []
    for x, index in zip(tensors, indices, strict=True):
        x = x.expand(*x.shape[:-3], len(index), -1, -1)
        # Row by row, index_select copies whole tokens and checks the range of their indices.
        rows = [row.index_select(-2, i) for row, i in zip(x.unbind(-3), index, strict=True)]
        outer = max(range(x.ndim - 2), key=lambda i: (x.stride(i), -i))
        if not rows:
            taken = x.new_empty(*x.shape[:-3], *index.shape, x.shape[-1])
        elif outer == x.ndim - 3:
            taken = torch.stack(rows).movedim(0, -3)
        else:
            taken = torch.stack(rows, -3)
        out.append(taken if valid is None else taken.masked_fill(~valid.unsqueeze(-1), 0))
    return out


def gather_mask(mask: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """Rows and columns of a square attention mask: ``out[b, h, i, j] = mask[b, h, index[b, i], index[b, j]]``.

    Args:
        mask: [B or 1, H or 1, L, L], bool (True = may see) or float (added to the logits).
        index: [B, K] int64.
        valid: [B, K] bool, False for slots that nobody sees but they themselves (no row of a softmax may be empty);
            None where there are none.

    Returns:
        [B, H or 1, K, K].
    """
    mask = mask.expand(len(index), -1, -1, -1)
    mask = gather_many([mask.movedim(1, 0)], [index])[0].movedim(0, 1)
    mask = mask.gather(3, index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
    if valid is None:
        return mask
    hidden = ~valid
    itself = torch.eye(hidden.shape[1], dtype=torch.bool, device=mask.device) & hidden.unsqueeze(-1)
    shut, opened = (False, True) if mask.dtype == torch.bool else (torch.finfo(mask.dtype).min, 0.0)
    return mask.masked_fill(hidden[:, None, None], shut).masked_fill(itself[:, None], opened)


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
    b, n, d = x.shape
    weighted = x.to(acc) * weight.to(acc).unsqueeze(-1)
    # All slots of all rows below each other and, for what is dropped, one more that is cut off.
    slot = into + n_out * torch.arange(b, device=x.device).unsqueeze(1)
    slot = slot.masked_fill(into < 0, b * n_out).reshape(-1, 1)
    out = weighted.new_zeros(b * n_out + 1, d).scatter_add(0, slot.expand(-1, d), weighted.reshape(b * n, d))
    return out[:-1].view(b, n_out, d).to(x.dtype)


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
    queries, keys = q.reshape(b, g, h // g * r, d), k.transpose(-1, -2)
    # torch copies the keys of a whole batch where heads lie between them (as behind a projection), but not of one row.
    logits = queries @ keys if b < 2 else torch.stack([a @ c for a, c in zip(queries, keys, strict=True)])
    logits = logits.float().mul_(scale).view(b, h, r, k.shape[2])
    if visible is not None:
        visible = visible[:, None, None, :] if visible.ndim == 2 else visible[:, None]
        logits.masked_fill_(~visible, float("-inf"))
    return logits.softmax(-1)


def attention_columns(
    q: Tensor,
    k: Tensor,
    scale: float,
    visible: Tensor | None = None,
    asking: Tensor | None = None,
    causal: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Column sums of the softmax matrix: the attention that each key receives from all queries, never N x N.

    Args:
        q: [B, H, R, d] queries, after any rotary embedding.
        k: [B, G, N, d] keys, G dividing H (grouped-query attention).
        scale: factor on the logits.
        visible: [B, N] bool, False for keys that no query sees (but its own, if `causal`).
        asking: [B, R] bool, False for queries that do not count, not even where they are NaN or see nothing.
        causal: query r is token N - R + r and sees keys up to itself, always itself too.
        chunk: query rows per step of this reference; its memory is H x chunk x N. None: about 4 MiB, 16 rows at least.

    Returns:
        [B, H, N] float32. A counting query that is NaN makes at least those keys NaN that it sees, one that sees nothing
        makes all keys NaN.
    """
    b, h, r, _ = q.shape
    n = k.shape[2]
    chunk = chunk or min(256, max(16, (1 << 20) // max(h * n, 1)))
    total = torch.zeros(b, h, n, device=q.device)
    key = torch.arange(n, device=q.device)
    for row, start in product(range(b), range(0, r, chunk)):
        one, stop = slice(row, row + 1), min(start + chunk, r)
        end = n  # keys that some query of this step sees
        may = None if visible is None else visible[one]
        if causal:
            end = n - r + stop if r <= n else n
            own = torch.arange(n - r + start, n - r + stop, device=q.device).unsqueeze(1)
            may = key[:end] <= own
            if visible is not None:
                may = may & (visible[row, :end] | (key[:end] == own))
            may = may.unsqueeze(0)
        rows = attention_rows(q[one, :, start:stop], k[one, :, :end], scale, may)
        if asking is not None:
            # Not by a factor of 0: rows that do not count may be NaN.
            rows = rows.masked_fill(~asking[one, None, start:stop, None], 0)
        total[one, :, :end] += rows.sum(2)
    return total


def farthest_first(
    weight: Tensor, distance: Tensor, k: int, start: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Greedy choice of k tokens by weight times distance to the nearest chosen one (DivPrune's, weighted).

        first = argmax_i w_i;   next = argmax_{i not in S} w_i min_{s in S} D_is;   ties go to the lower index

    Args:
        weight: [G, N] >= 0, finite.
        distance: [G, N, N], finite; what is below 0 counts as 0.
        k: tokens to choose, 1 to N.
        start: [G] int64, the first choice, if it is not the largest weight.
        lengths: [G] int64, tokens of each image, the rest is padding; at least 1. None where none is.

    Returns:
        [G, k] int64, in order of choice; -1 where an image has no token left.
    """
    images, n = weight.shape
    dtype = torch.promote_types(torch.promote_types(weight.dtype, distance.dtype), torch.float32)
    weight, rows = weight.detach().to(dtype), distance.detach().to(dtype).flatten(0, 1)
    zero = weight.new_zeros(images, n)
    barred = zero.clone()  # -inf for members and padding
    if lengths is not None:
        barred.masked_fill_(torch.arange(n, device=weight.device) >= lengths.unsqueeze(1), float("-inf"))
    nearest, value, row = torch.full_like(zero, float("inf")), weight + barred, torch.empty_like(zero)
    first_row = torch.arange(images, device=weight.device) * n
    last_row = torch.empty_like(first_row)
    chosen = torch.empty(k, images, dtype=torch.int64, device=weight.device)
    steps = chosen.unbind()
    steps[0].copy_(value.argmax(-1) if start is None else start)
    # Into tensors at hand: on CPU the time of a step is the overhead of its operations.
    for last, following in pairwise(steps):
        torch.add(first_row, last, out=last_row)
        torch.index_select(rows, 0, last_row, out=row)
        torch.clamp(row, zero, nearest, out=nearest)
        barred.view(-1).index_fill_(0, last_row, float("-inf"))
        torch.addcmul(barred, weight, nearest, out=value)
        torch.argmax(value, -1, out=following)
    return _exhausted(chosen.t().contiguous(), lengths)


def _exhausted(chosen: Tensor, lengths: Tensor | None) -> Tensor:
    """Marks choices beyond the tokens of an image by -1."""
    if lengths is None:
        return chosen
    step = torch.arange(chosen.shape[1], device=chosen.device)
    return chosen.masked_fill(step >= lengths.unsqueeze(1), -1)


def dpp_map(kernel: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
    """Greedy maximum a posteriori set of a determinantal point process (Chen et al. 2018, algorithm 1).

        j = argmax d;   e = (K_j - C_j C) / sqrt(d_j);   d <- d - e^2;   append e to C

    Once the chosen tokens explain all others (d at most EXHAUSTED of the diagonal), the lowest free indices follow.

    Args:
        kernel: [G, N, N] positive semi-definite, float32 or wider.
        k: tokens to choose, 1 to N.
        lengths: as for :func:`farthest_first`.

    Returns:
        As :func:`farthest_first`.
    """
    images, n = kernel.shape[:2]
    kernel = kernel.detach().to(torch.promote_types(kernel.dtype, torch.float32))
    lines = kernel.flatten(0, 1)
    gain = kernel.diagonal(dim1=1, dim2=2).clone(memory_format=torch.contiguous_format)
    # Members and padding have a gain of -inf, and keep it, as nothing is below a floor of NaN.
    floor = EXHAUSTED * gain
    if lengths is not None:
        padding = torch.arange(n, device=kernel.device) >= lengths.unsqueeze(1)
        gain.masked_fill_(padding, float("-inf"))
        floor.masked_fill_(padding, float("nan"))
    first_line = torch.arange(images, device=kernel.device) * n
    last_line, best = torch.empty_like(first_line), gain.new_empty(images)
    line, known = torch.empty_like(gain), gain.new_empty(images, 1, n)
    spent = torch.empty_like(gain, dtype=torch.bool)
    rows = gain.new_empty(images, k, n)
    chosen = torch.empty(k, images, dtype=torch.int64, device=kernel.device)
    for i, (j, row) in enumerate(zip(chosen.unbind(), rows.unbind(1), strict=True)):
        torch.argmax(gain, -1, out=j)
        torch.add(first_line, j, out=last_line)
        torch.index_select(gain.view(-1), 0, last_line, out=best)
        root = best.masked_fill(best <= 0, float("inf")).sqrt_()
        before = rows[:, :i]
        torch.bmm(before.gather(2, j.view(-1, 1, 1).expand(-1, i, 1)).transpose(1, 2), before, out=known)
        torch.index_select(lines, 0, last_line, out=line)
        torch.sub(line, known[:, 0], out=line)
        torch.div(line, root.unsqueeze(1), out=row)
        torch.square(row, out=line)
        gain.sub_(line)
        torch.le(gain, floor, out=spent)
        gain.masked_fill_(spent, 0)
        gain.view(-1).index_fill_(0, last_line, float("-inf"))
        floor.view(-1).index_fill_(0, last_line, float("nan"))
    return _exhausted(chosen.t().contiguous(), lengths)


def best_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of every vector of a to one of b, and whose it is; a zero vector has cosine 0 to all.

    Args:
        a: [G, M, D].
        b: [G, P, D], P at least 1.

    Returns:
        [G, M] float32 cosines and [G, M] int64 indices into b, ties going to the lower index.
    """
    cosine = normalize(a.float(), dim=-1) @ normalize(b.float(), dim=-1).transpose(1, 2)
    # max() breaks ties by no rule, argmax() by the first.
    index = cosine.argmax(-1)
    return cosine.gather(-1, index.unsqueeze(-1))[..., 0], index


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
