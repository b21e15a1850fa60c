"""DyCoke against its formula."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.test_evs import spaced, video
from methods.views import EXAMPLES, SEEDS, cosine, lists, make_view, normal

from vtprune.methods import create


def literal(frames: np.ndarray, index: list[list[int]], k: int) -> list[list[int]]:
    f, n = frames.shape[:2]
    of_four = ["ABCD"[t % 4] for t in range(f)]
    others = sum(name != "A" for name in of_four)
    for_a = min(k * f - others, n * (f - others))
    counts = [0] * f
    for total, group in ((for_a, "A"), (k * f - for_a, "BCD")):
        members = [t for t in range(f) if of_four[t] in group]
        for i in range(total):
            counts[members[i % len(members)]] += 1
    kept = []
    for t in range(f):
        if of_four[t] == "A":
            kept.append(spaced(n, counts[t]))
            continue
        other = {"B": t - 1, "C": t - 2, "D": t - 1}[of_four[t]]
        alike = []
        for i in range(n):
            same = [j for j in range(n) if index[other][j] == index[t][i]]
            alike.append(cosine(frames[t, i], frames[other, same[0]]) if same else -9.0)
        kept.append(sorted(sorted(range(n), key=lambda i: (alike[i], i))[: counts[t]]))
    return kept


@EXAMPLES
@given(SEEDS, st.integers(1, 10), st.integers(1, 10), st.booleans(), st.data())
def test_formula(seed: int, frames: int, n: int, thinned: bool, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    features = normal(seed, frames, n, 4)
    places = n + 3 if thinned else n
    rows = [sorted(np.random.default_rng([seed, t]).permutation(places)[:n].tolist()) for t in range(frames)]
    view = make_view(features, {}, k, video(frames, places), index=torch.tensor(rows))
    found = lists(create("dycoke").decide(view))
    assert found == literal(features.numpy(), rows, k)
    assert sum(map(len, found)) == k * frames


def test_the_authors_ratio_leaves_their_counts() -> None:
    """One frame of four whole, and 0.3 of the tokens of the three others."""
    n = 40
    found = create("dycoke").decide(make_view(normal(0, 8, n, 4), {}, int(1.9 / 4 * n), video(8, n)))
    assert found.counts == (40, 12, 12, 12, 40, 12, 12, 12)
