"""DivPrune against a literal transcription."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, cosine, lists, make_view, normal

from vtprune.methods.divprune import DivPrune


def literal(features: np.ndarray, k: int) -> list[int]:
    n = len(features)
    if k == n:
        return list(range(n))
    distance = [[1 - cosine(features[i], features[j]) for j in range(n)] for i in range(n)]
    alone = [min(distance[i][j] for j in range(n) if j != i) for i in range(n)]
    chosen = [max(range(n), key=lambda i: (alone[i], -i))]
    while len(chosen) < k:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: (min(distance[i][s] for s in chosen), -i)))
    return sorted(chosen)


@EXAMPLES
@given(st.integers(1, 3), st.integers(1, 20), st.integers(2, 8), SEEDS, st.data())
def test_farthest_first(images: int, n: int, width: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    features = normal(seed, images, n, width)
    expected = [literal(one, k) for one in features.float().double().numpy()]
    assert lists(DivPrune(keep=k).decide(make_view(features, {}, k))) == expected


def test_ties_go_to_the_lower_index() -> None:
    # Four tokens of each of three orthogonal directions: distances are 0 or 1 exactly.
    features = normal(0, 1, 12, 3) * 0
    for j in range(12):
        features[0, j, j % 3] = 1
    assert lists(DivPrune(keep=5).decide(make_view(features, {}, 5))) == [[0, 1, 2, 3, 4]]
