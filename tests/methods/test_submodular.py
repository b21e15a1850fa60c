"""The greedy set function against its definition, set by set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.views import make_view

import vtprune
from vtprune.methods.submodular import Submodular

FAST = settings(max_examples=30, deadline=None, derandomize=True)


def value(x: np.ndarray, chosen: list[int], eff: float, cons: float) -> float:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))

    spread = 0.0
    if len(chosen) > 1:
        for i in chosen:
            spread += min(np.arccos(cosine(x[i], x[j])) / np.pi for j in chosen if j != i)
    return eff * spread + cons * cosine(sum(x[i] for i in chosen) / len(chosen), x.mean(0))


@FAST
@given(
    seed=st.integers(0, 10**6),
    g=st.integers(1, 2),
    n=st.integers(1, 9),
    d=st.integers(2, 4),
    k=st.integers(1, 9),
    eff=st.sampled_from([0.0, 0.05, 1.0]),
    cons=st.sampled_from([0.5, 1.0]),
)
def test_greedy(seed: int, g: int, n: int, d: int, k: int, eff: float, cons: float) -> None:
    k = min(k, n)
    x = torch.randn(g, n, d, generator=torch.Generator().manual_seed(seed))
    found = Submodular(keep=k, effectiveness=eff, consistency=cons).decide(make_view(x, {}, k))
    for image in range(g):
        features = x[image].double().numpy()
        chosen: list[int] = []
        for _ in range(k):
            left = [i for i in range(n) if i not in chosen]
            scores = [value(features, [*chosen, i], eff, cons) for i in left]
            best = max(scores)
            chosen.append(next(i for i, s in zip(left, scores, strict=True) if s > best - 1e-9))
        assert found.index[image].tolist() == sorted(chosen)


def test_equal_tokens_go_to_the_lower_index() -> None:
    x = torch.tensor([[1.0, 0.0]]).expand(1, 4, 2)
    assert Submodular(keep=2).decide(make_view(x, {}, 2)).index[0].tolist() == [0, 1]


def test_options() -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="weights"):
        Submodular(effectiveness=-1.0)
