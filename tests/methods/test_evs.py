"""EVS against its formula, and what all methods for video share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, cosine, lists, make_view, normal

import vtprune
from vtprune.layout import TokenLayout
from vtprune.methods import create
from vtprune.methods.clips import clips


def spaced(n: int, k: int) -> list[int]:
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def literal(frames: np.ndarray, index: list[list[int]], k: int) -> list[list[int]]:
    n, later = len(frames[0]), len(frames) - 1
    first = min(n, k * len(frames) - later)
    kept = [spaced(n, first)] + [[] for _ in range(later)]
    change = {}
    for t in range(1, later + 1):
        for i in range(n):
            before = [j for j in range(n) if index[t - 1][j] == index[t][i]]
            change[t, i] = 1 - cosine(frames[t, i], frames[t - 1, before[0]]) if before else 255.0
    left = k * len(frames) - first
    for t in range(1, later + 1):  # one each
        i = max(range(n), key=lambda i: (change[t, i], -i))
        kept[t].append(i)
        del change[t, i]
        left -= 1
    for t, i in sorted(change, key=lambda at: (-change[at], at))[:left]:
        kept[t].append(i)
    return [sorted(row) for row in kept]


def video(frames: int, n: int, image: int = 0) -> list[TokenLayout]:
    return [TokenLayout(1, n, "video", image, time=t) for t in range(frames)]


@EXAMPLES
@given(SEEDS, st.integers(1, 5), st.integers(1, 12), st.booleans(), st.data())
def test_formula(seed: int, frames: int, n: int, thinned: bool, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    features = normal(seed, frames, n, 4)
    places = n + 3 if thinned else n
    rows = [sorted(np.random.default_rng([seed, t]).permutation(places)[:n].tolist()) for t in range(frames)]
    view = make_view(features, {}, k, video(frames, places), index=torch.tensor(rows))
    found = lists(create("evs").decide(view))
    assert found == literal(features.numpy(), rows, k)
    assert sum(map(len, found)) == k * frames


def test_a_still_scene_keeps_the_first_frame_and_what_moved() -> None:
    features = normal(0, 1, 6, 4).repeat(3, 1, 1)
    features[1, 4] = -features[1, 4]
    features[2, 4] = -features[2, 4]  # stays as it was in frame 1, so nothing changes in frame 2
    chosen = create("evs").decide(make_view(features, {}, 3, video(3, 6)))
    assert lists(chosen) == [[0, 1, 2, 3, 4, 5], [0, 4], [0]]


def test_videos_and_pictures_of_one_view_do_not_mix() -> None:
    features = normal(3, 6, 5, 4)
    layout = [*video(2, 5), TokenLayout(1, 5), *video(3, 5, image=1)]
    together = lists(create("evs").decide(make_view(features, {}, 2, layout)))
    alone = [
        lists(create("evs").decide(make_view(features[a:b], {}, 2, layout[a:b])))
        for a, b in ((0, 2), (2, 3), (3, 6))
    ]
    assert together == [row for part in alone for row in part]


def test_the_frames_of_a_video() -> None:
    a, b = video(2, 4), video(3, 4, image=1)
    assert clips([*a, *b, TokenLayout(2, 2), TokenLayout(2, 2, tile=1)]) == [[0, 1], [2, 3, 4], [5], [6]]
    assert clips([*a, *a]) == [[0, 1], [2, 3]]  # beams


def test_broken_features_are_refused() -> None:
    features = normal(0, 2, 4, 3)
    features[1, 2, 0] = float("nan")
    with pytest.raises(vtprune.NonFiniteScoresError):
        create("evs").decide(make_view(features, {}, 2, video(2, 4)))
