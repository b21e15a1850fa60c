"""Decoding behind a pruned prompt: greedy, beams, sampling, without a cache, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract.common import (
    CELLS,
    FAMILIES,
    KEY_CELLS,
    TOLERANCE,
    greedy,
    judge_of,
    options_of,
    patched,
    subject,
)
from contract.evidence import (
    continued,
    decisions,
    inputs_of,
    prompts_of,
    ragged,
    repeatable,
    row_of,
    spread,
    tell,
)
from torch import Tensor
from versions import ENCODES_BEFOREHAND

import vtprune

BANNED = list(range(20))
STEPS = 8
SCORED = {"return_dict_in_generate": True, "output_logits": True}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def recomputes(family: str) -> bool:
    """Whether stock generation without a cache is right: older PaliGemma lets its own text look ahead there."""
    return family != "paligemma" or ENCODES_BEFOREHAND


def same_decisions(first: vtprune.Report, second: vtprune.Report) -> bool:
    """Whether two reports list the same units with the same survivors."""

    def told(report: vtprune.Report) -> list[Any]:
        return [(i.sample, i.layout, {s: k.tolist() for s, k in i.kept.items()}) for i in report.images]

    return told(first) == told(second)


def assert_greedy(steps: Tensor, text: list[int]) -> None:
    """Every token is the judge's best but for ties, given the tokens before it."""
    allowed = steps.clone()
    allowed[:, BANNED] = -torch.inf
    best = allowed.amax(-1)
    chosen = allowed[torch.arange(len(text)), text]
    assert float((best - chosen).max()) < TOLERANCE


@pytest.mark.parametrize(("family", "method"), CELLS)
@torch.no_grad()
def test_greedy_equals_the_judge(family: str, method: str) -> None:
    """Every step shows the judge's logits, with the decisions of the prompt, and so does a run without cache."""
    names, model = ragged(family), subject(family)
    inputs = inputs_of(family, names)
    n = inputs["input_ids"].shape[1]
    options = options_of(family, method)
    with decisions(method) as seen, vtprune.patch(model, method, **options) as patch:
        out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **SCORED)
        report = patch.report()
        known = tell(family, names, report, seen)
        assert report.decode_steps == STEPS - 1
        if recomputes(family):
            uncached = greedy(model, inputs, 3, use_cache=False)
            assert torch.equal(uncached, out.sequences[:, n : n + 3])
            assert same_decisions(report, patch.report())
    raw = torch.stack(out.logits, 1)
    for sample, name in enumerate(names):
        text = out.sequences[sample, n:].tolist()
        steps = continued(family, name, known[sample], text)
        close(raw[sample], steps)
        assert_greedy(steps, text)


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
@torch.no_grad()
def test_greedy_loop_of_the_judge(family: str, method: str) -> None:
    """The same by the judge's own loop, which does not know what the library wrote; all other rows."""
    names = tuple(n for n in prompts_of(family) if n not in ragged(family))
    with patched(family, method, 3) as patch:
        text = greedy(subject(family), inputs_of(family, names), 5)
        known = tell(family, names, patch.report())
    for sample, name in enumerate(names):
        row = row_of(family, name)
        assert text[sample].tolist() == judge_of(family).greedy(row, 5, banned=BANNED, **known[sample])


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
@torch.no_grad()
def test_beam_search(family: str, method: str) -> None:
    """Scores of all returned beams are the judge's, and a row alone gives what it gives in the batch."""
    names, model = repeatable(), subject(family)
    inputs = inputs_of(family, names)
    n, steps = inputs["input_ids"].shape[1], 4
    how = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": steps, "do_sample": False}
    scored = {"return_dict_in_generate": True, "output_scores": True}
    with patched(family, method) as patch:
        best = model.generate(**inputs, **how, **scored)
        known = tell(family, spread(names, 3), patch.report())
        assert torch.equal(best.sequences, model.generate(**inputs, **how))
        if recomputes(family):
            assert torch.equal(best.sequences, model.generate(**inputs, **how, use_cache=False))
        alone = model.generate(**row_of(family, names[0]), **how, **scored)
    assert best.sequences.shape == (3 * len(names), n + steps)
    for i, name in enumerate(spread(names, 3)):
        text = best.sequences[i, n:].tolist()
        logs = continued(family, name, known[i], text).log_softmax(-1)
        close(best.sequences_scores[i], logs[torch.arange(steps), text].mean())
    assert torch.equal(alone.sequences[:, -steps:], best.sequences[:3, n:])
    close(alone.sequences_scores, best.sequences_scores[:3])


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
@torch.no_grad()
def test_sampling(family: str, method: str) -> None:
    """Two sequences per row: reproducible, with and without cache, and drawn from the judge's distribution."""
    names, model = repeatable(), subject(family)
    inputs = inputs_of(family, names)
    n, steps = inputs["input_ids"].shape[1], 4
    how = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": steps, "top_k": 12}
    with patched(family, method) as patch, torch.random.fork_rng():
        torch.manual_seed(5)
        out = model.generate(**inputs, **how, **SCORED)
        known = tell(family, spread(names, 2), patch.report())
        for use_cache in {True, not recomputes(family)}:
            torch.manual_seed(5)
            assert torch.equal(out.sequences, model.generate(**inputs, **how, use_cache=use_cache))
        torch.manual_seed(6)
        assert not torch.equal(out.sequences, model.generate(**inputs, **how))
    assert out.sequences.shape == (2 * len(names), n + steps)
    raw = torch.stack(out.logits, 1)
    for i, name in enumerate(spread(names, 2)):
        close(raw[i], continued(family, name, known[i], out.sequences[i, n:].tolist()))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decode_steps_are_counted(family: str, steps: int) -> None:
    with patched(family, "stride") as patch:
        greedy(subject(family), inputs_of(family, ("one",)), steps)
        assert patch.report().decode_steps == steps - 1


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
@torch.no_grad()
def test_decoding_by_hand(family: str, method: str) -> None:
    """A caller's own loop over the returned cache: one token, then three at once, without positions or mask."""
    name, model = "one", subject(family)
    with patched(family, method) as patch:
        out = model(**inputs_of(family, (name,)), use_cache=True)
        (how,) = tell(family, (name,), patch.report())
        text: list[int] = []
        for chunk in ([21], [22], [23, 24, 25], [26]):
            text += chunk
            out = model(input_ids=torch.tensor([chunk]), past_key_values=out.past_key_values, use_cache=True)
            expected = judge_of(family).logits(row_of(family, name), continuation=text, **how)
            close(out.logits[0], expected[-len(chunk) :])
        assert patch.report().decode_steps == 4


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize(
    "family", ["llava", "llava_onevision", "internvl", "idefics3", "gemma3", "mistral3", "qwen3_vl"]
)
@torch.no_grad()
def test_decoding_a_padded_batch_by_hand(family: str, method: str) -> None:
    """The caller goes on with the mask of the unpruned prompt, and with the positions that stock needs."""
    names, model = ragged(family), subject(family)
    inputs = inputs_of(family, names)
    mask = inputs["attention_mask"]
    last = [judge_of(family).run(row_of(family, name)).positions.amax() for name in names]
    with patched(family, method) as patch:
        call: dict[str, Any] = {"position_ids": mask.cumsum(-1).sub(1).clamp(min=0)}
        if family.startswith("qwen"):
            call = {}
        out = model(**inputs, **call, use_cache=True)
        known = tell(family, names, patch.report())
        text: list[int] = []
        for token in (31, 32, 33):
            text.append(token)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            places = (torch.stack(last) + len(text))[:, None]
            if family.startswith("qwen"):
                places = places.expand(3, -1, 1)
            out = model(
                input_ids=torch.full((len(names), 1), token),
                attention_mask=mask,
                position_ids=places,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            for sample, name in enumerate(names):
                expected = judge_of(family).logits(row_of(family, name), continuation=text, **known[sample])
                close(out.logits[sample, -1], expected[-1])
