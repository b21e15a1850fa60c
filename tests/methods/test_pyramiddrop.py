"""PyramidDrop against its formula."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, lists, make_view, normal, shares_of

from vtprune.method import Signal
from vtprune.methods import create

LAST = Signal("text_attention", 8)


@EXAMPLES
@given(SEEDS, st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.sampled_from([None, 2]), st.data())
def test_formula(seed: int, images: int, n: int, heads: int, steps: int | None, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    attention = shares_of(seed, images, heads, n, steps=steps)
    chosen = create("pyramiddrop").decide(make_view(normal(seed, images, n, 4), {LAST: attention}, k))
    expected = []
    for g in range(images):
        scores = [sum(attention[g, h, i].item() for h in range(heads)) / heads for i in range(n)]
        expected.append(sorted(best(scores, k)))
    assert lists(chosen) == expected
