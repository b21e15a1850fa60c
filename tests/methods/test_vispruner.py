"""VisPruner against its formula."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, cosine, lists, make_view, normal, shares_of

import vtprune
from vtprune.method import Signal
from vtprune.methods import create

CLS = Signal("cls_attention", 3)


def literal(features: list, scores: list[float], k: int, important: float) -> list[int]:
    ranked = best(scores, len(scores))
    first = ranked[: int(k * important)]
    rest = ranked[int(k * important) :]
    diverse = k - len(first)
    if diverse == 0:
        return sorted(first)
    while len(rest) > diverse:
        here, between = rest[0::2], rest[1::2]
        likeness = [max(cosine(features[a], features[b]) for b in between) for a in here]
        leave = min(8, len(rest) - diverse, len(here))
        rest = [here[i] for i in best(likeness, len(here))][leave:] + between
    return sorted(first + rest)


@EXAMPLES
@given(
    SEEDS,
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from([0.5, 0.0, 1.0, 0.3]),
    st.booleans(),
    st.data(),
)
def test_formula(seed: int, images: int, n: int, important: float, ties: bool, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    attention = shares_of(seed, images, 2, n, steps=2 if ties else None)
    features = normal(seed, images, n, 5)
    chosen = create("vispruner", important=important).decide(make_view(features, {CLS: attention}, k))
    scores = attention.mean(1)
    assert lists(chosen) == [
        literal(list(features[g].numpy()), scores[g].tolist(), k, important) for g in range(images)
    ]


def test_share_is_checked() -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="share"):
        create("vispruner", important=2.0)
