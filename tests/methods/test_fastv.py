"""FastV against a literal transcription."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, lists, make_view, normal, shares_of

from vtprune.method import Signal
from vtprune.methods.fastv import FastV


@EXAMPLES
@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 5), st.sampled_from([None, 4]), SEEDS, st.data())
def test_attention_of_the_last_prompt_token(
    images: int, n: int, heads: int, steps: int | None, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    attention = shares_of(seed, images, heads, n, steps=steps)
    view = make_view(normal(seed, images, n, 2), {Signal("text_attention", 1): attention}, k)
    rows = attention.tolist()
    expected = []
    for g in range(images):
        scores = [sum(rows[g][h][j] for h in range(heads)) / heads for j in range(n)]
        expected.append(sorted(best(scores, k)))
    assert lists(FastV(keep=k).decide(view)) == expected
