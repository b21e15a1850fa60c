"""PruMerge+ against its formula; merging is that of PruMerge."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.test_prumerge import FAST, assert_plan, count_of, draw, falling, plan, scores_of
from methods.views import make_view

from vtprune.method import Signal
from vtprune.methods.prumerge_plus import PruMergePlus

KINDS = ("cls_query", "cls_key", "encoder_key_heads")


@FAST
@given(seed=st.integers(0, 10**6), g=st.integers(1, 3), n=st.integers(2, 60), quantised=st.booleans())
def test_emergent_count(seed: int, g: int, n: int, quantised: bool) -> None:
    values = draw(seed, g, n, 2, 3, quantised)
    signals = {Signal(kind, 0): v for kind, v in zip(KINDS, values, strict=True)}  # type: ignore[arg-type]
    found = PruMergePlus().decide(make_view(torch.randn(g, n, 4), signals, n))
    for image in range(g):
        a, keys = scores_of(*(v[image].double().numpy() for v in values))
        t = count_of(a)
        selected = falling(a)[:t]
        step = max(1, (n // t) // 3)
        selected += [j for j in range(0, n - 1, step) if j not in selected]
        assert_plan(found, image, plan(a, keys, selected, True), n)


@FAST
@given(seed=st.integers(0, 10**6), g=st.integers(1, 3), n=st.integers(2, 60), k=st.integers(1, 60))
def test_budget(seed: int, g: int, n: int, k: int) -> None:
    k = min(k, n - 1)
    values = draw(seed, g, n, 2, 3, False)
    signals = {Signal(kind, 0): v for kind, v in zip(KINDS, values, strict=True)}  # type: ignore[arg-type]
    found = PruMergePlus(keep=k).decide(make_view(torch.randn(g, n, 4), signals, k))
    assert found.counts == (k,) * g
    for image in range(g):
        a, keys = scores_of(*(v[image].double().numpy() for v in values))
        wanted = max(1, k - 1)
        t = max(1, int(wanted / 4 + 0.5))
        selected = falling(a)[:t]
        left = [j for j in range(n) if j not in selected]
        selected += [left[i * len(left) // (wanted - t)] for i in range(wanted - t)]
        assert_plan(found, image, plan(a, keys, selected, k > 1), n)
