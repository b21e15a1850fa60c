"""Token operations alone: time, bytes that must be read and written, and share of the copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune import ops

from .roofline import Peaks, repeated


@dataclass(frozen=True)
class KernelRow:
    """One operation on one shape.

    Attributes:
        operation: function of :mod:`vtprune.ops`.
        shape: of its input, in words.
        backend: "triton" or "reference".
        dtype: of its floating-point input.
        ms: median time of a call.
        mib: what has to be read and written once at least; None where the time is no matter of bytes.
        share: of the copy bandwidth measured in the same run, that is the time which these bytes take at it / ms.
    """

    operation: str
    shape: str
    backend: str
    dtype: str
    ms: float
    mib: float | None
    share: float | None


@dataclass(frozen=True)
class _Case:
    operation: str
    shape: str
    call: Callable[[], object]
    moved: int | None
    given: Tensor


def kernels_alone(device: torch.device, dtype: torch.dtype, peaks: Peaks) -> Iterator[KernelRow]:
    """Times all operations; on CUDA the large shapes are well past the L2 cache."""
    for case in _cases(device, dtype):
        seconds = repeated(case.call, device)
        moved = case.moved
        yield KernelRow(
            case.operation,
            case.shape,
            ops.backend(case.given),
            str(case.given.dtype).removeprefix("torch."),
            1e3 * seconds,
            None if moved is None else moved / 2**20,
            None if moved is None else moved / peaks.bandwidth / seconds,
        )


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[_Case]:
    generator = torch.Generator(device).manual_seed(0)
    size = torch.empty((), dtype=dtype).element_size()

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def chosen(b: int, n: int, k: int) -> Tensor:
        order = torch.rand(b, n, generator=generator, device=device).argsort(1)
        return order[:, :k].sort(1).values

    big = (8, 32768, 3584, 8192) if device.type == "cuda" else (2, 4096, 2048, 1024)
    for b, n, d, k in ((8, 576, 4096, 64), big):
        x, index = randn(b, n, d), chosen(b, n, k)
        moved = 2 * b * k * d * size
        yield _Case(
            "gather_tokens", f"[{b}, {n}, {d}] to {k}", partial(ops.gather_tokens, x, index), moved, x
        )
        slots = torch.full((b, n), -1, device=device).scatter(
            1, index, torch.arange(k, device=device).expand(b, k)
        )
        into = torch.where(slots >= 0, slots, torch.arange(n, device=device).expand(b, n) % k)
        weight = torch.rand(b, n, generator=generator, device=device)
        yield _Case(
            "merge_tokens",
            f"[{b}, {n}, {d}] into {k}",
            partial(ops.merge_tokens, x, into, weight, k),
            b * (n + k) * d * size,
            x,
        )
    b, n, d, k = 4, 6272, 3584, 627
    hidden, index = randn(b, n, d), chosen(b, n, k)
    tables = [randn(b, n, 128) for _ in range(2)]
    ids = torch.arange(n, device=device).expand(3, b, n).unsqueeze(-1)
    caches = [randn(b, 4, n, 128).transpose(0, 1) for _ in range(2)]
    several = [hidden, *tables, ids, *caches]
    yield _Case(
        "gather_many",
        f"hidden states [{b}, {n}, {d}], cos and sin, 3-row positions, keys and values of 4 heads, to {k}",
        partial(ops.gather_many, several, [index] * len(several)),
        2 * b * k * (size * (d + 2 * 128 + 2 * 4 * 128) + 3 * 8),
        hidden,
    )
    for b, h, g, n, d, who in ((8, 16, 16, 577, 64, "[CLS]"), (1, 28, 4, 6300, 128, "last token")):
        q, keys = randn(b, h, 1, d), randn(b, g, n, d)
        yield _Case(
            "attention_rows",
            f"{who}, {b} x {h} heads ({g} of keys), {n} keys of {d}",
            partial(ops.attention_rows, q, keys, d**-0.5),
            b * g * n * d * size + b * h * n * 4,
            q,
        )
    for b, h, n, d in ((8, 16, 577, 64), (1, 16, 2916, 72)):
        q, keys = randn(b, h, n, d), randn(b, h, n, d)
        yield _Case(
            "attention_columns",
            f"{b} x {h} heads, {n} tokens of {d}",
            partial(ops.attention_columns, q, keys, d**-0.5),
            2 * b * h * n * d * size + b * h * n * 4,
            q,
        )
    for images, n, k in ((1, 576, 64), (32, 196, 20)):
        unit = normalize(randn(images, n, 64).float(), dim=-1)
        near = unit @ unit.transpose(1, 2)
        far, weight = 1 - near, torch.ones(images, n, device=device)
        shape = f"{images} x {n} to {k}"
        yield _Case(
            "farthest_first",
            shape,
            partial(ops.farthest_first, weight, far, k),
            None,
            weight,
        )
        yield _Case("dpp_map", shape, partial(ops.dpp_map, near, k), None, near)
    a, b_ = randn(8, 288, 1024), randn(8, 288, 1024)
    yield _Case(
        "best_match",
        "8 x 288 against 288 vectors of 1024",
        partial(ops.best_match, a, b_),
        2 * a.numel() * size,
        a,
    )
