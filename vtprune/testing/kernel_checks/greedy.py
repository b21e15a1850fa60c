"""Checks of vtprune.kernels.greedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.kernels import greedy, reference
from vtprune.testing.kernel_checks import Check, poisoned

Size = tuple[int, int, int]  # images, tokens, kept
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = ((1, 1, 1), (2, 7, 7), (3, 63, 33), (2, 130, 17), (1, 600, 40))
ON_GPU = ((1, 576, 64), (8, 576, 64), (32, 196, 20), (1, 2880, 320), (2, 5000, 40))
FARTHEST_ON_GPU = ((1, 16384, 64), (1, 32800, 12))  # all in registers, and spilled
# Of a float32 gain, in units of the largest diagonal entry; the matrices here are well conditioned.
GAIN_BOUND = 2e-5


def checks() -> Iterator[tuple[str, Check]]:
    """See :func:`vtprune.testing.kernel_checks.all_checks`."""
    for dtype in FLOATS:
        for size in SIZES if dtype == torch.float32 else SIZES[1:3]:
            yield f"farthest_first {_text(size)} {_text(dtype)}", partial(_farthest, size, dtype)
            yield f"dpp_map {_text(size)} {_text(dtype)}", partial(_dpp, size, dtype)
    for size in ON_GPU + FARTHEST_ON_GPU:
        yield f"farthest_first {_text(size)}, on a GPU", partial(_on_gpu, _farthest, size)
    for size in ON_GPU:
        yield f"dpp_map {_text(size)}, on a GPU", partial(_on_gpu, _dpp, size)
    yield "farthest_first, float64 weights and float32 distances", _farthest_mixed
    yield "farthest_first, images of 1 to 70 tokens, 40 kept", _farthest_ragged
    yield "farthest_first, given first choices", _farthest_start
    yield "farthest_first, ties and distances below 0", _farthest_ties
    yield "farthest_first, large values", _farthest_large
    yield "farthest_first, strides", _farthest_strides
    yield "dpp_map, images of 1 to 70 tokens, 36 kept", _dpp_ragged
    yield "dpp_map, nothing left to explain", _dpp_exhausted
    yield "dpp_map, ties", _dpp_ties
    yield "dpp_map, large and small values", _dpp_scales
    yield "dpp_map, strides", _dpp_strides
    yield "dpp_map, the same in every run", _dpp_repeated
    yield "no images", _no_images
    yield "NaN makes no index of a token that is not there", _nan


def _text(what: tuple[int, ...] | torch.dtype) -> str:
    return str(what).split(".")[1] if isinstance(what, torch.dtype) else "x".join(map(str, what))


def _on_gpu(
    check: Callable[[Size, torch.dtype, torch.device], None], size: Size, device: torch.device
) -> None:
    if device.type == "cuda":
        check(size, torch.float32, device)


def _vectors(images: int, n: int, d: int = 24) -> Tensor:
    return normalize(torch.randn(images, n, d, generator=torch.Generator().manual_seed(n)), dim=-1)


def _spread(images: int, n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights [G, N] and cosine distances [G, N, N]."""
    x = _vectors(images, n).to(device)
    weight = torch.rand(images, n, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return weight, (1 - x @ x.transpose(1, 2)).to(dtype)


def _process(images: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Positive definite [G, N, N], no gain far below the diagonal."""
    x = _vectors(images, n).to(device)
    weight = 0.5 + torch.rand(images, n, generator=torch.Generator().manual_seed(1)).to(device)
    kernel = x @ x.transpose(1, 2) + 0.1 * torch.eye(n, device=device)
    return (weight.unsqueeze(2) * kernel * weight.unsqueeze(1)).to(dtype)


def _same_farthest(
    weight: Tensor, distance: Tensor, k: int, start: Tensor | None = None, lengths: Tensor | None = None
) -> None:
    with poisoned():
        found = greedy.farthest_first(weight, distance, k, start, lengths)
    expected = reference.farthest_first(weight, distance, k, start, lengths)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected), f"{found}\nis not\n{expected}"


def _found_dpp(kernel: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
    with poisoned():
        found = greedy.dpp_map(kernel, k, lengths)
    assert found.dtype == torch.int64
    return found


def _same_dpp(kernel: Tensor, k: int, lengths: Tensor | None = None) -> None:
    found, expected = _found_dpp(kernel, k, lengths), reference.dpp_map(kernel, k, lengths)
    assert torch.equal(found, expected), f"{found}\nis not\n{expected}"


def _greedy_dpp(kernel: Tensor, k: int, lengths: Tensor | None = None) -> None:
    """Every choice has the largest gain but for rounding, by Schur complements in float64."""
    sizes = [kernel.shape[1]] * len(kernel) if lengths is None else lengths.tolist()
    for one, order, size in zip(
        kernel.double().cpu(), _found_dpp(kernel, k, lengths).tolist(), sizes, strict=True
    ):
        assert order[size:] == [-1] * max(k - size, 0)
        chosen = order[:size]
        assert len(set(chosen)) == len(chosen)
        assert all(0 <= token < size for token in chosen)
        whole = one[:size, :size]
        bound = GAIN_BOUND * float(whole.diagonal().amax())
        lower = torch.linalg.cholesky(whole[chosen][:, chosen])
        explained = torch.linalg.solve_triangular(lower, whole[chosen], upper=False).square()
        gains = whole.diagonal() - explained.cumsum(0) + explained  # [step, token]
        for step, token in enumerate(chosen):
            free = gains[step].clone()
            free[chosen[:step]] = float("-inf")
            assert free[token] >= free.amax() - bound, (
                f"choice {step}, {token}: gain {free[token]} of {free.amax()}"
            )


def _farthest(size: Size, dtype: torch.dtype, device: torch.device) -> None:
    images, n, k = size
    _same_farthest(*_spread(images, n, dtype, device), k)


def _farthest_mixed(device: torch.device) -> None:
    weight, distance = _spread(2, 63, torch.float32, device)
    _same_farthest(weight.double(), distance, 20)
    _same_farthest(weight.bfloat16(), distance.double(), 20)
    _same_farthest(torch.ones_like(weight), 1 + 1e-10 * distance.double(), 20)


def _farthest_ragged(device: torch.device) -> None:
    weight, distance = _spread(4, 70, torch.float32, device)
    lengths = torch.tensor([70, 1, 33, 40], device=device)
    _same_farthest(weight, distance, 40, None, lengths)
    start = torch.tensor([69, 0, 32, 5], device=device)
    _same_farthest(weight, distance, 40, start, lengths)
    wide = torch.stack([lengths, lengths.flip(0)], 1)
    _same_farthest(weight, distance, 40, None, wide[:, 0])


def _farthest_start(device: torch.device) -> None:
    weight, distance = _spread(3, 40, torch.float32, device)
    start = torch.tensor([[39, 1], [0, 1], [7, 1]], device=device)[:, 0]
    _same_farthest(weight, distance, 40, start)
    _same_farthest(torch.ones_like(weight), distance, 9, start)


def _farthest_ties(device: torch.device) -> None:
    for n in (12, 200):
        directions = torch.eye(5)[torch.arange(2 * n).view(2, n) % 5].to(device)
        distance = 1 - directions @ directions.transpose(1, 2)
        ones = torch.ones(2, n, device=device)
        _same_farthest(ones, distance, 11)
        _same_farthest(ones, distance - 2 + 0.001 * torch.arange(n, device=device), 11)
        _same_farthest(ones * 0, distance, 11)


def _farthest_large(device: torch.device) -> None:
    weight, distance = _spread(2, 63, torch.float32, device)
    _same_farthest(weight * 1e18, distance * 1e19, 30)
    _same_farthest(weight * 1e-20, distance * 1e-20, 30)


def _farthest_strides(device: torch.device) -> None:
    weight, distance = _spread(2, 66, torch.float32, device)
    skewed = distance * torch.arange(66, device=device).unsqueeze(1)  # rows are not columns
    _same_farthest(weight, skewed, 20)
    _same_farthest(weight.t().contiguous().t(), skewed.transpose(1, 2), 20)
    _same_farthest(weight[:, ::2], skewed[:, ::2, ::2], 20)
    _same_farthest(weight[:, :1].expand(-1, 66), skewed[:1].expand(2, -1, -1), 20)


def _dpp(size: Size, dtype: torch.dtype, device: torch.device) -> None:
    images, n, k = size
    kernel = _process(images, n, dtype, device)
    if dtype == torch.float64:
        _same_dpp(kernel, k)
    _greedy_dpp(kernel, k)


def _dpp_ragged(device: torch.device) -> None:
    kernel = _process(4, 70, torch.float32, device)
    lengths = torch.tensor([70, 1, 33, 40], device=device)
    _greedy_dpp(kernel, 36, lengths)
    _same_dpp(kernel.double(), 36, torch.stack([lengths, lengths], 1)[:, 0])


def _dpp_exhausted(device: torch.device) -> None:
    for n, dtype in ((20, torch.float32), (20, torch.bfloat16), (20, torch.float64), (150, torch.float32)):
        directions = torch.eye(9)[torch.arange(2 * n).view(2, n) * 7 % 9].to(device)
        kernel = (directions @ directions.transpose(1, 2)).to(dtype)
        _same_dpp(kernel, 20, torch.tensor([n, 14], device=device))
        _same_dpp(kernel * 0, 5)
        # Residues below the threshold, larger for later tokens.
        _same_dpp(kernel + torch.diag(1e-8 * torch.arange(n)).to(kernel), 14)


def _dpp_ties(device: torch.device) -> None:
    pairs = torch.block_diag(*[torch.tensor([[4.0, 2.0], [2.0, 4.0]])] * 35)
    kernel = torch.stack([4 * torch.eye(70), pairs]).to(device)
    _same_dpp(kernel, 45)


def _dpp_scales(device: torch.device) -> None:
    kernel = _process(2, 63, torch.float32, device)
    _greedy_dpp(kernel * 1e30, 20)
    _greedy_dpp(kernel * 1e-25, 20)


def _dpp_strides(device: torch.device) -> None:
    kernel = _process(2, 66, torch.float64, device)
    _same_dpp(kernel.transpose(1, 2), 20)
    _same_dpp(kernel[:, ::2, ::2], 20)
    _same_dpp(kernel[:1].expand(2, -1, -1), 20)


def _dpp_repeated(device: torch.device) -> None:
    kernel = _process(2, 300, torch.float32, device)
    first = _found_dpp(kernel, 20)
    for _ in range(20 if device.type == "cuda" else 1):
        assert torch.equal(_found_dpp(kernel, 20), first)


def _nan(device: torch.device) -> None:
    for n in (5, 64, 70):
        weight, distance = _spread(2, n, torch.float32, device)
        nan = torch.full_like(weight, float("nan"))
        for index in (
            greedy.farthest_first(nan, distance, 5),
            greedy.farthest_first(weight, distance * float("nan"), 5),
            greedy.dpp_map(distance * float("nan"), 5),
        ):
            assert bool(((index >= 0) & (index < n)).all())


def _no_images(device: torch.device) -> None:
    for dtype in FLOATS:
        none = torch.zeros(0, 9, 9, dtype=dtype, device=device)
        assert greedy.farthest_first(none[:, 0], none, 4).shape == (0, 4)
        assert greedy.dpp_map(none, 4).shape == (0, 4)
