"""Token operations; the one place that chooses between the torch reference and a Triton kernel.

``VTPRUNE_BACKEND`` is ``auto`` (default: Triton for CUDA tensors where a kernel exists, the reference
elsewhere), ``reference`` or ``triton``. An error inside a kernel is raised, never hidden by a fallback.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

from torch import Tensor

from vtprune.errors import InvalidOptionError, did_you_mean
from vtprune.kernels import reference
from vtprune.kernels.reference import attention_rows, compact, merge_tokens, received_attention

__all__ = ["attention_rows", "backend", "compact", "gather_tokens", "merge_tokens", "received_attention"]

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


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """``out[b, k] = x[b, index[b, k]]``.

    Args:
        x: [B, N, D].
        index: [B, K] int64 in [0, N).

    Returns:
        [B, K, D].
    """
    if backend(x) == "triton":
        from vtprune.kernels.gather import gather_tokens as triton_gather

        return triton_gather(x, index)
    return reference.gather_tokens(x, index)
