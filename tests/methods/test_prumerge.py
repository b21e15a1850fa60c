"""PruMerge against its formula, token by token."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.views import make_view

from vtprune.method import Signal
from vtprune.methods.prumerge import PruMerge
from vtprune.selection import Selection

FAST = settings(max_examples=40, deadline=None, derandomize=True)


def draw(seed: int, g: int, n: int, h: int, d: int, quantised: bool) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    shapes = ((g, h, d), (g, h, d), (g, h, n, d))
    values = [torch.randn(shape, generator=make) for shape in shapes]
    if quantised:  # equal logits; a part that tells keys apart is orthogonal to the query
        values[0][..., -1] = 0
        values[0], values[1] = values[0].round(), values[1].round()
        values[2][..., :-1] = values[2][..., :-1].round()
    return values


def scores_of(query: np.ndarray, own: np.ndarray, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and keys without head split of one image."""
    h, n, d = heads.shape
    keys = np.stack([np.concatenate([heads[i, j] for i in range(h)]) for j in range(n)])
    logits = [float(query.ravel() @ own.ravel())] + [float(query.ravel() @ keys[j]) for j in range(n)]
    e = np.exp(np.array(logits) / np.sqrt(h * d))
    return (e / e.sum())[1:], keys


def count_of(a: np.ndarray) -> int:
    q1, q3 = np.percentile(a, 25), np.percentile(a, 75)
    return max(1, sum(1 for x in a if x > q3 + 1.5 * (q3 - q1)))


def plan(a: np.ndarray, keys: np.ndarray, selected: list[int], rest: bool) -> dict[int, dict[int, float]]:
    """Kept token -> {token: coefficient}."""
    n = len(a)
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    out = {}
    for i in selected:
        others = sorted((j for j in range(n) if j != i), key=lambda j: (-(unit[i] @ unit[j]), j))
        out[i] = {i: 1.0} | {j: a[j] for j in others[:32]}
    pruned = [j for j in range(n) if j not in selected]
    if rest and pruned:
        out[min(pruned, key=lambda j: (-np.float32(a[j]), j))] = {j: a[j] for j in pruned}
    return out


def assert_plan(selection: Selection, g: int, expected: dict[int, dict[int, float]], n: int) -> None:
    kept = selection.index[g].tolist()
    assert kept == sorted(expected)
    assert selection.mix is not None
    matrix = np.zeros((len(kept), n))
    for row, i in enumerate(kept):
        for j, weight in expected[i].items():
            matrix[row, j] = weight
    np.testing.assert_allclose(selection.mix[g].numpy(), matrix, rtol=1e-5, atol=1e-5)


def falling(a: np.ndarray) -> list[int]:
    return sorted(range(len(a)), key=lambda j: (-np.float32(a[j]), j))


@FAST
@given(
    seed=st.integers(0, 10**6),
    g=st.integers(1, 3),
    n=st.integers(2, 60),
    h=st.integers(1, 3),
    d=st.integers(2, 5),
    share=st.floats(0, 1),
    quantised=st.booleans(),
)
def test_budget(seed: int, g: int, n: int, h: int, d: int, share: float, quantised: bool) -> None:
    k = max(1, min(n - 1, round(share * n)))
    values = draw(seed, g, n, h, d, quantised)
    signals = dict(
        zip([Signal(s, 0) for s in ("cls_query", "cls_key", "encoder_key_heads")], values, strict=True)
    )
    found = PruMerge(keep=k).decide(make_view(torch.randn(g, n, 4), signals, k))
    assert found.counts == (k,) * g
    for image in range(g):
        a, keys = scores_of(*(v[image].double().numpy() for v in values))
        selected = falling(a)[: max(1, k - 1)]
        assert_plan(found, image, plan(a, keys, selected, k > 1), n)


@FAST
@given(seed=st.integers(0, 10**6), g=st.integers(1, 3), n=st.integers(2, 60), h=st.integers(1, 3))
def test_emergent_count(seed: int, g: int, n: int, h: int) -> None:
    values = draw(seed, g, n, h, 4, False)
    values[0] *= 3
    signals = dict(
        zip([Signal(s, 0) for s in ("cls_query", "cls_key", "encoder_key_heads")], values, strict=True)
    )
    found = PruMerge().decide(make_view(torch.randn(g, n, 4), signals, n))
    for image in range(g):
        a, keys = scores_of(*(v[image].double().numpy() for v in values))
        assert_plan(found, image, plan(a, keys, falling(a)[: count_of(a)], True), n)


@FAST
@given(seed=st.integers(0, 10**6), n=st.integers(3, 40), k=st.integers(1, 40))
def test_received_attention(seed: int, n: int, k: int) -> None:
    k = min(k, n - 1)
    make = torch.Generator().manual_seed(seed)
    received = torch.randint(1, 5, (1, 2, n), generator=make) / 8
    heads = torch.randn(1, 2, n, 3, generator=make)
    signals = {Signal("received_attention", 0): received, Signal("encoder_key_heads", 0): heads}
    found = PruMerge(keep=k, scorer="received").decide(make_view(torch.randn(1, n, 4), signals, k))
    a = received[0].double().numpy().mean(0)
    _, keys = scores_of(np.zeros((2, 3)), np.zeros((2, 3)), heads[0].double().numpy())
    assert_plan(found, 0, plan(a, keys, falling(a)[: max(1, k - 1)], k > 1), n)
