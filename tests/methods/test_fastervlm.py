"""FasterVLM against its formula."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, lists, make_view, normal, shares_of

import vtprune
from vtprune.method import Signal
from vtprune.methods import create

CLS = Signal("cls_attention", 3)


@EXAMPLES
@given(SEEDS, st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.sampled_from([None, 2]), st.data())
def test_formula(seed: int, images: int, n: int, heads: int, steps: int | None, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    attention = shares_of(seed, images, heads, n, steps=steps)
    chosen = create("fastervlm").decide(make_view(normal(seed, images, n, 4), {CLS: attention}, k))
    expected = []
    for g in range(images):
        scores = [sum(attention[g, h, i].item() for h in range(heads)) / heads for i in range(n)]
        expected.append(sorted(best(scores, k)))
    assert lists(chosen) == expected


def test_nan_is_no_score() -> None:
    attention = shares_of(0, 1, 2, 5)
    attention[0, 1, 2] = float("nan")
    with pytest.raises(vtprune.NonFiniteScoresError):
        create("fastervlm").decide(make_view(normal(0, 1, 5, 4), {CLS: attention}, 2))


def test_scorer_is_checked() -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="received"):
        create("fastervlm", scorer="recieved")
