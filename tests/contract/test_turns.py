"""Conversations: further turns over a pruned cache, caches in the wrong hands, and speculative decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contract.common import FAMILIES, KEY_CELLS, TOLERANCE, judge_of, patched, subject
from contract.evidence import ALONG_TEXT, Row, claim, continued, inputs_of, joined, ragged, row_of, tell
from judge import QWEN, Judge
from torch import Tensor
from versions import ENCODES_BEFOREHAND

import vtprune
from vtprune.testing.zoo import LVLMS, Image

TURN = [40, 41, 42]
SCORED = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
# Families that make masks of their own around pictures; the library refuses new ones behind a cache.
OWN_MASKS = ("gemma3", "paligemma")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
@torch.no_grad()
def test_turns_of_text(family: str, method: str) -> None:
    """Three turns of a ragged batch over one cache equal fresh runs of the whole conversation."""
    names, model = ragged(family), subject(family)
    inputs = inputs_of(family, names)
    n = inputs["input_ids"].shape[1]
    with patched(family, method) as patch:
        out = model.generate(**inputs, max_new_tokens=3, **SCORED)
        known = tell(family, names, patch.report())
        for _ in range(2):
            turn = torch.tensor([TURN]).expand(len(names), -1)
            ids = torch.cat([out.sequences, turn], 1)
            more = torch.ones(len(ids), ids.shape[1] - n, dtype=torch.long)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.cat([inputs["attention_mask"], more], 1),
                past_key_values=out.past_key_values,
                max_new_tokens=3,
                **SCORED,
            )
            raw = torch.stack(out.logits, 1)
            for sample, name in enumerate(names):
                text = out.sequences[sample, n:].tolist()
                close(raw[sample], continued(family, name, known[sample], text)[-3:])


def conversation(family: str, name: str, answer: list[int]) -> tuple[Row, Row]:
    """A second turn with a new picture, and the whole conversation as one row."""
    new = LVLMS[family].batch([[43, Image(9), 44, 45]])
    return new, joined(family, judge_of(family).extended(row_of(family, name), answer), new)


def both(earlier: vtprune.Report, later: vtprune.Report, pictures: int) -> vtprune.Report:
    """The report of the whole conversation: units of the first turn, then those that came later."""
    whole = copy.copy(later)
    whole.images = [*earlier.images, *later.images[-pictures:]]
    return whole


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
@torch.no_grad()
def test_a_new_picture_in_the_second_turn(family: str, method: str) -> None:
    """Its tokens are pruned too, and the earlier decisions hold; or the call is refused with the way out."""
    judge, model, name = judge_of(family), subject(family), "one"
    n = row_of(family, name)["input_ids"].shape[1]
    with patched(family, method) as patch:
        out = model.generate(**row_of(family, name), max_new_tokens=4, **SCORED)
        earlier = patch.report()
        new, whole = conversation(family, name, out.sequences[0, n:].tolist())
        # The last token of an answer is not in the cache yet.
        cached = out.past_key_values.get_seq_length()
        assert cached == n + 3
        call = {k: whole[k][:, cached:] if k in ALONG_TEXT else v for k, v in new.items()}
        call |= {"attention_mask": whole["attention_mask"], "past_key_values": out.past_key_values}
        if family in QWEN:
            # Stock code derives positions of a new picture only from the grids of all pictures.
            call["position_ids"] = judge.run(whole).positions[..., cached:]
        if family in OWN_MASKS:
            with pytest.raises(vtprune.UnsupportedCallError, match="whole conversation"):
                model(**call, use_cache=True)
            return
        logits = model(**call, use_cache=True).logits[0]
        prompt = judge.prompt(whole)
        pictures = len(prompt.units) - len(earlier.images)
        assert pictures > 0
        report = both(earlier, patch.report(), pictures)
    found = claim(report, 0, prompt)
    assert all(i.tokens_out == (i.tokens_in + 1) // 2 for i in report.images)
    close(logits, Judge.shown(judge.logits(whole, **found.how))[cached:])


# Stock generate() finds no positions for a new picture on M-RoPE.
BY_GENERATE = [p for p in KEY_CELLS if p.values[0] not in QWEN]


@pytest.mark.parametrize(("family", "method"), BY_GENERATE)
@torch.no_grad()
def test_a_new_picture_by_generate(family: str, method: str) -> None:
    """The same through generate()."""
    judge, model, name = judge_of(family), subject(family), "one"
    n = row_of(family, name)["input_ids"].shape[1]
    with patched(family, method) as patch:
        out = model.generate(**row_of(family, name), max_new_tokens=4, **SCORED)
        earlier = patch.report()
        new, whole = conversation(family, name, out.sequences[0, n:].tolist())
        call = {k: whole[k] if k in ALONG_TEXT else v for k, v in new.items()}
        if family in OWN_MASKS:
            with pytest.raises(vtprune.UnsupportedCallError, match="whole conversation"):
                model.generate(**call, past_key_values=out.past_key_values, max_new_tokens=3, **SCORED)
            return
        second = model.generate(**call, past_key_values=out.past_key_values, max_new_tokens=3, **SCORED)
        prompt = judge.prompt(whole)
        report = both(earlier, patch.report(), len(prompt.units) - len(earlier.images))
    text = second.sequences[0, whole["input_ids"].shape[1] :].tolist()
    logits = judge.logits(whole, continuation=text[:-1], **claim(report, 0, prompt).how)
    close(torch.cat(second.logits), logits[-3:])


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
@torch.no_grad()
def test_a_pruned_cache_is_refused_elsewhere(family: str, method: str) -> None:
    """The unpatched model, and one that never was patched, would count positions wrongly."""
    row = row_of(family, "one")
    with patched(family, method):
        cache = subject(family)(**row, use_cache=True).past_key_values
    ids = torch.cat([row["input_ids"], torch.tensor([[21]])], 1)
    for model in (subject(family), judge_of(family).stock):
        with pytest.raises(vtprune.UnsupportedCallError, match=r"prun"):
            model(input_ids=torch.tensor([[21]]), past_key_values=copy.deepcopy(cache))
        with pytest.raises(vtprune.UnsupportedCallError, match=r"prun"):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=copy.deepcopy(cache),
                max_new_tokens=2,
                do_sample=False,
            )
    for other in ("keep-all", "stride"):
        with patched(family, other), pytest.raises(vtprune.UnsupportedCallError, match="another patch"):
            subject(family)(input_ids=torch.tensor([[21]]), past_key_values=copy.deepcopy(cache))
    # What was refused left nothing behind.
    close(subject(family)(**row).logits[0], judge_of(family).logits(row))


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
@torch.no_grad()
def test_a_dense_cache_goes_on_under_a_patch(family: str, method: str) -> None:
    """Nothing was removed from it, and nothing is."""
    row = row_of(family, "one")
    cache = subject(family)(**row, use_cache=True).past_key_values
    with patched(family, method):
        logits = subject(family)(input_ids=torch.tensor([[21]]), past_key_values=cache, use_cache=True).logits
    close(logits[0], judge_of(family).logits(row, continuation=[21])[-1:])


SPECULATION: dict[str, Any] = {
    "prompt lookup": lambda family: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda family: {"assistant_model": judge_of(family).stock},
}


@pytest.mark.parametrize("draft", SPECULATION)
@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
@torch.no_grad()
def test_speculative_decoding(family: str, method: str, draft: str) -> None:
    """Drafts change nothing where the text has no part in decisions, and are refused where it has."""
    model = subject(family)
    # The prompt repeats itself, so that a look-up finds a draft before the first step.
    row = LVLMS[family].batch([[20, 21, 22, Image(1), 20, 21, 22, 23, 20, 21]])
    n = row["input_ids"].shape[1]
    extra = SPECULATION[draft](family)
    how = {"max_new_tokens": 6, "do_sample": False}
    if (family, draft) == ("paligemma", "assistant"):
        pytest.skip("stock PaliGemma lets drafts see each other, so its own assisted logits differ")
    if (family, draft) == ("gemma3", "assistant") and not ENCODES_BEFOREHAND:
        pytest.skip("stock: an assistant with a sliding window fails in older transformers")
    assert torch.equal(model.generate(**row, **how, **extra), model.generate(**row, **how))
    with patched(family, method) as patch:
        plain = model.generate(**row, **how)
        if method == "fastv":
            with pytest.raises(vtprune.UnsupportedCallError, match="draft"):
                model.generate(**row, **how, **extra)
            return
        drafted = model.generate(**row, **how, **extra)
        found = claim(patch.report(), 0, judge_of(family).prompt(row))
    assert torch.equal(drafted, plain)
    text = plain[0, n:].tolist()
    assert text == judge_of(family).greedy(row, 6, banned=range(20), **found.how)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_two_conversations_do_not_mix(family: str) -> None:
    """What a conversation needs lies in its cache."""
    model, names = subject(family), ("one", "large")
    known, caches = {}, {}
    with patched(family, "stride") as patch:
        for name in names:
            caches[name] = model(**row_of(family, name), use_cache=True).past_key_values
            (known[name],) = tell(family, (name,), patch.report())
        for text in ([30], [30, 31]):
            for name in names:
                row = row_of(family, name)
                call: dict[str, Any] = {"input_ids": torch.tensor([text[-1:]])}
                if family in QWEN:  # stock keeps the offset of the latest prompt only
                    last = judge_of(family).run(row).positions.amax()
                    call["position_ids"] = (last + len(text)).view(1, 1, 1).expand(3, 1, 1)
                out = model(**call, past_key_values=caches[name], use_cache=True)
                close(out.logits[0], continued(family, name, known[name], [*text, 0])[-1:])
