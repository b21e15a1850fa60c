"""Checks of ``kernels/gather.py``; everything but gradients is exact to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.kernels import gather, reference
from vtprune.testing.kernel_checks import Check, poisoned

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# (B, N, K, D); 4096 features and 300 tokens are more than one block
SIZES = [(1, 1, 1, 1), (2, 63, 20, 100), (3, 17, 1, 33), (2, 16, 16, 64), (1, 5, 3, 1500), (1, 4, 3, 4096)]
LARGE_SIZES = [(1, 5000, 1999, 4096), (64, 577, 577, 1152), (3, 40000, 39999, 80)]


def checks() -> Iterator[tuple[str, Check]]:
    """Name and function of every check."""
    for dtype in (*FLOATS, torch.float64, torch.int64, torch.uint8, torch.bool):
        for size in (
            SIZES if dtype == torch.bfloat16 else SIZES[1:2]
        ):  # the kernel moves bits, whatever they mean
            yield f"tokens, B, N, K, D = {size}, {_of(dtype)}", partial(_tokens, size, dtype)
    for size in LARGE_SIZES:
        yield f"tokens, B, N, K, D = {size}, bfloat16 (GPU only)", partial(_large, size)
    for ragged in (False, True):
        for b, n, k in [(1, 9, 9), (2, 37, 11), (3, 180, 150)]:
            name = f"states, positions, tables, keys in one launch, B, N, K = {b, n, k}"
            yield f"{name}{', ragged' if ragged else ''}", partial(_many, b, n, k, ragged)
    yield "33 tensors", _more_than_a_launch
    yield "memory order of the result", _memory_order
    yield "strided, sliced, broadcast and unaligned inputs", _strided
    yield "two leading dimensions", _leading
    yield "a token taken several times, int32 index", _repeated
    yield "no rows, no tokens", _nothing
    yield "bits of NaN, infinity and -0", _bits
    yield "padding is not read", _padding
    yield "shapes that do not fit raise", _refused
    yield "gradients, float64, ragged, a repeated index, broadcast tables", _gradients
    yield "gradients of a repeated index, bfloat16", _gradients_summed
    yield "no graph where none is needed", _no_graph
    for dtype in (torch.bool, *FLOATS, torch.float64):
        for b, h, n, k in (
            [(1, 1, 1, 1), (2, 3, 30, 17)] if dtype in (torch.bool, torch.bfloat16) else [(2, 2, 13, 6)]
        ):
            yield f"mask, B, H, L, K = {b, h, n, k}, {_of(dtype)}", partial(_mask, b, h, n, k, dtype)
    yield "mask, K = 300 (more than a block)", partial(_mask, 1, 1, 310, 300, torch.bool)
    yield "mask, transposed and sliced", _mask_strided
    yield "mask, no rows, no tokens", _mask_of_nothing
    yield "mask, gradients, float64", _mask_gradients


def _of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 200, shape, generator=generator).to(dtype)


def _index(b: int, n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator)[:k].sort().values for _ in range(b)])


def _ragged(b: int, k: int) -> Tensor:
    """[B, K] bool: k, 2 k / 3, k / 3 valid slots, the padding on the left in odd rows."""
    slot, count = torch.arange(k), torch.tensor([[k - row % 3 * k // 3] for row in range(b)])
    return torch.where(torch.arange(b).unsqueeze(1) % 2 == 1, slot >= k - count, slot < count)


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), f"tensor {i}: {one.shape}, {one.dtype}"
        assert torch.equal(one, other), f"tensor {i} differs in {int((one != other).sum())} elements"


def _compare(
    device: torch.device, tensors: Sequence[Tensor], indices: Sequence[Tensor], valid: Tensor | None = None
) -> list[Tensor]:
    tensors, indices = [x.to(device) for x in tensors], [i.to(device) for i in indices]
    valid = None if valid is None else valid.to(device)
    expected = reference.gather_many(tensors, indices, valid)
    with poisoned():
        out = gather.gather_many(tensors, indices, valid)
    _same(out, expected)
    return out


def _tokens(size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    b, n, k, d = size
    x, index = _random((b, n, d), dtype).to(device), _index(b, n, k).to(device)
    expected = reference.gather_tokens(x, index)
    with poisoned():
        out = gather.gather_tokens(x, index)
    _same([out], [expected])
    assert out.is_contiguous()


def _large(size: tuple[int, int, int, int], device: torch.device) -> None:
    if device.type == "cuda":
        _tokens(size, torch.bfloat16, device)


def _states(b: int, n: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Hidden states, position ids, rotary tables, keys, values and a flag of every token."""
    return [
        _random((b, n, 48), dtype),
        _random((3, b, n), torch.int64).unsqueeze(-1),
        _random((1, n, 8), torch.float32),
        _random((3, b, n, 8), torch.float32),
        _random((b, 2, n, 16), dtype).transpose(0, 1),
        _random((b, n, 2, 16), dtype).permute(2, 0, 1, 3),
        _random((b, n, 1), torch.bool),
    ]


def _many(b: int, n: int, k: int, ragged: bool, device: torch.device) -> None:
    tensors = _states(b, n)
    indices = [_index(b, n, k, seed) for seed in range(len(tensors))]
    _compare(device, tensors, indices, _ragged(b, k) if ragged else None)


def _more_than_a_launch(device: torch.device) -> None:
    tensors = [_random((2, 6 + i, 1 + i), FLOATS[i % 3], i) for i in range(33)]
    _compare(device, tensors, [_index(2, 6 + i, 4, i) for i in range(33)])


def _memory_order(device: torch.device) -> None:
    hidden, _, table, _, keys, values, _ = _compare(device, _states(2, 9), [_index(2, 9, 4)] * 7)
    assert hidden.is_contiguous()
    assert table.is_contiguous()
    assert keys.transpose(0, 1).is_contiguous()
    assert values.permute(1, 2, 0, 3).is_contiguous()
    turned = _random((2, 24, 31), torch.float32).transpose(1, 2)  # features are not the last stride
    out = _compare(device, [turned], [_index(2, 31, 7)])[0]
    assert out.transpose(1, 2).is_contiguous()


def _strided(device: torch.device) -> None:
    x, index = _random((2, 62, 48), torch.float32), _index(2, 31, 7)
    wide = index.repeat_interleave(2, 1)[:, ::2]
    turned = index.t().contiguous().t()
    valid = _ragged(2, 14)[:, ::2]
    tensors = [x[:, ::2], x[:, :31, 1:], x[:, :31, ::3], x[:1, :31], x[:1, :31].expand(2, -1, -1), x[:, 31:]]
    _compare(device, tensors, [wide, turned, index, index[:1].expand(2, -1), index, wide], valid)


def _leading(device: torch.device) -> None:
    x = _random((3, 4, 2, 19, 8), torch.float16)
    _compare(device, [x, x.transpose(0, 1)], [_index(2, 19, 6)] * 2)


def _repeated(device: torch.device) -> None:
    x, index = _random((2, 19, 8), torch.float16), torch.tensor([[3, 3, 0, 3], [18, 0, 18, 18]])
    expected = reference.gather_tokens(x, index)
    _same([gather.gather_tokens(x.to(device), index.int().to(device)).cpu()], [expected])


def _nothing(device: torch.device) -> None:
    x = _random((2, 9, 8), torch.float32)
    index = _index(2, 9, 3)
    _compare(device, [x, x[..., :0], x[:, :4]], [index[:, :0]] * 3)
    _compare(device, [x[..., :0], x], [index] * 2)
    _compare(device, [x[:0], x[:0, :, :4]], [index[:0]] * 2, torch.ones(0, 3, dtype=torch.bool))
    assert gather.gather_many([], []) == []


def _bits(device: torch.device) -> None:
    payload = torch.tensor([0x7F800001, -0x7FFFFFFF, 0x7F800000, -0x80000000, 1], dtype=torch.int64).to(
        torch.int32
    )
    x = payload.view(1, 5, 1).to(device)
    index = torch.tensor([[4, 3, 2, 1, 0]], device=device)
    out = gather.gather_tokens(x.view(torch.float32), index)
    assert torch.equal(out.view(torch.int32), x.flip(1))


def _padding(device: torch.device) -> None:
    x = _random((1, 4, 40), torch.float32).to(device)
    far = torch.tensor([[1, 2**40, 3]], device=device)  # reading there is an illegal access
    valid = torch.tensor([[True, False, True]], device=device)
    with poisoned():
        out = gather.gather_many([x], [far], valid)[0]
    _same([out], [torch.stack([x[:, 1], torch.zeros_like(x[:, 1]), x[:, 3]], 1)])


def _refused(device: torch.device) -> None:
    x, index = _random((2, 9, 8), torch.float32).to(device), _index(2, 9, 3).to(device)
    valid = torch.ones(2, 2, dtype=torch.bool, device=device)
    for arguments in ([[x, x], [index, index[:, :2]]], [[x], [index], valid]):
        try:
            gather.gather_many(*arguments)
        except VTPruneError:
            continue
        raise AssertionError("no error")


def _gradients(device: torch.device) -> None:
    b, n, k = 2, 11, 6
    index = _index(b, n, k)
    index[1, 3:5] = index[1, 3]
    valid = _ragged(b, k).to(device)
    results = []
    for module in (gather, reference):
        tensors = [x.to(device) for x in _states(b, n, torch.float64)]
        leaves = [x.double().requires_grad_() for x in tensors if x.is_floating_point()]
        still = _random((b, n, 3), torch.float64).to(device)
        outs = module.gather_many([*leaves, tensors[1], still], [index.to(device)] * (len(leaves) + 2), valid)
        assert [out.requires_grad for out in outs] == [True] * len(leaves) + [False] * 2
        # The last leaf is not used, as an output may not be.
        losses = [(i + 1) * (out + 1).sin().sum() for i, out in enumerate(outs[: len(leaves) - 1])]
        first = torch.autograd.grad(losses, leaves[:-1], create_graph=True)
        second = torch.autograd.grad([g.square().sum() for g in first], leaves[0])
        results.append([*first, *second])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def _gradients_summed(device: torch.device) -> None:
    x = _random((1, 3, 70), torch.bfloat16).to(device).requires_grad_()
    index = torch.zeros(1, 100, dtype=torch.int64, device=device)
    grad = _random((1, 100, 70), torch.bfloat16).to(device)
    runs = [torch.autograd.grad(gather.gather_tokens(x, index), x, grad)[0] for _ in range(2)]
    _same(runs[:1], runs[1:])
    # The sum is in float32 and rounded once (by Triton's interpreter towards zero).
    torch.testing.assert_close(runs[0][:, 0].double(), grad.double().sum(1), rtol=2**-7, atol=1e-4)
    assert not runs[0][:, 1:].any()


def _no_graph(device: torch.device) -> None:
    x, index = _random((1, 4, 8), torch.float32).to(device), _index(1, 4, 2).to(device)
    assert gather.gather_tokens(x, index).grad_fn is None
    leaf = x.clone().requires_grad_()
    assert not torch.autograd.grad(gather.gather_tokens(leaf, index[:, :0]).sum(), leaf)[0].any()
    with torch.no_grad():
        assert gather.gather_tokens(x.clone().requires_grad_(), index).grad_fn is None


def _masks(b: int, h: int, n: int, dtype: torch.dtype) -> Iterator[Tensor]:
    full = _random((b, h, n, n), dtype)
    yield full
    yield full[:1]
    yield full[:, :1]
    yield full[:, :1].expand(-1, h, -1, -1)


def _mask(b: int, h: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    index = _index(b, n, k).to(device)
    for i, mask in enumerate(_masks(b, h, n, dtype)):
        for valid in (None, _ragged(b, k).to(device)):
            if i and k > 100 and device.type == "cpu":
                continue
            expected = reference.gather_mask(mask.to(device), index, valid)
            with poisoned():
                out = gather.gather_mask(mask.to(device), index, valid)
            _same([out], [expected])


def _mask_strided(device: torch.device) -> None:
    index, valid = _index(2, 15, 6).to(device), _ragged(2, 12)[:, ::2].to(device)
    mask = _random((2, 2, 30, 30), torch.float32).to(device)
    for view in (
        mask.transpose(2, 3)[..., :15, :15],
        mask[..., ::2, 1::2],
        mask[..., :1].expand(-1, -1, -1, 30),
    ):
        _same([gather.gather_mask(view, index, valid)], [reference.gather_mask(view, index, valid)])


def _mask_of_nothing(device: torch.device) -> None:
    mask, index = _random((2, 1, 9, 9), torch.bool).to(device), _index(2, 9, 4).to(device)
    assert gather.gather_mask(mask, index[:, :0], None).shape == (2, 1, 0, 0)
    assert gather.gather_mask(mask[:0], index[:0], index[:0] > 0).shape == (0, 1, 4, 4)


def _mask_gradients(device: torch.device) -> None:
    index, valid = _index(2, 9, 6), _ragged(2, 6).to(device)
    index[1, 2] = index[1, 3]
    for mask in _masks(2, 2, 9, torch.float64):
        weight = _random((2, mask.shape[1], 6, 6), torch.float64, 1).to(device)
        for some in (None, valid):
            grads = []
            for module in (gather, reference):
                leaf = mask.to(device).detach().clone().requires_grad_()
                seen = module.gather_mask(leaf, index.to(device), some)
                grads.append(torch.autograd.grad(seen, leaf, weight)[0])
            torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
