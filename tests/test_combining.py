"""Combinations: parts against slow transcriptions, and on real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, cosine, lists, make_view, normal, shares_of

import vtprune
from vtprune import combining
from vtprune.combining import (
    Above,
    Combined,
    Desink,
    Dpp,
    Draw,
    Drop,
    Farthest,
    Mass,
    Merge,
    Outliers,
    Power,
    Quota,
    Top,
)
from vtprune.layout import TokenLayout
from vtprune.method import Scored, Signal, Site, View
from vtprune.methods import REGISTRY, create
from vtprune.testing.tiny import llava_inputs, tiny_llava
from vtprune.testing.zoo import LVLMS, Image, Video

CLS = Signal("cls_attention", 3)
SCORERS = [key for key, cls in REGISTRY.items() if issubclass(cls, Scored)]


def view_of(seed: int, images: int, n: int, k: int, steps: int | None = None) -> View:
    return make_view(normal(seed, images, n, 6), {CLS: shares_of(seed, images, 2, n, steps=steps)}, k)


def scores_of(view: View) -> list[list[float]]:
    return [
        [sum(head[j] for head in image) / len(image) for j in range(view.n)] for image in view[CLS].tolist()
    ]


@EXAMPLES
@given(st.integers(1, 3), st.integers(1, 20), st.sampled_from([None, 4]), SEEDS, st.data())
def test_a_scorer_alone_is_the_method(
    images: int, n: int, steps: int | None, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    view = view_of(seed, images, n, k, steps)
    one = vtprune.combine("fastervlm", keep=k)
    assert lists(one.decide(view)) == lists(create("fastervlm", keep=k).decide(view))


@EXAMPLES
@given(st.integers(1, 3), st.integers(2, 14), SEEDS, st.data())
def test_our_own_method_in_parts(images: int, n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    view = view_of(seed, images, n, k)
    whole = create("vtprune", keep=k, scorer="cls", theta=0.5, beta=0.3).decide(view)
    parts = vtprune.combine(
        create("vtprune", keep=k, scorer="cls"), Power(0.5), Farthest(), Merge(0.3), keep=k
    )
    for g in range(images):
        ours, theirs = (s.image(g).apply(view.features[g]) for s in (whole, parts.decide(view)))
        torch.testing.assert_close(ours, theirs)


@EXAMPLES
@given(st.integers(1, 3), st.integers(1, 25), st.floats(0.05, 1.0), SEEDS)
def test_budgets_by_hand(images: int, n: int, share: float, seed: int) -> None:
    view = view_of(seed, images, n, n)
    budgets: list[tuple[Any, Callable[[list[float]], int]]] = [
        (Above(0.04), lambda s: sum(x > 0.04 for x in s)),
        (Mass(share), lambda s: fewest(s, share)),
        (
            Outliers(),
            lambda s: sum(
                x > np.quantile(s, 0.75) + 1.5 * np.subtract(*np.quantile(s, [0.75, 0.25])) for x in s
            ),
        ),
    ]
    for budget, count in budgets:
        chosen = vtprune.combine("fastervlm", budget).decide(view)
        for g, scores in enumerate(scores_of(view)):
            k = min(n, max(1, count(scores)))
            assert lists(chosen)[g] == sorted(best(scores, k))


@EXAMPLES
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 9), SEEDS)
def test_quotas_of_frames(tokens: list[int], n: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(tokens)).tolist()
    layout = [TokenLayout(1, n, "video", 0, time) for time in order]
    shown = shares_of(seed, len(tokens), 2, n)
    view = make_view(normal(seed, len(tokens), n, 6), {CLS: shown}, n, layout)
    chosen = vtprune.combine("fastervlm", Quota(tokens)).decide(view)
    for g, (time, scores) in enumerate(zip(order, scores_of(view), strict=True)):
        assert lists(chosen)[g] == sorted(best(scores, min(n, tokens[time])))


def test_quotas_on_a_model() -> None:
    model = LVLMS["qwen2_vl"].build()
    inputs = LVLMS["qwen2_vl"].batch([[20, Video(1, 3), 21, 22]])
    norms = lambda view: view.features.norm(dim=-1)
    with vtprune.patch(model, vtprune.combine(norms, "quota:tokens=(3, 1, 2)")) as patch:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        found = [(image.layout.time, image.tokens_out) for image in patch.report().images]
        assert found == [(0, 3), (1, 1), (2, 2)]
    for method, prompt, said in (
        (vtprune.combine(norms, Quota([3, 1])), [20, Video(1, 3)], "2 frames of a video, .*holds frame 2"),
        (vtprune.combine(norms, Quota([3, 1])), [20, Image(1)], "2 frames of a video, .*holds a picture"),
    ):
        inputs = LVLMS["qwen2_vl"].batch([[*prompt, 21]])
        with vtprune.patch(model, method), pytest.raises(vtprune.InvalidOptionError, match=said):
            model(**inputs)


def fewest(scores: list[float], share: float) -> int:
    total = 0.0
    for count, score in enumerate(sorted(scores, reverse=True), start=1):
        total += score
        if total >= share * sum(scores) - 1e-12:
            return count
    return len(scores)


@EXAMPLES
@given(st.integers(2, 12), SEEDS, st.data())
def test_dpp_by_determinants(n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(n, 4)))
    view = view_of(seed, 1, n, k)
    features, scores = view.features[0].float().double().numpy(), scores_of(view)[0]
    kernel = np.array(
        [[scores[i] * cosine(features[i], features[j]) * scores[j] for j in range(n)] for i in range(n)]
    )
    chosen: list[int] = []
    while len(chosen) < k:
        left = [j for j in range(n) if j not in chosen]
        chosen.append(
            max(left, key=lambda j: (np.linalg.det(kernel[np.ix_([*chosen, j], [*chosen, j])]), -j))
        )
    assert lists(vtprune.combine("fastervlm", Dpp(), keep=k).decide(view)) == [sorted(chosen)]


def test_draws_follow_the_scores() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    view = make_view(torch.zeros(4000, 4, 1), {}, 1, seeds=range(4000))
    drawn = Draw()(scores.expand(4000, -1), view)[:, 0]
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, scores / 10, atol=0.03, rtol=0)


def test_transforms() -> None:
    view = view_of(0, 1, 4, 2)
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    assert Desink(0.5, 0.5)(scores, view).tolist()[0] == pytest.approx(
        [0.35, 0.35 / 3 + 0.1, 0.35 / 3 + 0.1, 0.35 / 3 + 0.1]
    )
    assert Power(2)(torch.tensor([[-1.0, 3.0]]), view).tolist() == [[0.0, 9.0]]


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_with_every_part_on_a_model(scorer: str) -> None:
    model = tiny_llava()
    inputs = llava_inputs([[1, 10, "image", 11, 12], ["image", 13, 14, 15]])
    before = model(**inputs).logits
    for parts in ("farthest|merge", "power:exponent=2|dpp", "desink|draw:seed=3", "mass:share=0.5|top|drop"):
        budget = {} if "mass" in parts else {"keep": 5}
        with vtprune.patch(model, f"{scorer}|{parts}", **budget) as patch:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            report = patch.report()
            assert report.engaged
            assert all(n == 5 for n in report.visual_tokens_out) or "mass" in parts
    assert torch.equal(model(**inputs).logits, before)


def test_functions_of_ones_own() -> None:
    model = tiny_llava()
    inputs = llava_inputs([[1, "image", 11]])
    first = Combined(
        scorer=create("vtc-cls", keep=1.0),
        keep=4,
        selector=lambda scores, view: torch.arange(view.k).expand(len(scores), -1),
        at=Site("projector"),
    )
    norms = vtprune.combine(lambda view: view.features.norm(dim=-1), "merge:beta=0.5", keep=0.25)
    for method in (first, norms):
        with vtprune.patch(model, method) as patch:
            model(**inputs)
            assert patch.report().engaged
    with vtprune.patch(model, first) as patch:
        model(**inputs)
        assert patch.report().images[0].kept["projector"].tolist() == [0, 1, 2, 3]


def test_what_is_said_of_it() -> None:
    one = vtprune.combine("rollout", "power", "farthest", keep=7)
    assert one.options()["parts"] == ["Power(exponent=0.5)", "Farthest()", "Drop()"]
    assert one.options()["keep"] == 7


@pytest.mark.parametrize(
    ("parts", "options", "reason"),
    [
        (("vtc-cls", "farthst"), {"keep": 4}, "farthest"),
        (("vtc-cls", "merge:bta=1"), {"keep": 4}, "beta"),
        (("vtc-cls", "merge:beta=-1"), {"keep": 4}, "number >= 0"),
        (("vtc-cls", "top", "dpp"), {"keep": 4}, "2 parts are a selector"),
        (("vtc-cls", "top"), {}, "keep"),
        (("vtc-cls", "outliers"), {"keep": 4}, "not both"),
        (("divprune", "merge"), {"keep": 4}, "scorers: .*vtc-cls"),
        (("vtc-cls", "quota:tokens=(3, 0)"), {}, "int >= 1 for every frame"),
        (("vtc-cls", "quota:tokens=()"), {}, "int >= 1 for every frame"),
        (("vtc-cls", print), {"keep": 4}, "no part"),
        (("vtc-cls", "merge"), {"keep": 0}, "keep=0"),
    ],
)
def test_refused(parts: tuple[Any, ...], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(vtprune.InvalidOptionError, match=reason):
        vtprune.combine(*parts, **options)


def test_names_and_parts_agree() -> None:
    with pytest.raises(vtprune.UnknownMethodError, match="vtc-cls"):
        create("vtccls|merge", keep=4)
    assert set(combining.PARTS) == {
        "desink", "power", "outliers", "above", "mass", "quota", "top", "farthest", "dpp", "draw", "drop", "merge",
    }  # fmt: skip
    assert create("vtc-cls:first_layer=-1|merge:beta=0.5", keep=4).options()["scorer"]["first_layer"] == -1  # type: ignore[index]
    assert isinstance(Top(), Top)
    assert Drop() == Drop()
