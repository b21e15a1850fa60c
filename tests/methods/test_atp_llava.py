"""ATP-LLaVA against its formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, lists, make_view, normal, shares_of
from torch import Tensor

import vtprune
from vtprune.layout import TokenLayout
from vtprune.method import ModelFacts, Signal, View
from vtprune.methods import create
from vtprune.methods.staged import part_of
from vtprune.methods.weights import save

QUERIES = Signal("decoder_queries", 4)
KEYS = Signal("decoder_keys", 4)
ATTENTION = Signal("prompt_attention", 4)
RATES = (0.5, 0.25, 0.0625)
STEPS = ((1, 2), (2, 2), (4, 4))


def redundancy(queries: np.ndarray, keys: np.ndarray, attention: np.ndarray) -> list[float]:
    heads, n, d = queries.shape
    groups = heads // len(keys)
    scores = []
    for i in range(n):
        own = [
            float(np.dot(queries[h, j], keys[h // groups, i])) / math.sqrt(d)
            for h in range(heads)
            for j in range(n)
        ]
        cross = [float(attention[h, t, i]) for h in range(heads) for t in range(attention.shape[1])]
        scores.append((sum(own) / len(own) + sum(cross) / len(cross)) / 2)
    return scores


def spatial(stage: int, index: list[int], cols: int) -> list[float]:
    rows_step, cols_step = STEPS[stage]
    value = 1 - RATES[stage] * 3
    return [value if i // cols % rows_step == 0 and i % cols % cols_step == 0 else 0.0 for i in index]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights") / "atp.safetensors"


def weights_of(seed: int, n: int, width: int = 3) -> dict[str, Tensor]:
    shapes = {
        "project.weight": (width, 2 * n),
        "project.bias": (width,),
        "thresholds.weight": (2, width),
        "thresholds.bias": (2,),
    }
    return {
        f"{stage}.{name}": normal(seed + stage, *shape).float()
        for stage in range(3)
        for name, shape in shapes.items()
    }


def case(seed: int, images: int, rows: int, cols: int, alive: int) -> tuple[View, Tensor]:
    """A view of `alive` tokens per picture, and their prompt attention without padding."""
    n = rows * cols
    index = torch.stack(
        [torch.from_numpy(np.random.default_rng([seed, g]).permutation(n)[:alive]) for g in range(images)]
    )
    attention = shares_of(seed, images, 4, 3, alive)
    signals = {
        QUERIES: normal(seed, images, 4, alive, 5),
        KEYS: normal(seed + 1, images, 2, alive, 5),
        ATTENTION: torch.nn.functional.pad(attention, (0, 0, 1, 2)),
    }
    layout = [TokenLayout(rows, cols, image=g) for g in range(images)]
    view = make_view(
        normal(seed, images, alive, 4), signals, alive, layout=layout, index=index.sort(-1).values
    )
    return view, attention


SHAPES = (SEEDS, st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2), st.data())


@EXAMPLES
@given(*SHAPES)
def test_quantile(seed: int, images: int, rows: int, cols: int, stage: int, data: st.DataObject) -> None:
    alive = data.draw(st.integers(1, rows * cols))
    view, attention = case(seed, images, rows, cols, alive)
    view.k = data.draw(st.integers(1, alive))
    method: Any = create("atp-llava", threshold="quantile")
    chosen = method.decide(part_of(view, range(images), view.k, stage))
    for g in range(images):
        s = redundancy(view[QUERIES][g].numpy(), view[KEYS][g].numpy(), attention[g].numpy())
        span = max(s) - min(s)
        s = [(x - min(s)) / span if span else 0.0 for x in s]
        grid = spatial(stage, view.index[g].tolist(), cols)
        assert lists(chosen)[g] == sorted(best([max(a, b) for a, b in zip(s, grid, strict=True)], view.k))


@EXAMPLES
@given(*SHAPES)
def test_learned(
    file: Path, seed: int, images: int, rows: int, cols: int, stage: int, data: st.DataObject
) -> None:
    n = rows * cols
    alive = data.draw(st.integers(1, n))
    view, attention = case(seed, images, rows, cols, alive)
    weights = weights_of(seed, n)
    save(file, weights, {})
    method: Any = create("atp-llava", weights=file)
    chosen = method.decide(part_of(view, range(images), view.k, stage))
    w, b, v, c = (
        weights[f"{stage}.{name}"].double().numpy()
        for name in ("project.weight", "project.bias", "thresholds.weight", "thresholds.bias")
    )
    for g in range(images):
        s = redundancy(view[QUERIES][g].numpy(), view[KEYS][g].numpy(), attention[g].numpy())
        index = view.index[g].tolist()
        grid = spatial(stage, index, cols)
        vector = np.zeros(2 * n)
        for place, i in enumerate(index):
            vector[i], vector[n + i] = s[place], grid[place]
        theta = 1 / (1 + np.exp(-(v @ (w @ vector + b) + c)))
        kept = [i for i in range(alive) if s[i] > theta[0] or grid[i] > theta[1]]
        if not kept:
            kept = best([max(s[i] - theta[0], grid[i] - theta[1]) for i in range(alive)], 1)
        assert lists(chosen)[g] == kept


def test_weights(file: Path) -> None:
    facts = ModelFacts("test", 4, 32, frozenset(["decoder"]), {}, {})
    with pytest.raises(vtprune.UnsupportedMethodError, match="vtprune train atp-llava"):
        create("atp-llava").stages(facts)
    weights = weights_of(0, 12)
    save(file, weights, {})
    method = create("atp-llava", weights=file)
    assert [stage.site.layer for stage in method.stages(facts)] == [5, 15, 25]
    assert [stage.keep for stage in method.stages(facts)] == [None] * 3
    with pytest.raises(vtprune.VTPruneError, match="pictures of 12 tokens, not of"):
        method.stages(facts)[0].decide(case(0, 1, 2, 2, 3)[0])
    del weights["1.project.bias"]
    save(file, weights, {})
    with pytest.raises(vtprune.InvalidOptionError, match=r"1\.project\.bias"):
        method.stages(facts)
    with pytest.raises(vtprune.InvalidOptionError, match="cannot be read"):
        create("atp-llava", weights=file.with_name("none")).stages(facts)
