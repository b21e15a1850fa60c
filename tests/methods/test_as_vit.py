"""AS-ViT against its formula, and its stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.views import make_view

import vtprune
from vtprune.layout import TokenLayout
from vtprune.method import ModelFacts, Signal
from vtprune.methods.as_vit import ASViT
from vtprune.methods.weights import save

FAST = settings(max_examples=40, deadline=None, derandomize=True)


def scores_of(attention: np.ndarray, norms: np.ndarray) -> list[float]:
    heads, n = attention.shape
    return [
        sum(norms[h, i] / (sum(norms[:, i]) + 1e-8) * attention[h, i] for h in range(heads)) for i in range(n)
    ]


@FAST
@given(
    seed=st.integers(0, 10**6),
    g=st.integers(1, 3),
    n=st.integers(1, 30),
    h=st.sampled_from([1, 2, 4]),
    k=st.integers(1, 30),
    threshold=st.floats(0.01, 1.2),
)
def test_cut(seed: int, g: int, n: int, h: int, k: int, threshold: float) -> None:
    k = min(k, n)
    make = torch.Generator().manual_seed(seed)
    attention = torch.randint(0, 6, (g, h, n), generator=make) / 8
    # Powers of two that fill up to a power of two: weights are exact but for the 1e-8.
    norms = 2.0 ** torch.randint(-1, 3, (g, 1, n), generator=make).expand(g, h, n)
    if seed % 2:
        attention, norms = torch.rand(g, h, n, generator=make), torch.rand(g, h, n, generator=make)
    signals = {Signal("cls_attention", 3): attention, Signal("head_output_norms", 3): norms}
    view = make_view(torch.randn(g, n, 2), signals, k)
    by_budget = ASViT(keep=k, threshold="topk").decide(view)
    by_threshold = ASViT(threshold="given").cut(view, 1, 1, threshold)
    for image in range(g):
        s = scores_of(attention[image].double().numpy(), norms[image].double().numpy())
        falling = sorted(range(n), key=lambda j: (-round(s[j], 7), j))
        assert by_budget.index[image].tolist() == sorted(falling[:k])
        above = [j for j in range(n) if s[j] > threshold]
        assert by_threshold.index[image].tolist() == (above or [falling[0]])


def test_stages() -> None:
    facts = ModelFacts("test", 12, 0, frozenset({"vit"}), {}, {})
    stages = ASViT(threshold="given").stages(facts)
    assert [str(s.site) for s in stages] == ["vit[4]", "vit[7]", "vit[10]"]
    assert [s.keep for s in stages] == [None] * 3
    signals = {n: torch.tensor([[[0.0005, 0.0015, 0.0025, 0.0035]]]) for n in stages[0].needs}
    for stage, left in zip(stages, (3, 2, 1), strict=True):
        here = dict(zip(stage.needs, signals.values(), strict=True))
        assert stage.decide(make_view(torch.randn(1, 4, 2), here, 4)).counts == (left,)
    assert [s.keep for s in ASViT(keep=0.3, threshold="topk").stages(facts)] == [None, None, 0.3]


@FAST
@given(n=st.integers(1, 300), keep=st.floats(0.01, 1))
def test_every_stage_keeps_the_same_share(n: int, keep: float) -> None:
    stages = ASViT(keep=keep, threshold="topk").stages(ModelFacts("test", 12, 0, frozenset({"vit"}), {}, {}))
    k, now = max(1, math.floor(keep * n + 0.5)), n
    for i, stage in enumerate(stages, start=1):
        signals = {need: torch.rand(1, 1, now) for need in stage.needs}
        now = stage.decide(make_view(torch.randn(1, now, 2), signals, now, [TokenLayout(1, n)])).counts[0]
        assert now == (k if i == 3 else max(k, math.floor(n * (k / n) ** (i / 3) + 0.5)))


def test_layers_that_fall_together_act_once() -> None:
    facts = ModelFacts("test", 3, 0, frozenset({"vit"}), {}, {})
    assert ASViT(threshold="given").places(facts) == {1: 0.001, 2: 0.003}
    with pytest.raises(vtprune.InvalidOptionError, match="thresholds"):
        ASViT(threshold="given", thresholds=(0.1,))


def test_learned_thresholds_come_from_the_file(tmp_path: Path) -> None:
    facts = ModelFacts("test", 12, 0, frozenset({"vit"}), {}, {})
    with pytest.raises(
        vtprune.UnsupportedMethodError, match="vtprune train as-vit --model CHECKPOINT --keep 3"
    ):
        ASViT(keep=3).stages(facts)
    save(tmp_path / "w", {"thresholds": torch.tensor([0.1, 0.3, 0.2])}, {})
    stages = ASViT(keep=3, weights=tmp_path / "w").stages(facts)
    for stage, theta in zip(stages, (0.1, 0.3, 0.2), strict=True):
        attention, norms = stage.needs
        signals = {attention: torch.tensor([[[0.05, 0.15, 0.25, 0.35]]]), norms: torch.ones(1, 1, 4)}
        chosen = stage.decide(make_view(torch.randn(1, 4, 2), signals, 4))
        assert chosen.index[0].tolist() == [i for i in range(4) if 0.05 + i / 10 > theta]
        assert stage.keep is None


@pytest.mark.parametrize("options", [{}, {"threshold": "topk"}, {"threshold": "given", "keep": 3}])
def test_budget_and_threshold_belong_together(options: dict[str, Any]) -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="emerge from `thresholds`"):
        ASViT(**options)
