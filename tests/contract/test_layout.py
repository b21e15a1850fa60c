"""What methods see of the pictures, and what reports say of them, against the judge's reading of the prompt."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from contract.common import CELLS, FAMILIES, TOLERANCE, batch_of, judge_of, options_of, rows_of, subject
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import ANYRES, Judge, Unit
from torch import Tensor

import vtprune
from vtprune.method import DECODER_SIGNALS
from vtprune.testing.zoo import LVLMS, Image, Video

Key = tuple[str, int, int, int]
ONE_TOKEN_EACH = 1


def key_of(layout: vtprune.TokenLayout) -> Key:
    return layout.modality, layout.image, layout.time, layout.tile


@dataclass
class Seen:
    """One picture, tile or frame as a decision saw it."""

    layout: vtprune.TokenLayout
    index: Tensor
    features: Tensor
    seed: int
    n_original: int
    k: int


@dataclass(frozen=True, kw_only=True)
class Probe(vtprune.Method):
    """Keeps k tokens in a row, from `offset` on, and writes down what it saw."""

    key: ClassVar[str] = "test-probe"

    keep: int | float = 0.5
    where: vtprune.Site = field(default_factory=lambda: vtprune.Site("projector"))
    seen: list[Seen] = field(default_factory=list)
    offset: int = 0

    def site(self, facts: vtprune.ModelFacts) -> vtprune.Site:
        return self.where

    def decide(self, view: vtprune.View) -> vtprune.Selection:
        assert len(view.features) == len(view.index) == len(view.layout) == len(view.n_original)
        assert view.features.shape[:2] == view.index.shape
        for g, layout in enumerate(view.layout):
            self.seen.append(
                Seen(
                    layout,
                    view.index[g].clone(),
                    view.features[g].clone(),
                    view.image_seeds[g],
                    view.n_original[g],
                    view.k,
                )
            )
        order = (torch.arange(view.n) + self.offset) % view.n
        return vtprune.Selection.of(order[: view.k].expand(len(view.features), -1))


def expected_units(family: str, *names: str) -> dict[Key, tuple[int, Unit, Tensor]]:
    """Layout key -> (sample, unit, embedded features) by the judge, for a batch of rows."""
    judge, found = judge_of(family), {}
    first = {"image": 0, "video": 0}
    for sample, name in enumerate(names or rows_of(family)):
        row = batch_of(family, name)
        units = judge.prompt(row).units
        for unit, features in zip(units, judge.encoder_features(row), strict=True):
            time = unit.part if unit.kind == "video" else 0
            tile = 0 if unit.kind == "video" else unit.part
            found[unit.kind, first[unit.kind] + unit.picture, time, tile] = sample, unit, features
        for kind in first:
            first[kind] += len({u.picture for u in units if u.kind == kind})
    return found


def coordinates(unit: Unit, index: list[int]) -> list[list[int]]:
    time = unit.part if unit.kind == "video" else 0
    return [
        [time] * len(index),
        [unit.top + i // unit.cols for i in index],
        [unit.left + i % unit.cols for i in index],
    ]


def sites_of(family: str) -> list[vtprune.Site]:
    with vtprune.patch(subject(family), "keep-all") as patch:
        kinds = patch.facts.sites
    every = [vtprune.Site("encoder"), vtprune.Site("projector"), vtprune.Site("decoder", 2)]
    return [s for s in every if s.kind in kinds]


# ---------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_views_are_the_units_of_the_prompt(family: str) -> None:
    """At every site: grids, coordinates, ordinals, original counts; at the projector the features too."""
    expected = expected_units(family)
    for site in sites_of(family):
        probe = Probe(where=site)
        with vtprune.patch(subject(family), probe) as patch:
            subject(family)(**batch_of(family))
            report = patch.report()
        found = {key_of(s.layout): s for s in probe.seen}
        assert len(found) == len(probe.seen)
        assert found.keys() == expected.keys(), site
        for key, (_, unit, features) in expected.items():
            seen = found[key]
            n = len(unit.columns)
            layout = seen.layout
            assert (layout.rows, layout.cols, layout.top, layout.left) == (
                unit.rows,
                unit.cols,
                unit.top,
                unit.left,
            ), key
            assert seen.n_original == layout.n_tokens == n
            assert seen.k == max(1, math.floor(0.5 * n + 0.5))
            assert seen.index.tolist() == list(range(n))
            assert layout.coordinates(seen.index).tolist() == coordinates(unit, list(range(n)))
            if site.kind == "projector":
                torch.testing.assert_close(seen.features, features, atol=TOLERANCE, rtol=0)
        # Reports list the same pictures in reading order.
        listed = [(i.sample, key_of(i.layout)) for i in report.images]
        assert listed == [(sample, key) for key, (sample, _, _) in in_reading_order(expected)]
        assert [i.layout for i in report.images] == [found[key].layout for _, key in listed]


def in_reading_order(
    expected: dict[Key, tuple[int, Unit, Tensor]],
) -> list[tuple[Key, tuple[int, Unit, Tensor]]]:
    return sorted(expected.items(), key=lambda entry: (entry[1][0], entry[1][1].columns[0]))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_views_behind_earlier_stages(family: str) -> None:
    """Indices map to the full grid after one and after two earlier decisions; budgets are of the original."""
    expected = expected_units(family)
    sites = sites_of(family)
    probes = [
        Probe(where=site, keep=keep, offset=1)
        for site, keep in zip(sites, [0.8, 0.5, 0.25][-len(sites) :], strict=True)
    ]
    with vtprune.patch(subject(family), probes) as patch:
        subject(family)(**batch_of(family))
        report = patch.report()
    alive = {key: list(range(len(unit.columns))) for key, (_, unit, _) in expected.items()}
    for probe in probes:
        found = {key_of(s.layout): s for s in probe.seen}
        assert found.keys() == expected.keys()
        for key, (_, unit, features) in expected.items():
            seen, n = found[key], len(unit.columns)
            assert seen.index.tolist() == alive[key]
            assert seen.n_original == seen.layout.n_tokens == n
            assert seen.k == min(len(alive[key]), max(1, math.floor(float(probe.keep) * n + 0.5)))
            assert seen.layout.coordinates(seen.index).tolist() == coordinates(unit, alive[key])
            if probe.where.kind == "projector":
                torch.testing.assert_close(seen.features, features[alive[key]], atol=TOLERANCE, rtol=0)
            m = len(alive[key])
            alive[key] = sorted(alive[key][(i + 1) % m] for i in range(seen.k))
        for image in report.images:
            assert image.kept[str(probe.where)].tolist() == alive[key_of(image.layout)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_grids_tile_the_picture(family: str) -> None:
    """Tiles of a composite cover a rectangle once; its lines are as many as its line breaks."""
    for shape in range(3):
        inputs = LVLMS[family].batch([[20, Image(1, shape), 22]])
        probe = Probe()
        with vtprune.patch(subject(family), probe):
            subject(family)(**inputs)
        groups: dict[tuple[int, bool], list[list[int]]] = {}
        for seen in probe.seen:
            whole = seen.layout.tile == 0
            cells = seen.layout.coordinates(seen.index)[1:].T.tolist()
            groups.setdefault((seen.layout.image, whole), []).extend(cells)
        for (_, whole), cells in groups.items():
            assert len({tuple(c) for c in cells}) == len(cells), f"shape {shape}: overlap"
            lines, across = max(c[0] for c in cells) + 1, max(c[1] for c in cells) + 1
            assert lines * across == len(cells), f"shape {shape}: hole"
            if family in ANYRES and not whole:
                assert len({s.layout.tile for s in probe.seen}) > 2
                assert lines == len(judge_of(family).prompt(inputs).loose)
        assert sum(map(len, groups.values())) == len(judge_of(family).prompt(inputs).columns)


# ---------------------------------------------------------------------------------------------- seeds, batches


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_seeds_belong_to_the_picture(family: str) -> None:
    """Equal alone, in a batch, in another row and beside larger pictures; different for other pixels."""
    model = subject(family)

    def seeds(*rows: list[Any], site: str = "projector") -> list[list[int]]:
        """Per row the seeds of its units in reading order."""
        probe = Probe(where=vtprune.Site(site, 2 if site == "decoder" else None))
        with vtprune.patch(model, probe) as patch:
            model(**LVLMS[family].batch(list(rows)))
            found = {key_of(s.layout): s.seed for s in probe.seen}
            out: list[list[int]] = [[] for _ in rows]
            for image in patch.report().images:
                out[image.sample].append(found[key_of(image.layout)])
        return out

    a, b, c = [20, Image(1), 21], [22, 23, 24, Image(2, 1), 25], [26, Image(3, 2), 27]
    alone = [seeds(row)[0] for row in (a, b, c)]
    assert seeds(a, b, c) == alone
    assert seeds(c, a, [40], b, [50, 51, Image(1)]) == [alone[2], alone[0], [], alone[1], alone[0]]
    assert seeds(a, c, site="decoder") == [alone[0], alone[2]]
    for i in range(3):
        for j in range(i):
            assert not {*alone[i]} & {*alone[j]}
    assert len(set(seeds([20, Image(1), Image(2)])[0])) >= 2
    if LVLMS[family].has_video:
        video, other = seeds([20, Video(1), 21], [20, Video(2), 21])
        assert seeds([30, Video(1)], a) == [video, alone[0]]
        assert not {*video} & {*other, *alone[0]}


@pytest.mark.parametrize(("family", "method"), CELLS)
@torch.no_grad()
def test_a_row_keeps_the_same_alone_and_in_a_batch(family: str, method: str) -> None:
    options = options_of(family, method, 2)
    model = subject(family)
    rows = list(rows_of(family).values())
    with vtprune.patch(model, method, **options) as patch:

        def kept(*prompts: list[Any], padding: str = "left") -> list[list[dict[str, list[int]]]]:
            model(**LVLMS[family].batch(list(prompts), padding=padding))
            out: list[list[dict[str, list[int]]]] = [[] for _ in prompts]
            for image in patch.report().images:
                out[image.sample].append({s: k.tolist() for s, k in image.kept.items()})
            return out

        alone = [kept(row)[0] for row in rows]
        assert kept(*rows) == alone
        assert kept(*rows[::-1]) == alone[::-1]
        assert kept(*rows, padding="right") == alone
        if not any(need.kind in DECODER_SIGNALS for stage in patch.stages for need in stage.needs):
            # Text and neighbours do not matter: the picture of the first row behind other words, twice.
            other = [40, 41, 42, *(x for x in rows[0] if isinstance(x, Image)), 43]
            assert kept(other, rows[1], other) == [alone[0], alone[1], alone[0]]


# ---------------------------------------------------------------------------------------------- what stays


@pytest.mark.parametrize(("family", "method"), CELLS)
@torch.no_grad()
def test_only_tokens_of_pictures_are_removed(family: str, method: str) -> None:
    """Line breaks, separators, [CLS] of frames and text stay, also at one token per picture."""
    options = options_of(family, method, 1)
    model, judge = subject(family), judge_of(family)
    inputs = batch_of(family)
    with vtprune.patch(model, method, **options) as patch:
        layers = model(**inputs, use_cache=True).past_key_values.layers
        report = patch.report()
    for sample, name in enumerate(rows_of(family)):
        prompt = judge.prompt(batch_of(family, name))
        images = [i for i in report.images if i.sample == sample]
        assert [i.tokens_in for i in images] == [len(u.columns) for u in prompt.units]
        for number, layer in enumerate(report.layers):
            gone = 0
            for image in images:
                passed = [
                    k for s, k in image.kept.items() if not s.startswith("decoder") or int(s[8:-1]) <= number
                ]
                gone += image.tokens_in - (len(passed[-1]) if passed else image.tokens_in)
            assert layer.tokens[sample] == prompt.length - gone
        if method != "keep-all":
            assert report.layers[-1].tokens[sample] == prompt.length - len(prompt.columns) + len(images)
    assert [layer.keys.shape[-2] for layer in layers] == [max(layer.tokens) for layer in report.layers]


@pytest.mark.parametrize(("family", "method"), CELLS)
@torch.no_grad()
def test_reports_are_plain_data(family: str, method: str) -> None:
    options = options_of(family, method, 2)
    model, inputs = subject(family), batch_of(family)
    with vtprune.patch(model, method, **options) as patch:
        model(**inputs)
        report = patch.report()
        said = report.to_dict()
        copied = json.loads(json.dumps(said, allow_nan=False))
        model(**batch_of(family, "text"))
        text = patch.report()
    assert copied == said
    assert said["method"] == method
    assert said["options"]["keep"] == 2
    assert said["engaged"] is (method != "keep-all")
    assert len(said["samples"]) == len(inputs["input_ids"])
    assert len(said["images"]) == len(report.images) > 0
    for entry, image in zip(said["images"], report.images, strict=True):
        assert entry["tokens_in"] == math.prod(entry["grid"]) == image.layout.n_tokens
        for kept in entry["kept"].values():
            assert kept == sorted(set(kept))
            assert 0 <= kept[0] <= kept[-1] < entry["tokens_in"]
        assert entry["tokens_out"] == len(list(entry["kept"].values())[-1])
    for sample, entry in enumerate(said["samples"]):
        mine = [e for e in said["images"] if e["sample"] == sample]
        assert entry["visual_tokens_in"] == sum(e["tokens_in"] for e in mine)
        assert entry["visual_tokens_out"] == sum(e["tokens_out"] for e in mine)
        assert entry["visual_tokens_in"] >= entry["visual_tokens_llm"] >= entry["visual_tokens_out"]
    printed = str(report)
    assert printed.startswith(f"{method}(")
    for sample, entry in enumerate(said["samples"]):
        assert f"sample {sample}: {entry['visual_tokens_in']} visual tokens" in printed
    assert all(site in printed for site in said["positions"])
    assert json.loads(json.dumps(text.to_dict()))["images"] == []
    assert "no visual tokens" in str(text)


# ---------------------------------------------------------------------------------------------- anything goes

TEXT = st.integers(20, 60)


@st.composite
def batches(draw: st.DrawFn, family: str) -> list[list[Any]]:
    """One to three rows that begin and end with text."""
    image = st.builds(Image, st.integers(0, 5), st.integers(0, 2))
    items: list[Any] = [TEXT, image]
    if LVLMS[family].has_video:
        # One number of frames per batch, as several families demand.
        items.append(st.builds(Video, st.integers(0, 3), st.just(2)))
    row = st.lists(st.one_of(*items), max_size=4)
    return [[draw(TEXT), *draw(row), draw(TEXT)] for _ in range(draw(st.integers(1, 3)))]


CASES = [
    pytest.param(family, method, where, id=f"{family}-{method}-{where}")
    for family in ("llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm")
    for method, where in (("stride", "projector"), ("random", "decoder"), ("divprune", "projector"))
]


@pytest.mark.parametrize(("family", "method", "where"), CASES)
def test_any_prompt(family: str, method: str, where: str) -> None:
    """Counts are those of the budget's definition; the last token of every row answers as the judge says."""
    site = "decoder[2]" if where == "decoder" else "projector"
    more: dict[str, Any] = {} if method == "divprune" else {"where": where}
    judge: Judge = judge_of(family)
    model = subject(family)

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(rows=batches(family), keep=st.one_of(st.integers(1, 12), st.floats(0.05, 1.0)))
    @torch.no_grad()
    def check(rows: list[list[Any]], keep: int | float) -> None:
        with vtprune.patch(model, method, keep=keep, **more) as patch:
            logits = model(**LVLMS[family].batch(rows)).logits
            report = patch.report()
        for sample, prompt in enumerate(rows):
            row = LVLMS[family].batch([prompt])
            images = [i for i in report.images if i.sample == sample]
            gone = set()
            for unit, image in zip(judge.prompt(row).units, images, strict=True):
                n = len(unit.columns)
                count = min(n, keep) if isinstance(keep, int) else max(1, math.floor(keep * n + 0.5))
                assert list(image.kept) == [site]
                assert len(image.kept[site]) == count
                gone |= {unit.columns[i] for i in set(range(n)) - set(image.kept[site].tolist())}
            dense = report.positions[site] == "dense"
            expected = judge.logits(
                row, {2 if where == "decoder" else 0: gone}, positions="dense" if dense else "original"
            )
            torch.testing.assert_close(logits[sample, -1], expected[-1], atol=TOLERANCE, rtol=0)

    check()
