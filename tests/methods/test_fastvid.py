"""FastVID against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.test_evs import video
from methods.views import EXAMPLES, SEEDS, best, cosine, lists, make_view, normal, shares_of

import vtprune
from vtprune.method import Signal
from vtprune.methods import create
from vtprune.methods.fastvid import FastVID

RECEIVED = Signal("received_attention", 3)


def quotas(
    frames: np.ndarray, dense: int, room: int, c: int, tau: float, p: int
) -> tuple[list[int], list[list[int]]]:
    """Context tokens of every frame, and the frames of its segment."""
    f = len(frames)
    means = frames.mean(1)
    alike = [cosine(means[t], means[t + 1]) for t in range(f - 1)]
    cut = {t for t in range(f - 1) if alike[t] < tau} | set(best([-a for a in alike], c - 1))
    segments: list[list[int]] = [[]]
    for t in range(f):
        segments[-1].append(t)
        if t in cut:
            segments.append([])
    counts = [0] * f
    for segment in segments:
        anchors = [t for i, t in enumerate(reversed(segment)) if i % p == 0][::-1]
        for group in (anchors, [t for t in segment if t not in anchors]):
            left = dense * len(segment) - sum(counts[t] for t in segment)
            while left and any(counts[t] < room for t in group):
                for t in group:
                    if left and counts[t] < room:
                        counts[t] += 1
                        left -= 1
    return counts, [next(segment for segment in segments if t in segment) for t in range(f)]


def peaks(x: np.ndarray) -> list[int]:
    m, width = x.shape
    d = [[math.sqrt(sum((x[i] - x[j]) ** 2)) / math.sqrt(width) for j in range(m)] for i in range(m)]
    rho = []
    for row in d:
        small = sorted(row)[:4]
        rho.append(math.exp(-sum(v * v for v in small) / len(small)))
    most = max(max(row) for row in d)
    delta = [min([most, *(d[i][j] for j in range(m) if rho[j] > rho[i])]) for i in range(m)]
    return best([delta[i] * rho[i] for i in range(m)], m)


@EXAMPLES
@given(
    SEEDS,
    st.integers(1, 11),
    st.integers(1, 12),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([-1.0, 0.9]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.0, 0.6]),
    st.data(),
)
def test_formula(
    seed: int, frames: int, n: int, c: int, tau: float, p: int, beta: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    x, attention = normal(seed, frames, n, 5), shares_of(seed, frames, 2, n)
    method = create("fastvid", segments=c, threshold=tau, anchors=p, beta=beta)
    found = method.decide(make_view(x, {RECEIVED: attention}, k, video(frames, n)))
    dense = math.floor(k * 0.4)
    counts, segment_of = quotas(x.numpy(), dense, n - k + dense, c, tau, p)
    values = found.apply_all(x)
    salient = [best(attention[t].mean(0).tolist(), k - dense) for t in range(frames)]
    rest = [[i for i in range(n) if i not in salient[t]] for t in range(frames)]
    for t in range(frames):
        chosen = [rest[t][i] for i in peaks(x[t, rest[t]].numpy())[: counts[t]]] if counts[t] else []
        assert lists(found)[t] == sorted(salient[t] + chosen)
        expected = {i: x[t, i].numpy() for i in salient[t]}
        joined: dict[int, list[np.ndarray]] = {i: [] for i in chosen}
        for token in [x[s, i].numpy() for s in segment_of[t] for i in rest[s]] if chosen else ():
            near = max(chosen, key=lambda j: cosine(token, x[t, j].numpy()))
            joined[near].append(token)
        for i, tokens in joined.items():
            w = max(1 / (1 + len(tokens)), beta)
            expected[i] = w * x[t, i].numpy() + (1 - w) * np.mean(tokens, axis=0)
        made = np.stack([expected[i] for i in sorted(expected)])
        torch.testing.assert_close(values[t], torch.from_numpy(made), atol=1e-9, rtol=1e-9)
    assert sum(found.counts) == k * frames


def test_anchors_count_from_the_last_frame() -> None:
    """One scene of ten frames: frames 1, 5 and 9 hold all context tokens, 20 of them, and the first the rest of 20 / 3."""
    method = create("fastvid", segments=1)
    assert isinstance(method, FastVID)
    assert method.scenes(torch.ones(10, 3)) == [range(10)]
    assert method.contexts(10, 2, 50) == [0, 7, 0, 0, 0, 7, 0, 0, 0, 6]


def test_tokens_join_every_anchor_of_their_segment() -> None:
    """Two scenes of two frames, one token each beside the salient one: the last frames hold the context tokens."""
    x = torch.tensor([[1.0, 0], [1, 0.2], [0, 1], [0.2, 1]], dtype=torch.float64)[:, None].repeat(1, 4, 1)
    x[:, 1:] += torch.eye(4, dtype=torch.float64)[:, :3, None] / 50
    attention = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64).expand(4, 1, 4)
    found = create("fastvid", segments=2, context=0.5).decide(
        make_view(x, {RECEIVED: attention}, 2, video(4, 4))
    )
    assert found.sources == ((0,), (0, 1), (2,), (2, 3))
    assert found.counts == (1, 3, 1, 3)
    assert found.mix is not None
    # What is not salient of both frames, nothing of the other scene, and each token once.
    assert found.mix[1].sum(0).count_nonzero() == found.mix[3].sum(0).count_nonzero() == 7


@pytest.mark.parametrize("wrong", [{"segments": 0}, {"anchors": 0}, {"context": 1.0}, {"beta": 2.0}])
def test_options_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(vtprune.InvalidOptionError, match=next(iter(wrong))):
        create("fastvid", **wrong)
