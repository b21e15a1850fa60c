"""Checks of ``kernels/merge.py``.

A sum of m products in float32 errs by at most (m + 1) 2^-24 of the sum of their magnitudes, in float64 by (m + 1) 2^-53;
the reference does the same in another order. Half precisions round once more, by 2^-8 (bfloat16; Triton's interpreter,
which cuts off, by 2^-7) or 2^-11 (float16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.kernels import merge, reference
from vtprune.testing.kernel_checks import Check, poisoned

ROUNDING = {torch.float64: 0.0, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# (B, N, slots, D); 32 members are a piece, 4 slots of 512 features a program, 512 tokens a step of the plan
SIZES = [(1, 1, 1, 1), (2, 33, 5, 100), (3, 17, 20, 33), (2, 70, 70, 8), (1, 600, 3, 40), (1, 65, 6, 1500)]
LARGE_SIZES = [(1, 9000, 2000, 4096), (1, 9000, 7, 4096), (32, 577, 64, 1152), (2, 40000, 39000, 80)]


def checks() -> Iterator[tuple[str, Check]]:
    """Name and function of every check."""
    for dtype in ROUNDING:
        for size in SIZES if dtype in (torch.float32, torch.bfloat16) else SIZES[1:3]:
            yield (
                f"B, N, slots, D = {size}, {str(dtype).removeprefix('torch.')}",
                partial(_merge, size, dtype),
            )
    for size in LARGE_SIZES:
        yield f"B, N, slots, D = {size}, bfloat16 (GPU only)", partial(_large, size)
    for name in ("alone", "one slot", "skewed", "on the pieces' edges", "none", "descending"):
        yield f"tokens per slot: {name}", partial(_shares, name)
    yield "tokens kept alone are exact", _alone
    yield "strided, sliced and broadcast inputs", _strided
    yield "weights of other dtypes, int32 slots, no weights", _dtypes
    yield "no rows, no tokens, no slots, no features", _nothing
    yield "dropped tokens are not read", _dropped
    yield "large values", _large_values
    yield "weighted mean, score-weighted mean, sum, clamped weights", _meanings
    yield "two runs and other rows beside it give the same bits", _same_bits
    yield "64-bit keys of the plan", _wide_keys
    yield "shapes that do not fit raise", _refused
    yield "gradients, float64", partial(_gradients, torch.float64)
    yield "gradients, bfloat16", partial(_gradients, torch.bfloat16)


def _case(
    b: int, n: int, slots: int, d: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b * 1000 + n * 10 + slots)
    x = torch.randn(b, n, d, generator=generator, dtype=torch.float64).to(dtype)
    into = torch.randint(-1, slots, (b, n), generator=generator)
    weight = torch.randn(b, n, generator=generator, dtype=torch.float64)
    return x.to(device), into.to(device), weight.to(torch.promote_types(dtype, torch.float32)).to(device)


def _close(out: Tensor, x: Tensor, into: Tensor, weight: Tensor, n_out: int) -> None:
    """Within the stated bound of the reference in float64."""
    exact = reference.merge_tokens(x.double(), into, weight.double(), n_out)
    size = reference.merge_tokens(x.double().abs(), into, weight.double().abs(), n_out)
    one = torch.ones_like(into, dtype=torch.float64)
    members = reference.merge_tokens(one.unsqueeze(-1), into, one, n_out)  # [B, slots, 1]
    unit = 2**-53 if x.dtype == torch.float64 else 2**-24
    rounding = ROUNDING[x.dtype] * (2 if x.dtype == torch.bfloat16 and x.device.type == "cpu" else 1)
    bound = (members + 1) * unit * size * 1.01 + (exact.abs() + size * unit * members) * rounding
    if x.dtype == torch.float16:
        bound = bound + 2**-24  # its spacing near zero
    if x.dtype == torch.float64:
        bound = bound * 2  # the judge errs as much
    assert (out.dtype, out.shape) == (x.dtype, exact.shape)
    assert out.is_contiguous()
    error = (out.double() - exact).abs()
    assert bool((error <= bound).all()), f"error {float(error.max())}"  # NaN fails, too


def _compare(x: Tensor, into: Tensor, weight: Tensor, n_out: int) -> Tensor:
    with poisoned():
        out = merge.merge_tokens(x, into, weight, n_out)
    _close(out, x, into, weight, n_out)
    return out


def _merge(size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    _compare(*_case(*size, dtype, device), size[2])


def _large(size: tuple[int, int, int, int], device: torch.device) -> None:
    if device.type == "cuda":
        _merge(size, torch.bfloat16, device)


def _shares(name: str, device: torch.device) -> None:
    n, slots = 140, 60
    token = torch.arange(n)
    into = {
        "alone": torch.where(token < slots, token, -1),
        "one slot": token * 0 + 37,
        "skewed": torch.where(token % 2 == 0, 41, token % slots),
        "on the pieces' edges": token // 32,
        "none": token * 0 - 1,
        "descending": (slots - 1 - token).clamp(min=-1),
    }[name].to(device)
    x, _, weight = _case(2, n, slots, 12, torch.float32, device)
    _compare(x, torch.stack([into, into.roll(7)]), weight, slots)


def _alone(device: torch.device) -> None:
    for dtype in ROUNDING:
        x, _, _ = _case(2, 40, 20, 24, dtype, device)
        into = torch.full((2, 40), -1, device=device)
        into[0, ::2] = torch.arange(20, device=device)
        into[1, 20:] = torch.arange(20, device=device).flip(0)
        with poisoned():
            out = merge.merge_tokens(x, into, torch.ones(2, 40, device=device), 20)
        assert torch.equal(out, torch.stack([x[0, ::2], x[1, 20:].flip(0)]))


def _strided(device: torch.device) -> None:
    x, into, weight = _case(2, 80, 7, 48, torch.float32, device)
    turned = x[:, :40].transpose(1, 2).contiguous().transpose(1, 2)
    for view in (turned, x[:, ::2], x[:, :40, 1:], x[:, :40, ::3], x[:1, :40].expand(2, -1, -1)):
        _compare(view, into[:, ::2], weight.t().contiguous().t()[:, 1::2], 7)
    _compare(x, into[:1].expand(2, -1), weight[:, :1].expand(-1, 80), 7)


def _dtypes(device: torch.device) -> None:
    x, into, weight = _case(2, 50, 7, 20, torch.bfloat16, device)
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        _compare(x, into.int(), weight.to(kind).float().to(kind), 7)
    _close(merge.merge_tokens(x, into, None, 7), x, into, torch.ones_like(weight), 7)
    count = torch.ones_like(into)
    _close(merge.merge_tokens(x, into, count, 7), x, into, count, 7)


def _nothing(device: torch.device) -> None:
    x, into, weight = _case(2, 9, 4, 8, torch.float32, device)
    for rows, n, d, slots in ((0, 9, 8, 4), (2, 0, 8, 4), (2, 9, 0, 4)):
        _compare(x[:rows, :n, :d], into[:rows, :n], weight[:rows, :n], slots)
    assert merge.merge_tokens(x, into * 0 - 1, weight, 0).shape == (2, 0, 8)


def _dropped(device: torch.device) -> None:
    x, into, weight = _case(2, 50, 4, 8, torch.float32, device)
    x[into < 0], weight[into < 0] = float("nan"), float("inf")
    expected = reference.merge_tokens(x, into, weight, 4)
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(merge.merge_tokens(x, into, weight, 4), expected)


def _large_values(device: torch.device) -> None:
    x, into, weight = _case(1, 90, 3, 8, torch.float32, device)
    _compare(x * 1e30, into, weight * 1e5, 3)
    half = torch.full((1, 64, 8), 60000.0, device=device, dtype=torch.float16)
    # The sum overflows float16, the mean does not.
    out = merge.merge_tokens(half, into[:, :64] * 0, torch.full((1, 64), 1 / 64, device=device), 1)
    assert torch.equal(out, half[:, :1])


def _meanings(device: torch.device) -> None:
    n, slots = 75, 4
    x, into, score = _case(2, n, slots, 16, torch.float32, device)
    member = into[:, None, :] == torch.arange(slots, device=device)[:, None]  # [B, slots, N]
    score = score.abs() + 0.1
    clamped = (score - 0.8).clamp(min=0)

    def normalised(c: Tensor) -> Tensor:
        total = (member * c.unsqueeze(1)).sum(-1)
        return c / total.gather(1, into.clamp(min=0))

    meanings: list[tuple[Tensor, Callable[[int, Tensor], Tensor]]] = [
        (normalised(torch.ones_like(score)), lambda r, m: x[r, m].mean(0)),
        (normalised(score), lambda r, m: (x[r, m] * score[r, m, None]).sum(0) / score[r, m].sum()),
        (torch.ones_like(score), lambda r, m: x[r, m].sum(0)),
        (clamped, lambda r, m: (x[r, m] * clamped[r, m, None]).sum(0)),
    ]
    for weight, one_by_one in meanings:
        out = _compare(x, into, weight, slots)
        expected = torch.stack([torch.stack([one_by_one(r, m) for m in member[r]]) for r in range(2)])
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def _same_bits(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, into, weight = _case(3, 100, 3, 8, dtype, device)
        runs = [merge.merge_tokens(x, into, weight, 3) for _ in range(2)]
        alone = [merge.merge_tokens(x[i : i + 1], into[i : i + 1], weight[i : i + 1], 3) for i in range(3)]
        assert torch.equal(*runs)
        assert torch.equal(runs[0], torch.cat(alone))


def _wide_keys(device: torch.device) -> None:
    if device.type == "cuda":
        slots = 2**23
        into = torch.full((1, 300), slots - 1, device=device)
        into[0, 7] = 0
        x = torch.randn(1, 300, 1, device=device, generator=torch.Generator(device).manual_seed(0))
        out = merge.merge_tokens(x, into, torch.ones(1, 300, device=device), slots)
        assert torch.equal(out[0, 0], x[0, 7])
        assert not out[0, 1:-1].any()
        torch.testing.assert_close(out[0, -1], x[0].sum(0) - x[0, 7], rtol=0, atol=1e-4)


def _refused(device: torch.device) -> None:
    x, into, weight = _case(2, 9, 4, 8, torch.float32, device)
    wrong: Sequence[tuple[Tensor, Tensor, Tensor]] = [(x, into[:, :5], weight), (x, into, weight[:1])]
    for arguments in wrong:
        try:
            merge.merge_tokens(*arguments, 4)
        except VTPruneError:
            continue
        raise AssertionError("no error")


def _gradients(dtype: torch.dtype, device: torch.device) -> None:
    x, into, weight = _case(2, 40, 4, 20, dtype, device)
    upstream = _case(2, 4, 1, 20, dtype, device)[0]
    precise = dtype == torch.float64
    for wanted in ((True, True), (True, False), (False, True)):
        grads = []
        for module in (merge, reference):
            leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight), wanted, strict=True)]
            out = module.merge_tokens(leaves[0], into, leaves[1], 4)
            inputs = [leaf for leaf in leaves if leaf.requires_grad]
            # Rounded outputs differ in the last bit, so their gradient must not depend on them.
            loss = ((out.sin() if precise else out) * upstream).sum()
            first = torch.autograd.grad(loss, inputs, create_graph=precise)
            second = torch.autograd.grad([g.square().sum() for g in first], inputs) if precise else ()
            grads.append([*first, *second])
        for ours, theirs in zip(*grads, strict=True):
            tolerance = 1e-12 if precise else 2**-7
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
