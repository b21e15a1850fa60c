"""Triton gather of tokens: rows of many tensors in one launch, and rows and columns of an attention mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.kernels.merge import UNSIGNED, feature_block, merge_tokens, vectors

TILE_BYTES = 8192  # copied per program of 4 warps: four 16-byte loads in flight per thread
TILE_ELEMENTS = 4096
TENSORS = 16  # per launch, because a kernel's parameters may take 4 KB
MASK_TILE = (8, 256)
SIZES: tl.constexpr = tl.constexpr(12)  # entries per tensor in the kernel's argument of that name


def _plain(sizes: Sequence[int]) -> tuple[int, ...]:
    """Hides integers from Triton, which compiles anew for a 1 or a multiple of 16 inside a tuple; `>> 4` undoes it."""
    return tuple(size * 16 + 8 for size in sizes)


@triton.jit  # type: ignore[untyped-decorator]
def _size(sizes, i: tl.constexpr):  # type: ignore[no-untyped-def]
    return sizes[i].to(tl.int64) >> 4


@triton.jit  # type: ignore[untyped-decorator]
def _copy_tile(  # type: ignore[no-untyped-def]
    p_x,
    p_index,
    p_out,
    p_valid,
    sizes,
    I: tl.constexpr,
    B,
    K,
    stride_vb,
    stride_vk,
    pid,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # VECTOR > 0: the last stride is 1, all other sizes count vectors of so many elements; 0: any strides.
    scale: tl.constexpr = VECTOR if VECTOR > 0 else 1
    D = _size(sizes, I + 1) * scale
    tiles_d = tl.cdiv(D, COLS).to(tl.int32)
    tiles_k = tl.cdiv(K, ROWS)
    o_d = pid % tiles_d * COLS + tl.arange(0, COLS)
    o_k = (pid // tiles_d % tiles_k).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    image = pid // tiles_d // tiles_k
    b = (image % B).to(tl.int64)
    lead = (image // B).to(tl.int64)

    here = o_k < K
    read = here
    if p_valid is not None:
        read &= tl.load(p_valid + b * stride_vb + o_k * stride_vk, mask=here, other=0) != 0
    # [ROWS]
    token = tl.load(p_index + b * _size(sizes, I + 10) + o_k * _size(sizes, I + 11), mask=read, other=0)
    source = lead * _size(sizes, I + 2) + b * _size(sizes, I + 3) + token.to(tl.int64) * _size(sizes, I + 4)
    target = lead * _size(sizes, I + 6) + b * _size(sizes, I + 7) + o_k * _size(sizes, I + 8)
    if VECTOR > 0:
        x_d = o_d
        out_d = o_d
    else:
        x_d = o_d * _size(sizes, I + 5)
        out_d = o_d * _size(sizes, I + 9)
    inside = (o_d < D)[None, :]
    # [ROWS, COLS]
    x = tl.load(p_x + (source[:, None] * scale + x_d[None, :]), mask=read[:, None] & inside, other=0)
    tl.store(p_out + (target[:, None] * scale + out_d[None, :]), x, mask=here[:, None] & inside)


@triton.jit(do_not_specialize=["B", "K", "stride_vb", "stride_vk"])  # type: ignore[untyped-decorator]
def gather_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_index,
    p_out,
    p_valid,
    sizes,
    B,
    K,
    stride_vb,
    stride_vk,
    TILES: tl.constexpr,
):
    # The programs of all tensors in a row; sizes[12 i] is the first one after those of tensor i.
    pid = tl.program_id(0)
    first = pid * 0
    for i in tl.static_range(len(TILES)):
        end = _size(sizes, i * SIZES).to(tl.int32)
        if (pid >= first) & (pid < end):
            _copy_tile(
                p_x[i],
                p_index[i],
                p_out[i],
                p_valid,
                sizes,
                i * SIZES,
                B,
                K,
                stride_vb,
                stride_vk,
                pid - first,
                TILES[i][0],
                TILES[i][1],
                TILES[i][2],
            )
        first = end


def _like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised tensor of this shape whose dimensions lie in memory in x's order."""
    strides = list(x.stride())
    for i in reversed(range(x.ndim - 1)):
        # A broadcast dimension has no place in memory of its own; it goes where its index says.
        if strides[i] == 0:
            strides[i] = strides[i + 1]
    order = sorted(range(x.ndim), key=lambda i: -strides[i])
    out = torch.empty([shape[i] for i in order], dtype=x.dtype, device=x.device)
    return out.permute([order.index(i) for i in range(x.ndim)])


def _launch(tensors: Sequence[Tensor], indices: Sequence[Tensor], valid: Tensor | None) -> list[Tensor]:
    """The kernel on at most `TENSORS` tensors [..., B, N, D]."""
    b, k = indices[0].shape
    outs, args, sizes, tiles, programs = [], [], [], [], 0
    for x, index in zip(tensors, indices, strict=True):
        d, bits = x.shape[-1], UNSIGNED[x.element_size()]
        # Several leading dimensions become one (a copy where their strides do not allow it).
        source = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
        target = _like(source, (len(source), b, k, d))
        outs.append(target.view(*x.shape[:-2], k, d))
        if not target.numel():
            continue
        vector = min(vectors(source), vectors(target))
        cols = feature_block(d, 1024)
        rows = max(1, min(TILE_BYTES // x.element_size(), TILE_ELEMENTS) // cols)
        programs += len(source) * b * triton.cdiv(k, rows) * triton.cdiv(d, cols)
        scale = max(1, vector)
        strides = [stride // scale for stride in (*source.stride(), *target.stride())]
        sizes += [programs, d // scale, *strides, *index.stride()]
        args.append((source.view(bits), index, target.view(bits)))
        tiles.append((rows, cols, vector))
    if programs >= 2**31:
        raise VTPruneError(
            f"{programs} tiles are too many for one gather (at most 2^31 - 1); split the batch."
        )
    if args:
        with torch.cuda.device_of(outs[0]):
            gather_kernel[(programs,)](
                *zip(*args, strict=True),
                None if valid is None else valid.view(torch.uint8),
                _plain(sizes),
                b,
                k,
                *((0, 0) if valid is None else valid.stride()),
                TILES=tuple(tiles),
            )
    return outs


def _gather(tensors: Sequence[Tensor], indices: Sequence[Tensor], valid: Tensor | None) -> list[Tensor]:
    outs = []
    for i in range(0, len(tensors), TENSORS):
        outs += _launch(tensors[i : i + TENSORS], indices[i : i + TENSORS], valid)
    return outs


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, valid: Tensor | None, number: int, *args: Tensor) -> tuple[Tensor, ...]:
        tensors, indices = args[:number], args[number:]
        outs = _gather([x.detach() for x in tensors], indices, valid)
        ctx.save_for_backward(valid, *indices)
        ctx.shapes = [x.shape for x in tensors]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(out for out, x in zip(outs, tensors, strict=True) if not x.requires_grad)
        )
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        valid, *indices = ctx.saved_tensors
        out: list[Tensor | None] = []
        for grad, shape, index in zip(grads, ctx.shapes, indices, strict=True):
            if grad is None:
                out.append(None)
                continue
            # The adjoint of gather is merge with weights of one: sums what an index took several times.
            into = index if valid is None else index.masked_fill(~valid, -1)
            rows = math.prod(shape[:-2])
            into = into.expand(*shape[:-3], -1, -1).reshape(rows, index.shape[1])
            merged = merge_tokens(grad.reshape(rows, *grad.shape[-2:]), into, None, shape[-2])
            out.append(merged.view(shape))
        return None, None, *out, *(None for _ in indices)


def gather_many(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], valid: Tensor | None = None
) -> list[Tensor]:
    """As :func:`vtprune.kernels.reference.gather_many`, in one launch (per 16 tensors).

    Differentiable in every floating tensor; an index that repeats sums, with the same bits in every run.

    Raises:
        VTPruneError: the indices differ in shape, or `valid` from them.
    """
    for index in indices:
        if index.shape != indices[0].shape or (valid is not None and valid.shape != index.shape):
            shapes = [tuple(i.shape) for i in (*indices, *(() if valid is None else (valid,)))]
            raise VTPruneError(f"gather_many() needs indices (and valid) of one shape [B, K], not {shapes}.")
    tensors = [x.expand(*x.shape[:-3], len(index), -1, -1) for x, index in zip(tensors, indices, strict=True)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return list(_Gather.apply(valid, len(tensors), *tensors, *indices))
    return _gather(tensors, indices, valid)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """As :func:`vtprune.kernels.reference.gather_tokens`, by a Triton kernel; differentiable in x."""
    return gather_many([x], [index])[0].contiguous()


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        *("H", "K", "stride_mb", "stride_mh", "stride_mi", "stride_mj"),
        *("stride_ib", "stride_ik", "stride_vb", "stride_vk"),
    ]
)
def gather_mask_kernel(  # type: ignore[no-untyped-def]
    p_mask,
    p_index,
    p_valid,
    p_out,
    H,
    K,
    stride_mb,
    stride_mh,
    stride_mi,
    stride_mj,
    stride_ib,
    stride_ik,
    stride_vb,
    stride_vk,
    SHUT: tl.constexpr,
    OPENED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    tiles_i = tl.cdiv(K, ROWS)
    tiles_j = tl.cdiv(K, COLS)
    image = pid // tiles_j // tiles_i
    b = image // H
    o_i = pid // tiles_j % tiles_i * ROWS + tl.arange(0, ROWS)
    o_j = pid % tiles_j * COLS + tl.arange(0, COLS)
    in_i = o_i < K
    in_j = o_j < K
    p_index += b * stride_ib
    row = tl.load(p_index + o_i * stride_ik, mask=in_i, other=0).to(tl.int64)
    col = tl.load(p_index + o_j * stride_ik, mask=in_j, other=0).to(tl.int64)
    read = in_j
    if p_valid is not None:
        read &= tl.load(p_valid + b * stride_vb + o_j * stride_vk, mask=in_j, other=0) != 0
    # [ROWS, COLS]
    p_mask += b * stride_mb + image % H * stride_mh
    seen = tl.load(
        p_mask + (row[:, None] * stride_mi + col[None, :] * stride_mj),
        mask=in_i[:, None] & read[None, :],
        other=SHUT,
    )
    if p_valid is not None:
        # A slot that is not valid sees itself.
        itself = (o_i[:, None] == o_j[None, :]) & ~read[None, :]
        seen = tl.where(itself, OPENED, seen).to(seen.dtype)
    tl.store(p_out + (image * K + o_i[:, None]) * K + o_j[None, :], seen, mask=in_i[:, None] & in_j[None, :])


def _mask_bits(dtype: torch.dtype) -> tuple[int, int]:
    """The bits of "may not see" and "may see" in a mask, as an integer of the same size."""
    if dtype == torch.bool:
        return 0, 1
    lowest = torch.tensor(torch.finfo(dtype).min, dtype=dtype, device="cpu")
    return int(lowest.view(UNSIGNED[lowest.element_size()])), 0


def _gather_mask(mask: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    b, k = index.shape
    h = mask.shape[1]
    mask = mask.expand(b, -1, -1, -1)
    out = torch.empty(b, h, k, k, dtype=mask.dtype, device=mask.device)
    if out.numel():
        bits = UNSIGNED[mask.element_size()]
        shut, opened = (0, 0) if valid is None else _mask_bits(mask.dtype)
        rows, cols = MASK_TILE
        with torch.cuda.device_of(out):
            gather_mask_kernel[(b * h * triton.cdiv(k, rows) * triton.cdiv(k, cols),)](
                mask.view(bits),
                index,
                None if valid is None else valid.view(torch.uint8),
                out.view(bits),
                h,
                k,
                *mask.stride(),
                *index.stride(),
                *((0, 0) if valid is None else valid.stride()),
                SHUT=shut,
                OPENED=opened,
                ROWS=rows,
                COLS=cols,
            )
    return out


class _GatherMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, valid)
        ctx.size = mask.shape[-1]
        return _gather_mask(mask.detach(), index, valid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, valid = ctx.saved_tensors
        h, k = grad.shape[1:3]
        if valid is not None:
            grad = grad.masked_fill(~valid[:, None, None], 0)
        into = index.repeat_interleave(h, 0)
        for _ in range(2):  # rows, then columns
            grad = merge_tokens(grad.reshape(len(into), k, grad.shape[-1]), into, None, ctx.size).transpose(
                1, 2
            )
        return grad.view(len(index), h, ctx.size, ctx.size), None, None


def gather_mask(mask: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """As :func:`vtprune.kernels.reference.gather_mask`, in one launch; differentiable in a float mask."""
    mask = mask.expand(len(index), -1, -1, -1)
    if torch.is_grad_enabled() and mask.requires_grad:
        out: Tensor = _GatherMask.apply(mask, index, valid)
        return out
    return _gather_mask(mask, index, valid)
