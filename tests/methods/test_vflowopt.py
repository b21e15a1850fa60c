"""VFlowOpt against its formula: map, recycling, schedule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from methods.views import make_view

import vtprune
from vtprune.layout import TokenLayout
from vtprune.method import ModelFacts, Signal
from vtprune.methods.vflowopt import VFlowOpt
from vtprune.scoring import grey_entropy
from vtprune.space import fitted

FAST = settings(max_examples=60, deadline=None, derandomize=True)
MAP = Signal("attention_map", 3)
PIXELS = Signal("patch_pixels", 0)
MEAN, STD = (0.5, 0.25, 0.375), (0.25, 0.5, 0.5)


def importance(attention: np.ndarray, t: float) -> np.ndarray:
    n = len(attention)
    r = [sum(attention[i, j] for i in range(n)) / n for j in range(n)]
    threshold = t * sum(r) / n
    voters = [q for q in range(n) if r[q] > threshold]
    if not voters:
        voters = [max(range(n), key=lambda j: (r[j], -j))]
    return np.array([sum(attention[q, i] for q in voters) / len(voters) for i in range(n)])


def entropy(pixels: np.ndarray) -> float:
    """Of [C, P] normalised pixels, in bits."""
    counts = [0] * 256
    for x in range(pixels.shape[1]):
        colours = [255 * (pixels[c, x] * STD[c] + MEAN[c]) for c in range(3)]
        counts[min(255, max(0, math.floor(sum(colours) / 3 + 0.5)))] += 1
    shares = [c / pixels.shape[1] for c in counts if c]
    return -sum(s * math.log2(s) for s in shares)


def softmax(x: list[float]) -> np.ndarray:
    return np.exp(x) / sum(np.exp(x))


def falling(scores: np.ndarray) -> list[int]:
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


def recycled(scores: np.ndarray, cols: int, a: float, k: int) -> dict[int, dict[int, float]]:
    """Kept token -> {token: coefficient}, by trying every number of plain tokens."""
    n, order = len(scores), falling(scores)
    found: dict[int, dict[int, float]] | None = None
    for m in range(n):
        plan: dict[int, dict[int, float]] = {i: {i: 1.0} for i in order[:m]}
        cells: dict[tuple[int, int], list[int]] = {}
        for i in order[m:]:
            cells.setdefault((int(i // cols / a), int(i % cols / a)), []).append(i)
        for members in cells.values():
            share = {i: max(scores[i], 1e-12) for i in members}
            plan[members[0]] = {i: share[i] / sum(share.values()) for i in members}
        if len(plan) == k:
            found = plan
    return found if found is not None else {i: {i: 1.0} for i in order[:k]}


@FAST
@given(
    seed=st.integers(0, 10**6),
    g=st.integers(1, 3),
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    p=st.integers(0, 2),
    share=st.floats(0, 1),
    t=st.sampled_from([0.0, 0.7, 1.0, 1.3, 40.0]),
    a=st.sampled_from([1.0, 1.7, 2.0, 3.3, 15.0]),
    alpha=st.sampled_from([0.0, 0.0, 0.7, -1.0]),
)
def test_first_stage(
    seed: int, g: int, rows: int, cols: int, p: int, share: float, t: float, a: float, alpha: float
) -> None:
    n = rows * cols
    k = max(1, min(n, round(share * n)))
    make = torch.Generator().manual_seed(seed)
    # Multiples of 1/64 with few values: sums are exact and ties are many.
    maps = torch.randint(1, 6, (g, p + n, p + n), generator=make) / 64
    layout = [TokenLayout(rows, cols, image=i) for i in range(g)]
    x = torch.randn(g, n, 3, generator=make)
    method = VFlowOpt(keep=k, r1=1.0, t=t, a=a, alpha=alpha, pixel_mean=MEAN, pixel_std=STD)
    # From flat to noisy patches, some of them out of range.
    spread = torch.rand(g, n, 1, 1, generator=make) * 2
    pixels = (torch.randn(g, n, 3, 12, generator=make) * spread * 8).round() / 8
    signals = {MAP: maps, PIXELS: pixels} if alpha else {MAP: maps}
    found = method.flow(make_view(x, signals, n, layout), 0, (1, 0, 0))
    assert found.counts == (k,) * g
    for image in range(g):
        scores = importance(maps[image, p:, p:].double().numpy(), t)
        if alpha:
            scores = scores + alpha * softmax([entropy(one) for one in pixels[image].double().numpy()])
            # Which of two equal sums is larger is left to rounding.
            assume(np.diff(np.sort(scores)).min(initial=1) > 1e-6)
        plan = recycled(scores, cols, a, k) if k < n else {i: {i: 1.0} for i in range(n)}
        kept = sorted(plan)
        assert found.index[image].tolist() == kept
        value = found.image(image).apply(x[image])
        for slot, i in enumerate(kept):
            expected = sum(w * x[image, j].double().numpy() for j, w in plan[i].items())
            np.testing.assert_allclose(value[slot].numpy(), expected, rtol=1e-4, atol=1e-5)


@FAST
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 20),
    left=st.integers(1, 20),
    t=st.sampled_from([0.0, 1.0, 9.0]),
)
def test_later_stages_discard_by_the_map_of_the_survivors(seed: int, n: int, left: int, t: float) -> None:
    left = min(left, n)
    make = torch.Generator().manual_seed(seed)
    maps = torch.randint(1, 6, (1, left, left), generator=make) / 64
    index = torch.randperm(n, generator=make)[:left].sort().values[None]
    view = make_view(torch.randn(1, left, 2), {MAP: maps}, left, [TokenLayout(1, n)], index=index)
    method, spans = VFlowOpt(keep=0.4, t=t), (9, 9, 10)
    found = method.flow(view, 1, spans)
    k = min(left, method.counts(n, spans)[1])
    scores = importance(maps[0].double().numpy(), t)
    assert found.into is None
    assert found.index[0].tolist() == sorted(falling(scores)[:k])


@FAST
@given(
    n=st.integers(1, 900),
    keep=st.one_of(st.floats(0.001, 1), st.integers(1, 900)),
    r2=st.floats(0.1, 1),
    r1=st.floats(0.5, 3),
    spans=st.sampled_from([(9, 9, 10), (1, 2, 1), (10, 10, 12), (2, 3, 0)]),
)
def test_schedule_meets_the_budget(
    n: int, keep: float | int, r1: float, r2: float, spans: tuple[int, int, int]
) -> None:
    counts = VFlowOpt(keep=keep, r1=r1, r2=r2).counts(n, spans)
    assert n >= counts[0] >= counts[1] >= counts[2] >= 1
    depth = sum(spans)
    budget = max(1.0, keep * n if isinstance(keep, float) else min(keep, n))
    average = sum(c * s for c, s in zip(counts, spans, strict=True)) / depth
    # A count is whole, and it costs as many layers as it lasts.
    assert abs(average - budget) <= max(spans) / depth + 1e-9 or spans[2] == 0
    if isinstance(keep, float) and keep == 1.0:
        assert counts == (n, n, n)


def test_published_schedule() -> None:
    """R (.2651, .9833, .8773) at 25 % of LLaVA-OneVision-7B: R3 comes out of the budget
    (their rounded ratios average 25.07 %)."""
    one, two, three = VFlowOpt().counts(100_000, (9, 9, 10))
    assert math.isclose(one / 100_000, 0.2651, abs_tol=1e-5)
    assert math.isclose(two / one, 0.9833, abs_tol=1e-4)
    assert math.isclose(three / two, 0.8773, abs_tol=0.01)


def test_stages_and_options() -> None:
    facts = ModelFacts("test", 26, 28, frozenset({"projector", "decoder"}), {}, {})
    stages = VFlowOpt().stages(facts)
    assert [str(s.site) for s in stages] == ["projector", "decoder[9]", "decoder[18]"]
    assert {s.needs for s in stages} == {(Signal("attention_map", 25),)}
    entropic = VFlowOpt(alpha=0.3).stages(facts)
    assert {s.needs for s in entropic} == {(Signal("attention_map", 25), PIXELS)}
    for options, name in (
        ({"r1": 0.0}, "r1"),
        ({"r2": 1.5}, "r2"),
        ({"a": 0.5}, "a="),
        ({"pixel_std": (1.0, 0.0, 1.0)}, "pixel_std"),
        ({"pixel_mean": (0.5,)}, "pixel_mean"),
    ):
        with pytest.raises(vtprune.InvalidOptionError, match=name):
            VFlowOpt(**options)  # type: ignore[arg-type]


def test_entropy_of_known_patches() -> None:
    flat, two, all_levels = torch.full((256,), 7.0), torch.tensor([0.0, 255.0] * 128), torch.arange(256.0)
    outside = torch.tensor([-300.0, 0.0, 255.0, 900.0] * 64)  # clamped, not wrapped
    grey = torch.stack([flat, two, all_levels, outside])[None, :, None].expand(1, 4, 3, 256) / 255
    mean, std = torch.tensor(VFlowOpt().pixel_mean)[:, None], torch.tensor(VFlowOpt().pixel_std)[:, None]
    found = grey_entropy((grey - mean) / std, VFlowOpt().pixel_mean, VFlowOpt().pixel_std)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0, 8.0, 1.0]]))
    with pytest.raises(vtprune.InvalidOptionError, match="1 channels"):
        grey_entropy(grey[:, :, :1], MEAN, STD)


def test_search_space_is_the_authors_box() -> None:
    """R1 in [.25, .375] at a budget of 25 %, so 1 to 1.5 times the budget; a search starts from the defaults."""
    assert {o: str(s) for o, s in VFlowOpt.search_space.items()} == {
        "r1": "1.0:1.5",
        "r2": "0.533:1.0",
        "t": "0.0:50.0",
        "a": "3.0:24.0",
        "alpha": "-1.0:1.0",
    }
    for option, space in VFlowOpt.search_space.items():
        assert fitted(VFlowOpt, option, space) == space
        assert getattr(VFlowOpt(), option) in space
