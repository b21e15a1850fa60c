"""Views made by hand, so that a method's decision can be compared with its formula without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from vtprune.layout import TokenLayout
from vtprune.method import Signal, View
from vtprune.selection import Selection


def make_view(
    features: Tensor,
    signals: Mapping[Signal, Tensor],
    k: int,
    layout: Sequence[TokenLayout] | None = None,
    n_original: Sequence[int] | None = None,
    sizes: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    index: Tensor | None = None,
) -> View:
    """What a stage would be shown of images [G, N, D]; one row of tokens each unless `layout` says otherwise.

    `index` [G, N] are the tokens that earlier stages left, all by default.
    """
    images, n = features.shape[:2]
    if index is None:
        index = torch.arange(n).expand(images, n)
    if layout is None:
        layout = [TokenLayout(1, n, image=g) for g in range(images)]
    if n_original is None:
        n_original = [one.n_tokens for one in layout]
    chosen = range(images) if seeds is None else seeds
    return View(features, index, layout, k, n_original, lambda: list(chosen), dict(signals), sizes)


EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 10**6)


def normal(seed: int, *shape: int, steps: int | None = None) -> Tensor:
    """Float64 noise; with `steps`, rounded to multiples of 1 / steps so that many values tie."""
    x = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return torch.from_numpy(x if steps is None else np.round(x * steps) / steps)


def shares_of(seed: int, *shape: int, steps: int | None = None) -> Tensor:
    """Positive rows such as softmax attention."""
    x = normal(seed, *shape, steps=steps).abs() + (0 if steps is None else 1)
    return x / (x.sum(-1, keepdim=True) if steps is None else 64)


def lists(chosen: Selection) -> list[list[int]]:
    """Kept indices per image."""
    return [index.tolist() for index in chosen.index]


def best(scores: Sequence[float], k: int) -> list[int]:
    """Numbers of the k largest scores, best first, ties going to the lower number."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors."""
    return float(np.dot(a, b) / (np.sqrt(np.dot(a, a)) * np.sqrt(np.dot(b, b))))
