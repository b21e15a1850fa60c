"""SpAtten against its formulas: tokens, heads, ramps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, lists, make_view, normal, shares_of

import vtprune
from vtprune.method import HeadView, ModelFacts, Signal
from vtprune.methods import create
from vtprune.methods.spatten import SpAtten
from vtprune.methods.staged import Schedule


@EXAMPLES
@given(SEEDS, st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.sampled_from([None, 2]), st.data())
def test_formula(seed: int, images: int, n: int, layers: int, steps: int | None, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    received = {
        Signal("decoder_received", layer): shares_of(seed + 10 * layer, images, 2, n, steps=steps)
        for layer in range(layers)
    }
    chosen = create("spatten").decide(make_view(normal(seed, images, n, 4), received, k))
    expected = []
    for g in range(images):
        scores = [sum(x[g, h, i].item() for x in received.values() for h in range(2)) for i in range(n)]
        expected.append(sorted(best(scores, k)))
    assert lists(chosen) == expected


@pytest.mark.parametrize(
    ("strength", "first", "last"), [(1.0, 0, 0), (0.75, 0, 0.5), (0.5, 0, 1), (0.25, 0.5, 1), (0.0, 1, 1)]
)
def test_ramp(strength: float, first: float, last: float) -> None:
    """Ends of the ramp of removed shares; its middle is their mean, the average."""
    shares = create("spatten").shares(strength, 3)  # type: ignore[attr-defined]
    assert [1 - s for s in shares] == pytest.approx([first, (first + last) / 2, last])
    assert (first + last) / 2 == pytest.approx(1 - strength)


@EXAMPLES
@given(SEEDS, st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.sampled_from([None, 2]), st.data())
def test_heads(seed: int, rows: int, n: int, layers: int, steps: int | None, data: st.DataObject) -> None:
    outputs = {
        Signal("decoder_head_outputs", layer): shares_of(seed + 10 * layer, rows, n, steps=steps)
        for layer in range(layers)
    }
    alive = torch.from_numpy(normal(seed, rows, n).numpy() > -0.5)
    alive[:, data.draw(st.integers(0, n - 1))] = True
    share = data.draw(st.floats(0.05, 1))
    schedule = Schedule(layers + 1, [layers], lambda strength: [strength])
    k = schedule.counts(share, n)[0]
    found = SpAtten(heads=share).decide_heads(schedule, 0, HeadView(alive, outputs)).keep
    for g in range(rows):
        left = [h for h in range(n) if alive[g, h]]
        scores = [sum(x[g, h].item() for x in outputs.values()) for h in left]
        expected = [left[i] for i in best(scores, k)]
        assert found[g].nonzero()[:, 0].tolist() == sorted(expected)


def test_stages_of_heads() -> None:
    facts = ModelFacts("test", 24, 32, frozenset({"decoder"}), {}, {})
    assert SpAtten().head_stages(facts) == []
    method = SpAtten(heads=1 / 1.1)
    stages = method.head_stages(facts)
    assert [s.layer for s in stages] == list(range(10, 32))  # 30 % of 32 layers are 9.6
    assert all(s.needs == tuple(Signal("decoder_head_outputs", x) for x in range(s.layer)) for s in stages)
    alive = torch.ones(1, 40, dtype=torch.bool)
    counts = []
    for stage in stages:
        signals = {signal: torch.arange(40.0).unsqueeze(0) for signal in stage.needs}
        alive = stage.decide(HeadView(alive, signals)).keep
        counts.append(int(alive.sum()))
        assert alive[0, 40 - counts[-1] :].all()
    assert counts == sorted(counts, reverse=True)
    assert (10 * 40 + sum(counts)) / 32 == pytest.approx(40 / 1.1, abs=0.5 / 32 + 1e-6)
    # In equal steps, but for rounding.
    steps = [a - b for a, b in pairwise(counts)]
    assert max(steps) - min(steps) <= 2


def test_scores_are_summed_over_all_layers() -> None:
    facts = ModelFacts("test", 24, 8, frozenset({"decoder"}), {}, {})
    for stage in SpAtten().stages(facts):
        assert stage.needs == tuple(
            Signal("decoder_received", layer) for layer in range(stage.site.layer or 0)
        )


@pytest.mark.parametrize("options", [{"heads": 0.0}, {"heads": 1.5}, {"first_heads": 1.0}, {"first": -0.1}])
def test_options(options: dict[str, float]) -> None:
    with pytest.raises(vtprune.InvalidOptionError, match=next(iter(options))):
        create("spatten", **options)
    shallow = ModelFacts("test", 24, 3, frozenset({"decoder"}), {}, {})
    with pytest.raises(vtprune.InvalidOptionError, match="leaves no layer of 3"):
        SpAtten(heads=0.5, first_heads=0.9).head_stages(shallow)
