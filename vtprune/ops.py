"""Token operations; the one place that chooses between the torch reference and a Triton kernel.

``VTPRUNE_BACKEND`` is ``auto`` (default: Triton for CUDA tensors, the reference elsewhere), ``reference`` or ``triton``
(on CPU only in Triton's interpreter, ``TRITON_INTERPRET=1``). An error inside a kernel is raised, never hidden by a
fallback. Every operation is defined, with its arguments, in :mod:`vtprune.kernels.reference`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from vtprune.errors import InvalidOptionError, did_you_mean
from vtprune.kernels import reference
from vtprune.kernels.reference import compact

__all__ = [
    "attention_columns",
    "attention_rows",
    "backend",
    "best_match",
    "compact",
    "dpp_map",
    "farthest_first",
    "gather_many",
    "gather_mask",
    "gather_tokens",
    "merge_tokens",
    "received_attention",
]

_BACKENDS = ("auto", "reference", "triton")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend(x: Tensor) -> str:
    """The backend ("reference" or "triton") that handles this tensor.

    Raises:
        InvalidOptionError: ``VTPRUNE_BACKEND`` is set to an unknown name.
    """
    name = os.environ.get("VTPRUNE_BACKEND", "auto")
    if name not in _BACKENDS:
        raise InvalidOptionError(f"VTPRUNE_BACKEND={name!r} is unknown. {did_you_mean(name, _BACKENDS)}")
    if name == "auto":
        return "triton" if x.is_cuda and _has_triton() else "reference"
    return name


def _of(x: Tensor, module: str) -> Any:
    """What implements the operations of a kernel module for this tensor."""
    if backend(x) == "reference":
        return reference
    return importlib.import_module(f"vtprune.kernels.{module}")


def gather_many(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], valid: Tensor | None = None
) -> list[Tensor]:
    """See :func:`vtprune.kernels.reference.gather_many`; one launch for all tensors."""
    out: list[Tensor] = _of(tensors[0], "gather").gather_many(tensors, indices, valid)
    return out


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """See :func:`vtprune.kernels.reference.gather_tokens`."""
    out: Tensor = _of(x, "gather").gather_tokens(x, index)
    return out


def gather_mask(mask: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """See :func:`vtprune.kernels.reference.gather_mask`."""
    out: Tensor = _of(mask, "gather").gather_mask(mask, index, valid)
    return out


def merge_tokens(x: Tensor, into: Tensor, weight: Tensor, n_out: int) -> Tensor:
    """See :func:`vtprune.kernels.reference.merge_tokens`; the kernel gives the same bits in every run."""
    out: Tensor = _of(x, "merge").merge_tokens(x, into, weight, n_out)
    return out


def attention_rows(q: Tensor, k: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """See :func:`vtprune.kernels.reference.attention_rows`."""
    out: Tensor = _of(q, "attention").attention_rows(q, k, scale, visible)
    return out


def attention_columns(
    q: Tensor,
    k: Tensor,
    scale: float,
    visible: Tensor | None = None,
    asking: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """See :func:`vtprune.kernels.reference.attention_columns`."""
    out: Tensor = _of(q, "attention").attention_columns(q, k, scale, visible, asking, causal)
    return out


def received_attention(q: Tensor, k: Tensor, scale: float, valid: Tensor | None = None) -> Tensor:
    """Mean over all queries of the attention each key receives (column mean of the softmax matrix).

    Args:
        q, k: [B, H, N, d].
        scale: factor on the logits.
        valid: [B, N] bool, False for padding, which neither gives nor receives.

    Returns:
        [B, H, N] float32, summing to one over N.
    """
    total = attention_columns(q, k, scale, valid, valid)
    return total / (q.shape[2] if valid is None else valid.sum(1)[:, None, None])


def farthest_first(
    weight: Tensor, distance: Tensor, k: int, start: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """See :func:`vtprune.kernels.reference.farthest_first`; one launch."""
    out: Tensor = _of(weight, "greedy").farthest_first(weight, distance, k, start, lengths)
    return out


def dpp_map(kernel: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
    """See :func:`vtprune.kernels.reference.dpp_map`; one launch."""
    out: Tensor = _of(kernel, "greedy").dpp_map(kernel, k, lengths)
    return out


def best_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`vtprune.kernels.reference.best_match`."""
    out: tuple[Tensor, Tensor] = _of(a, "matching").best_match(a, b)
    return out
