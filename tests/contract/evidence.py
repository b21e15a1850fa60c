"""What a report claims, turned into what the judge is asked; and a method that only looks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from contract.common import TOLERANCE, judge_of, rows_of
from judge import CHOPPED, QWEN, Judge, Unit
from judge import Prompt as VisualPrompt
from torch import Tensor
from versions import ENCODES_BEFOREHAND

import vtprune
from vtprune import methods
from vtprune.methods.clips import Clipwise
from vtprune.methods.staged import Staged
from vtprune.methods.vflowopt import VFlowOpt
from vtprune.report import ImageReport
from vtprune.testing.zoo import LVLMS, Image, Video

Row = dict[str, Tensor]
PROJECTOR = vtprune.Site("projector")


@functools.cache
def prompts_of(family: str) -> dict[str, list[Any]]:
    """The shared prompts and a few that stress order and tiling."""
    rows = {
        **rows_of(family),
        # A picture of shape 2 alone in its row: tiles, also those that LLaVA-OneVision resamples.
        "large": [25, Image(4, 2), 26, 27],
        "adjacent": [20, Image(5), Image(6, 1), 21, 22],
    }
    if LVLMS[family].has_video:
        rows["mixed"] = [20, Image(1, 1), 21, Video(3, 2), 22, 23]
        rows["video first"] = [20, Video(5, 2), 21, Image(6), 22]
        rows["clips"] = [20, Video(5, 2), 21, 22, Video(7, 2), 23]
    return rows


@functools.cache
def clips_of(family: str) -> dict[str, list[Any]]:
    """Rows of one or two clips, with pictures before and behind, for batches.

    Clips differ in their numbers of frames, grids and seconds per frame where the family takes that in one batch;
    elsewhere the rows in front have three frames each, and the other ones four and one.
    """
    if not LVLMS[family].ragged_videos:
        rows: dict[str, list[Any]] = {
            "short": [20, Video(4, 3), 21, 22],
            "two clips": [20, Video(6, 3), Video(7, 3), 22, 23],
            "image, clip": [20, Image(1, 2), 21, Video(8, 3), 22],
            "clip, image": [20, 24, Video(9, 3), 21, Image(2, 1), 22, 23],
            "four frames": [25, Video(5, 4), 26],
            "two of four": [25, Video(6, 4), 26, Image(3), 27, Video(7, 4), 28],
            "one frame": [20, Video(8, 1), 21, Image(1), Video(9, 1), 22],
        }
        return rows
    return {
        "short": [20, Video(4, 2), 21, 22],
        "two clips": [20, Video(6, 3, 2), Video(7, 4, 0, 2.0), 22, 23],
        # One frame with the grid of the picture beside it.
        "image, clip": [20, Image(1, 2), 21, Video(8, 1), 22],
        "clip, image": [20, 24, Video(9, 5, 0, 1.5), 21, Image(2, 1), 22, 23],
        "long": [25, Video(5, 6, 1, 0.5), 26],
    }


def batches_of(family: str) -> list[tuple[str, ...]]:
    """The rows of `clips_of` as batches that the family takes, the first with a row of text."""
    mixed = ("two clips", "image, clip", "text", "clip, image", "short")
    if LVLMS[family].ragged_videos:
        return [(*mixed, "long")]
    return [mixed, ("four frames", "two of four"), ("one frame",)]


def ragged(family: str) -> tuple[str, ...]:
    """Rows of a batch with differing counts of pictures, one of them without any."""
    return ("two", "text", "large", "mixed" if LVLMS[family].has_video else "one")


@functools.cache
def _inputs(family: str, names: tuple[str, ...], padding: str) -> Row:
    rows = {**prompts_of(family), **clips_of(family)}
    return LVLMS[family].batch([rows[n] for n in names], padding=padding)


def repeatable() -> tuple[str, ...]:
    """Rows that generate() can repeat for beams: one tile each, where it repeats pixels and not features."""
    return ("two", "text", "large") if ENCODES_BEFOREHAND else ("one", "text")


def inputs_of(family: str, names: Sequence[str], padding: str = "left") -> Row:
    """Inputs of some rows."""
    return dict(_inputs(family, tuple(names), padding))


def row_of(family: str, name: str) -> Row:
    """Inputs of one row alone."""
    return inputs_of(family, [name])


@functools.cache
def visual(family: str, name: str) -> VisualPrompt:
    """The units of one row, by the judge."""
    return judge_of(family).prompt(row_of(family, name))


@functools.cache
def units_of(family: str, names: tuple[str, ...]) -> list[tuple[int, Unit, int]]:
    """(sample, unit, ordinal of its picture within the encoder call) of a batch, in reading order."""
    before = {"image": 0, "video": 0}
    found = []
    for sample, name in enumerate(names):
        units = visual(family, name).units
        found += [(sample, u, before[u.kind] + u.picture) for u in units]
        for kind in before:
            before[kind] += len({u.picture for u in units if u.kind == kind})
    return found


@functools.cache
def features_of(family: str, name: str) -> list[Tensor]:
    """Stock features of every unit of a row, as they enter the language model."""
    return judge_of(family).encoder_features(row_of(family, name))


def first_layer(site: str) -> int:
    """The first decoder layer that misses what was removed at a site."""
    return int(site[len("decoder[") : -1]) if site.startswith("decoder") else 0


def budget(keep: int | float, n: int) -> int:
    """Tokens per unit: an int as it is, a ratio rounded half up and at least 1, never more than there are."""
    return min(n, keep if isinstance(keep, int) else max(1, int(keep * n + 0.5)))


def images_of(report: vtprune.Report, sample: int) -> list[ImageReport]:
    """What the report says of one row."""
    return [image for image in report.images if image.sample == sample]


@dataclass
class Claim:
    """What a report says of one row, in prompt columns.

    Attributes:
        removed: decoder layer -> columns gone from this layer on.
        renumbered: columns whose gap is closed.
    """

    removed: dict[int, list[int]] = field(default_factory=dict)
    renumbered: set[int] = field(default_factory=set)

    @property
    def how(self) -> dict[str, Any]:
        """Arguments for the judge."""
        return {"removed": self.removed, "positions": self.renumbered}

    def expected(self, family: str, name: str) -> Tensor:
        """The judge's logits of the row, with those of survivors at removed columns."""
        removed = tuple((layer, tuple(columns)) for layer, columns in sorted(self.removed.items()))
        return _expected(family, name, removed, tuple(sorted(self.renumbered)))

    def alive(self, length: int, layer: int) -> int:
        """Columns of `length` that this layer processes."""
        return length - sum(len(columns) for first, columns in self.removed.items() if first <= layer)


@functools.lru_cache(maxsize=64)  # both sides of padding, and text-agnostic methods, repeat their claims
def _expected(
    family: str, name: str, removed: tuple[tuple[int, tuple[int, ...]], ...], renumbered: tuple[int, ...]
) -> Tensor:
    return Judge.shown(judge_of(family).logits(row_of(family, name), dict(removed), positions=renumbered))


def claim(report: vtprune.Report, sample: int, prompt: VisualPrompt) -> Claim:
    """The claim of one row; checks on the way that every stage chose among the survivors of the one before."""
    found = Claim()
    for image, unit in zip(images_of(report, sample), prompt.units, strict=True):
        assert image.tokens_in == len(unit.columns)
        alive = list(range(len(unit.columns)))
        for site, kept in image.kept.items():
            index = kept.tolist()
            assert index == sorted(set(index))
            assert set(index) <= set(alive)
            gone = [unit.columns[i] for i in alive if i not in index]
            found.removed.setdefault(first_layer(site), []).extend(gone)
            if report.positions[site] == "dense":
                found.renumbered |= set(gone)
            alive = index
        assert image.tokens_out == len(alive)
    return found


def claims(report: vtprune.Report, family: str, names: Sequence[str]) -> list[Claim]:
    """The claims of all rows of a batch."""
    assert report.n_samples == len(names)
    return [claim(report, sample, visual(family, name)) for sample, name in enumerate(names)]


def assert_units(report: vtprune.Report, family: str, names: Sequence[str]) -> None:
    """The report lists the units that the judge knows, in reading order."""
    expected = units_of(family, tuple(names))
    assert [i.sample for i in report.images] == [sample for sample, _, _ in expected]
    for image, (_, unit, ordinal) in zip(report.images, expected, strict=True):
        video = unit.kind == "video"
        found = image.layout
        assert (found.modality, found.image) == (unit.kind, ordinal)
        assert (found.rows, found.cols) == (unit.rows, unit.cols)
        assert (found.time, found.tile) == ((unit.part, 0) if video else (0, unit.part))
        assert (found.top, found.left) == (unit.top, unit.left)


def assert_counts(report: vtprune.Report, keep: int | float) -> None:
    """Every unit has its budget left behind the last site."""
    assert report.images
    for image in report.images:
        assert image.tokens_out == budget(keep, image.tokens_in)


def assert_average(report: vtprune.Report, keep: int | float) -> None:
    """Every unit has its budget on average over the layers, as nearly as whole tokens allow."""
    assert report.images
    depth = len(report.layers)
    for image in report.images:
        n = image.tokens_in
        wanted = keep * n if isinstance(keep, float) else min(keep, n)
        starts = [first_layer(site) for site in image.kept]
        spans = [end - start for start, end in zip(starts, [*starts[1:], depth], strict=True)]
        counts = [len(kept) for kept in image.kept.values()]
        total = starts[0] * n + sum(s * c for s, c in zip(spans, counts, strict=True))
        near = abs(total - wanted * depth) <= max(spans) / 2 + 1e-6
        assert near or (set(counts) == {1} and total > wanted * depth)


def assert_total(report: vtprune.Report, keep: int | float) -> None:
    """The frames of every video have their budgets together, and each has a token at least."""
    assert report.images
    kept: dict[tuple[object, ...], list[int]] = {}
    wanted: dict[tuple[object, ...], list[int]] = {}
    for image in report.images:
        layout = image.layout
        of = (image.sample, layout.modality, layout.image, layout.tile)
        kept.setdefault(of, []).append(image.tokens_out)
        wanted.setdefault(of, []).append(budget(keep, image.tokens_in))
    assert {of: sum(counts) for of, counts in kept.items()} == {of: sum(c) for of, c in wanted.items()}
    assert min(min(counts) for counts in kept.values()) >= 1


def assert_budget(report: vtprune.Report, method: str, keep: int | float) -> None:
    """The budget of a method in its own terms."""
    if issubclass(methods.REGISTRY[method], Clipwise):
        assert_total(report, keep)
    elif issubclass(methods.REGISTRY[method], (Staged, VFlowOpt)):
        assert_average(report, keep)
    else:
        assert_counts(report, 1.0 if method == "keep-all" else keep)


def assert_lengths(family: str, names: Sequence[str], out: Any, report: vtprune.Report) -> None:
    """Cache and report hold exactly the columns that the claims leave."""
    found = claims(report, family, names)
    lengths = [visual(family, name).length for name in names]
    layers = out.past_key_values.layers
    assert len(report.layers) == len(layers) == len(judge_of(family).layers)
    for number, (layer, entry) in enumerate(zip(layers, report.layers, strict=True)):
        alive = [c.alive(n, number) for c, n in zip(found, lengths, strict=True)]
        pictures = [len(visual(family, name).columns) for name in names]
        assert entry.tokens == alive
        assert entry.visual_tokens == [v - n + a for v, n, a in zip(pictures, lengths, alive, strict=True)]
        slots = max(alive)
        if getattr(layer, "is_sliding", False):
            slots = min(slots, layer.sliding_window - 1)
        assert layer.keys.shape[-2] == layer.values.shape[-2] == slots
        assert entry.kv_bytes == layer.keys.nbytes + layer.values.nbytes
    assert report.kv_bytes == sum(entry.kv_bytes for entry in report.layers)


def assert_logits(
    family: str,
    names: Sequence[str],
    inputs: Row,
    logits: Tensor,
    report: vtprune.Report,
    merges: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """All unpadded columns of all rows show what the judge computes for that row alone."""
    assert logits.shape[:2] == inputs["input_ids"].shape
    for sample, (name, found) in enumerate(zip(names, claims(report, family, names), strict=True)):
        if merges and merges[sample]["merged"]:
            judge = judge_of(family)
            expected = Judge.shown(judge.logits(row_of(family, name), **found.how, **merges[sample]))
        else:
            expected = found.expected(family, name)
        shown = logits[sample][inputs["attention_mask"][sample].bool()]
        torch.testing.assert_close(
            shown, expected, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, name=name: f"row {name}: {m}"
        )


# ---------------------------------------------------------------------- merging

Decision = tuple[vtprune.View, vtprune.Selection]


@contextmanager
def decisions(method: str) -> Iterator[list[Decision]]:
    """Records what a registered method was shown and what it decided; to be entered before the patch."""
    cls = methods.REGISTRY[method]
    stock = cls.decide
    seen: list[Decision] = []

    def decide(self: vtprune.Method, view: vtprune.View) -> vtprune.Selection:
        chosen = stock(self, view)
        seen.append((view, chosen))
        return chosen

    cls.decide = decide  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        cls.decide = stock  # type: ignore[method-assign]


def projected(family: str, features: Tensor) -> Tensor:
    """The stock projector on features [K, D] of the site "encoder"."""
    judge = judge_of(family)
    base = judge.base
    if family in QWEN:
        merger = base.visual.merger
        return merger(features.reshape(-1, features.shape[-1] // base.visual.spatial_merge_size**2))
    if family in ("idefics3", "smolvlm"):
        return base.connector.modality_projection(features)
    return base.multi_modal_projector(features[None])[0]


@torch.no_grad()
def merges_of(
    family: str, names: Sequence[str], report: vtprune.Report, seen: Sequence[Decision]
) -> list[dict[str, Any]]:
    """Per row `merged` for the judge, from the decisions: which tokens became what.

    In front of the language model as vectors; inside it as sums that the judge makes of its own states.
    """
    rows: list[dict[str, Any]] = [{"merged": []} for _ in names]
    if any(site.startswith("vit") for site in report.positions):
        return [entering(family, name, report, i) for i, name in enumerate(names)]
    if not any(chosen.merges for _, chosen in seen):
        return rows
    units = units_of(family, tuple(names))
    places = {image.layout: (image, *unit) for image, unit in zip(report.images, units, strict=True)}
    assert len(places) == len(units)
    sites = {layout: list(image.kept) for layout, (image, *_) in places.items()}
    stock = [features_of(family, name) for name in names]
    for view, chosen in seen:
        for g, layout in enumerate(view.layout):
            image, sample, unit, _ = places[layout]
            kept = view.index[g][chosen.index[g]]
            # A stage that keeps all tokens of a picture need not have asked.
            while not torch.equal(kept, image.kept[site := sites[layout].pop(0)]):
                pass
            features = view.features[g]
            if not site.startswith("decoder"):
                number = visual(family, names[sample]).units.index(unit)
                through = projected(family, features) if site == "encoder" else features
                torch.testing.assert_close(through, stock[sample][number], atol=TOLERANCE, rtol=TOLERANCE)
            if not chosen.merges:
                continue
            of = (g,) if chosen.sources is None else chosen.sources[g]
            shown = [view.layout[s] for s in of]
            assert {(one.modality, one.image) for one in shown} == {(layout.modality, layout.image)}
            features = torch.cat([view.features[s] for s in of])
            made: list[dict[int, float]] = [{} for _ in kept]
            if chosen.mix is not None:
                made = [{t: w for t, w in enumerate(row) if w} for row in chosen.mix[g].tolist()]
            else:
                assert chosen.into is not None
                assert chosen.weight is not None
                for token, (slot, weight) in enumerate(
                    zip(chosen.into[g].tolist(), chosen.weight[g].tolist(), strict=True)
                ):
                    if slot >= 0:
                        made[slot][token] = weight
            own = [places[view.layout[s]][2].columns[index] for s in of for index in view.index[s].tolist()]
            if site.startswith("decoder"):
                sums: list[Any] = [{own[token]: w for token, w in parts.items()} for parts in made]
            else:
                slots = torch.stack([sum(w * features[t] for t, w in parts.items()) for parts in made])
                sums = list(projected(family, slots) if site == "encoder" else slots)
            for index, value in zip(kept.tolist(), sums, strict=True):
                rows[sample]["merged"].append((first_layer(site), unit.columns[index], value))
    return rows


# ---------------------------------------------------------------------- looking


@functools.cache
def _twin(family: str) -> Any:
    return LVLMS[family].build()


@torch.no_grad()
def entering(family: str, name: str, report: vtprune.Report, sample: int) -> dict[str, Any]:
    """What the judge has to know of a method inside the encoder: all vectors that the same method gives the language
    model for the row alone, where it has to keep the same. tests/encoders proves what happens inside."""
    given: dict[str, Any] = {}
    model = _twin(family)
    base = model.model if hasattr(model, "lm_head") else model
    decoder = base.text_model if family in CHOPPED else base.language_model
    # Registered before the patch: sees what enters in full length.
    handle = decoder.register_forward_pre_hook(lambda m, a, kwargs: given.update(kwargs), with_kwargs=True)
    try:
        with vtprune.patch(model, methods.create(report.method, **report.options)) as patch:
            model(**row_of(family, name))
            alone = patch.report()
    finally:
        handle.remove()
    prompt = visual(family, name)
    columns = list(prompt.loose)
    pairs = zip(images_of(report, sample), images_of(alone, 0), prompt.units, strict=True)
    for image, same, unit in pairs:
        kept = {site: index.tolist() for site, index in image.kept.items()}
        assert {site: index.tolist() for site, index in same.kept.items()} == kept
        last = next((index for site, index in reversed(kept.items()) if not site.startswith("decoder")), [])
        columns += [unit.columns[i] for i in last]
    found: dict[str, Any] = {"merged": [(0, c, given["inputs_embeds"][0, c]) for c in columns]}
    if given.get("deepstack_visual_embeds"):
        order = given["visual_pos_masks"][0].nonzero()[:, 0].tolist()
        stacks = torch.stack(list(given["deepstack_visual_embeds"]))
        found["merged_deepstack"] = {c: stacks[:, order.index(c)] for c in columns}
    return found


@dataclass(frozen=True, kw_only=True)
class Probe(vtprune.Method):
    """Keeps every second token and remembers what it was shown: (layout, index, signal -> value) per image."""

    key: ClassVar[str] = "test-probe"
    keep: int | float = 0.5
    where: vtprune.Site = PROJECTOR
    signals: tuple[vtprune.Signal, ...] = ()
    seen: list[Any] = field(default_factory=list, compare=False)

    def site(self, facts: vtprune.ModelFacts) -> vtprune.Site:
        return self.where

    def needs(self, facts: vtprune.ModelFacts) -> tuple[vtprune.Signal, ...]:
        return self.signals

    def decide(self, view: vtprune.View) -> vtprune.Selection:
        for g, layout in enumerate(view.layout):
            values = {signal: view[signal][g].clone() for signal in view.signals}
            self.seen.append((layout, view.index[g].clone(), values))
        every_second = torch.arange(0, view.n, 2)[: view.k]
        return vtprune.Selection.of(every_second.expand(len(view.features), -1))


def spread(names: Sequence[str], copies: int) -> list[str]:
    """Rows as generate() repeats them for beams and returned sequences."""
    return [name for name in names for _ in range(copies)]


def tell(
    family: str, names: Sequence[str], report: vtprune.Report, seen: Sequence[Decision] | None = None
) -> list[dict[str, Any]]:
    """Per row what the judge has to know; with the decisions where tokens were merged."""
    found: list[dict[str, Any]] = [c.how for c in claims(report, family, names)]
    if seen is not None:
        for how, merge in zip(found, merges_of(family, names, report, seen), strict=True):
            how.update(merge)
    return found


def continued(family: str, name: str, how: Mapping[str, Any], text: Sequence[int]) -> Tensor:
    """The judge's logits [len(text), V] that led to each token of a continuation of a row."""
    logits = judge_of(family).logits(row_of(family, name), continuation=list(text[:-1]), **how)
    return logits[-len(text) :]


ALONG_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def joined(family: str, first: Row, second: Row) -> Row:
    """The inputs of one row followed by those of another, as one row."""
    row = {}
    for key in {**first, **second}:
        parts = [part[key] for part in (first, second) if key in part]
        if len(parts) == 2 and parts[0].ndim == 5 and family not in CHOPPED:
            most = max(p.shape[1] for p in parts)
            parts = [torch.cat([p, p.new_zeros(1, most - p.shape[1], *p.shape[2:])], 1) for p in parts]
        row[key] = torch.cat(parts, 1 if key in ALONG_TEXT or family in CHOPPED else 0)
    return row
