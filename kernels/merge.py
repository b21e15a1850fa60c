"""Triton merge: deterministic weighted sums of tokens into slots."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.errors import VTPruneError

PIECE = 32  # members that one program adds; what a slot has more goes to other programs
TILE = 2048  # elements per program
QUERIES, KEYS = 16, 512  # the plan's tile
PARTIAL_ROWS = 4

# A tensor's elements as integers, for kernels that only move them.
UNSIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def vectors(x: Tensor) -> int:
    """Elements of the widest load (16 bytes) by which a kernel may step through x; 0 if the last stride is not 1."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return 0
    wide = 16 // x.element_size()
    sizes = [x.shape[-1], *(s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)]
    return wide if all(size % wide == 0 for size in sizes) else 1


def feature_block(d: int, most: int) -> int:
    """A power of two, at most `most`, as a block of d features: the one with the least padding, then the largest."""
    if d <= 256:
        return int(triton.next_power_of_2(d))
    blocks = [size for size in (1024, 512, 256) if size <= most]
    return min(blocks, key=lambda size: (-d % size, -size))


@triton.jit(do_not_specialize=["N", "S", "stride_ib", "stride_in"])  # type: ignore[untyped-decorator]
def plan_kernel(  # type: ignore[no-untyped-def]
    p_into,
    p_order,
    p_start,
    N,
    S,
    stride_ib,
    stride_in,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    KEY: tl.constexpr,
):
    # Sorting by counting: the key (slot, token) of a token, or (slot, 0) of a slot, is preceded by as many tokens as
    # its place in the sorted row. N^2 comparisons, but all at once; a sort would take more launches and more time.
    tiles = tl.cdiv(N + S + 1, QUERIES)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    o_q = pid % tiles * QUERIES + tl.arange(0, QUERIES)
    token = o_q < N
    p_into += b * stride_ib
    into = tl.load(p_into + o_q.to(tl.int64) * stride_in, mask=token, other=0)
    n = N.to(KEY)
    key = tl.where(token, into.to(KEY) * n + o_q, (o_q - N).to(KEY) * n)
    before = tl.zeros([QUERIES, KEYS], tl.int32)
    done = 0
    while done < N:
        o_n = done + tl.arange(0, KEYS)
        other = tl.load(p_into + o_n.to(tl.int64) * stride_in, mask=o_n < N, other=S).to(KEY) * n + o_n
        before += (other[None, :] < key[:, None]).to(tl.int32)
        done += KEYS
    place = tl.sum(before, 1)
    tl.store(p_order + b * N + place, o_q, mask=token)
    tl.store(p_start + b * (S + 1) + (o_q - N), place, mask=(o_q >= N) & (o_q <= N + S))


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        *("N", "S", "D", "boundaries", "stride_xb", "stride_xn", "stride_xd"),
        *("stride_ib", "stride_in", "stride_wb", "stride_wn"),
    ]
)
def merge_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_into,
    p_weight,
    p_order,
    p_start,
    p_out,
    p_partial,
    N,
    S,
    D,
    boundaries,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_ib,
    stride_in,
    stride_wb,
    stride_wn,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    # The sorted members of a row are cut where a slot begins and at every multiple of PIECE. Piece s < S begins with
    # slot s, piece S + c at boundary c; a program adds ROWS pieces, each in ascending order.
    # VECTOR > 0: the last stride is 1, D and the other strides of x count vectors of so many elements.
    scale: tl.constexpr = VECTOR if VECTOR > 0 else 1
    D = D * scale
    tiles_d = tl.cdiv(D, COLS)
    tiles_p = tl.cdiv(S + boundaries, ROWS)
    pid = tl.program_id(0)
    b = (pid // tiles_d // tiles_p).to(tl.int64)
    o_d = pid % tiles_d * COLS + tl.arange(0, COLS)
    o_p = pid // tiles_d % tiles_p * ROWS + tl.arange(0, ROWS)
    p_order += b * N
    p_start += b * (S + 1)

    opens = o_p < S
    cut = (o_p >= S) & (o_p < S + boundaries)
    boundary = (o_p - S + 1) * PIECE
    token = tl.load(p_order + boundary, mask=cut, other=0).to(tl.int64)
    goes = tl.load(p_into + b * stride_ib + token * stride_in, mask=cut, other=-1).to(tl.int32)
    slot = tl.where(opens, o_p, goes)
    there = (slot >= 0) & (slot < S)
    begin = tl.load(p_start + slot, mask=there, other=0)
    end = tl.load(p_start + slot + 1, mask=there, other=0)
    first = tl.where(opens, begin, boundary)
    last = tl.minimum(end, (first // PIECE + 1) * PIECE)
    # A slot that begins at a boundary has one piece there, not two.
    length = tl.where(opens | (cut & (begin < boundary)), tl.maximum(last - first, 0), 0)

    inside = (o_d < D)[None, :]
    x_d = o_d if VECTOR > 0 else o_d.to(tl.int64) * stride_xd
    acc = tl.zeros([ROWS, COLS], ACC)
    longest = tl.max(length, 0)
    step = 0
    while step < longest:
        # Two members at a time, for more loads in flight.
        for u in tl.static_range(2):
            here = length > step + u
            j = tl.load(p_order + first + step + u, mask=here, other=0).to(tl.int64)
            row = b * stride_xb + j * stride_xn
            x = tl.load(p_x + (row[:, None] * scale + x_d[None, :]), mask=here[:, None] & inside, other=0).to(
                ACC
            )
            if p_weight is not None:
                weight = tl.load(p_weight + b * stride_wb + j * stride_wn, mask=here, other=0).to(ACC)
                x *= weight[:, None]
            acc += x
        step += 2

    whole = opens & (end <= last)
    out = acc.to(p_out.dtype.element_ty)
    tl.store(p_out + ((b * S + o_p)[:, None] * D + o_d[None, :]), out, mask=whole[:, None] & inside)
    # Boundary c keeps two partial sums: of the slot that begins before it, and of its own piece.
    if p_partial is not None:
        place = b * boundaries * 2 + tl.where(opens, first // PIECE * 2, (o_p - S) * 2 + 1)
        split = (opens & (end > last)) | (cut & (length > 0))
        if tl.max(split.to(tl.int32), 0) > 0:  # spares most programs the way to the store's layout
            tl.store(p_partial + (place[:, None] * D + o_d[None, :]), acc, mask=split[:, None] & inside)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["N", "S", "D", "boundaries", "stride_ib", "stride_in"]
)
def finish_kernel(  # type: ignore[no-untyped-def]
    p_into,
    p_order,
    p_start,
    p_partial,
    p_out,
    N,
    S,
    D,
    boundaries,
    stride_ib,
    stride_in,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # One program per boundary; the first one inside a slot adds up the partial sums of that slot.
    scale: tl.constexpr = VECTOR if VECTOR > 0 else 1
    D = D * scale
    tiles_d = tl.cdiv(D, COLS)
    pid = tl.program_id(0)
    b = (pid // tiles_d // boundaries).to(tl.int64)
    c = pid // tiles_d % boundaries
    o_d = pid % tiles_d * COLS + tl.arange(0, COLS)
    inside = o_d < D
    boundary = (c + 1) * PIECE
    token = tl.load(p_order + b * N + boundary).to(tl.int64)
    slot = tl.load(p_into + b * stride_ib + token * stride_in).to(tl.int64)
    there = (slot >= 0) & (slot < S)
    begin = tl.load(p_start + b * (S + 1) + slot, mask=there, other=0)
    end = tl.load(p_start + b * (S + 1) + slot + 1, mask=there, other=0)
    if there & (begin < boundary) & (begin >= boundary - PIECE):
        # [COLS]: place 2 c of this boundary, then places 2 c + 1 of this one and the following
        p_sum = p_partial + (b * boundaries + c) * 2 * D + o_d
        acc = tl.load(p_sum, mask=inside, other=0)
        more = tl.cdiv(end, PIECE) - 1 - c
        step = 0
        while step < more:
            for u in tl.static_range(ROWS):
                here = o_d < tl.where(more > step + u, D, 0)
                acc += tl.load(p_sum + ((step + u).to(tl.int64) * 2 + 1) * D, mask=here, other=0)
            step += ROWS
        tl.store(p_out + (b * S + slot) * D + o_d, acc.to(p_out.dtype.element_ty), mask=inside)


def _merge(x: Tensor, into: Tensor, weight: Tensor | None, n_out: int) -> Tensor:
    b, n, d = x.shape
    out = torch.empty(b, n_out, d, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    acc = torch.promote_types(x.dtype, torch.float32)
    order = torch.empty(b, n, dtype=torch.int32, device=x.device)
    start = torch.empty(b, n_out + 1, dtype=torch.int32, device=x.device)
    boundaries = max(n - 1, 0) // PIECE
    partial = torch.empty(b, boundaries, 2, d, dtype=acc, device=x.device) if boundaries else None
    vector = vectors(x)
    scale, cols = max(1, vector), feature_block(d, 512)
    rows, tiles = TILE // cols, triton.cdiv(d, cols)
    with torch.cuda.device_of(x):
        plan_kernel[(b * triton.cdiv(n + n_out + 1, QUERIES),)](
            into,
            order,
            start,
            n,
            n_out,
            *into.stride(),
            QUERIES=QUERIES,
            KEYS=KEYS,
            KEY=tl.int32 if (n_out + 1) * n + KEYS < 2**31 else tl.int64,
            num_warps=8,
        )
        merge_kernel[(b * triton.cdiv(n_out + boundaries, rows) * tiles,)](
            x,
            into,
            weight,
            order,
            start,
            out,
            partial,
            n,
            n_out,
            d // scale,
            boundaries,
            *(stride // scale for stride in x.stride()),
            *into.stride(),
            *((0, 0) if weight is None else weight.stride()),
            PIECE=PIECE,
            ROWS=rows,
            COLS=cols,
            VECTOR=vector,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
        )
        if boundaries:
            finish_kernel[(b * boundaries * tiles,)](
                into,
                order,
                start,
                partial,
                out,
                n,
                n_out,
                d // scale,
                boundaries,
                *into.stride(),
                PIECE=PIECE,
                ROWS=PARTIAL_ROWS,
                COLS=cols,
                VECTOR=vector,
            )
    return out


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, into: Tensor, weight: Tensor | None, n_out: int) -> Tensor:
        ctx.save_for_backward(x, into, weight)
        return _merge(x.detach(), into, None if weight is None else weight.detach(), n_out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, into, weight = ctx.saved_tensors
        acc = torch.promote_types(x.dtype, torch.float32)
        # [B, N, D]: what each token's slot passes down; nothing to a token that went nowhere
        kept = (into >= 0).unsqueeze(-1)
        slot = into.clamp(min=0).unsqueeze(-1).expand(-1, -1, grad.shape[-1])
        grad = grad.gather(1, slot).to(acc)
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            weighted = grad if weight is None else grad * weight.to(acc).unsqueeze(-1)
            to_x = weighted.masked_fill(~kept, 0).to(x.dtype)
        if ctx.needs_input_grad[2]:
            to_weight = (grad * x.to(acc)).masked_fill(~kept, 0).sum(-1).to(weight.dtype)
        return to_x, None, to_weight, None


def merge_tokens(x: Tensor, into: Tensor, weight: Tensor | None, n_out: int) -> Tensor:
    """As :func:`vtprune.kernels.reference.merge_tokens`, the same bits in every run; differentiable in x and weight.

    A slot adds its members in ascending order, those beyond a multiple of 32 sorted tokens as partial sums.

    Args:
        weight: None counts as ones.

    Raises:
        VTPruneError: the shapes do not fit each other.
    """
    if into.shape != x.shape[:2] or (weight is not None and weight.shape != into.shape):
        raise VTPruneError(
            f"merge_tokens() needs x [B, N, D] with into and weight [B, N], not {tuple(x.shape)}, "
            f"{tuple(into.shape)} and {None if weight is None else tuple(weight.shape)}."
        )
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        out: Tensor = _Merge.apply(x, into, weight, n_out)
        return out
    return _merge(x, into, weight, n_out)
