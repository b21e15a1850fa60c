"""HoloV against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, lists, make_view, normal, shares_of

import vtprune
from vtprune.method import Signal
from vtprune.methods import create

CLS = Signal("cls_attention", 3)


def literal(features: np.ndarray, attention: list[float], k: int, parts: int) -> list[int]:
    n = len(features)
    runs, start = [], 0
    for p in range(parts):
        size = n // parts + (1 if p < n % parts else 0)
        runs.append(list(range(start, start + size)))
        start += size
    runs = [run for run in runs if run]
    score = []
    for run in runs:
        size = len(run)
        a = [1e3 * attention[i] for i in run]
        variance = [0.0] * size
        if size > 1:
            unit = [features[i] / (np.sqrt(np.sum(features[i] ** 2)) + 1e-6) for i in run]
            for i in range(size):
                row = [0.0 if i == j else float(np.dot(unit[i], unit[j])) for j in range(size)]
                mean = sum(row) / (size - 1)
                variance[i] = sum((c - mean) ** 2 for c in row) / (size - 1)
        scale = (sum(map(abs, a)) / size) / (sum(variance) / size + 1e-6)
        score.append(sum(a[i] + 0.09 * variance[i] * scale for i in range(size)) / size)
    weight = [s / (sum(score) + 1e-6) for s in score]
    quota = [math.floor(w * k) for w in weight]
    order = best(weight, len(weight))
    for p in order[: k - sum(quota)]:
        quota[p] += 1
    quota = [min(q, len(run)) for q, run in zip(quota, runs, strict=True)]
    while sum(quota) < k:
        for p in order:
            if sum(quota) < k and quota[p] < len(runs[p]):
                quota[p] += 1
    kept = []
    for q, run in zip(quota, runs, strict=True):
        kept += [run[i] for i in best([attention[t] for t in run], q)]
    return sorted(kept)


@EXAMPLES
@given(
    SEEDS,
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from([16, 1, 3, 7, None]),
    st.booleans(),
    st.data(),
)
def test_formula(seed: int, images: int, n: int, crops: int | None, ties: bool, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    attention = shares_of(seed, images, 2, n, steps=2 if ties else None)
    features = normal(seed, images, n, 5)
    chosen = create("holov", crops=crops).decide(make_view(features, {CLS: attention}, k))
    parts = crops or max(1, math.floor(1024 / 576 * n / k))
    scores = attention.mean(1)
    assert lists(chosen) == [
        literal(features[g].numpy(), scores[g].tolist(), k, parts) for g in range(images)
    ]


def test_what_a_crop_cannot_use_goes_to_others() -> None:
    """All attention in one crop of two tokens; the authors' code would return zero vectors for the rest."""
    attention = normal(0, 1, 1, 8).abs() * 1e-6
    attention[0, 0, :2] = 0.5
    chosen = create("holov", crops=4).decide(make_view(normal(1, 1, 8, 5), {CLS: attention}, 5))
    assert len(lists(chosen)[0]) == 5
    assert lists(chosen)[0][:2] == [0, 1]


def test_crops_are_checked() -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="crops"):
        create("holov", crops=0)
