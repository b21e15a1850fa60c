"""Triton kernels against their torch definitions, in Triton's interpreter or on a GPU; and how one is chosen."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch

from vtprune import ops
from vtprune.errors import InvalidOptionError
from vtprune.kernels import reference
from vtprune.testing.kernel_checks import BATTERIES, all_checks, poisoned

pytest.importorskip("triton", reason="Triton has no build for this platform")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in all_checks()])
def test_kernel(check: Callable[[torch.device], None]) -> None:
    check(DEVICE)


def test_checks_notice_a_lane_that_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert (torch.zeros(2).new_empty(2, dtype=torch.int64) == -7).all()
    kernel = importlib.import_module("vtprune.kernels.gather")

    def nothing(*args: object) -> torch.Tensor:
        return torch.empty(2, 20, 100)

    monkeypatch.setattr(kernel, "gather_tokens", nothing)
    name, check = next((n, c) for n, c in all_checks() if n.startswith("gather: "))
    monkeypatch.setattr(kernel, "gather_many", lambda tensors, *args: [torch.empty_like(x) for x in tensors])
    with pytest.raises((AssertionError, RuntimeError)):
        check(DEVICE)
    assert name


def test_every_operation_is_in_reference_and_kernel() -> None:
    chosen = set(ops.__all__) - {"backend", "compact", "received_attention"}
    kernels = {
        name: module
        for module in BATTERIES
        for name in vars(importlib.import_module(f"vtprune.kernels.{module}"))
        if name in chosen
    }
    assert set(kernels) == chosen
    assert all(hasattr(reference, name) for name in chosen)


def test_backend_is_chosen_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    x, index = torch.randn(1, 8, 4, device=DEVICE), torch.tensor([[5, 1, 1]], device=DEVICE)
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
