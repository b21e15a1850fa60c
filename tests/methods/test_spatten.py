"""SpAtten's token part against its formula."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, lists, make_view, normal, shares_of

from vtprune.method import Signal
from vtprune.methods import create


@EXAMPLES
@given(SEEDS, st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.sampled_from([None, 2]), st.data())
def test_formula(seed: int, images: int, n: int, layers: int, steps: int | None, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    received = {
        Signal("decoder_received", layer): shares_of(seed + 10 * layer, images, 2, n, steps=steps)
        for layer in range(layers)
    }
    chosen = create("spatten").decide(make_view(normal(seed, images, n, 4), received, k))
    expected = []
    for g in range(images):
        scores = [sum(x[g, h, i].item() for x in received.values() for h in range(2)) for i in range(n)]
        expected.append(sorted(best(scores, k)))
    assert lists(chosen) == expected


@pytest.mark.parametrize(
    ("strength", "first", "last"), [(1.0, 0, 0), (0.75, 0, 0.5), (0.5, 0, 1), (0.25, 0.5, 1), (0.0, 1, 1)]
)
def test_ramp(strength: float, first: float, last: float) -> None:
    """Ends of the ramp of removed shares; its middle is their mean, the average."""
    shares = create("spatten").shares(strength, 3)  # type: ignore[attr-defined]
    assert [1 - s for s in shares] == pytest.approx([first, (first + last) / 2, last])
    assert (first + last) / 2 == pytest.approx(1 - strength)
