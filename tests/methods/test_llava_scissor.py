"""LLaVA-Scissor against its formula: components by search, merged one edge at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.test_evs import video
from methods.views import EXAMPLES, SEEDS, cosine, lists, make_view, normal

import vtprune
from vtprune.methods import create


def components(x: np.ndarray, tau: float) -> list[list[int]]:
    """By depth-first search, ordered by their first node."""
    left, found = set(range(len(x))), []
    while left:
        seen, todo = set(), [min(left)]
        while todo:
            i = todo.pop()
            seen.add(i)
            todo += [j for j in left - seen if cosine(x[i], x[j]) > tau]
        left -= seen
        found.append(sorted(seen))
    return found


def literal(
    frames: np.ndarray, tau: float, k: int | None
) -> tuple[list[list[int]], list[dict[int, np.ndarray]]]:
    f, n, _ = frames.shape
    flat = frames.reshape(f * n, -1)
    total = f if k is None else k * f
    # Within frames: single linkage, strongest pair of any frame first.
    groups = [{i} for i in range(f * n)]
    pairs = [(t * n + i, t * n + j) for t in range(f) for i in range(n) for j in range(i)]
    for a, b in sorted(pairs, key=lambda p: -cosine(flat[p[0]], flat[p[1]])):
        one, other = (next(g for g in groups if e in g) for e in (a, b))
        if one is not other and cosine(flat[a], flat[b]) > tau and len(groups) > total:
            groups.remove(other)
            one |= other
    if k is None:
        assert sorted(sorted(g) for g in groups) == sorted(
            [t * n + i for i in part] for t in range(f) for part in components(frames[t], tau)
        )
    groups.sort(key=min)
    means = [np.mean([flat[i] for i in sorted(g)], axis=0) for g in groups]
    frame = [min(g) // n for g in groups]
    stays = set(range(len(groups)))
    wholes = [{r} for r in range(len(groups))]
    last = {r: r for r in range(len(groups))}  # smallest member -> survivor that may still go
    pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
    for a, b in sorted(pairs, key=lambda p: -cosine(means[p[0]], means[p[1]])):
        if len(stays) == total or (k is None and cosine(means[a], means[b]) <= tau):
            break
        one, other = (next(w for w in wholes if e in w) for e in (a, b))
        if one is other:
            continue
        early, late = sorted((last[min(one)], last[min(other)]))
        crowd = [sum(frame[s] == frame[r] for s in stays) for r in (early, late)]
        if crowd[1] > 1:
            stays.discard(late)
            survivor = early
        else:
            if crowd[0] > 1:
                stays.discard(early)
            survivor = late
        wholes.remove(other)
        one |= other
        last[min(one)] = survivor
    centres = [np.mean([means[r] for r in sorted(w)], axis=0) for w in wholes]
    nearest = [max(range(len(wholes)), key=lambda c: cosine(x, centres[c])) for x in flat]
    values: list[dict[int, np.ndarray]] = [{} for _ in range(f)]
    for number, whole in enumerate(wholes):
        mine = sorted(r for r in stays if r in whole)
        # One, but where frames keep a last one: then each takes what comes until the next.
        for place, r in enumerate(mine):
            since = frame[r] if place else 0
            until = frame[mine[place + 1]] if r != mine[-1] else f
            token = max(sorted(groups[r]), key=lambda i: cosine(flat[i], means[r]))
            mean = np.mean([means[p] for p in sorted(whole) if since <= frame[p] < until], axis=0)
            joined = [flat[i] for i in range(f * n) if since <= i // n < until and nearest[i] == number]
            values[frame[r]][token % n] = (mean + sum(joined)) / (1 + len(joined))
    return [sorted(row) for row in values], values


@pytest.mark.filterwarnings("ignore:llava-scissor removed nothing")
@EXAMPLES
@given(SEEDS, st.integers(1, 3), st.integers(1, 7), st.sampled_from([-1.0, 0.3, 0.6, 0.9, 1.0]), st.data())
def test_formula(seed: int, frames: int, n: int, tau: float, data: st.DataObject) -> None:
    k = data.draw(st.one_of(st.none(), st.integers(1, n)))
    x = normal(seed, frames, n, 3)
    found = create("llava-scissor", keep=k, threshold=tau).decide(
        make_view(x, {}, n if k is None else k, video(frames, n))
    )
    index, values = literal(x.numpy(), tau, k)
    assert lists(found) == index
    if k is not None:
        assert sum(found.counts) == k * frames
    for t, row in enumerate(found.apply_all(x)):
        expected = np.stack([values[t][i] for i in index[t]])
        torch.testing.assert_close(row, torch.from_numpy(expected), atol=1e-9, rtol=1e-9)


def test_a_repeated_frame_keeps_one_token() -> None:
    """Four directions twice: a frame that only repeats keeps one token, and each direction stays once."""
    x = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2, 3, 3]].expand(2, 6, 4)
    found = create("llava-scissor").decide(make_view(x, {}, 6, video(2, 6)))
    assert found.counts == (3, 1)


def test_a_component_across_frames_is_one_token_as_theirs() -> None:
    """No frame is emptied: y = (representative + sum of joined) / (1 + number of joined), tokens of both frames."""
    x = torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[1, 0.1, 0], [0, 0, 1]]], dtype=torch.float64)
    found = create("llava-scissor").decide(make_view(x, {}, 2, video(2, 2)))
    assert lists(found) == [[0, 1], [1]]
    representative = x[:, 0].mean(0)
    torch.testing.assert_close(found.apply_all(x)[0][0], (representative + x[:, 0].sum(0)) / 3)


def test_threshold_is_checked() -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="threshold"):
        create("llava-scissor", threshold=1.5)


def test_removing_nothing_is_not_silent() -> None:
    x = torch.eye(4, dtype=torch.float64)[None]
    with pytest.warns(UserWarning, match="lower it, or give keep"):
        found = create("llava-scissor").decide(make_view(x, {}, 4))
    assert found.counts == (4,)
