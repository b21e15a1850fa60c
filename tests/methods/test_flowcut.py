"""FlowCut against its formula, and its schedule."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.views import make_view
from torch import Tensor

from vtprune.layout import TokenLayout
from vtprune.method import ModelFacts, Signal
from vtprune.methods.flowcut import FlowCut

FAST = settings(max_examples=40, deadline=None, derandomize=True)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def layer_score(attention: np.ndarray, values: np.ndarray, own: np.ndarray) -> np.ndarray:
    heads, n = attention.shape
    c = [sum(attention[h, j] for h in range(heads)) / heads for j in range(n)]
    g = np.zeros(n)
    for h in range(heads):
        row = softmax(np.array([own[h] @ own[h]] + [own[h] @ values[h, j] for j in range(n)]))
        g += row[1:] / heads
    out = []
    for j in range(n):
        mean = sum(values[h, j] for h in range(heads)) / heads
        out.append((c[j] / sum(c) + g[j] / g.sum()) * sum(abs(v) for v in mean))
    return np.array(out)


def kept(layers: list[tuple[np.ndarray, np.ndarray, np.ndarray]], target: int, left: int) -> list[int]:
    total = None
    for layer in layers:
        s = layer_score(*layer)
        total = s if total is None else 0.5 * total + 0.5 * s
    assert total is not None
    n, count = len(total), min(target, len(total))
    if left and n > target:
        c = layers[-1][0].mean(0)
        p = c / c.sum()
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        count = max(target, n - round((n - target) / math.sqrt(left) * (1 - (entropy / math.log(n)) ** 2)))
    return sorted(sorted(range(n), key=lambda j: (-np.float32(total[j]), j))[:count])


@FAST
@given(
    seed=st.integers(0, 10**6),
    g=st.integers(1, 3),
    n=st.integers(2, 30),
    h=st.integers(1, 3),
    d=st.integers(1, 4),
    layers=st.integers(1, 4),
    target=st.integers(1, 30),
    left=st.sampled_from([0, 2, 4, 22]),
    ties=st.booleans(),
)
def test_cut(
    seed: int, g: int, n: int, h: int, d: int, layers: int, target: int, left: int, ties: bool
) -> None:
    make = torch.Generator().manual_seed(seed)
    given_: dict[Signal, Tensor] = {}
    for i in range(layers):
        # Pairs of equal tokens tie exactly.
        attention = (torch.randn(g, h, n, generator=make) * 2).softmax(-1)
        values = torch.randn(g, h, n, d, generator=make)
        if ties:
            attention[..., 1::2], values[..., 1::2, :] = (
                attention[..., : n - 1 : 2],
                values[..., : n - 1 : 2, :],
            )
        given_[Signal("cls_attention", i)] = attention
        given_[Signal("encoder_values", i)] = values
        given_[Signal("cls_value", i)] = torch.randn(g, h, d, generator=make)
    view = make_view(torch.randn(g, n, 4), given_, n)
    found = FlowCut(keep=target).cut(view, left)
    arrays = [x.double().numpy() for x in given_.values()]
    for image in range(g):
        stack = [tuple(a[image] for a in arrays[3 * i : 3 * i + 3]) for i in range(layers)]
        expected = kept(stack, target, left)  # type: ignore[arg-type]
        assert found.index[image].tolist() == expected


def test_schedule() -> None:
    facts = ModelFacts("test", 23, 0, frozenset({"vit", "encoder"}), {}, {})
    stages = FlowCut(keep=64).stages(facts)
    assert [str(s.site) for s in stages] == [f"vit[{i}]" for i in range(2, 23, 2)]
    assert [s.keep for s in stages] == [None] * 10 + [64]
    assert [max(n.layer for n in s.needs) for s in stages] == list(range(1, 22, 2))
    assert all(s.positions == "dense" for s in stages)


def test_images_of_differing_originals_have_their_own_targets() -> None:
    signals = {
        Signal("cls_attention", 0): torch.rand(2, 1, 8),
        Signal("encoder_values", 0): torch.randn(2, 1, 8, 2),
        Signal("cls_value", 0): torch.randn(2, 1, 2),
    }
    layout = [TokenLayout(1, 8), TokenLayout(1, 12, image=1)]
    assert FlowCut(keep=0.5).cut(make_view(torch.randn(2, 8, 2), signals, 8, layout), 0).counts == (4, 6)
