"""Checks of vtprune.kernels.matching."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.kernels import matching, reference
from vtprune.testing.kernel_checks import Check, poisoned

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# images, vectors, others, features; blocks are 16 or 64, 64 and 32 long
SIZES = ((1, 1, 1, 1), (2, 5, 3, 7), (2, 17, 65, 33), (1, 16, 64, 32), (3, 40, 130, 70))
MANY = ((1, 8200, 66, 8),)
ON_GPU = ((1, 576, 64, 4096), (8, 288, 288, 64), (1, 522, 10, 1024), (1, 2880, 320, 3584), (16, 576, 577, 64))


def checks() -> Iterator[tuple[str, Check]]:
    """See :func:`vtprune.testing.kernel_checks.all_checks`."""
    for dtype in FLOATS:
        for size in SIZES:
            yield f"best_match {_text(size)} {_text(dtype)}", partial(_close, size, dtype)
    for size in MANY:
        yield f"best_match {_text(size)} float32", partial(_close, size, torch.float32)
    for size in ON_GPU:
        yield f"best_match {_text(size)}, on a GPU", partial(_on_gpu, size)
    yield "best_match, float16 to bfloat16", _mixed
    yield "best_match, ties, opposite and zero vectors, 6 by 9", partial(_ties, 6, 9)
    yield "best_match, ties, opposite and zero vectors, 70 by 200", partial(_ties, 70, 200)
    yield "best_match, only negative cosines", _negative
    yield "best_match, large and small values", _scales
    yield "best_match, strides", _strides
    yield "best_match, nothing to match", _nothing
    yield "best_match, NaN makes no index of a vector that is not there", _nan


def _text(what: tuple[int, ...] | torch.dtype) -> str:
    return str(what).split(".")[1] if isinstance(what, torch.dtype) else "x".join(map(str, what))


def _vectors(images: int, n: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + d)
    return torch.randn(images, n, d, generator=generator).to(device, dtype)


def _found(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    with poisoned():
        cosine, index = matching.best_match(a, b)
    assert cosine.dtype == torch.float32
    assert index.dtype == torch.int64
    return cosine, index


def _judged(a: Tensor, b: Tensor) -> None:
    """Within the rounding of a float32 dot product of D terms and of two norms, by cosines in float64."""
    cosine, index = _found(a, b)
    exact = normalize(a.double(), dim=-1) @ normalize(b.double(), dim=-1).transpose(1, 2)
    bound = 2 * (a.shape[-1] + 8) * 2**-24
    there = exact.gather(-1, index.unsqueeze(-1))[..., 0]
    assert bool(((cosine - there).abs() <= bound).all()), f"off by {(cosine - there).abs().amax()}"
    short = exact.amax(-1) - there
    assert bool((short <= 2 * bound).all()), f"{short.amax()} below the largest cosine"


def _same(a: Tensor, b: Tensor) -> None:
    for found, expected in zip(_found(a, b), reference.best_match(a, b), strict=True):
        assert torch.equal(found, expected), f"{found}\nis not\n{expected}"


def _close(size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    images, m, p, d = size
    _judged(_vectors(images, m, d, dtype, device), _vectors(images, p, d, dtype, device))


def _on_gpu(size: tuple[int, int, int, int], device: torch.device) -> None:
    if device.type == "cuda":
        _close(size, torch.float32, device)
        _close(size, torch.bfloat16, device)


def _mixed(device: torch.device) -> None:
    _judged(_vectors(2, 9, 40, torch.float16, device), _vectors(2, 7, 40, torch.bfloat16, device))


def _ties(m: int, p: int, device: torch.device) -> None:
    """Directions of which some occur often, some never, some backwards; lengths are powers of two."""
    axes = torch.cat([torch.eye(12), -torch.eye(12)[:3], torch.zeros(2, 12)])
    axes = torch.nn.functional.pad(axes, (0, 25)).to(device)
    power = 2.0 ** (torch.arange(max(m, p), device=device) % 5 - 2).unsqueeze(-1)
    a = axes[torch.arange(2 * m, device=device).view(2, m) * 5 % 17] * power[:m]
    b = axes[torch.arange(2 * p, device=device).view(2, p) * 7 % 9 + 7] * power[:p]
    for dtype in FLOATS[:2]:
        _same(a.to(dtype), b.to(dtype))
    _same(a[:, :1], torch.cat([0 * a[:, :1], -a[:, :1]], 1))


def _negative(device: torch.device) -> None:
    a, b = _vectors(1, 20, 8, torch.float32, device).abs(), _vectors(1, 70, 8, torch.float32, device).abs()
    _judged(a, -b)


def _scales(device: torch.device) -> None:
    a, b = _vectors(2, 20, 8, torch.float32, device), _vectors(2, 70, 8, torch.float32, device)
    _judged(a * 1e18, b * 1e18)
    _judged(a * 1e18, b * 1e-10)
    _judged(a.bfloat16() * 1e18, b.bfloat16() * 1e-10)
    _judged(a.half() * 1e4, b.half() * 1e4)


def _strides(device: torch.device) -> None:
    x = _vectors(2, 45, 40, torch.float32, device)
    _judged(x[:, ::2], x[:, 1::2])
    _judged(x.transpose(1, 2)[:, ::2], x.transpose(1, 2)[:, 1::2])
    _judged(x[:1].expand(2, -1, -1), x[..., :1, :].expand(-1, 3, -1))
    _judged(x[..., ::2].flip(1), x[..., 1::2])


def _nan(device: torch.device) -> None:
    a, b = _vectors(1, 5, 8, torch.float32, device), _vectors(1, 70, 8, torch.float32, device)
    for index in (_found(a * float("nan"), b)[1], _found(a, b * float("nan"))[1]):
        assert bool(((index >= 0) & (index < 70)).all())


def _nothing(device: torch.device) -> None:
    for a, b in (((0, 5, 4), (0, 3, 4)), ((2, 0, 4), (2, 3, 4))):
        cosine, index = matching.best_match(torch.ones(a, device=device), torch.ones(b, device=device))
        assert cosine.shape == index.shape == a[:2]
