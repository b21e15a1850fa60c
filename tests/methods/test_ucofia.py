"""The learned selector against its formula, and what is said without weights."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from methods.views import make_view

import vtprune
from vtprune.method import ModelFacts
from vtprune.methods.ucofia import UCoFiA
from vtprune.methods.weights import save

FACTS = ModelFacts("test", 2, 0, frozenset({"encoder"}), {}, {})


def saved(path: Path, *sizes: int, seed: int = 0) -> tuple[str, list[tuple[np.ndarray, np.ndarray]]]:
    make = torch.Generator().manual_seed(seed)
    state = {}
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        state[f"{i}.weight"] = torch.randn(b, a, generator=make) / 4
        state[f"{i}.bias"] = torch.randn(b, generator=make) / 4
    save(path, state, {})
    arrays = [
        (state[f"{i}.weight"].double().numpy(), state[f"{i}.bias"].double().numpy())
        for i in range(len(sizes) - 1)
    ]
    return str(path), arrays


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("hidden", [(), (5,), (6, 3)])
def test_topk(tmp_path: Path, seed: int, hidden: tuple[int, ...]) -> None:
    g, n, d, k = 1 + seed % 3, 3 + seed, 4, 1 + seed // 2
    weights, layers = saved(tmp_path / "selector.safetensors", 2 * d, *hidden, 1, seed=seed)
    x = torch.randn(g, n, d, generator=torch.Generator().manual_seed(seed))
    x[:, -1] = x[:, 0]  # a tie
    found = UCoFiA(keep=k, weights=weights).decide(make_view(x, {}, k))
    for image in range(g):
        features = x[image].double().numpy()
        scores = []
        for i in range(n):
            y = np.concatenate([features[i], sum(features) / n])
            for number, (weight, bias) in enumerate(layers):
                if number:
                    y = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in y])
                y = weight @ y + bias
            scores.append(math.tanh(y[0]))
        expected = sorted(range(n), key=lambda j: (-round(scores[j], 6), j))[:k]
        assert found.index[image].tolist() == sorted(expected)


def test_without_weights_it_says_how_to_train() -> None:
    with pytest.raises(vtprune.UnsupportedMethodError, match="vtprune train ucofia"):
        UCoFiA().stages(FACTS)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="cannot be read"):
        UCoFiA(weights=str(tmp_path / "none.safetensors")).stages(FACTS)
    two, _ = saved(tmp_path / "two.safetensors", 8, 2)
    with pytest.raises(vtprune.InvalidOptionError, match="one number"):
        UCoFiA(weights=two).stages(FACTS)
    other, _ = saved(tmp_path / "other.safetensors", 6, 1)
    with pytest.raises(vtprune.InvalidOptionError, match="take 6 numbers"):
        UCoFiA(weights=other).decide(make_view(torch.randn(1, 5, 4), {}, 2))
