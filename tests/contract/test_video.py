"""Several clips in a batch, of different lengths and grids, with pictures and text beside them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from contract.common import TOLERANCE, greedy, judge_of, options_of, patched, subject
from contract.evidence import (
    Row,
    assert_budget,
    assert_lengths,
    assert_logits,
    assert_units,
    batches_of,
    budget,
    clips_of,
    continued,
    decisions,
    images_of,
    inputs_of,
    merges_of,
    row_of,
    tell,
    visual,
)
from judge import QWEN, Judge
from torch import Tensor

import vtprune
from vtprune.report import ImageReport
from vtprune.testing.zoo import LVLMS, Image, Video

FAMILIES = ("llava_next_video", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MROPE = tuple(f for f in FAMILIES if f in QWEN)
CLIPWISE = ("dycoke", "evs", "fastvid", "llava-scissor")
# One for every site and way of removing: [CLS] where there is one, behind the projector, in the decoder, merging.
FRAMEWISE = ("divprune", "fastv", "random", "visionzip", "vtc-cls", "vtprune")
CELLS = [pytest.param(f, m, id=f"{f}-{m}") for f in FAMILIES for m in (*CLIPWISE, *FRAMEWISE)]
STEPS = 4
BANNED = list(range(20))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def prefill(family: str, names: Sequence[str], **more: Any) -> Any:
    """The shared model's output for some rows, padded on the left."""
    return subject(family)(**inputs_of(family, names), **more)


@functools.cache
def stock(family: str, names: tuple[str, ...]) -> Tensor:
    """Its logits while it is not patched."""
    logits: Tensor = prefill(family, names).logits
    return logits


def told(images: Sequence[ImageReport]) -> list[dict[str, list[int]]]:
    """Per unit what was kept where."""
    return [{site: kept.tolist() for site, kept in image.kept.items()} for image in images]


def clips(images: Sequence[ImageReport]) -> dict[tuple[str, int, int], list[ImageReport]]:
    """The frames of every clip, and the tiles of every picture one by one, in reading order."""
    found: dict[tuple[str, int, int], list[ImageReport]] = {}
    for image in images:
        found.setdefault((image.layout.modality, image.layout.image, image.layout.tile), []).append(image)
    return found


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize(("family", "method"), CELLS)
@torch.no_grad()
def test_a_batch_of_clips_equals_the_judge(family: str, method: str) -> None:
    """Units, budgets, logits, lengths of the cache, and greedy text of every row, whatever stands beside it."""
    model, options = subject(family), options_of(family, method)
    for names in batches_of(family):
        inputs = inputs_of(family, names)
        n = inputs["input_ids"].shape[1]
        with decisions(method) as seen, vtprune.patch(model, method, **options) as patch:
            out = prefill(family, names, use_cache=True)
            report = patch.report()
            merges = merges_of(family, names, report, list(seen))
            seen.clear()
            text = model.generate(
                **inputs,
                max_new_tokens=STEPS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            assert told(patch.report().images) == told(report.images)
            known = tell(family, names, patch.report(), seen)
        assert_units(report, family, names)
        assert_budget(report, method, 0.5)
        assert_lengths(family, names, out, report)
        assert_logits(family, names, inputs, out.logits, report, merges)
        moved = (stock(family, names) - out.logits)[:, -1].abs().amax(-1)
        for sample, name in enumerate(names):
            assert (float(moved[sample]) > 10 * TOLERANCE) == bool(visual(family, name).units), "cannot fail"
            new = text.sequences[sample, n:].tolist()
            steps = continued(family, name, known[sample], new)
            close(torch.stack(text.logits, 1)[sample], steps)
            steps[:, BANNED] = -torch.inf
            assert float((steps.amax(-1) - steps[torch.arange(STEPS), new]).max()) < TOLERANCE


@pytest.mark.parametrize(("family", "method"), CELLS)
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(family: str, method: str) -> None:
    """Alone, among others and in another order it keeps the same tokens and shows the same logits."""
    with patched(family, method, 0.3) as patch:
        for names in batches_of(family):
            alone = {}
            for name in names:
                alone[name] = prefill(family, (name,)).logits[0], told(patch.report().images)
            for order in (names, names[::-1]):
                mask = inputs_of(family, order)["attention_mask"].bool()
                logits, report = prefill(family, order).logits, patch.report()
                for sample, name in enumerate(order):
                    close(logits[sample][mask[sample]], alone[name][0])
                    assert told(images_of(report, sample)) == alone[name][1], name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_method_behind_another(family: str) -> None:
    """The first leaves frames of one clip different counts, so that the second meets parts of clips."""
    chain = [vtprune.methods.create("evs", keep=0.75), vtprune.methods.create("dycoke", keep=2)]
    chain.append(vtprune.methods.create("fastv", keep=1, layer=2))
    with vtprune.patch(subject(family), chain) as patch:
        for names in batches_of(family):
            logits, report = prefill(family, names).logits, patch.report()
            assert_units(report, family, names)
            assert_logits(family, names, inputs_of(family, names), logits, report)
            assert {image.tokens_out for image in report.images} == {1}
            for sample, name in enumerate(names):
                prefill(family, (name,))
                assert told(images_of(report, sample)) == told(patch.report().images), name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keeping_everything_is_stock_to_the_bit(family: str) -> None:
    for names in batches_of(family):
        inputs, expected = inputs_of(family, names), stock(family, names)
        text = greedy(subject(family), inputs, STEPS)
        for method in ("keep-all", *CLIPWISE, *FRAMEWISE):
            with patched(family, method, 1.0) as patch:
                assert torch.equal(prefill(family, names).logits, expected), method
                assert not patch.report().engaged
                if method == "keep-all":
                    assert torch.equal(greedy(subject(family), inputs, STEPS), text)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_nothing_stays_behind(family: str) -> None:
    """The model is stock to the bit again after clips were pruned, and pruned alike when patched again."""
    names = batches_of(family)[0]
    model, inputs, expected = subject(family), inputs_of(family, names), stock(family, names)
    text = greedy(model, inputs, 2)
    for method in ("dycoke", "fastv", "visionzip"):
        found = []
        for _ in range(2):
            with patched(family, method):
                found.append((prefill(family, names).logits, greedy(model, inputs, 2)))
            assert torch.equal(prefill(family, names).logits, expected), method
            assert torch.equal(greedy(model, inputs, 2), text), method
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True)), method
        assert not torch.equal(found[0][0], expected), method


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize("keep", [0.25, 3])
@pytest.mark.parametrize(("family", "method"), CELLS)
@torch.no_grad()
def test_every_frame_has_its_budget(family: str, method: str, keep: int | float) -> None:
    """Framewise methods keep it in every frame; those for clips keep as much together, and what they promise in each."""
    with patched(family, method, keep) as patch:
        for names in batches_of(family):
            prefill(family, names)
            report = patch.report()
            assert_units(report, family, names)
            assert_budget(report, method, keep)
            for frames in clips(report.images).values():
                counts, n = [frame.tokens_out for frame in frames], frames[0].tokens_in
                assert {frame.tokens_in for frame in frames} == {n}
                assert sum(counts) == len(frames) * budget(keep, n)
                assert min(counts) >= promised(method, budget(keep, n), n, len(frames))
                if method == "evs":
                    # The first frame is whole where the others have one token each left.
                    assert counts[0] >= min(n, sum(counts) - len(frames) + 1)
                if method == "dycoke":
                    whole, rest = counts[::4], [c for t, c in enumerate(counts) if t % 4]
                    assert max(whole) - min(whole) <= 1
                    assert not rest or max(rest) - min(rest) <= 1
                    assert sum(whole) == min(n * len(whole), sum(counts) - len(rest))


def promised(method: str, k: int, n: int, frames: int) -> int:
    """Tokens that every frame of a clip keeps at least."""
    if method == "fastvid":
        return min(n, max(1, k - int(0.4 * k)))  # the salient ones
    return 1 if method in CLIPWISE else k


# ---------------------------------------------------------------------- reports


@pytest.mark.parametrize("method", ["evs", "fastv", "vtprune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reports_tell_clips_from_pictures(family: str, method: str) -> None:
    """Tokens in and out of every row and clip, in reading order, as the prompt was written."""
    with patched(family, method) as patch:
        for names in batches_of(family):
            prefill(family, names)
            report = patch.report()
            plain = report.to_dict()
            for sample, name in enumerate(names):
                prompt, images = visual(family, name), images_of(report, sample)
                written = [p for p in clips_of(family).get(name, []) if isinstance(p, (Image, Video))]
                found = [list(group) for _, group in itertools.groupby(images, key=of_picture)]
                assert len(found) == len(written)
                for number, (item, units) in enumerate(zip(written, found, strict=True)):
                    video = isinstance(item, Video)
                    assert {u.layout.modality for u in units} == {"video" if video else "image"}
                    if not isinstance(item, Video):
                        continue
                    assert [u.layout.time for u in units] == list(range(item.frames))
                    for time, unit in enumerate(units):
                        rows, cols, kept = report.grid(sample, number, time)
                        assert (rows, cols) == (unit.layout.rows, unit.layout.cols)
                        assert kept == list(unit.kept.values())[-1].tolist()
                entry = plain["samples"][sample]
                assert entry["visual_tokens_in"] == len(prompt.columns)
                assert entry["visual_tokens_out"] == sum(image.tokens_out for image in images)
                assert report.separator_tokens[sample] == len(prompt.loose)
            if len(names) > 2:
                assert len(set(report.visual_tokens_out)) > 2, "rows of one length only"


def of_picture(image: ImageReport) -> tuple[str, int]:
    return image.layout.modality, image.layout.image


# ---------------------------------------------------------------------- positions of the caller


def spaced(family: str, names: Sequence[str]) -> Tensor:
    """Positions [3, B, L] of clips whose frames were chosen from longer ones: gaps in time, text behind the last."""
    inputs = inputs_of(family, names)
    told = {k: v for k, v in inputs.items() if not k.startswith("pixel") and k != "input_ids"}
    places: Tensor = subject(family).model.get_rope_index(inputs["input_ids"], **told)[0].clone()
    kinds = inputs["mm_token_type_ids"]
    for row, prompt in enumerate(visual(family, name) for name in names):
        left = kinds.shape[1] - prompt.length
        for unit in prompt.units:
            if unit.kind == "video":
                columns = [left + c for c in unit.columns]
                behind = max(columns) + 1
                places[0, row, columns] += 5 * unit.part + 2
                places[:, row, behind:] += 5 * unit.part + 7
    return places


def placed(family: str, name: str, places: Tensor, more: int) -> Row:
    """One row with its own positions [3, L], padding included, followed by so many tokens."""
    row = row_of(family, name)
    own = places[:, -row["input_ids"].shape[1] :]
    behind = own[:, -1:] + torch.arange(1, more + 1)
    return {**row, "position_ids": torch.cat([own, behind], 1)[:, None]}


@pytest.mark.parametrize("method", ["keep-all", "dycoke", "fastv", "random"])
@pytest.mark.parametrize("family", MROPE)
@torch.no_grad()
def test_given_positions_are_kept(family: str, method: str) -> None:
    """By the judge: kept tokens stand where the caller put them, and text goes on behind the last position."""
    (names,) = batches_of(family)
    model, inputs, judge = subject(family), inputs_of(family, names), judge_of(family)
    places = spaced(family, names)
    text = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    n = inputs["input_ids"].shape[1]
    how = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with patched(family, method) as patch:
        usual = prefill(family, names).logits
        logits = prefill(family, names, position_ids=places).logits
        out = model.generate(**inputs, position_ids=places, **how)
        known = tell(family, names, patch.report())
        four = model.generate(**inputs, position_ids=torch.cat([text[None], places]), **how)
        uncached = model.generate(**inputs, position_ids=places, use_cache=False, **how)
    assert torch.equal(out.sequences, four.sequences)
    assert all(torch.equal(*pair) for pair in zip(out.logits, four.logits, strict=True))
    assert torch.equal(out.sequences, uncached.sequences)
    for sample, name in enumerate(names):
        new = out.sequences[sample, n:].tolist()
        row = placed(family, name, places[:, sample], STEPS - 1)
        expected = Judge.shown(judge.logits(row, continuation=new[:-1], **known[sample]))
        real = inputs["attention_mask"][sample].bool()
        close(logits[sample][real], expected[: int(real.sum())])
        close(torch.stack(out.logits, 1)[sample], expected[-STEPS:])
        moved = float((usual - logits)[sample, -1].abs().max())
        assert (moved > 10 * TOLERANCE) == (name != "text")


@pytest.mark.parametrize("method", ["fastv", "random"])
@pytest.mark.parametrize("family", MROPE)
@torch.no_grad()
def test_a_cache_goes_on_with_given_positions(family: str, method: str) -> None:
    """By hand, a token at a time, behind a prompt with positions of its own."""
    (names,) = batches_of(family)
    model, inputs = subject(family), inputs_of(family, names)
    places, mask = spaced(family, names), inputs["attention_mask"]
    with patched(family, method) as patch:
        out = prefill(family, names, position_ids=places, use_cache=True)
        known = tell(family, names, patch.report())
        new: list[int] = []
        for token in (31, 32):
            new.append(token)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = model(
                input_ids=torch.full((len(names), 1), token),
                attention_mask=mask,
                position_ids=places[..., -1:] + len(new),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            for sample, name in enumerate(names):
                row = placed(family, name, places[:, sample], len(new))
                expected = judge_of(family).logits(row, continuation=new, **known[sample])
                close(out.logits[sample, -1], expected[-1])


@pytest.mark.parametrize("method", ["fastv", "random"])
def test_positions_of_another_shape_are_refused(method: str) -> None:
    family = "qwen2_vl"
    (names,) = batches_of(family)
    places = spaced(family, names)
    wrong = {
        "too short": places[..., :-1],
        "two axes": places[:2],
        "too few rows": places[:, :2],
        "one row": places[0, 0],
    }
    with patched(family, method):
        for name, given in wrong.items():
            with pytest.raises(vtprune.UnsupportedCallError, match=r"position_ids.*\[3 or 4"):
                prefill(family, names, position_ids=given)
            assert prefill(family, names).logits.shape[0] == len(names), name


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_that_a_family_cannot_mix(family: str) -> None:
    """Some take one tensor of clips, all of one length; the zoo says so, and the processor would fail."""
    rows = [[20, Video(1, 2), 21], [22, Video(2, 3), 23]]
    if LVLMS[family].ragged_videos:
        assert LVLMS[family].batch(rows)["video_grid_thw"][:, 0].tolist() == [2, 3]
    else:
        with pytest.raises(ValueError, match="one number of frames"):
            LVLMS[family].batch(rows)
