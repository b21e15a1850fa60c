"""Random-LTD: the schedule and the draw, against a literal transcription of DeepSpeed's scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtprune
from vtprune.method import BypassView
from vtprune.methods import RandomLTD


def fixed_linear(global_steps: int, low: int, high: int, total: int, increase: int) -> int:
    """scheduler.py, `__fixed_root_get_value` with root degree 1."""
    next_seq = (float(global_steps) / total) ** 1.0
    next_seq = math.floor(next_seq * (high - low) + low)
    next_seq -= next_seq % increase
    return min(next_seq, high)


@settings(deadline=None)
@given(
    low=st.integers(1, 64),
    more=st.integers(0, 200),
    total=st.integers(1, 50),
    increase=st.integers(1, 20),
    step=st.integers(0, 120),
    first=st.integers(0, 20),
)
def test_the_schedule_is_theirs_but_for_its_floor(
    low: int, more: int, total: int, increase: int, step: int, first: int
) -> None:
    high = low + more
    method = RandomLTD(keep=low, until=high, steps=total, increase=increase, first_step=first)
    assert method.length(step, 1000) == max(low, fixed_linear(first + step, low, high, total, increase))
    assert method.length(step, 1) == 1
    assert method.length(step, 0) == 0


def test_ratios_are_of_a_rows_own_length() -> None:
    method = RandomLTD(keep=0.25, until=0.75, steps=10, increase=1)
    assert [method.length(s, 40) for s in (0, 5, 10, 99)] == [10, 20, 30, 30]
    assert [RandomLTD(keep=0.25).length(s, 40) for s in (0, 10**6)] == [10, 10]


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_draws_are_sorted_candidates_and_depend_on_seed_step_and_layer(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=30, max_size=30), min_size=1, max_size=4))
    candidates = torch.tensor(rows)
    k = [data.draw(st.integers(0, sum(row))) for row in rows]
    features = torch.zeros(len(rows), 30, 2)
    method = RandomLTD(seed=data.draw(st.integers(0, 9)))
    found = method.sample(BypassView(features, candidates, k, 3, 7))
    for row, index, n in zip(rows, found.index, k, strict=True):
        assert len(index) == n
        assert index.tolist() == sorted(set(index.tolist()))
        assert all(row[i] for i in index.tolist())
    again = RandomLTD(seed=method.seed, first_step=4).sample(BypassView(features, candidates, k, 3, 3))
    assert all(torch.equal(a, b) for a, b in zip(found.index, again.index, strict=True))
    everything = torch.ones(1, 1000, dtype=torch.bool)

    def drawn(seed: int, layer: int, step: int) -> list[int]:
        view = BypassView(torch.zeros(1, 1000, 1), everything, [500], layer, step)
        return RandomLTD(seed=seed).sample(view).index[0].tolist()

    assert len({tuple(drawn(*x)) for x in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4


def test_every_token_is_equally_likely() -> None:
    counts = torch.zeros(20)
    candidates = torch.ones(1, 20, dtype=torch.bool)
    for step in range(2000):
        index = RandomLTD().sample(BypassView(torch.zeros(1, 20, 1), candidates, [5], 1, step)).index[0]
        counts[index] += 1
    # 500 expected, standard deviation 19.4
    assert counts.sum() == 10_000
    assert (counts - 500).abs().max() < 80


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"until": 1.5},
        {"steps": 0},
        {"steps": 2.5},
        {"increase": 0},
        {"first_step": -1},
        {"tokens": "text"},
        {"positions": "dense"},
    ],
)
def test_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(vtprune.InvalidOptionError, match=next(iter(options))):
        vtprune.methods.create("random-ltd", **options)


def test_it_prunes_nothing_and_is_never_measured() -> None:
    from vtprune.eval.search import check_spaces
    from vtprune.eval.settings import DENSE, plan_settings
    from vtprune.space import Range
    from vtprune.testing import tiny_llava

    with pytest.raises(vtprune.InvalidOptionError, match="training only"):
        check_spaces([RandomLTD()], {"keep": Range(0.1, 0.9)})
    dense, mine = plan_settings(["random-ltd"], [0.5, 0.25], [64])
    assert (dense.method, mine.method) == (DENSE, "random-ltd")
    with (
        pytest.raises(vtprune.UnsupportedMethodError, match="training only"),
        mine.applied(torch.nn.Identity()),
    ):
        pass
    model = tiny_llava(layers=2)
    with pytest.raises(vtprune.UnsupportedMethodError, match="only 2 decoder layers"):
        vtprune.patch(model, "random-ltd")
    with pytest.raises(vtprune.InvalidOptionError, match="layers"):
        vtprune.patch(model, "random-ltd", layers=(2,))
    with vtprune.patch(model, "random-ltd", layers=(-1,)) as patch:
        assert "bypasses decoder layers [1]" in repr(patch)
        assert patch.bypasses[0].layers == (1,)
