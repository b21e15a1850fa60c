"""Triton row gather: ``out[b, k, :] = x[b, index[b, k], :]``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D_MAX = 1024


@triton.jit  # type: ignore[untyped-decorator]
def gather_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_index,
    p_out,
    D,
    K,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_ib,
    stride_ik,
    BLOCK_D: tl.constexpr,
):
    # One program copies one block of features of one kept token.
    pid = tl.program_id(0).to(tl.int64)
    b = pid // K
    slot = pid % K
    o_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = o_d < D
    token = tl.load(p_index + b * stride_ib + slot * stride_ik).to(tl.int64)
    # [BLOCK_D]
    row = tl.load(p_x + b * stride_xb + token * stride_xn + o_d * stride_xd, mask=inside, other=0)
    tl.store(p_out + pid * D + o_d, row, mask=inside)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, index: Tensor) -> Tensor:
        b, n, d = x.shape
        k = index.shape[1]
        ctx.save_for_backward(index)
        ctx.n = n  # type: ignore[attr-defined]
        out = torch.empty(b, k, d, dtype=x.dtype, device=x.device)
        if out.numel():
            block = min(BLOCK_D_MAX, triton.next_power_of_2(d))
            gather_kernel[(b * k, triton.cdiv(d, block))](
                x, index, out, d, k, *x.stride(), *index.stride(), BLOCK_D=block
            )
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors  # type: ignore[attr-defined]
        out = grad.new_zeros(grad.shape[0], ctx.n, grad.shape[-1])  # type: ignore[attr-defined]
        return out.scatter_add(1, index.unsqueeze(-1).expand_as(grad), grad), None


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """As :func:`vtprune.kernels.reference.gather_tokens`, by a Triton kernel; differentiable in x."""
    out: Tensor = _Gather.apply(x, index)
    return out
