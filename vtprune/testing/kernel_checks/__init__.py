"""Checks of the Triton kernels against their torch definitions, on any device.

The test suite runs them in Triton's interpreter; ``vtprune bench`` runs them on the device at hand before it prints a
figure. ``python -m vtprune.testing.kernel_checks [cpu|cuda]`` runs them alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Check = Callable[[torch.device], None]
BATTERIES = ("gather", "merge", "attention", "greedy", "matching")
POISON = -7  # what integers are poisoned with


def all_checks() -> Iterator[tuple[str, Check]]:
    """Name and function of every check; a function raises AssertionError on the device where its kernel is wrong."""
    for battery in BATTERIES:
        for name, check in importlib.import_module(f"{__name__}.{battery}").checks():
            yield f"{battery}: {name}", check


@contextmanager
def poisoned() -> Iterator[None]:
    """New uninitialised tensors hold NaN (integers -7, bool True), so that a lane that no kernel writes shows."""

    def poison(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = real(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else POISON)

        return made

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poison(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield
