"""Finds where a call makes the host wait for a GPU, on any machine."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune

# Operators whose result the host has to know: a number, or a shape.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim")
# Methods that copy to the host; on CPU tensors they reach no operator.
COPIES = ("tolist", "cpu", "numpy")
ROOTS = tuple(
    str(Path(vtprune.__file__).resolve().parent.parent / part)
    for part in ("vtprune", "integrations", "kernels")
)


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._overloadpacket._qualified_op_name.partition("::")[2]
        masked = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if name in WAITING or masked:
            _note(self.found)
        return func(*args, **(kwargs or {}))


def _note(found: Counter[str]) -> None:
    """Counts the innermost frame of a library, if it is vtprune's."""
    frame = sys._getframe(2)
    while frame is not None:
        file = str(Path(frame.f_code.co_filename).resolve())
        if file.startswith(ROOTS):
            found[f"{Path(file).name}:{frame.f_code.co_name}"] += 1
            return
        if "transformers" in file or "timm" in file:
            return
        frame = frame.f_back


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts per "file:function" of vtprune how often it would wait for the device."""
    found: Counter[str] = Counter()

    def watched(real: Any) -> Any:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            _note(found)
            return real(self, *args, **kwargs)

        return call

    to = Tensor.to

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if "cpu" in [a for a in args if isinstance(a, str)]:
            _note(found)
        return to(self, *args, **kwargs)

    patches = [mock.patch.object(Tensor, name, watched(getattr(Tensor, name))) for name in COPIES]
    patches.append(mock.patch.object(Tensor, "to", moved))
    for patch in patches:
        patch.start()
    try:
        with _Operators(found):
            yield found
    finally:
        for patch in patches:
            patch.stop()
