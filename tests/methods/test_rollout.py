"""Rollout against its formula, and attention flow against path counting."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.views import make_view

from vtprune.method import ModelFacts, Signal
from vtprune.methods.rollout import Rollout
from vtprune.scoring import attention_flow

FAST = settings(max_examples=40, deadline=None, derandomize=True)


def product(maps: list[np.ndarray]) -> np.ndarray:
    total = np.eye(len(maps[0]))
    for attention in maps:
        mixed = 0.5 * (attention + np.eye(len(attention)))
        for i in range(len(mixed)):
            mixed[i] /= sum(mixed[i])
        total = mixed @ total
    return total


@FAST
@given(
    seed=st.integers(0, 10**6),
    g=st.integers(1, 3),
    n=st.integers(1, 15),
    p=st.integers(1, 3),
    layers=st.integers(1, 4),
    k=st.integers(1, 15),
    ties=st.booleans(),
)
def test_topk(seed: int, g: int, n: int, p: int, layers: int, k: int, ties: bool) -> None:
    k = min(k, n)
    make = torch.Generator().manual_seed(seed)
    maps = [torch.rand(g, p + n, p + n, generator=make).softmax(-1) for _ in range(layers)]
    if ties:  # one layer, whose [CLS] row alone counts: few values
        maps = [(torch.randint(0, 3, (g, p + n, p + n), generator=make) + 1) / 4]
    signals = {Signal("attention_map", i): m for i, m in enumerate(maps)}
    by_cls = Rollout(keep=k).decide(make_view(torch.randn(g, n, 2), signals, k))
    by_mean = Rollout(keep=k, scorer="received").decide(make_view(torch.randn(g, n, 2), signals, k))
    for image in range(g):
        total = product([m[image].double().numpy() for m in maps])
        s = total[0, p:]
        expected = sorted(range(n), key=lambda j: (-np.float32(s[j]), j))[:k]
        assert by_cls.index[image].tolist() == sorted(expected)
        if not ties:
            mean = [sum(total[p + i, p + j] for i in range(n)) / n for j in range(n)]
            expected = sorted(range(n), key=lambda j: (-mean[j], j))[:k]
            assert by_mean.index[image].tolist() == sorted(expected)


def test_signals() -> None:
    facts = ModelFacts("test", 3, 0, frozenset({"encoder"}), {}, {})
    maps = tuple(Signal("attention_map", i) for i in range(3))
    assert Rollout().needs(facts) == (*maps, Signal("cls_key", 2))
    assert Rollout(scorer="received", first_layer=1).needs(facts) == maps[1:]


def cut(maps: list[np.ndarray], query: int, sink: int) -> float:
    """The smallest cut of the layered graph, by trying all: equals the maximum flow."""
    m, depth = len(maps[0]), len(maps)
    mixed = []
    for attention in maps:
        one = 0.5 * (attention + np.eye(m))
        mixed.append(one / one.sum(1, keepdims=True))
    inner = [(layer, i) for layer in range(1, depth) for i in range(m)]
    best = np.inf
    for sides in itertools.product([0, 1], repeat=len(inner)):
        side = {(depth, i): int(i == query) for i in range(m)} | {(0, i): 0 for i in range(m)}
        side |= dict(zip(inner, sides, strict=True))
        cost = 0.0
        for layer in range(1, depth + 1):
            for i in range(m):
                for j in range(m):
                    # Inputs other than the sink lead nowhere, so their edges need not be cut.
                    if side[layer, i] and (layer > 1 or j == sink) and not side[layer - 1, j]:
                        cost += mixed[layer - 1][i, j]
        best = min(best, cost)
    return float(best)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), m=st.integers(1, 4), layers=st.integers(1, 3), query=st.integers(0, 3))
def test_attention_flow_is_the_smallest_cut(seed: int, m: int, layers: int, query: int) -> None:
    make = torch.Generator().manual_seed(seed)
    maps = [(3 * torch.randn(m, m, generator=make)).softmax(-1) for _ in range(layers)]
    query = min(query, m - 1)
    expected = [cut([x.double().numpy() for x in maps], query, j) for j in range(m)]
    np.testing.assert_allclose(
        attention_flow(maps, query).numpy(), np.array(expected) / sum(expected), atol=1e-9
    )
