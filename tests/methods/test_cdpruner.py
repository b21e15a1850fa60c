"""CDPruner against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, cosine, lists, make_view, normal

import vtprune
from vtprune.method import Signal
from vtprune.methods import create

TEXT = Signal("text_features", 0)


def literal(visual: np.ndarray, text: np.ndarray, k: int, relevance: str) -> list[int]:
    n = len(visual)
    rho = [1.0] * n
    if relevance != "none":
        r = [sum(cosine(visual[i], t) for t in text) / len(text) for i in range(n)]
        r = r if relevance == "prompt" else [-x for x in r]
        low, high = min(r), max(r)
        rho = [(x - low + 1e-6) / (high - low) if high > low else 1.0 for x in r]
    kernel = np.ones((n, n))
    for i in range(n):
        for j in range(n):
            kernel[i, j] = rho[i] * rho[j] * (1.0 if i == j else cosine(visual[i], visual[j]))
    chosen: list[int] = []
    for _ in range(k):
        # What a candidate adds to the log determinant is its variance given the chosen ones.
        gain = []
        for i in range(n):
            if i in chosen:
                gain.append(-np.inf)
                continue
            across = kernel[chosen, i]
            left = kernel[i, i] - across @ np.linalg.solve(kernel[np.ix_(chosen, chosen)], across)
            gain.append(left)
        chosen += best(gain, 1)
    return sorted(chosen)


@EXAMPLES
@given(
    SEEDS,
    st.integers(1, 3),
    st.integers(2, 16),
    st.integers(1, 4),
    st.sampled_from(["prompt", "prompt-inverted", "none"]),
    st.data(),
)
def test_formula(seed: int, images: int, n: int, words: int, relevance: str, data: st.DataObject) -> None:
    # Two least relevant tokens have rho of 1e-6: their order among themselves would be noise.
    k = data.draw(st.integers(1, n - 1))
    visual, text = normal(seed, images, n, 24), normal(seed, images, words, 24)
    signals = {} if relevance == "none" else {TEXT: torch.nn.functional.pad(text, (0, 0, 0, 3))}
    chosen = create("cdpruner", relevance=relevance).decide(make_view(visual, signals, k))
    assert lists(chosen) == [literal(visual[g].numpy(), text[g].numpy(), k, relevance) for g in range(images)]


def test_exhausted_kernel_takes_the_lowest_free() -> None:
    """Six tokens of rank 2: after two of them nothing is left to explain."""
    visual = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 1]]])
    for k, expected in ((2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 4, 5])):
        assert lists(create("cdpruner", relevance="none").decide(make_view(visual, {}, k))) == [expected]


def test_equal_relevance_is_none() -> None:
    visual = normal(0, 1, 9, 5)
    text = torch.zeros(1, 2, 5, dtype=torch.float64)
    with_text = create("cdpruner").decide(make_view(visual, {TEXT: text}, 4))
    assert lists(with_text) == lists(create("cdpruner", relevance="none").decide(make_view(visual, {}, 4)))


def test_relevance_is_checked() -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="prompt"):
        create("cdpruner", relevance="clip")
