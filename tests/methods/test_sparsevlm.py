"""SparseVLM against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, lists, make_view, normal, shares_of

from vtprune.method import Signal
from vtprune.methods import create

ATTENTION = Signal("prompt_attention", 2)
TEXT = Signal("text_features", 0)
INPUT = Signal("input_features", 0)


def raters_of(visual: np.ndarray, text: np.ndarray) -> list[int]:
    words = len(text)
    m = [0.0] * words
    for v in visual:
        logits = [float(np.dot(v, t)) for t in text]
        top = max(logits)
        exp = [math.exp(x - top) for x in logits]
        for t in range(words):
            m[t] += exp[t] / sum(exp) / len(visual)
    return [t for t in range(words) if m[t] > sum(m) / words] or list(range(words))


def clusters_of(x: np.ndarray, count: int) -> dict[int, list[int]]:
    """Centre -> members."""
    n, dim = x.shape
    distance = [[float(np.sqrt(np.sum((a - b) ** 2))) / math.sqrt(dim) for b in x] for a in x]
    density = [math.exp(-sum(d**2 for d in sorted(row)[:count]) / count) for row in distance]
    farthest = max(max(row) for row in distance)
    score = []
    for i in range(n):
        denser = [distance[i][j] for j in range(n) if density[j] > density[i]]
        score.append(min(denser, default=farthest) * density[i])
    centres = best(score, count)
    found: dict[int, list[int]] = {c: [c] for c in centres}
    for i in range(n):
        if i not in centres:
            found[min(centres, key=lambda c: (distance[c][i], centres.index(c)))].append(i)
    return found


def literal(
    attention: np.ndarray, text: np.ndarray, visual: np.ndarray, hidden: np.ndarray, k: int, recycle: float
) -> dict[int, dict[int, float]]:
    """Kept token -> tokens it is made of, with their weights. Attention [H, T, N]."""
    heads, _, n = attention.shape
    raters = raters_of(visual, text)
    scores = [
        sum(float(attention[h, t, i]) for t in raters for h in range(heads)) / (heads * len(raters))
        for i in range(n)
    ]
    count = 0 if recycle == 0 else min(int((int(recycle * (n - k)) + 1) / 10) + 1, k - 1)
    ranked = best(scores, n)
    made = {i: {i: 1.0} for i in ranked[: k - count]}
    if count:
        pruned = ranked[k - count :]
        pool = sorted(pruned[: max(count, int(recycle * len(pruned)) + 1)])
        for centre, members in clusters_of(hidden[pool], count).items():
            made[pool[centre]] = {pool[i]: 1 / len(members) for i in members}
    return made


@EXAMPLES
@given(
    SEEDS,
    st.integers(1, 3),
    st.integers(2, 45),
    st.integers(1, 4),
    st.sampled_from([0.3, 0.0, 0.9]),
    st.data(),
)
def test_formula(seed: int, images: int, n: int, words: int, recycle: float, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n - 1))
    before, padding = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    text, visual, hidden = (
        normal(seed, images, words, 8),
        normal(seed, images, n, 8),
        normal(seed + 1, images, n, 8),
    )
    attention = shares_of(seed, images, 2, words, n)
    # Text before the picture sees nothing of it; shorter prompts are filled up.
    seen = torch.nn.functional.pad(attention, (0, 0, before, padding))
    words_shown = torch.cat(
        [normal(seed + 2, images, before, 8), text, text.new_zeros(images, padding, 8)], 1
    )
    view = make_view(hidden, {ATTENTION: seen, TEXT: words_shown, INPUT: visual}, k)
    chosen = create("sparsevlm", recycle=recycle).decide(view)
    for g in range(images):
        made = literal(*(x[g].numpy() for x in (attention, text, visual, hidden)), k, recycle)
        assert lists(chosen)[g] == sorted(made)
        expected = torch.stack([sum(w * hidden[g, j] for j, w in made[i].items()) for i in sorted(made)])
        torch.testing.assert_close(chosen.image(g).apply(hidden[g]), expected, atol=1e-5, rtol=1e-5)
        assert len(made) == k


def test_ties_go_to_the_lower_index() -> None:
    attention = torch.ones(1, 2, 3, 9, dtype=torch.float64) / 16
    signals = {ATTENTION: attention, TEXT: normal(0, 1, 3, 4), INPUT: normal(1, 1, 9, 4)}
    chosen = create("sparsevlm", recycle=0.0).decide(make_view(normal(2, 1, 9, 4), signals, 4))
    assert lists(chosen) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("words", [0, 2])
def test_no_text_behind_the_picture(words: int) -> None:
    attention = torch.zeros(1, 2, words, 9, dtype=torch.float64)
    signals = {ATTENTION: attention, TEXT: normal(0, 1, words, 4), INPUT: normal(1, 1, 9, 4)}
    chosen = create("sparsevlm", recycle=0.0).decide(make_view(normal(2, 1, 9, 4), signals, 4))
    assert lists(chosen) == [[0, 1, 2, 3]]
