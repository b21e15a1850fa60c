"""Triton kernels against their torch references; on CPU in Triton's interpreter."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from vtprune import ops
from vtprune.errors import InvalidOptionError
from vtprune.kernels import reference

pytest.importorskip("triton", reason="Triton has no build for this platform")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def gather(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Triton gather, with outputs poisoned by NaN so that a lane that is not written shows."""
    kernel = importlib.import_module("vtprune.kernels.gather")
    real = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(kernel.torch, "empty", poisoned)
    return kernel.gather_tokens


def case(b: int, n: int, k: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(b * 1000 + n * 10 + k)
    x = torch.randn(b, n, d, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(n, generator=generator)[:k].sort().values for _ in range(b)])
    return x.to(DEVICE), index.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).split(".")[1])
@pytest.mark.parametrize(
    ("b", "n", "k", "d"),
    [(1, 1, 1, 1), (2, 63, 20, 100), (3, 17, 1, 33), (2, 16, 16, 64), (1, 5, 3, 1500)],
    ids=lambda v: str(v),
)
def test_gather_is_bit_exact(gather, b: int, n: int, k: int, d: int, dtype: torch.dtype) -> None:
    x, index = case(b, n, k, d, dtype)
    assert torch.equal(gather(x, index), reference.gather_tokens(x, index))


def test_gather_of_non_contiguous_inputs(gather) -> None:
    x, index = case(2, 31, 7, 24, torch.float32)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)  # features are not the last stride
    sliced = torch.cat([x, x], 1)[:, ::2]
    wide = index.repeat_interleave(2, 1)[:, ::2]
    assert not strided.is_contiguous()
    assert not wide.is_contiguous()
    assert torch.equal(gather(strided, wide), reference.gather_tokens(x, index))
    assert torch.equal(gather(sliced, wide), reference.gather_tokens(sliced, index))


def test_gather_of_nothing(gather) -> None:
    x, index = case(2, 9, 3, 8, torch.float32)
    assert gather(x, index[:, :0]).shape == (2, 0, 8)
    assert gather(x[:0], index[:0]).shape == (0, 3, 8)


def test_gather_has_the_reference_gradient(gather) -> None:
    x, index = case(2, 11, 4, 6, torch.float32)
    grads = []
    for function in (gather, reference.gather_tokens):
        leaf = x.clone().requires_grad_()
        (function(leaf, index) ** 2).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_backend_is_chosen_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    x, index = case(1, 8, 3, 4, torch.float32)
    monkeypatch.setenv("VTPRUNE_BACKEND", "triton")
    assert ops.backend(x) == "triton"
    assert torch.equal(ops.gather_tokens(x, index), reference.gather_tokens(x, index))
    monkeypatch.setenv("VTPRUNE_BACKEND", "reference")
    assert ops.backend(x) == "reference"
    monkeypatch.setenv("VTPRUNE_BACKEND", "tritton")
    with pytest.raises(InvalidOptionError, match="Did you mean 'triton'"):
        ops.gather_tokens(x, index)
    monkeypatch.delenv("VTPRUNE_BACKEND")
    assert ops.backend(torch.zeros(1)) == "reference"


def test_a_kernel_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("vtprune.kernels.gather")

    def broken(*args: object) -> torch.Tensor:
        raise RuntimeError("kernel broke")

    monkeypatch.setattr(kernel, "gather_tokens", broken)
    monkeypatch.setenv("VTPRUNE_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="kernel broke"):
        ops.gather_tokens(torch.zeros(1, 2, 3), torch.zeros(1, 1, dtype=torch.long))
