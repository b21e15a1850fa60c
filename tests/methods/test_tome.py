"""ToMe against its formula, pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.views import make_view

import vtprune
from vtprune.layout import TokenLayout
from vtprune.method import ModelFacts, Signal
from vtprune.methods.tome import ToMe

FAST = settings(max_examples=40, deadline=None, derandomize=True)


def matched(metric: np.ndarray, sizes: np.ndarray, k: int) -> dict[int, list[int]]:
    """Kept token -> the tokens that it stands for."""
    groups = [(j, [j], metric[j], sizes[j]) for j in range(len(metric))]
    while len(groups) > k:
        r = min(len(groups) - k, len(groups) // 2)
        edges = []
        for a in range(0, len(groups), 2):
            x = groups[a][2] / np.linalg.norm(groups[a][2])
            values = [
                (-(x @ groups[b][2] / np.linalg.norm(groups[b][2])), b) for b in range(1, len(groups), 2)
            ]
            value, b = min(values)
            edges.append((value, a, b))
        gone = {}
        for _, a, b in sorted(edges)[:r]:
            gone[a] = b
        merged = []
        for i, (name, members, x, s) in enumerate(groups):
            if i in gone:
                continue
            total, weight, everyone = s * x, s, list(members)
            for a, b in gone.items():
                if b == i:
                    total = total + groups[a][3] * groups[a][2]
                    weight += groups[a][3]
                    everyone += groups[a][1]
            merged.append((name, everyone, total / weight, weight))
        groups = merged
    return {name: sorted(members) for name, members, _, _ in groups}


@FAST
@given(
    seed=st.integers(0, 10**6),
    g=st.integers(1, 3),
    n=st.integers(2, 30),
    k=st.integers(1, 30),
    big=st.booleans(),
)
def test_matching(seed: int, g: int, n: int, k: int, big: bool) -> None:
    k = min(k, n)
    make = torch.Generator().manual_seed(seed)
    keys, x = torch.randn(g, n, 5, generator=make), torch.randn(g, n, 4, generator=make)
    sizes = torch.randint(1, 6, (g, n), generator=make).float() if big else None
    found = ToMe(keep=k).decide(make_view(x, {Signal("encoder_keys", 0): keys}, k, sizes=sizes))
    for image in range(g):
        size = np.ones(n) if sizes is None else sizes[image].double().numpy()
        expected = matched(keys[image].double().numpy(), size, k)
        assert found.index[image].tolist() == sorted(expected)
        value = found.image(image).apply(x[image])
        for slot, name in enumerate(sorted(expected)):
            members = expected[name]
            mean = sum(size[j] * x[image, j].double().numpy() for j in members) / sum(
                size[j] for j in members
            )
            np.testing.assert_allclose(value[slot].numpy(), mean, rtol=1e-4, atol=1e-5)


@FAST
@given(
    depth=st.integers(2, 30),
    n=st.integers(1, 600),
    share=st.floats(0.01, 1),
    inflect=st.sampled_from([-1.0, 0.0, 0.5]),
)
def test_schedule(depth: int, n: int, share: float, inflect: float) -> None:
    """Sums of r_i = r (1 - inflect + 2 inflect i / (S - 1))."""
    method, steps = ToMe(keep=share, inflect=inflect), depth - 1
    k = max(1, math.floor(share * n + 0.5))
    r = [1 - inflect + 2 * inflect * i / max(1, steps - 1) for i in range(steps)]
    left = [
        n - math.floor((n - k) * (1.0 if i == steps - 1 else sum(r[: i + 1]) / sum(r)) + 0.5)
        for i in range(steps)
    ]
    assert left[-1] == k
    facts = ModelFacts("test", depth, 0, frozenset({"vit"}), {}, {}, proportional=True)
    stages = method.stages(facts)
    assert [s.site.layer for s in stages] == list(range(1, depth))
    assert [s.needs for s in stages] == [(Signal("encoder_keys", i),) for i in range(steps)]
    assert [s.keep for s in stages] == [None] * (steps - 1) + [share]
    now = n
    for stage, count in zip(stages[:6], left, strict=False):
        keys = torch.randn(1, now, 3)
        view = make_view(
            keys, {stage.needs[0]: keys}, now, [TokenLayout(1, n)], index=torch.arange(now)[None]
        )
        now = stage.decide(view).counts[0]
        assert now == count


def test_options() -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="inflect"):
        ToMe(inflect=2.0)


def test_images_of_differing_originals_have_their_own_counts() -> None:
    keys = torch.randn(2, 6, 3)
    layout = [TokenLayout(1, 6), TokenLayout(1, 10, image=1)]
    view = make_view(keys, {Signal("encoder_keys", 0): keys}, 6, layout)
    assert ToMe(keep=0.5).merge(view, 1.0).counts == (3, 5)
