"""VisionZip against a literal transcription."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, cosine, lists, make_view, normal, shares_of

import vtprune
from vtprune.method import Signal
from vtprune.methods.visionzip import VisionZip


def literal(attention: np.ndarray, keys: np.ndarray, k: int, share: float) -> tuple[list[int], np.ndarray]:
    """Survivors, sorted, and the [k, N] matrix that makes them of all tokens."""
    heads, n = attention.shape
    contextual = min(round(share * k), n - k)
    scores = [sum(attention[h, j] for h in range(heads)) for j in range(n)]
    dominant = best(scores, k - contextual)
    rest = [j for j in range(n) if j not in dominant]
    targets = rest[:: len(rest) // contextual][:contextual] if contextual else []
    kept = sorted([*dominant, *targets])
    mix = np.zeros((k, n))
    for j in kept:
        mix[kept.index(j), j] = 1
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for j in rest:
        if targets and j not in targets:
            joined[max(targets, key=lambda t: (cosine(keys[j], keys[t]), -targets.index(t)))].append(j)
    for target, members in joined.items():
        for j in members:
            mix[kept.index(target), j] = 1 / len(members)
    return kept, mix


@EXAMPLES
@given(
    st.integers(1, 3),
    st.integers(1, 24),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.0, 10 / 64, 0.5]),
    st.sampled_from([None, 4]),
    SEEDS,
    st.data(),
)
def test_dominant_and_contextual_tokens(
    images: int, n: int, heads: int, share: float, steps: int | None, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    attention = shares_of(seed, images, heads, n, steps=steps)
    keys = normal(seed + 1, images, n, 6)
    signals = {Signal("cls_attention", 5): attention, Signal("encoder_keys", 5): keys}
    chosen = VisionZip(keep=k, contextual=share).decide(make_view(normal(seed, images, n, 2), signals, k))
    for g in range(images):
        kept, mix = literal(attention[g].numpy(), keys[g].float().double().numpy(), k, share)
        assert lists(chosen)[g] == kept
        found = chosen.image(g).apply(torch.eye(n))
        torch.testing.assert_close(found, torch.from_numpy(mix).float(), atol=1e-5, rtol=1e-5)


def test_options() -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="contextual"):
        VisionZip(keep=4, contextual=1.0)
