"""Frame selectors against literal loops, and what every one of them owes."""

from __future__ import annotations

import ast
import colorsys
import inspect
import math
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vtprune.errors import InvalidOptionError, NonFiniteScoresError, UnknownMethodError
from vtprune.video.clip import ClipError, FrameSelection, FrameSelector
from vtprune.video.clustering import k_means, silhouettes
from vtprune.video.histogram import hsv_histograms, rgb_to_hsv
from vtprune.video.relevance import SUBSTITUTE, EmbeddingRelevance, keywords, listed
from vtprune.video.selection import SELECTORS, Clip, Embedder, create_selector
from vtprune.video.selectors.quota import shared
from vtprune.video.selectors.stacfp import farthest_first

KEYS = sorted(SELECTORS)
CONTROLS = ("uniform", "random")


class Table(Embedder):
    """Vectors that are given; texts are turned into vectors by their letters."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def frames(self, frames: np.ndarray) -> np.ndarray:
        return self.vectors

    def text(self, texts: Sequence[str]) -> np.ndarray:
        width = self.vectors.shape[1]
        return np.stack([unit(np.random.default_rng(list(t.encode())).normal(size=width)) for t in texts])


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def clip_of(n: int, seed: int, constant: bool = False, size: tuple[int, int] = (6, 8), **more: Any) -> Clip:
    """A clip of n frames in some scenes of noise around a colour."""
    rng = np.random.default_rng(seed)
    scene = np.sort(rng.integers(0, 4, n))
    base = rng.integers(0, 256, (4, 1, 1, 3))[scene]
    frames = np.clip(base + rng.integers(-20, 21, (n, *size, 3)), 0, 255).astype(np.uint8)
    vectors = unit(rng.normal(size=(n, 5)))
    if constant:
        frames, vectors = np.repeat(frames[:1], n, 0), np.repeat(vectors[:1], n, 0)
    more = {"captions": ("a caption",), "question": "when is it red ?", **more}
    return Clip(np.arange(n) / 2, frames, n / 2, embedder=Table(vectors), **more)


# ---------------------------------------------------------------------- what every selector owes


@pytest.mark.parametrize("key", KEYS)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 30), k=st.integers(1, 40), seed=st.integers(0, 99), constant=st.booleans())
def test_k_ascending_distinct_frames_of_the_clip_the_same_every_time(
    key: str, n: int, k: int, seed: int, constant: bool
) -> None:
    chosen, again = (create_selector(key).select(clip_of(n, seed, constant), k) for _ in range(2))
    indices = chosen.indices.tolist()
    assert len(indices) == min(n, k)
    assert indices == sorted(set(indices))
    assert set(indices) <= set(range(n))
    assert chosen.scores is None or chosen.scores.shape == (n,)
    assert chosen.tokens is None or (len(chosen.tokens) == len(indices) and chosen.tokens.min() >= 1)
    assert indices == again.indices.tolist()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("k", [0, -1, True, 2.0, "3"])
def test_senseless_budgets_are_refused(key: str, k: Any) -> None:
    with pytest.raises(InvalidOptionError, match="k="):
        create_selector(key).select(clip_of(4, 0), k)


@pytest.mark.parametrize("key", KEYS)
def test_only_adaptive_selectors_go_without_a_budget(key: str) -> None:
    selector, clip = create_selector(key), clip_of(20, 3)
    if selector.adaptive:
        assert 1 <= len(selector.select(clip, None).indices) < 20
    else:
        with pytest.raises(InvalidOptionError, match="by itself"):
            selector.select(clip, None)


@pytest.mark.parametrize("key", KEYS)
def test_one_short_file_each_that_says_where_it_comes_from(key: str) -> None:
    cls = SELECTORS[key]
    path = Path(inspect.getfile(cls))
    assert path.stem == key.replace("-", "_")
    code = [line for line in ast.unparse(ast.parse(path.read_text())).splitlines() if line.strip()]
    assert len(code) - len((cls.__doc__ or "").splitlines()) <= 100
    assert key in CONTROLS or "Source:" in (cls.__doc__ or "")


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(UnknownMethodError, match="'keyscore'"):
        create_selector("keyscor")
    with pytest.raises(InvalidOptionError, match="'seed'"):
        create_selector("random", sed=1)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("stacfp", {"time_weight": 0.0}),
        ("stacfp", {"most": 0}),
        ("stacfp", {"seed": -1}),
        ("keyscore", {"alpha": -1.0}),
        ("keyscore", {"alpha": 0.0, "beta": 0.0, "gamma": 0.0}),
        ("keyscore", {"temporal": "other"}),
        ("keyscore", {"proposals": "some"}),
        ("keyscore", {"window": 0}),
        ("keyscore", {"trials": 0}),
        ("shots", {"threshold": 2.0}),
        ("quota", {"per_frame": 0}),
        ("quota", {"cap": 0}),
        ("quota", {"frames": "some"}),
    ],
)
def test_options_outside_their_range_are_refused(key: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError):
        create_selector(key, **options)


def test_importing_vtprune_imports_no_video() -> None:
    program = "import sys, vtprune; assert not [m for m in sys.modules if m.startswith('vtprune.video')]"
    subprocess.run([sys.executable, "-c", program], check=True)


# ---------------------------------------------------------------------- clip and selection


def test_bad_clips_are_refused() -> None:
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    for times, bad, duration in (
        ([0, 1, 2], frames.astype(np.float32), 3),
        ([0, 1, 2], frames[..., :1], 3),
        ([0, 1], frames, 3),
        ([0, 2, 1], frames, 3),
        ([0, 1, np.nan], frames, 3),
        ([], frames[:0], 3),
        ([0, 1, 2], frames, -1),
        ([0, 1, 2], frames, np.nan),
    ):
        with pytest.raises(ClipError):
            Clip(np.array(times), bad, duration)


def test_bad_selections_are_refused() -> None:
    for indices in ([], [1, 1], [2, 1], [-1, 0]):
        with pytest.raises(ClipError):
            FrameSelection(np.array(indices))
    with pytest.raises(ClipError):
        FrameSelection(np.array([0, 1]), tokens=np.array([1, 0]))
    with pytest.raises(NonFiniteScoresError):
        FrameSelection.top(np.array([0.0, np.nan]), 1)


def test_ties_go_to_the_earlier_frame() -> None:
    assert FrameSelection.top(np.array([1.0, 3, 2, 3, 2]), 3).indices.tolist() == [1, 2, 3]


def test_selectors_that_leave_the_clip_are_caught() -> None:
    class Far(FrameSelector):
        key = "far"

        def decide(self, clip: Clip, k: int | None) -> FrameSelection:
            return FrameSelection(np.array([clip.n]))

    with pytest.raises(ClipError, match="far"):
        Far().select(clip_of(3, 0), 1)


def test_query_is_the_mean_caption_and_else_the_question() -> None:
    clip = clip_of(3, 0, captions=("one", "two"))
    assert np.allclose(clip.query, unit(clip.text("one") + clip.text("two")))
    asked = clip_of(3, 0, captions=())
    assert np.allclose(asked.query, asked.text("when is it red ?"))
    assert clip_of(3, 0, captions="a dog").captions == ("a dog",)
    with pytest.raises(ClipError, match="captions"):
        _ = clip_of(3, 0, captions=(), question=None).query
    with pytest.raises(ClipError, match="embedder"):
        _ = Clip(np.zeros(1), np.zeros((1, 2, 2, 3), np.uint8), 0, captions="x").query


def test_embedders_are_checked_and_asked_once() -> None:
    class Counting(Table):
        asked = 0

        def frames(self, frames: np.ndarray) -> np.ndarray:
            self.asked += 1
            return super().frames(frames)

    embedder = Counting(unit(np.ones((2, 3))))
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    clip = Clip(np.arange(2), frames, 1, embedder=embedder)
    assert not embedder.asked
    assert clip.embeddings is clip.embeddings
    assert embedder.asked == 1
    for vectors in (np.ones((2, 3)), unit(np.ones((3, 3))), np.full((2, 3), np.nan)):
        with pytest.raises(ClipError, match="Table"):
            _ = Clip(np.arange(2), frames, 1, embedder=Table(vectors)).embeddings


# ---------------------------------------------------------------------- formulas


def test_uniform_takes_the_middles_of_equal_parts() -> None:
    assert create_selector("uniform").select(clip_of(12, 0), 3).indices.tolist() == [2, 6, 10]


def test_random_depends_on_the_seed_and_the_clip_alone() -> None:
    draws = {
        tuple(create_selector("random", seed=s).select(clip_of(40, c), 5).indices.tolist())
        for s in (-1, 0, 1)
        for c in (0, 1)
    }
    assert len(draws) == 6
    counts = np.zeros(10)
    for seed in range(400):
        counts[create_selector("random", seed=seed).select(clip_of(10, 0), 3).indices] += 1
    assert counts.min() > 80
    assert counts.max() < 160


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=20))
def test_hsv_histogram_is_the_literal_one(pixels: list[tuple[int, int, int]]) -> None:
    frame = np.array([pixels], np.uint8)
    expected = np.zeros((8, 4, 4))
    for r, g, b in pixels:
        h, s, v = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
        assert np.allclose(
            rgb_to_hsv(np.array([r, g, b], np.uint8)), [h, s * 255 / 256, v * 255 / 256], atol=1e-5
        )
        cell = rgb_to_hsv(np.array([r, g, b], np.uint8)) * [8, 4, 4]
        expected[tuple(int(c) for c in cell)] += 1 / len(pixels)
    assert np.allclose(hsv_histograms(frame[None])[0], expected.ravel())


def literal_silhouette(x: np.ndarray, labels: np.ndarray) -> float:
    total = 0.0
    for i in range(len(x)):
        mean = {}
        for cluster in set(labels.tolist()):
            others = [j for j in range(len(x)) if labels[j] == cluster and j != i]
            mean[cluster] = np.mean([np.linalg.norm(x[i] - x[j]) for j in others]) if others else None
        a = mean.pop(int(labels[i]))
        if a is None or not mean:
            continue
        b = min(mean.values())
        total += (b - a) / max(a, b) if max(a, b) > 0 else 0
    return total / len(x)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 25), k=st.integers(1, 25), seed=st.integers(0, 99))
def test_k_means_and_silhouette(n: int, k: int, seed: int) -> None:
    k = min(n, k)
    x = np.random.default_rng(seed).normal(size=(n, 3)).round(1)
    x[:, 0] += np.arange(n)  # no two rows are equal
    labels, centres = k_means(x, k, seed)
    assert set(labels.tolist()) == set(range(k))
    assert centres.shape == (k, 3)
    if k > 1:
        assert np.isclose(silhouettes(x, [labels])[0], literal_silhouette(x, labels))


def test_k_means_finds_what_is_there_and_the_silhouette_its_number() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat([[0.0, 0], [10, 0], [0, 10], [10, 10]], 15, axis=0) + rng.normal(size=(60, 2)) * 0.3
    found = [k_means(x, k, 0)[0] for k in range(2, 9)]
    values = silhouettes(x, found)
    assert values.argmax() == 2
    assert all(len(set(found[2][i : i + 15].tolist())) == 1 for i in range(0, 60, 15))
    assert np.allclose(values, [literal_silhouette(x, labels) for labels in found])


def scenes(lengths: Sequence[int], size: int = 8) -> Clip:
    """Scenes of plain colours that share none."""
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)], np.uint8)
    frames = np.concatenate([np.full((n, size, size, 3), c) for n, c in zip(lengths, colours, strict=False)])
    return Clip(np.arange(len(frames)), frames, len(frames))


def test_stacfp_proposes_one_frame_per_scene() -> None:
    clip = scenes([10, 4, 20, 6])
    chosen = create_selector("stacfp").select(clip, None).indices.tolist()
    assert len(chosen) == 4
    assert [np.searchsorted([10, 14, 34], i, side="right") for i in chosen] == [0, 1, 2, 3]
    assert set(chosen) <= set(create_selector("stacfp").select(clip, 9).indices.tolist())


def test_k_means_leaves_no_cluster_empty_among_equal_rows() -> None:
    labels, centres = k_means(np.ones((5, 2)), 3, 0)
    assert set(labels.tolist()) == {0, 1, 2}
    assert (centres == 1).all()


def test_stacfp_time_runs_from_0_to_its_weight() -> None:
    selector: Any = create_selector("stacfp", time_weight=0.6)
    assert np.allclose(selector.points(clip_of(4, 0))[:, -1], [0, 0.2, 0.4, 0.6])
    assert selector.points(clip_of(1, 0))[:, -1].tolist() == [0]


def test_stacfp_is_its_definition() -> None:
    clip = clip_of(20, 7)
    selector = create_selector("stacfp", time_weight=0.7)
    x = np.array([[*hsv_histograms(clip.frames)[i], 0.7 * i / 19] for i in range(20)])
    best = None
    for k in range(2, 17):
        labels, centres = k_means(x, k, 0)
        value = literal_silhouette(x, labels)
        if best is None or value > best[0] + 1e-12:
            best = (value, labels, centres)
    assert best is not None
    _, labels, centres = best
    expected = []
    for cluster, centre in enumerate(centres):
        assert np.allclose(centre, x[labels == cluster].mean(0))
        members = [i for i in range(20) if labels[i] == cluster]
        expected.append(min(members, key=lambda i: np.linalg.norm(x[i] - centre)))
    assert selector.select(clip, None).indices.tolist() == sorted(expected)


def test_farthest_first_is_its_definition() -> None:
    x = np.random.default_rng(3).normal(size=(15, 4))
    chosen = [2, 5]
    while len(chosen) < 9:
        rest = [i for i in range(15) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(np.linalg.norm(x[i] - x[j]) for j in chosen)))
    assert farthest_first(x, np.array([2, 5]), 9).tolist() == chosen


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    seed=st.integers(0, 99),
    temporal=st.sampled_from(["distinct", "representative"]),
    window=st.integers(1, 6),
)
def test_keyscore_is_its_definition(n: int, seed: int, temporal: str, window: int) -> None:
    clip = clip_of(n, seed, captions=("one", "two"))
    e, c = clip.embeddings, unit(clip.text("one") + clip.text("two"))

    def cos(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) if np.linalg.norm(a) > 1e-9 else 0.0

    cues = np.zeros((3, n))
    for i in range(n):
        near = [j for j in range(n) if abs(i - j) <= window]
        cues[0, i] = cos(e[i], c)
        if temporal == "distinct":
            cues[1, i] = 1 - max((cos(e[i], e[j]) for j in near if j != i), default=1)
        else:
            cues[1, i] = cos(e[i], np.mean([e[j] for j in near], axis=0))
        rest = [e[j] for j in range(n) if j != i]
        cues[2, i] = cos(e.mean(0), c) - (cos(np.mean(rest, axis=0), c) if rest else 0)
    expected = np.zeros(n)
    for weight, cue in zip((0.5, 0.2, 0.3), cues, strict=True):
        if n > 1 and cue.max() - cue.min() > 1e-6:
            expected += weight * (cue - cue.min()) / (cue.max() - cue.min())
    options = {"alpha": 0.5, "beta": 0.2, "gamma": 0.3, "temporal": temporal, "window": window}
    chosen = create_selector("keyscore", proposals="all", **options).select(clip, 4)
    assert chosen.scores is not None
    assert np.allclose(chosen.scores, expected)
    order = sorted(range(n), key=lambda i: (-chosen.scores[i], i))
    assert chosen.indices.tolist() == sorted(order[:4])


def test_keyscore_keeps_the_best_of_the_proposals() -> None:
    clip = clip_of(40, 5)
    selector: Any = create_selector("keyscore")
    stacfp: Any = create_selector("stacfp")
    proposals = stacfp.proposals(stacfp.points(clip), 6, 12)
    assert 6 <= len(proposals) <= 12
    scores = selector.scores(clip)
    expected = sorted(sorted(proposals.tolist(), key=lambda i: -scores[i])[:6])
    assert selector.select(clip, 6).indices.tolist() == expected
    free = selector.select(clip, None).indices.tolist()
    assert free == stacfp.select(clip, None).indices.tolist()


def test_keyscore_looks_for_up_to_twice_as_many_proposals_as_the_budget() -> None:
    colours = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], np.uint8)
    frames = np.repeat(colours, 5, 0)[:, None, None] + np.zeros((1, 4, 4, 1), np.uint8)
    vectors = unit(np.random.default_rng(0).normal(size=(40, 5)))
    clip = Clip(np.arange(40), frames, 40, "a caption", embedder=Table(vectors))
    stacfp: Any = create_selector("stacfp")
    proposals = np.sort(stacfp.proposals(stacfp.points(clip), 4, 8))
    assert (proposals // 5).tolist() == list(range(8))
    chosen = create_selector("keyscore").select(clip, 4)
    assert chosen.scores is not None
    expected = sorted(proposals.tolist(), key=lambda i: -chosen.scores[i])[:4]
    assert chosen.indices.tolist() == sorted(expected)


def test_keyscore_finds_the_frames_that_the_caption_names() -> None:
    vectors = np.tile([1.0, 0.0, 0.0], (60, 1))
    clip = clip_of(60, 1)
    vectors[33:36] = unit(clip.text("a caption")[:3])
    clip = Clip(clip.times, clip.frames, 30, captions="a caption", embedder=Needle(vectors))
    chosen = create_selector("keyscore", proposals="all").select(clip, 3)
    assert chosen.indices.tolist() == [33, 34, 35]
    with pytest.raises(InvalidOptionError, match="how many"):
        create_selector("keyscore", proposals="all").select(clip, None)


class Needle(Table):
    def text(self, texts: Sequence[str]) -> np.ndarray:
        return np.repeat(self.vectors[33:34], len(texts), 0)


def test_keyscore_does_not_stretch_rounding() -> None:
    clip = clip_of(30, 2, constant=True)
    noisy = unit(clip.embeddings + np.random.default_rng(0).normal(size=(30, 5)) * 1e-8)
    clip = Clip(clip.times, clip.frames, 15, captions="a caption", embedder=Table(noisy))
    scores = create_selector("keyscore").select(clip, 3).scores
    assert scores is not None
    assert not scores.any()


def test_motion_is_its_definition() -> None:
    clip = clip_of(12, 4)
    expected = [0.0]
    for i in range(1, 12):
        a, b = clip.frames[i].ravel().tolist(), clip.frames[i - 1].ravel().tolist()
        expected.append(sum(((p - q) / 255) ** 2 for p, q in zip(a, b, strict=True)) / len(a))
    chosen = create_selector("motion").select(clip, 3)
    assert np.allclose(chosen.scores, expected)
    assert chosen.indices.tolist() == sorted(sorted(range(12), key=lambda i: -expected[i])[:3])


def test_shots_gives_the_longest_shots_their_middles_and_then_more() -> None:
    clip = scenes([10, 4, 20, 6])
    shots = create_selector("shots")
    assert shots.select(clip, None).indices.tolist() == [5, 12, 24, 37]
    assert shots.select(clip, 1).indices.tolist() == [24]
    assert shots.select(clip, 2).indices.tolist() == [5, 24]
    assert shots.select(clip, 4).indices.tolist() == [5, 12, 24, 37]
    assert shots.select(clip, 5).indices.tolist() == [5, 12, 14 + 5, 14 + 15, 37]
    # 20 / 3 before 10 / 2
    assert shots.select(clip, 6).indices.tolist() == [5, 12, 14 + 3, 14 + 10, 14 + 16, 37]
    assert len(create_selector("shots", threshold=1.0).select(clip, None).indices) == 1


def fixed(p: Sequence[float]) -> Any:
    return lambda frames, question: np.array(p)


def floors(x: Fraction) -> tuple[int, ...]:
    """What may be called the whole part of a quotient that floating point rounds a little."""
    return tuple(sorted({math.floor(x), math.floor(x + Fraction(1, 10**8))}))


@settings(max_examples=60, deadline=None)
@example(p=[0.8998159779559498] * 5, k=5, per_frame=2)  # quotients that round to just below 1
@given(
    p=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    k=st.integers(1, 12),
    per_frame=st.integers(1, 200),
)
def test_quota_is_its_definition(p: list[float], k: int, per_frame: int) -> None:
    clip, k = clip_of(len(p), 0), min(k, len(p))
    w = [(100 * x) ** 2 for x in p]
    if sum(w) > 0:
        exact = [k * per_frame * Fraction(x) / sum(map(Fraction, w)) for x in w]
        every = create_selector("quota", relevance=fixed(p), per_frame=per_frame, frames="all")
        if any(floors(x)[-1] for x in exact):
            chosen = every.select(clip, k)
            assert chosen.tokens is not None
            pairs = dict(zip(chosen.indices.tolist(), chosen.tokens.tolist(), strict=True))
            assert all(pairs.get(i, 0) in floors(x) for i, x in enumerate(exact))
            assert sum(pairs.values()) <= k * per_frame
        else:
            with pytest.raises(ClipError, match="per_frame"):
                every.select(clip, k)
    top = create_selector("quota", relevance=fixed(p), per_frame=per_frame).select(clip, k)
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[:k]
    if len(set(p)) == 1:
        order = [math.floor((i + 0.5) * len(p) / k) for i in range(k)]
    assert top.indices.tolist() == sorted(order)
    assert top.tokens is not None
    assert k * (per_frame - 1) - k < top.tokens.sum() - k <= k * (per_frame - 1)
    total = sum(Fraction(w[i]) for i in order)
    if total > 0:
        exact = [k * (per_frame - 1) * Fraction(w[i]) / total for i in sorted(order)]
        assert all(n - 1 in floors(x) for n, x in zip(top.tokens.tolist(), exact, strict=True))


def test_quota_shares_evenly_where_nothing_is_relevant_and_caps() -> None:
    nothing = create_selector("quota", relevance=fixed([0] * 5), per_frame=10).select(clip_of(5, 0), 3)
    assert nothing.indices.tolist() == [0, 2, 4]
    assert nothing.tokens is not None
    assert nothing.tokens.tolist() == [10, 10, 10]
    # 100 tokens, shares 1 : 4 : 16 : 64 -> 64 is capped, then 16, then 4, and the rest goes to the first
    assert shared(100, np.array([1.0, 4, 16, 64]), 30).tolist() == [10, 30, 30, 30]
    assert shared(100, np.array([1.0, 4, 16, 64]), None).tolist() == [1, 4, 18, 75]
    assert shared(100, np.array([1.0, 1]), 30).tolist() == [30, 30]
    assert shared(100, np.array([0.0, 0, 1]), 50).tolist() == [25, 25, 50]
    capped = create_selector("quota", relevance=fixed([1, 0, 0.5]), cap=200).select(clip_of(3, 0), 2)
    assert capped.tokens is not None
    assert capped.tokens.max() <= 200


def test_mllm_select_is_its_definition() -> None:
    rng = np.random.default_rng(1)
    for n, k in ((40, 3), (40, 4), (41, 10), (9, 9), (16, 4), (1, 1)):
        s = rng.random(n).round(1)
        left, chosen, delta = s.tolist(), [], math.floor(n / (4 * k))
        for _ in range(k):
            best = max(range(n), key=lambda i: (left[i], -i))
            chosen.append(best)
            for i in range(n):
                if abs(i - best) <= delta:
                    left[i] = -1
        selector = create_selector("mllm-select", scorer=fixed(s.tolist()))
        assert selector.select(clip_of(n, 0), k).indices.tolist() == sorted(chosen)


@pytest.mark.parametrize(("key", "option"), [("quota", "relevance"), ("mllm-select", "scorer")])
def test_relevance_is_checked_and_substitutes_are_declared(key: str, option: str) -> None:
    clip = clip_of(6, 0)
    assert create_selector(key).select(clip, 2).notes == (SUBSTITUTE,)
    assert create_selector(key, **{option: fixed([0.5] * 6)}).select(clip, 2).notes == ()
    for bad in ([0.5] * 5, [2.0] * 6, [-0.1] * 6):
        with pytest.raises(ClipError, match="relevance"):
            create_selector(key, **{option: fixed(bad)}).select(clip, 2)
    with pytest.raises(NonFiniteScoresError):
        create_selector(key, **{option: fixed([math.nan] * 6)}).select(clip, 2)
    with pytest.raises(ClipError, match="question"):
        create_selector(key).select(clip_of(6, 0, question=None), 2)


def test_substitute_relevance_is_its_definition() -> None:
    clip = clip_of(9, 3, question="When is the red car at the dog ?")
    texts = [clip.text("red car"), clip.text("dog")]
    fit = [max(float(e @ t) for t in texts) for e in clip.embeddings]
    expected = [(f - min(fit)) / (max(fit) - min(fit)) for f in fit]
    assert np.allclose(create_selector("quota").select(clip, 2).scores, expected)
    assert clip.embedder is not None
    assert np.allclose(EmbeddingRelevance(clip.embedder)(clip.frames, str(clip.question)), expected)


def test_keywords_and_lists() -> None:
    assert keywords("What comes after the t-shirt, the dog or the red car?") == ["t-shirt", "dog", "red car"]
    assert keywords("what is it ?") == []
    assert listed("The question is about two.\nred car, a dog.") == ["red car", "a dog"]
    assert listed("None.") == listed("") == []
