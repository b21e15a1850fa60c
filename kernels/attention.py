"""Triton attention of a few queries over all keys, and the attention that keys receive from all queries.

No N x N matrix is ever stored, and no sum uses atomics. How work is split depends on sizes of one picture alone (rows,
keys, head size), never on the batch, so a picture has the same bits alone and in every batch.

- Up to FEW_ROWS rows of one key head: pass 1 reads the keys once and writes logits with a maximum and a sum per tile,
  pass 2 normalises in place. That is 1.05 to 1.7 times the bytes of keys and result, less where logits stay in the L2 cache.
- More rows: pass 1 finds the maximum and the sum of every row (as FlashAttention does), pass 2 multiplies once more and
  writes each probability once, because writing, reading and writing logits would cost more than the keys.
- Columns: pass 1 as above; in pass 2 each program owns a block of keys and goes over the queries.

Query heads of one key head stand below each other as rows of one matrix [H // G * R, d], so keys are read once for all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.errors import UnsupportedCallError

# Rows of one key head up to which logits are stored and normalised in place: the smallest side of a tensor-core tile.
FEW_ROWS = 16
# Rows up to which bfloat16 and float16 are multiplied without tensor cores, whose tile would be mostly padding.
VECTOR_ROWS = 4
# Elements of a tile of keys without tensor cores: 64 float32 registers in each of 128 threads.
TILE = 8192
# Keys (queries) per program where one loops over them; both have an upper bound on the number of splits.
SPLIT_KEYS, MAX_KEY_SPLITS = 512, 32
SPLIT_QUERIES, MAX_QUERY_SPLITS = 512, 8
BLOCK_NORMALISE = 1024
BLOCK_STATS = 32
MAX_HEAD = 256
HALF = (torch.bfloat16, torch.float16)
# The interpreter multiplies the bit patterns of bfloat16.
WIDENED = tl.constexpr(bool(triton.knobs.runtime.interpret))
NEVER_SPECIALIZED = ["G", "M", "R", "N", "S", "keys_per_split", "queries_per_split", "rows"]


@triton.jit  # type: ignore[untyped-decorator]
def load_tile(p_x, o_row, row_inside, c, stride_d, HEAD: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK, STEP] features c to c + STEP of rows that start at the offsets o_row [BLOCK]."""
    o_d = c + tl.arange(0, STEP).to(tl.int64)
    tile = tl.load(
        p_x + o_row[:, None] + o_d[None, :] * stride_d,
        mask=row_inside[:, None] & (o_d < HEAD)[None, :],
        other=0,
    )
    if WIDENED or tile.dtype == tl.float64:
        tile = tile.to(tl.float32)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def products(  # type: ignore[no-untyped-def]
    p_a,
    o_a,
    a_inside,
    stride_ad,
    p_b,
    o_b,
    b_inside,
    stride_bd,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    """[BLOCK_A, BLOCK_B] float32 inner products of two sets of rows, STEP features at a time."""
    acc = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for c in range(0, BLOCK_D, STEP):
        a = load_tile(p_a, o_a, a_inside, c, stride_ad, HEAD, STEP)
        b = load_tile(p_b, o_b, b_inside, c, stride_bd, HEAD, STEP)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def seen(  # type: ignore[no-untyped-def]
    p_visible, o_row, o_key, row_inside, key_inside, VISIBLE: tl.constexpr
):
    """[BLOCK_M, BLOCK_N] which keys the rows see: "all", a mask of "keys" [B, N] or one of "rows" [B, R, N]."""
    inside = row_inside[:, None] & key_inside[None, :]
    if VISIBLE == "keys":
        return inside & tl.load(p_visible + o_key, mask=key_inside, other=False)[None, :]
    if VISIBLE == "rows":
        return inside & tl.load(p_visible + (o_row[:, None] + o_key[None, :]), mask=inside, other=False)
    return inside


@triton.jit
def finite(top):  # type: ignore[no-untyped-def]
    """A maximum that can be subtracted: 0 where nothing was seen yet (-inf)."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit  # type: ignore[untyped-decorator]
def combined(p_top, p_sum, row, inside, S, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr):  # type: ignore[no-untyped-def]
    """Maximum and sum of exponentials [BLOCK] of whole rows, from those of their S parts."""
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, S, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        mask = inside[:, None] & (o_s < S)[None, :]
        part = row[:, None] * S + o_s[None, :]
        # [BLOCK, BLOCK_S]
        b_top = tl.load(p_top + part, mask=mask, other=float("-inf"))
        b_sum = tl.load(p_sum + part, mask=mask, other=0)
        new = tl.maximum(top, tl.max(b_top, 1))
        base = finite(new)
        total = total * tl.exp(top - base) + tl.sum(b_sum * tl.exp(b_top - base[:, None]), 1)
        top = new
    return top, total


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)  # type: ignore[untyped-decorator]
def vector_rows_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_visible,
    p_out,
    p_top,
    p_sum,
    scale,
    G,
    M,
    R,
    N,
    S,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_qd,
    stride_kb,
    stride_kg,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vr,
    stride_vn,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VISIBLE: tl.constexpr,
):
    # One program keeps a tile of keys in registers and multiplies it by the rows of its key head, one by one.
    pid = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    b = pid // G
    g = pid % G
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o_key = o_n.to(tl.int64)
    inside = o_n < N
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    # [BLOCK_N, BLOCK_D]
    b_k = load_tile(
        p_k, b * stride_kb + g * stride_kg + o_key * stride_kn, inside, 0, stride_kd, HEAD, BLOCK_D
    )
    b_k = b_k.to(tl.float32)
    for m in range(M):
        h = g * (M // R) + m // R
        r = (m % R).to(tl.int64)
        # [BLOCK_D]
        b_q = tl.load(
            p_q + b * stride_qb + h * stride_qh + r * stride_qr + o_d * stride_qd, mask=o_d < HEAD, other=0
        )
        logits = tl.sum(b_k * b_q.to(tl.float32)[None, :], 1) * scale
        may = inside
        if VISIBLE != "all":
            may = may & tl.load(
                p_visible + b * stride_vb + r * stride_vr + o_key * stride_vn, mask=inside, other=False
            )
        logits = tl.where(may, logits, float("-inf"))
        row = pid * M + m
        tl.store(p_out + row * N + o_n, logits, mask=inside)
        top = tl.max(logits, 0)
        tl.store(p_top + row * S + tile, top)
        tl.store(p_sum + row * S + tile, tl.sum(tl.exp(logits - finite(top)), 0))


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)  # type: ignore[untyped-decorator]
def rows_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_visible,
    p_out,
    p_top,
    p_sum,
    scale,
    G,
    M,
    R,
    N,
    S,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_qd,
    stride_kb,
    stride_kg,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vr,
    stride_vn,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    VISIBLE: tl.constexpr,
    FIRST: tl.constexpr,
):
    # One program: one tile of one key head's rows. FIRST writes logits with their maximum and sum per tile, otherwise
    # maximum and reciprocal sum of whole rows (S = 1) are known and probabilities are written.
    blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    b = pid // blocks // G
    g = pid // blocks % G
    o_m = (pid % blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = o_m < M
    key_inside = o_n < N
    h = g * (M // R) + o_m // R
    r = (o_m % R).to(tl.int64)
    o_key = o_n.to(tl.int64)
    # [BLOCK_M, BLOCK_N]
    logits = (
        products(
            p_q,
            b * stride_qb + h * stride_qh + r * stride_qr,
            row_inside,
            stride_qd,
            p_k,
            b * stride_kb + g * stride_kg + o_key * stride_kn,
            key_inside,
            stride_kd,
            BLOCK_M,
            BLOCK_N,
            HEAD,
            BLOCK_D,
            STEP,
        )
        * scale
    )
    may = seen(p_visible + b * stride_vb, r * stride_vr, o_key * stride_vn, row_inside, key_inside, VISIBLE)
    logits = tl.where(may, logits, float("-inf"))
    row = pid // blocks * M + o_m
    inside = row_inside[:, None] & key_inside[None, :]
    p_part = p_out + row[:, None] * N + o_n[None, :]
    if FIRST:
        tl.store(p_part, logits, mask=inside)
        top = tl.max(logits, 1)
        total = tl.sum(tl.exp(logits - finite(top)[:, None]), 1)
        tl.store(p_top + row * S + tile, top, mask=row_inside)
        tl.store(p_sum + row * S + tile, total, mask=row_inside)
    else:
        top = tl.load(p_top + row, mask=row_inside, other=0)
        inverse = tl.load(p_sum + row, mask=row_inside, other=0)
        tl.store(p_part, tl.exp(logits - top[:, None]) * inverse[:, None], mask=inside)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)  # type: ignore[untyped-decorator]
def normalise_kernel(  # type: ignore[no-untyped-def]
    p_out, p_top, p_sum, N, S, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr
):
    # One program turns one block of one row of logits into probabilities, in place.
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    top, total = combined(p_top, p_sum, row, row >= 0, S, 1, BLOCK_S)
    o_n = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p_part = p_out + row[:, None] * N + o_n[None, :]
    inside = (o_n < N)[None, :]
    # [1, BLOCK]
    logits = tl.load(p_part, mask=inside, other=0)
    # A row that sees nothing is -inf - -inf = NaN, as in torch's softmax.
    tl.store(p_part, tl.exp(logits - top[:, None]) / total[:, None], mask=inside)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)  # type: ignore[untyped-decorator]
def stats_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_visible,
    p_top,
    p_sum,
    scale,
    G,
    M,
    R,
    N,
    S,
    keys_per_split,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_qd,
    stride_kb,
    stride_kg,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vr,
    stride_vn,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    VISIBLE: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    # One program goes over one part of the keys for one block of rows.
    blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = pid // blocks // G
    g = pid // blocks % G
    o_m = (pid % blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = o_m < M
    h = g * (M // R) + o_m // R
    own = o_m % R + (N - R)
    r = (o_m % R).to(tl.int64)
    o_q = b * stride_qb + h * stride_qh + r * stride_qr
    o_k = b * stride_kb + g * stride_kg
    first = split * keys_per_split
    last = tl.minimum(first + keys_per_split, N)
    if CAUSAL:
        last = tl.minimum(last, tl.max(tl.where(row_inside, own, -1), 0) + 1)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        o_key = o_n.to(tl.int64)
        key_inside = o_n < last
        # [BLOCK_M, BLOCK_N]
        logits = (
            products(
                p_q,
                o_q,
                row_inside,
                stride_qd,
                p_k,
                o_k + o_key * stride_kn,
                key_inside,
                stride_kd,
                BLOCK_M,
                BLOCK_N,
                HEAD,
                BLOCK_D,
                STEP,
            )
            * scale
        )
        may = seen(
            p_visible + b * stride_vb, r * stride_vr, o_key * stride_vn, row_inside, key_inside, VISIBLE
        )
        if CAUSAL:
            itself = (o_n[None, :] == own[:, None]) & (row_inside[:, None] & key_inside[None, :])
            may = (may & (o_n[None, :] <= own[:, None])) | itself
        logits = tl.where(may, logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        base = finite(new)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        top = new
    part = (pid // blocks * M + o_m) * S + split
    tl.store(p_top + part, top, mask=row_inside)
    tl.store(p_sum + part, total, mask=row_inside)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)  # type: ignore[untyped-decorator]
def combine_kernel(  # type: ignore[no-untyped-def]
    p_top, p_sum, p_row_top, p_row_inverse, rows, S, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr
):
    # One program writes maximum and reciprocal sum of BLOCK whole rows.
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    top, total = combined(p_top, p_sum, row, inside, S, BLOCK, BLOCK_S)
    tl.store(p_row_top + row, top, mask=inside)
    tl.store(p_row_inverse + row, 1 / total, mask=inside)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)  # type: ignore[untyped-decorator]
def columns_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_visible,
    p_asking,
    p_row_top,
    p_row_inverse,
    p_out,
    scale,
    G,
    M,
    R,
    N,
    queries_per_split,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_qd,
    stride_kb,
    stride_kg,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_ab,
    stride_ar,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    VISIBLE: tl.constexpr,
    ASKING: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    # One program sums what one block of keys receives from one part of the queries of one head. Causal blocks come in
    # the order of their work: the first keys are seen by most queries.
    heads = G * (M // R)
    pid = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    b = pid // heads
    h = pid % heads
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_key = o_n.to(tl.int64)
    key_inside = o_n < N
    visible = key_inside
    if VISIBLE != "all":
        visible = tl.load(p_visible + b * stride_vb + o_key * stride_vn, mask=key_inside, other=False)
    o_k = b * stride_kb + h // (M // R) * stride_kg + o_key * stride_kn
    o_q = b * stride_qb + h * stride_qh
    first = split * queries_per_split
    last = tl.minimum(first + queries_per_split, R)
    if CAUSAL:
        # Queries in front of the first key (where R > N) see nothing, and their NaN belongs to all keys.
        first = tl.where(R > N, first, tl.maximum(first, tl.program_id(1) * BLOCK_N - (N - R)))
    received = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        r = o_m.to(tl.int64)
        counts = o_m < last
        # [BLOCK_M, BLOCK_N]
        logits = (
            products(
                p_q,
                o_q + r * stride_qr,
                counts,
                stride_qd,
                p_k,
                o_k,
                key_inside,
                stride_kd,
                BLOCK_M,
                BLOCK_N,
                HEAD,
                BLOCK_D,
                STEP,
            )
            * scale
        )
        top = tl.load(p_row_top + pid * R + r, mask=counts, other=0)
        inverse = tl.load(p_row_inverse + pid * R + r, mask=counts, other=0)
        if ASKING:
            counts = tl.load(p_asking + b * stride_ab + r * stride_ar, mask=counts, other=False)
        may = visible[None, :]
        if CAUSAL:
            own = (o_m + (N - R))[:, None]
            may = (may & (o_n[None, :] <= own)) | (o_n[None, :] == own)
        share = tl.exp(tl.where(may, logits, float("-inf")) - top[:, None]) * inverse[:, None]
        # Not by a factor of 0: rows that do not count may be NaN.
        received += tl.where(counts[:, None], share, 0.0)
    row = split * tl.num_programs(0).to(tl.int64) + pid
    tl.store(p_out + row * N + o_n, tl.sum(received, 0), mask=key_inside)


class _WithoutGradient(torch.autograd.Function):
    """Passes a result on and refuses to be differentiated, so that a missing gradient is an error, not a zero."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, out: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> None:
        raise UnsupportedCallError(
            "the Triton attention of vtprune.ops measures and has no gradient; call it under torch.no_grad(), or set "
            "VTPRUNE_BACKEND=reference to differentiate it"
        )


def _result(out: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _WithoutGradient.apply(out, q, k)  # type: ignore[no-any-return]
    return out


def _check(q: Tensor, k: Tensor) -> None:
    """Refuses what would read outside of a tensor, or has no tile."""
    b, h, _, d = q.shape
    if k.shape[0] != b or k.shape[3] != d or k.dtype != q.dtype or h % k.shape[1]:
        raise UnsupportedCallError(
            f"attention of queries {tuple(q.shape)} {q.dtype} over keys {tuple(k.shape)} {k.dtype}: batch, head size and "
            "dtype must be the same, and the key heads divide the query heads"
        )
    if d > MAX_HEAD:
        raise UnsupportedCallError(
            f"the Triton attention has head sizes up to {MAX_HEAD}, not {d}; set VTPRUNE_BACKEND=reference"
        )


def _seen(visible: Tensor | None, q: Tensor, n: int) -> tuple[str, Tensor, tuple[int, ...]]:
    """Kind, tensor (q where none is read) and strides (batch, row, key) of a mask [B, N] or [B, R, N]."""
    if visible is None:
        return "all", q, (0, 0, 0)
    if visible.ndim == 2:
        visible = visible.expand(q.shape[0], n)
        return "keys", visible, (visible.stride(0), 0, visible.stride(1))
    visible = visible.expand(q.shape[0], q.shape[2], n)
    return "rows", visible, visible.stride()


def _tiles(q: Tensor) -> dict[str, int]:
    """Head size and blocks of the kernels with many rows."""
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    # Features at a time: all, where a tile of tensor-core operands fits three times into 48 KiB of shared memory; few
    # for float32, which is multiplied from registers.
    step = 32 if q.dtype not in HALF else 64 if block_d > 128 else block_d
    return {
        "HEAD": q.shape[3],
        "BLOCK_D": block_d,
        "STEP": min(step, block_d),
        "BLOCK_M": 64,
        "BLOCK_N": 64,
    }


def _stats(
    q: Tensor, k: Tensor, scale: float, visible: Tensor | None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Maximum of the logits of every row and reciprocal of the sum of its exponentials, each [B, H, R] float32."""
    b, h, r, _ = q.shape
    g, n = k.shape[1:3]
    m = h // g * r
    tiles = _tiles(q)
    per_split = max(SPLIT_KEYS, triton.cdiv(n, MAX_KEY_SPLITS))
    per_split = triton.cdiv(per_split, tiles["BLOCK_N"]) * tiles["BLOCK_N"]
    splits = triton.cdiv(n, per_split)
    kind, mask, mask_strides = _seen(visible, q, n)
    top, total = torch.empty(2, b * h * r, splits, dtype=torch.float32, device=q.device)
    row_top, row_inverse = torch.empty(2, b, h, r, dtype=torch.float32, device=q.device)
    stats_kernel[(b * g * triton.cdiv(m, tiles["BLOCK_M"]), splits)](
        q,
        k,
        mask,
        top,
        total,
        scale,
        g,
        m,
        r,
        n,
        splits,
        per_split,
        *q.stride(),
        *k.stride(),
        *mask_strides,
        VISIBLE=kind,
        CAUSAL=causal,
        **tiles,
    )
    combine_kernel[(triton.cdiv(b * h * r, BLOCK_STATS),)](
        top, total, row_top, row_inverse, b * h * r, splits, BLOCK=BLOCK_STATS, BLOCK_S=MAX_KEY_SPLITS
    )
    return row_top, row_inverse


def _few_rows(q: Tensor, k: Tensor, scale: float, visible: Tensor | None, out: Tensor) -> None:
    b, h, r, d = q.shape
    g, n = k.shape[1:3]
    m = h // g * r
    block_d = max(16, triton.next_power_of_2(d))
    block_n = max(32, min(128, TILE // block_d))
    splits = triton.cdiv(n, block_n)
    kind, mask, mask_strides = _seen(visible, q, n)
    top, total = torch.empty(2, b * h * r, splits, dtype=torch.float32, device=q.device)
    arguments = (
        q,
        k,
        mask,
        out,
        top,
        total,
        scale,
        g,
        m,
        r,
        n,
        splits,
        *q.stride(),
        *k.stride(),
        *mask_strides,
    )
    sizes = {"HEAD": d, "BLOCK_N": block_n, "BLOCK_D": block_d, "VISIBLE": kind}
    if m <= VECTOR_ROWS or q.dtype not in HALF:
        vector_rows_kernel[(b * g, splits)](*arguments, **sizes)
    else:
        rows_kernel[(b * g, splits)](*arguments, **sizes, BLOCK_M=FEW_ROWS, STEP=block_d, FIRST=True)
    normalise_kernel[(b * h * r, triton.cdiv(n, BLOCK_NORMALISE))](
        out, top, total, n, splits, BLOCK=BLOCK_NORMALISE, BLOCK_S=128
    )


def attention_rows(q: Tensor, k: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """As :func:`vtprune.kernels.reference.attention_rows`, without gradient; products accumulate in float32.

    Inputs are float32, bfloat16 or float16; float64 is rounded to float32 first.

    Raises:
        UnsupportedCallError: shapes or dtypes of q and k do not fit, heads larger than MAX_HEAD, or a backward pass.
    """
    _check(q, k)
    b, h, r, _ = q.shape
    g, n = k.shape[1:3]
    out = torch.empty(b, h, r, n, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return _result(out, q, k)
    with torch.cuda.device_of(q):
        if h // g * r <= FEW_ROWS:
            _few_rows(q, k, float(scale), visible, out)
        else:
            top, inverse = _stats(q, k, float(scale), visible)
            tiles = _tiles(q)
            kind, mask, mask_strides = _seen(visible, q, n)
            m = h // g * r
            rows_kernel[(b * g * triton.cdiv(m, tiles["BLOCK_M"]), triton.cdiv(n, tiles["BLOCK_N"]))](
                q,
                k,
                mask,
                out,
                top,
                inverse,
                float(scale),
                g,
                m,
                r,
                n,
                1,
                *q.stride(),
                *k.stride(),
                *mask_strides,
                VISIBLE=kind,
                FIRST=False,
                **tiles,
            )
    return _result(out, q, k)


def attention_columns(
    q: Tensor,
    k: Tensor,
    scale: float,
    visible: Tensor | None = None,
    asking: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """As :func:`vtprune.kernels.reference.attention_columns`, without gradient; products accumulate in float32.

    Inputs and errors as for :func:`attention_rows`. A causal query that is NaN makes NaN of the keys that it sees (the
    reference: of all keys).
    """
    _check(q, k)
    b, h, r, _ = q.shape
    g, n = k.shape[1:3]
    splits = max(1, min(MAX_QUERY_SPLITS, triton.cdiv(r, SPLIT_QUERIES)))
    out = torch.empty(splits, b, h, n, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or r == 0:
        return _result(out[0].zero_(), q, k)
    with torch.cuda.device_of(q):
        top, inverse = _stats(q, k, float(scale), visible, causal)
        tiles = _tiles(q)
        kind, mask, mask_strides = _seen(visible, q, n)
        counting = q if asking is None else asking.expand(b, r)
        columns_kernel[(b * h, triton.cdiv(n, tiles["BLOCK_N"]), splits)](
            q,
            k,
            mask,
            counting,
            top,
            inverse,
            out,
            float(scale),
            g,
            h // g * r,
            r,
            n,
            triton.cdiv(r, splits),
            *q.stride(),
            *k.stride(),
            mask_strides[0],
            mask_strides[2],
            *counting.stride()[:2],
            VISIBLE=kind,
            ASKING=asking is not None,
            CAUSAL=causal,
            **tiles,
        )
    return _result(out[0] if splits == 1 else out.sum(0), q, k)
