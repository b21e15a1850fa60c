"""Checks of the attention kernels.

The judge is the reference in float64 on the same inputs. Bounds on a probability: float32 2e-6, a few roundings of sum,
exponential and quotient. bfloat16 and float16 8e-6: their products are exact in float32 (at most 22 bits), so only the
sum differs, which tensor cores truncate rather than round (d / 16 steps of 2^-23 of the logit). Both grow with the
logits: 2^-22 of the largest |q| |k| scale, where that exceeds the 8 of unit normal inputs. A column sum has the same bound
and twice as much relative to its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from vtprune.errors import UnsupportedCallError
from vtprune.kernels import reference
from vtprune.testing.kernel_checks import poisoned

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Check = Callable[[torch.device], None]

# B, H, G, R, N, d
ROWS = (
    (1, 1, 1, 1, 1, 16),
    (2, 3, 3, 1, 300, 64),  # [CLS]: some tiles of keys
    (1, 4, 2, 2, 130, 80),  # four rows of a key head, and padded heads
    (1, 6, 2, 3, 129, 72),  # nine: tensor cores for half precision
    (1, 4, 1, 4, 65, 100),  # sixteen
    (1, 6, 2, 13, 150, 40),  # a text window, logits computed twice
    (2, 2, 1, 33, 64, 128),
    (1, 1, 1, 65, 70, 256),
)
COLUMNS = (
    (1, 1, 1, 1, 1, 16),
    (2, 1, 1, 70, 70, 64),
    (1, 4, 2, 17, 130, 80),
    (1, 2, 1, 64, 64, 100),
    (1, 1, 1, 65, 66, 256),
)
SPLIT = (1, 1, 1, 600, 530, 16)  # both passes
ON_GPU = (
    (8, 16, 16, 1, 577, 64),
    (2, 16, 16, 577, 577, 64),
    (1, 28, 4, 1, 30_000, 128),
    (1, 28, 4, 100, 3001, 128),
    (1, 28, 4, 3, 20_000, 128),
    (1, 4, 2, 40, 20_000, 64),  # the most splits of keys
)


def inputs(
    device: torch.device, size: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a size (B, H, G, R, N, d), normally distributed."""
    b, h, g, r, n, d = size
    generator = torch.Generator().manual_seed(1000 * h + 100 * r + n + d)
    q, k = torch.randn(b, h, r, d, generator=generator), torch.randn(b, g, n, d, generator=generator)
    return q.to(device, dtype), k.to(device, dtype)


def chances(device: torch.device, *shape: int, own: bool = True) -> Tensor:
    """Bool of the given shape, two thirds True; the first and, with `own`, no row empty."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) < 2 / 3
    if own:
        mask[..., 0] = True
    return mask.to(device)


def bound(q: Tensor, k: Tensor, scale: float) -> float:
    unit = 2e-6 if q.dtype in (torch.float32, torch.float64) else 8e-6
    if not q.numel():
        return unit
    largest = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) * scale
    return max(unit, 2**-22 * largest)


def agree_rows(q: Tensor, k: Tensor, visible: Tensor | None = None, scale: float | None = None) -> Tensor:
    from vtprune.kernels import attention

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with poisoned():
        got = attention.attention_rows(q, k, scale, visible)
    wanted = reference.attention_rows(q.double(), k.double(), scale, visible)
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    if got.numel():
        torch.testing.assert_close(got, wanted.float(), atol=bound(q, k, scale), rtol=0, equal_nan=True)
    return got


def agree_columns(
    q: Tensor,
    k: Tensor,
    visible: Tensor | None = None,
    asking: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    from vtprune.kernels import attention

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with poisoned():
        got = attention.attention_columns(q, k, scale, visible, asking, causal)
    wanted = reference.attention_columns(q.double(), k.double(), scale, visible, asking, causal)
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    if got.numel():
        allowed = bound(q, k, scale)
        torch.testing.assert_close(got, wanted.float(), atol=allowed, rtol=2 * allowed, equal_nan=True)
    return got


def rows(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    b, _, _, r, n, _ = size
    q, k = inputs(device, size, dtype)
    if dtype == torch.float32:
        agree_rows(q, k)
    agree_rows(q, k, chances(device, b, n))
    agree_rows(q, k, chances(device, b, r, n))


def columns(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    b, _, _, r, n, _ = size
    q, k = inputs(device, size, dtype)
    if dtype == torch.float32:
        agree_columns(q, k)
    asking = chances(device, b, r, own=False)
    for causal in (False, True) if r <= n else (False,):
        agree_columns(q, k, chances(device, b, n), asking, causal)


def many_tiles(device: torch.device) -> None:
    """More tiles of keys than are combined in one step."""
    q, k = inputs(device, (1, 1, 1, 1, 4200, 256))
    k[:, :, 4180:] *= 4  # the maximum is in the last step
    agree_rows(q, k)
    agree_rows(*inputs(device, (1, 2, 1, 20, 1100, 16)))


def strides(device: torch.device) -> None:
    for size in ((2, 2, 1, 1, 70, 32), (2, 2, 1, 9, 66, 32)):
        b, h, g, r, n, d = size
        q, k = inputs(device, (b, g, h, n, r, d))  # [B, G, N, d] and [B, H, R, d]
        q, k = k, q
        assert q.shape == (b, h, r, d)
        # as behind a projection, and with heads or features far apart
        projected = k.transpose(1, 2).contiguous().transpose(1, 2)
        columnar = k.transpose(2, 3).contiguous().transpose(2, 3)
        queries = torch.stack([q, q], -1).flatten(3)[..., ::2].flip(0)
        mask = chances(device, b, n).repeat_interleave(2, 1)[:, ::2]
        for keys in (projected, columnar, k[:1].expand(b, -1, -1, -1), k[:, :, :1].expand(-1, -1, n, -1)):
            agree_rows(queries, keys, mask)
            agree_rows(queries, keys, mask[:1].unsqueeze(1).expand(b, r, n))
        agree_rows(q, k, mask[:1])  # as torch broadcasts
        for keys in (projected, columnar):
            agree_columns(queries, keys, mask[:1].expand(b, n), chances(device, 1, r).expand(b, r), True)


def nothing(device: torch.device) -> None:
    for size in ((0, 2, 1, 3, 5, 16), (2, 2, 1, 0, 5, 16), (2, 2, 1, 3, 0, 16)):
        b, _, _, r, n, _ = size
        q, k = inputs(device, size)
        agree_rows(q, k, chances(device, b, n, own=False))
        agree_columns(q, k, asking=chances(device, b, r, own=False))


def hidden(device: torch.device) -> None:
    """A row that sees nothing is NaN; it counts nothing unless it asks."""
    for size in ((2, 2, 2, 1, 70, 16), (2, 2, 1, 4, 130, 16), (2, 1, 1, 40, 66, 16)):
        b, _, _, r, n, _ = size
        q, k = inputs(device, size, torch.bfloat16)
        mask = chances(device, b, n)
        mask[1] = False
        assert agree_rows(q, k, mask)[1].isnan().all()
        per_row = chances(device, b, r, n)
        per_row[0, r - 1] = False
        assert agree_rows(q, k, per_row)[0, :, r - 1].isnan().all()
        asking = torch.ones(b, r, dtype=torch.bool, device=device)
        assert agree_columns(q, k, mask, asking)[1].isnan().all()
        asking[1] = False
        assert (agree_columns(q, k, mask, asking)[1] == 0).all()
        assert agree_columns(q, k, mask, causal=True).isfinite().all()  # each sees itself


def not_a_number(device: torch.device) -> None:
    """NaN and infinity spread as in the reference, but not from queries that do not ask."""
    for r, value in product((1, 30), (float("nan"), float("inf"))):
        q, k = inputs(device, (1, 2, 1, r, 70, 16))
        q[0, 0, r - 1, 3] = value
        agree_rows(q, k)
        agree_columns(q, k)
        asking = torch.arange(r, device=device).unsqueeze(0) < r - 1
        assert agree_columns(q, k, asking=asking).isfinite().all()
        q, k = inputs(device, (1, 2, 1, r, 70, 16))
        k[0, 0, 69] = value
        mask = torch.arange(70, device=device).unsqueeze(0) < 69
        assert agree_rows(q, k, mask).isfinite().all()
        assert agree_columns(q, k, mask).isfinite().all()


def more_queries_than_keys(device: torch.device) -> None:
    q, k = inputs(device, (1, 2, 1, 70, 66, 16))
    assert agree_columns(q, k, causal=True).isnan().all()  # the first four queries stand in front of all keys
    asking = torch.arange(70, device=device).unsqueeze(0) >= 4
    assert agree_columns(q, k, asking=asking, causal=True).isfinite().all()


def large(device: torch.device) -> None:
    for dtype, r in product(DTYPES.values(), (1, 5, 40)):
        q, k = inputs(device, (1, 2, 1, r, 70, 64), dtype)
        agree_rows(30 * q, k)
        if r == 40:
            agree_columns(30 * q, k, causal=True)
        # far from zero, where the exponential of a logit itself would overflow
        agree_rows(q, k + 10)
        agree_rows(q, k, scale=0.0)


def doubles(device: torch.device) -> None:
    for r in (1, 20):
        q, k = inputs(device, (1, 2, 1, r, 70, 24), torch.float64)
        agree_rows(q, k)
        agree_columns(q, k, causal=True)


def ties(device: torch.device) -> None:
    """Equal keys receive equal bits wherever they are, so that ties stay ties (NumPy's matrix product has none)."""
    for dtype, r in product(DTYPES.values(), (1, 5, 40)):
        q, k = inputs(device, (1, 2, 1, r, 3, 64), dtype)
        k = k[:, :, torch.arange(192, device=device) % 3]
        for got, vector in ((agree_rows(q, k), r == 1), (agree_columns(q, k), False)):
            if vector or device.type == "cuda":
                assert (got.unflatten(-1, (64, 3)) == got[..., None, :3]).all()


def batches(device: torch.device) -> None:
    """The same bits in every run, alone and in a batch."""
    from vtprune.kernels import attention

    for dtype, r in product(DTYPES.values() if device.type == "cuda" else (torch.bfloat16,), (1, 40)):
        q, k = inputs(device, (3, 2, 1, r, 70, 20), dtype)
        for function in (attention.attention_rows, attention.attention_columns):
            whole = function(q, k, 0.2)
            assert torch.equal(whole, function(q, k, 0.2))
            assert torch.equal(whole[1:2], function(q[1:2], k[1:2], 0.2))


def refusals(device: torch.device) -> None:
    from vtprune.kernels import attention

    q, k = inputs(device, (2, 4, 2, 3, 5, 16))
    leaf = q.clone().requires_grad_()
    wide = torch.zeros(1, 1, 1, 264, device=device)

    def backward() -> None:
        attention.attention_rows(leaf, k, 1.0).sum().backward()

    wrong: tuple[Callable[[], object], ...] = (
        lambda: attention.attention_rows(q, k[:1], 1.0),
        lambda: attention.attention_rows(q[..., :8], k, 1.0),
        lambda: attention.attention_columns(q[:, :3], k, 1.0),
        lambda: attention.attention_columns(q.bfloat16(), k, 1.0),
        lambda: attention.attention_rows(wide, wide, 1.0),
        backward,
    )
    for number, call in enumerate(wrong):
        try:
            call()
        except UnsupportedCallError:
            continue
        raise AssertionError(f"call {number} was not refused")


def far_apart(device: torch.device) -> None:
    """Offsets beyond 32 bits; only where 8 GiB of GPU memory are free."""
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] < 8 << 30:
        return
    store = torch.empty(40_000 * 70_000, dtype=torch.bfloat16, device=device)
    k = store.as_strided((1, 1, 40_000, 64), (0, 0, 70_000, 1))
    q, values = inputs(device, (1, 1, 1, 40, 40_000, 64), torch.bfloat16)
    k.copy_(values)
    for r in (1, 10, 40):
        agree_rows(q[:, :, :r], k)
    agree_columns(q, k, causal=True)


def checks() -> Iterator[tuple[str, Check]]:
    """Name and function of every check."""

    def name(kind: str, size: tuple[int, ...], dtype: str) -> str:
        return f"{kind} B{size[0]}-H{size[1]}-G{size[2]}-R{size[3]}-N{size[4]}-d{size[5]}-{dtype}"

    for text, dtype in DTYPES.items():
        for size in ROWS[:4] if text == "fp16" else ROWS:
            yield name("rows", size, text), partial(rows, size, dtype)
        for size in COLUMNS[2:3] if text == "fp16" else COLUMNS:
            yield name("columns", size, text), partial(columns, size, dtype)
    yield name("columns", SPLIT, "fp32"), partial(columns, SPLIT, torch.float32)

    def on_gpu(
        kind: Callable[..., None], size: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        if device.type == "cuda":
            kind(size, dtype, device)

    for (text, dtype), size in product(DTYPES.items(), ON_GPU):
        yield name("rows (GPU only)", size, text), partial(on_gpu, rows, size, dtype)
        yield name("columns (GPU only)", size, text), partial(on_gpu, columns, size, dtype)
    yield "rows over many tiles", many_tiles
    yield "strides", strides
    yield "empty", nothing
    yield "rows that see nothing", hidden
    yield "NaN and infinity", not_a_number
    yield "causal, more queries than keys", more_queries_than_keys
    yield "large logits", large
    yield "float64", doubles
    yield "ties", ties
    yield "batches", batches
    yield "refusals", refusals
    yield "offsets beyond 32 bits (GPU only)", far_apart
