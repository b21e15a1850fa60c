"""ACT's calibration against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.views import make_view

import vtprune
from vtprune.method import ModelFacts, Signal
from vtprune.methods.act import ACT
from vtprune.scoring import desink

FAST = settings(max_examples=40, deadline=None, derandomize=True)


def calibrated(row: np.ndarray, threshold: float, beta: float) -> np.ndarray:
    sinks = [j for j in range(len(row)) if row[j] > threshold]
    others = [j for j in range(len(row)) if j not in sinks]
    freed = sum((1 - beta) * row[j] for j in sinks)
    mass = sum(row[j] for j in others)
    if mass == 0:
        return row
    out = row.copy()
    for j in sinks:
        out[j] = beta * row[j]
    for j in others:
        out[j] = row[j] + freed * row[j] / mass
    return out


@FAST
@given(
    seed=st.integers(0, 10**6),
    g=st.integers(1, 3),
    h=st.integers(1, 3),
    n=st.integers(1, 20),
    k=st.integers(1, 20),
    threshold=st.sampled_from([0.05, 0.1, 0.3]),
    beta=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_topk(seed: int, g: int, h: int, n: int, k: int, threshold: float, beta: float) -> None:
    k = min(k, n)
    make = torch.Generator().manual_seed(seed)
    attention = (2 * torch.randn(g, h, n, generator=make)).softmax(-1)
    attention[..., 1::2] = attention[..., : n - 1 : 2]  # pairs tie exactly
    view = make_view(torch.randn(g, n, 2), {Signal("cls_attention", 1): attention}, k)
    found = ACT(keep=k, threshold=threshold, beta=beta).decide(view)
    for image in range(g):
        rows = [calibrated(attention[image, i].double().numpy(), threshold, beta) for i in range(h)]
        s = sum(rows) / h
        expected = sorted(range(n), key=lambda j: (-np.float32(s[j]), j))[:k]
        assert found.index[image].tolist() == sorted(expected)


@FAST
@given(seed=st.integers(0, 10**6), n=st.integers(1, 20), beta=st.floats(0, 1))
def test_the_sum_stays(seed: int, n: int, beta: float) -> None:
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    torch.testing.assert_close(desink(scores, 1 / n, beta).sum(), scores.sum())


def test_options() -> None:
    facts = ModelFacts("test", 5, 0, frozenset({"encoder"}), {}, {})
    assert ACT().needs(facts) == (Signal("cls_attention", 4),)
    assert ACT(scorer="received", layer=0).needs(facts) == (Signal("received_attention", 0),)
    with pytest.raises(vtprune.InvalidOptionError, match="beta"):
        ACT(beta=1.5)
