"""Ragged batches, generation, second turns and decoding loops say what the dense reference says without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense.common import (
    ALL_SITES,
    EVERY_PAIR,
    METHODS,
    PAIRS,
    TOLERANCE,
    Adaptive,
    assert_logits,
    batch,
    greedy,
    how,
    judge,
    kept_of,
    merge_of,
    options_of,
    patched,
    subject,
)
from versions import ENCODES_BEFOREHAND

import vtprune

# ------------------------------------------------------------------------------------ batches


def assert_batch_equals_rows(
    family: str, attention: str, make: Callable[[], Any], **options: Any
) -> set[int]:
    """A left-padded, a right-padded and single runs agree; returns the numbers of survivors."""
    model, left, right = subject(family, attention), batch(family), batch(family, padding="right")
    counts = set()
    with patched(model, make(), **options) as patch:
        out = model(**left).logits
        report = patch.report()
        mirrored = model(**right).logits
        text = greedy(model, left, 6)
        for sample, row in enumerate(judge(family, attention).split(left)):
            alone = model(**row).logits[0]
            kept = [{s: k.tolist() for s, k in kept.items()} for kept in kept_of(patch.report(), 0)]
            assert kept == [{s: k.tolist() for s, k in kept.items()} for kept in kept_of(report, sample)]
            counts |= {len(list(k.values())[-1]) for k in kept}
            for padded, mask in ((out, left), (mirrored, right)):
                shown = padded[sample][mask["attention_mask"][sample].bool()]
                torch.testing.assert_close(shown, alone, atol=TOLERANCE, rtol=0)
            assert text[sample].tolist() == greedy(model, row, 6)[0].tolist()
    return counts


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_ragged_batch_equals_single_runs(method: str, family: str, attention: str) -> None:
    assert_batch_equals_rows(family, attention, lambda: method, **options_of(method, family, 0.3))


@pytest.mark.parametrize("site", ALL_SITES, ids=str)
@pytest.mark.parametrize(("family", "attention"), PAIRS)
@torch.no_grad()
def test_adaptive_counts_in_a_ragged_batch(family: str, attention: str, site: vtprune.Site) -> None:
    counts = assert_batch_equals_rows(family, attention, lambda: Adaptive(where=site))
    assert len(counts) > 1, "the counts must differ for this test to mean anything"
    model, inputs = subject(family, attention), batch(family)
    with patched(model, Adaptive(where=site)) as patch:
        assert_logits(judge(family, attention), inputs, model(**inputs).logits, patch.report())


# ------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize(("family", "attention"), EVERY_PAIR)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_greedy_generation_equals_the_cache_free_loop(method: str, family: str, attention: str) -> None:
    model, reference, inputs = subject(family, attention), judge(family, attention), batch(family)
    options = options_of(method, family)
    merge = merge_of(reference, method, options)
    with patched(model, method, **options) as patch:
        text = greedy(model, inputs)
        report = patch.report()
        assert report.decode_steps == 15
        uncached = greedy(model, inputs, 6, use_cache=False)
    for sample, row in enumerate(reference.split(inputs)):
        expected = reference.greedy(row, 16, **how(row, report, sample, merge))
        assert text[sample].tolist() == expected
        assert uncached[sample].tolist() == expected[:6]


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_beam_search_and_sampling(method: str, family: str, attention: str) -> None:
    model, reference = subject(family, attention), judge(family, attention)
    inputs = batch(family) if ENCODES_BEFOREHAND else batch(family, "one")
    n = inputs["input_ids"].shape[1]
    options = options_of(method, family)
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    scored = {"return_dict_in_generate": True, "output_scores": True}
    sample = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6, "top_k": 20}
    with patched(model, method, **options) as patch:
        best = model.generate(**inputs, **beams, **scored)
        report = patch.report()
        assert torch.equal(best.sequences, model.generate(**inputs, **beams, use_cache=False))
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            drawn.append(model.generate(**inputs, **sample, use_cache=use_cache))
        assert drawn[0].shape[0] == 2 * len(inputs["input_ids"])
        assert torch.equal(*drawn)
    merge = merge_of(reference, method, options)
    for r, row in enumerate(reference.split(inputs)):
        text = best.sequences[r, n:].tolist()
        logits = reference.row_logits(row, more=text, **how(row, report, 3 * r, merge))
        steps = logits[-len(text) - 1 : -1].log_softmax(-1)
        score = sum(step[token] for step, token in zip(steps, text, strict=True)) / len(text)
        torch.testing.assert_close(score, best.sequences_scores[r], atol=TOLERANCE, rtol=0)


# ------------------------------------------------------------------------------------ conversations


TURN = [40, 41, 42]


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_second_turn_with_the_returned_cache(method: str, family: str, attention: str) -> None:
    model, reference = subject(family, attention), judge(family, attention)
    options = options_of(method, family)
    merge = merge_of(reference, method, options)
    for kind in ("one", "two"):
        inputs = batch(family, kind)
        with patched(model, method, **options) as patch:
            first = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
            row = reference.split(inputs)[0]
            told = how(row, patch.report(), 0, merge)
            ids = torch.cat([first.sequences, torch.tensor([TURN])], 1)
            second = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=first.past_key_values,
                max_new_tokens=6,
                do_sample=False,
            )
        answer = first.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer == reference.greedy(row, 6, **told)
        assert second[0, ids.shape[1] :].tolist() == reference.greedy(row, 6, start=answer + TURN, **told)


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_manual_decoding_loop(method: str, family: str, attention: str) -> None:
    """No position_ids, no attention_mask for a single row; one token, then three tokens at once."""
    model, reference, inputs = subject(family, attention), judge(family, attention), batch(family, "two")
    options = options_of(method, family)
    row = reference.split(inputs)[0]
    with patched(model, method, **options) as patch:
        out = model(**inputs, use_cache=True)
        told = how(row, patch.report(), 0, merge_of(reference, method, options))
        text: list[int] = []
        for chunk in ([21], [22], [23, 24, 25], [26]):
            text += chunk
            out = model(input_ids=torch.tensor([chunk]), past_key_values=out.past_key_values)
            expected = reference.row_logits(row, more=text, **told)[-len(chunk) :]
            torch.testing.assert_close(out.logits[0], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", ["vtc-cls", "fastv", "visionzip", "stride"])
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_manual_decoding_of_a_padded_batch(method: str, family: str) -> None:
    """The caller goes on with the mask of the unpruned prompt (Qwen2.5-VL: with its positions)."""
    model, reference, inputs = subject(family), judge(family), batch(family)
    options = options_of(method, family)
    rows = reference.split(inputs)
    with patched(model, method, **options) as patch:
        out = model(**inputs, use_cache=True)
        merge = merge_of(reference, method, options)
        told = [how(row, patch.report(), r, merge) for r, row in enumerate(rows)]
        mask, text = inputs["attention_mask"], []
        for token in (21, 22, 23):
            text.append(token)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            call = {"input_ids": torch.full((len(rows), 1), token), "attention_mask": mask}
            if family == "qwen":  # the stock model cannot derive positions of padded rows from the mask
                last = [reference.positions(row, row["input_ids"].shape[1]).max() for row in rows]
                call["position_ids"] = (torch.stack(last) + len(text))[:, None].expand(3, -1, 1)
            out = model(**call, past_key_values=out.past_key_values)
            for r, row in enumerate(rows):
                expected = reference.row_logits(row, more=text, **told[r])[-1]
                torch.testing.assert_close(out.logits[r, -1], expected, atol=TOLERANCE, rtol=0)
