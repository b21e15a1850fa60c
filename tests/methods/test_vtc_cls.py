"""VTC-CLS against a literal transcription."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, lists, make_view, normal, shares_of

from vtprune.method import Signal
from vtprune.methods.vtc_cls import VTCCls


@EXAMPLES
@given(
    st.integers(1, 3),
    st.integers(1, 30),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 4),
    st.sampled_from([None, 4]),
    SEEDS,
    st.data(),
)
def test_ensemble_of_layers(
    images: int, n: int, heads: int, layers: int, steps: int | None, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    signals = {
        Signal("cls_attention", layer): shares_of(seed + layer, images, heads, n, steps=steps)
        for layer in range(layers)
    }
    view = make_view(normal(seed, images, n, 2), signals, k)
    expected = []
    for g in range(images):
        scores = [0.0] * n
        for attention in signals.values():
            rows = attention[g].tolist()
            for j in range(n):
                scores[j] += sum(rows[h][j] for h in range(heads)) / heads
        expected.append(sorted(best(scores, k)))
    assert lists(VTCCls(keep=k).decide(view)) == expected
