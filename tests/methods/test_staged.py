"""Budgets of methods with several stages inside the language model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, make_view, normal, shares_of

import vtprune
from vtprune.layout import TokenLayout
from vtprune.method import ModelFacts, Signal
from vtprune.methods import create

KINDS = ("text_attention", "prompt_attention", "text_features", "input_features", "decoder_received")
KEYS = ("pyramiddrop", "sparsevlm", "spatten", "atp-llava")


def facts(depth: int) -> ModelFacts:
    layers = frozenset(range(depth))
    return ModelFacts("test", 4, depth, frozenset(["decoder"]), {kind: layers for kind in KINDS}, {})


def make(key: str, **options: object) -> vtprune.Method:
    return create(key, **options, **({"threshold": "quantile"} if key == "atp-llava" else {}))


def left(method: vtprune.Method, depth: int, n: int) -> dict[int, int]:
    """First layer -> visual tokens from there on, for a picture of n tokens; only counts, nothing is scored."""
    found = {}
    object.__setattr__(method, "decide", lambda view: vtprune.Selection.of(torch.arange(view.k)[None]))
    alive = n
    for stage in method.stages(facts(depth)):
        features = torch.zeros(1, alive, 1)
        view = make_view(features, {}, alive, n_original=[n], layout=[TokenLayout(1, n)])
        alive = stage.decide(view).counts[0]
        found[stage.site.layer or 0] = alive
    return found


def average(found: dict[int, int], depth: int, n: int) -> float:
    total, alive = 0, n
    for layer in range(depth):
        alive = found.get(layer, alive)
        total += alive
    return total / depth


@EXAMPLES
@given(
    st.sampled_from(KEYS), st.integers(3, 40), st.integers(1, 700), st.floats(0.01, 1.0) | st.integers(1, 700)
)
def test_average(key: str, depth: int, n: int, keep: float) -> None:
    found = left(make(key, keep=keep), depth, n)
    counts = list(found.values())
    assert counts == sorted(counts, reverse=True)
    assert all(1 <= count <= n for count in counts)
    wanted = keep * n if isinstance(keep, float) else min(keep, n)
    ends = [*list(found)[1:], depth]
    widest = max(end - start for start, end in zip(found, ends, strict=True))
    reached = average(found, depth, n)
    # One token more or less in the longest stage is the finest step; below one token per stage nothing is left.
    assert abs(reached - wanted) <= widest / depth / 2 + 1e-6 or (set(counts) == {1} and reached > wanted)


def test_authors_schedules() -> None:
    assert left(make("pyramiddrop"), 32, 576) == {8: 288, 16: 144, 24: 72}
    assert left(make("pyramiddrop", keep=270), 32, 576) == {8: 288, 16: 144, 24: 72}
    lists = {203: (300, 200, 110), 141: (303, 110, 36), 110: (238, 48, 26), 79: (66, 30, 17)}
    for keep, expected in lists.items():
        found = left(make("sparsevlm", keep=keep), 32, 576)
        assert list(found) == [3, 7, 16]
        # Named averages are whole numbers, so the counts are met within their rounding.
        assert all(abs(a - b) <= 4 for a, b in zip(found.values(), expected, strict=True))
        stages = make("sparsevlm", counts=expected).stages(facts(32))
        assert tuple(stage.keep for stage in stages) == expected
    assert left(make("spatten"), 20, 576) != {}
    assert next(iter(left(make("spatten"), 20, 576))) == 3


def test_pictures_of_other_sizes_get_their_own_counts() -> None:
    """Equally many tokens left, but not at the start: two groups, one of them untouched."""
    method = make("pyramiddrop", keep=0.5)
    stage = method.stages(facts(4))[1]
    signal = Signal("text_attention", stage.site.layer or 0)
    attention = shares_of(0, 3, 2, 10)
    layout = [TokenLayout(1, 40), TokenLayout(1, 12), TokenLayout(1, 40)]
    index = torch.arange(10).expand(3, -1)
    view = make_view(normal(0, 3, 10, 4), {signal: attention}, 10, layout=layout, index=index)
    chosen = stage.decide(view)
    counts = [left(create("pyramiddrop", keep=0.5), 4, n)[2] for n in (40, 12, 40)]
    assert chosen.counts == tuple(min(10, c) for c in counts)
    assert len(set(counts)) == 2


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("pyramiddrop", {"counts": (3, 2)}, "one each"),
        ("pyramiddrop", {"counts": (3, 2, 0)}, "no visual token"),
        ("sparsevlm", {"layers": (2,)}, "three stages"),
        ("sparsevlm", {"recycle": 2.0}, "share"),
        ("spatten", {"first": 1.0}, "share"),
        ("atp-llava", {"rates": (0.5, 0.5)}, "per layer"),
    ],
)
def test_options_are_checked(key: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(vtprune.InvalidOptionError, match=message):
        create(key, **options)


def test_layers_outside_the_model() -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="outside"):
        make("pyramiddrop", layers=(0, 2)).stages(facts(4))
    with pytest.raises(vtprune.InvalidOptionError, match="another follows"):
        make("sparsevlm", layers=(3, 3, 3)).stages(facts(4))
