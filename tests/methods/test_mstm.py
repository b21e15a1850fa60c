"""MSTM against its formula, and its schedule."""

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
from vtprune.methods.mstm import MSTM

FAST = settings(max_examples=40, deadline=None, derandomize=True)


@FAST
@given(
    seed=st.integers(0, 10**6),
    g=st.integers(1, 3),
    n=st.integers(2, 30),
    h=st.sampled_from([1, 2, 4]),
    d=st.integers(2, 6),
    k=st.integers(1, 30),
)
def test_mergence(seed: int, g: int, n: int, h: int, d: int, k: int) -> None:
    k = min(k, n)
    make = torch.Generator().manual_seed(seed)
    attention = torch.randint(1, 6, (g, h, n), generator=make) / 8
    x = torch.randn(g, n, d, generator=make)
    found = MSTM(keep=k).decide(make_view(x, {Signal("cls_attention", 0): attention}, k))
    if k == n:
        assert found.into is None
        return
    for image in range(g):
        s = attention[image].double().numpy().mean(0)
        features = x[image].double().numpy()
        crucial = sorted(sorted(range(n), key=lambda j: (-s[j], j))[:k])
        assert found.index[image].tolist() == crucial
        members: dict[int, list[int]] = {c: [c] for c in crucial}
        for u in range(n):
            if u not in crucial:
                cosines = [
                    features[u] @ features[c] / np.linalg.norm(features[u]) / np.linalg.norm(features[c])
                    for c in crucial
                ]
                members[crucial[int(np.argmax(cosines))]].append(u)
        value = found.image(image).apply(x[image]).numpy()
        for slot, c in enumerate(crucial):
            expected = sum(s[u] * features[u] for u in members[c]) / sum(s[u] for u in members[c])
            np.testing.assert_allclose(value[slot], expected, rtol=1e-4, atol=1e-5)


@FAST
@given(n=st.integers(1, 400), keep=st.floats(0.01, 1))
def test_every_stage_keeps_the_same_share(n: int, keep: float) -> None:
    facts = ModelFacts("test", 12, 0, frozenset({"vit"}), {}, {})
    stages = MSTM(keep=keep).stages(facts)
    assert [str(s.site) for s in stages] == ["vit[4]", "vit[7]", "vit[10]"]
    assert [s.needs for s in stages] == [(Signal("cls_attention", i),) for i in (3, 6, 9)]
    k, now = max(1, math.floor(keep * n + 0.5)), n
    for i, stage in enumerate(stages, start=1):
        view = make_view(
            torch.randn(1, now, 2), {stage.needs[0]: torch.rand(1, 1, now)}, now, [TokenLayout(1, n)]
        )
        now = stage.decide(view).counts[0]
        assert now == (k if i == 3 else max(k, math.floor(n * (k / n) ** (i / 3) + 0.5)))


def test_shallow_encoders_and_options() -> None:
    facts = ModelFacts("test", 3, 0, frozenset({"vit"}), {}, {})
    assert [str(s.site) for s in MSTM().stages(facts)] == ["vit[1]", "vit[2]"]
    with pytest.raises(vtprune.InvalidOptionError, match="scorer"):
        MSTM(scorer="text")  # type: ignore[arg-type]
