"""Triton bipartite matching: row maxima of a cosine matrix that is never written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of torch.nn.functional.normalize.
EPSILON = 1e-12
BLOCK_P = 64
BLOCK_D = 32


@triton.jit  # type: ignore[untyped-decorator]
def best_match_kernel(  # type: ignore[no-untyped-def]
    p_a,
    p_b,
    p_length_a,
    p_length_b,
    p_cosine,
    p_index,
    M,
    P,
    D,
    stride_ag,
    stride_am,
    stride_ad,
    stride_bg,
    stride_bp,
    stride_bd,
    EPSILON: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program matches one block of vectors with all others.
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(M, BLOCK_M)
    g = pid // blocks
    o_m = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = o_m < M
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_M]
    scale_a = tl.load(p_length_a + g * M + o_m, mask=in_m, other=1)
    scale_a = tl.div_rn(1.0, tl.maximum(scale_a, EPSILON))
    p_a += g * stride_ag + o_m[:, None] * stride_am
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    index = tl.full([BLOCK_M], 0, tl.int32)
    for first in range(0, P, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        in_p = o_p < P
        # [BLOCK_P]
        scale_b = tl.load(p_length_b + g * P + o_p, mask=in_p, other=1)
        scale_b = tl.div_rn(1.0, tl.maximum(scale_b, EPSILON))
        p_other = p_b + g * stride_bg + o_p[None, :].to(tl.int64) * stride_bp
        cosine = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
        for d in range(0, D, BLOCK_D):
            at = (d + o_d).to(tl.int64)
            in_d = at < D
            # [BLOCK_M, BLOCK_D], [BLOCK_D, BLOCK_P]
            a = tl.load(p_a + at[None, :] * stride_ad, mask=in_m[:, None] & in_d[None, :], other=0)
            b = tl.load(p_other + at[:, None] * stride_bd, mask=in_d[:, None] & in_p[None, :], other=0)
            a = a.to(tl.float32) * scale_a[:, None]
            b = b.to(tl.float32) * scale_b[None, :]
            cosine = tl.dot(a, b, cosine, input_precision="ieee")
        # NaN would lose against columns behind the last vector.
        cosine = tl.where(in_p[None, :] & (cosine > float("-inf")), cosine, float("-inf"))
        largest, whose = tl.max(cosine, 1, return_indices=True)
        index = tl.where(largest > best, first + whose, index)
        best = tl.maximum(largest, best)
    tl.store(p_cosine + g * M + o_m, best, mask=in_m)
    tl.store(p_index + g * M + o_m, index, mask=in_m)


def best_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`vtprune.kernels.reference.best_match`, but for rounding; not differentiable."""
    # Norms of float64 vectors cannot be taken in float32.
    a, b = (x.detach().float() if x.dtype == torch.float64 else x.detach() for x in (a, b))
    images, m, d = a.shape
    cosine = torch.empty(images, m, dtype=torch.float32, device=a.device)
    index = torch.empty(images, m, dtype=torch.int64, device=a.device)
    if index.numel():
        # Blocks of many vectors load the others less often, but one picture's would keep few processors busy.
        block = 64 if index.numel() >= 8192 else 16
        lengths = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (a, b)]
        with torch.cuda.device_of(a):
            best_match_kernel[(images * triton.cdiv(m, block),)](
                a,
                b,
                *lengths,
                cosine,
                index,
                m,
                b.shape[1],
                d,
                *a.stride(),
                *b.stride(),
                EPSILON=EPSILON,
                BLOCK_M=block,
                BLOCK_P=BLOCK_P,
                BLOCK_D=BLOCK_D,
                num_warps=4,
            )
    return cosine, index
