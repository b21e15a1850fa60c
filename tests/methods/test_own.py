"""The package's own method against a literal transcription."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.views import make_view

import vtprune
from vtprune.method import Signal, SignalKind
from vtprune.methods.own import VTPrune


def literal(
    features: np.ndarray, attention: list[list[np.ndarray]], k: int, theta: float, beta: float
) -> tuple[list[int], np.ndarray]:
    """Chosen tokens, sorted, and the [k, N] matrix that makes survivors of all tokens."""
    n = len(features)
    importance = [0.0] * n
    for layers in attention:
        share = [sum(a[:, j].mean() for a in layers) / len(layers) for j in range(n)]
        for j in range(n):
            importance[j] += share[j] / (sum(share) / n)
    weight = [i**theta for i in importance]
    unit = [f / max(np.linalg.norm(f), 1e-12) for f in features]
    cosine = [[float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
    chosen = [int(np.argmax(weight))]
    while len(chosen) < k:
        best, best_score = -1, -1.0
        for j in range(n):
            if j in chosen:
                continue
            score = weight[j] * min(max(1 - cosine[j][s], 0.0) for s in chosen)
            if score > best_score:
                best, best_score = j, score
        chosen.append(best)
    order = list(chosen)
    chosen.sort()
    mix = np.zeros((k, n))
    for j in range(n):
        if j in chosen:
            mix[chosen.index(j), j] = 1
        else:
            nearest = max(order, key=lambda s: (cosine[j][s], -order.index(s)))
            mix[chosen.index(nearest), j] = beta * max(cosine[j][nearest], 0)
    return chosen, mix / mix.sum(1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(2, 14),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from([("cls_attention",), ("received_attention",), ("cls_attention", "received_attention")]),
    st.integers(0, 10**6),
    st.data(),
)
def test_choice_and_weights(
    g: int,
    n: int,
    heads: int,
    layers: int,
    theta: float,
    beta: float,
    kinds: tuple[SignalKind, ...],
    seed: int,
    data: st.DataObject,
) -> None:
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(g, n, 5, generator=generator)
    signals = {
        Signal(kind, layer): torch.rand(g, heads, n, generator=generator) + 0.01
        for kind in kinds
        for layer in range(layers)
    }
    selection = VTPrune(keep=k, theta=theta, beta=beta).decide(make_view(features, signals, k))
    for i in range(g):
        attention = [
            [value[i].double().numpy() for signal, value in signals.items() if signal.kind == kind]
            for kind in kinds
        ]
        chosen, mix = literal(features[i].double().numpy(), attention, k, theta, beta)
        assert selection.index[i].tolist() == chosen
        found = selection.image(i).apply(torch.eye(n))
        expected = torch.eye(n)[chosen] if beta == 0 or k == n else torch.from_numpy(mix).float()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"theta": -1}, {"beta": float("inf")}, {"scorer": "clip"}])
def test_options(options: dict[str, object]) -> None:
    with pytest.raises(vtprune.InvalidOptionError):
        VTPrune(keep=4, **options)  # type: ignore[arg-type]
