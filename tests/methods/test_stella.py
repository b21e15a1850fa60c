"""STELLA's importance and draw against their definition."""

from __future__ import annotations

import math
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.views import make_view

import vtprune
from vtprune.method import Signal
from vtprune.methods.stella import Stella

FAST = settings(max_examples=40, deadline=None, derandomize=True)
TEXT = Signal("prompt_attention", 1)


def importance(logits: np.ndarray, temperature: float) -> list[float]:
    """From the logits [H, T, N] of the visual tokens."""
    heads, queries, n = logits.shape
    total = [0.0] * n
    for h in range(heads):
        for q in range(queries):
            e = [math.exp((x - max(logits[h, q])) / temperature) for x in logits[h, q]]
            for j in range(n):
                total[j] += e[j] / sum(e) / heads / queries
    return total


@FAST
@given(
    seed=st.integers(0, 10**6),
    g=st.integers(1, 3),
    h=st.integers(1, 3),
    t=st.integers(1, 4),
    n=st.integers(1, 15),
    k=st.integers(1, 15),
    blind=st.integers(0, 2),
)
def test_draw(seed: int, g: int, h: int, t: int, n: int, k: int, blind: int) -> None:
    k = min(k, n)
    make = torch.Generator().manual_seed(seed)
    logits = torch.randn(g, h, t, n + 3, generator=make)  # three more keys: text
    attention = logits.softmax(-1)[..., :n]
    attention = torch.cat([attention, torch.zeros(g, h, blind, n)], 2)
    view = make_view(torch.randn(g, n, 2), {TEXT: attention}, k, seeds=[7 + i for i in range(g)])
    found = Stella(keep=k, seed=3).decide(view)
    best = Stella(keep=k, draw=False).decide(view)
    for image in range(g):
        weights = importance(logits[image, ..., :n].double().numpy(), 0.4)
        clock = torch.rand(n, generator=torch.Generator().manual_seed(crc32(f"3 {7 + image}".encode())))
        arrivals = [-math.log(float(u)) / w for u, w in zip(clock, weights, strict=True)]
        expected = sorted(range(n), key=lambda j: arrivals[j])[:k]
        assert found.index[image].tolist() == sorted(expected)
        largest = sorted(range(n), key=lambda j: (-round(weights[j], 9), j))[:k]
        assert best.index[image].tolist() == sorted(largest)


def test_the_draw_follows_the_importance() -> None:
    """First draws of many pictures fall as often on a token as it is important."""
    attention = torch.tensor([[[[0.4, 0.3, 0.2]]]]).expand(2000, 1, 1, 3)
    view = make_view(torch.zeros(2000, 3, 1), {TEXT: attention}, 1, seeds=range(2000))
    found = torch.stack(Stella(keep=1, temperature=1.0).decide(view).index)[:, 0].bincount() / 2000
    torch.testing.assert_close(found, torch.tensor([4.0, 3.0, 2.0]) / 9, atol=0.04, rtol=0)


def test_options() -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="temperature"):
        Stella(temperature=0)
