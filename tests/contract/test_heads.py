"""Silenced attention heads, against stock models whose heads are zeroed by hand at the input of `o_proj`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from contract.common import TOLERANCE, greedy, judge_of, subject
from contract.evidence import PROJECTOR, Probe, Row, assert_logits, claims, inputs_of, joined, row_of, visual
from judge import Judge
from torch import Tensor

import vtprune
from vtprune import methods
from vtprune.method import HeadStage, HeadView
from vtprune.selection import HeadSelection
from vtprune.testing.zoo import LVLMS, Image

FAMILIES = ("llava", "qwen2_5_vl", "internvl")
NAMES = ("two", "text", "large", "one")
BANNED = list(range(20))  # the tiny models' generation suppresses special tokens
OPTIONS = {"heads": 0.8, "first_heads": 0.0}
Heads = Mapping[int, Sequence[int]]
"""Decoder layer -> query heads of one row that speak from it on."""


def projections(model: Any) -> list[tuple[Any, int]]:
    """(`o_proj`, heads) of every decoder layer."""
    heads = model.config.get_text_config().num_attention_heads
    return [(layer.self_attn.o_proj, heads) for layer in model.model.language_model.layers]


@contextmanager
def zeroed(judge: Judge, heads: Heads) -> Iterator[None]:
    """The judge with all other heads zeroed, by slices of what enters the output projections."""

    def hook(layer: int, total: int, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        starts = [start for start in heads if start <= layer]
        x = args[0].clone()
        size = x.shape[-1] // total
        for head in range(total):
            if starts and head not in heads[max(starts)]:
                x[..., head * size : (head + 1) * size] = 0
        return (x, *args[1:])

    handles = [
        o_proj.register_forward_pre_hook(partial(hook, layer, total))
        for layer, (o_proj, total) in enumerate(projections(judge.model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def of_row(report: vtprune.Report, sample: int) -> dict[int, list[int]]:
    return {layer: rows[sample] for layer, rows in report.heads.items()}


def assert_row(family: str, name: str, logits: Tensor, heads: Heads, how: Mapping[str, Any]) -> None:
    judge = judge_of(family)
    with zeroed(judge, heads):
        expected = Judge.shown(judge.logits(row_of(family, name), **how))
    torch.testing.assert_close(
        logits, expected, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m: f"row {name}: {m}"
    )


def cascade(family: str, name: str, wanted: Mapping[int, int], removed: Mapping[int, Sequence[int]]) -> Heads:
    """Which heads speak when the best `wanted` of those left do from each layer on, in a plain loop."""
    judge = judge_of(family)
    total = projections(judge.model)[0][1]
    scores, alive, found = [0.0] * total, list(range(total)), {}

    def hook(layer: int, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal alive
        if layer in wanted:
            alive = sorted(sorted(alive, key=lambda h: (-scores[h], h))[: wanted[layer]])
            found[layer] = alive
        gone = {c for first, columns in removed.items() if first <= layer for c in columns}
        x = args[0].clone()
        size = x.shape[-1] // total
        for head in range(total):
            part = x[..., head * size : (head + 1) * size]
            if head not in alive:
                part[:] = 0
            scores[head] += float(part[0, [c for c in range(part.shape[1]) if c not in gone]].abs().sum())
        return (x, *args[1:])

    handles = [
        o_proj.register_forward_pre_hook(partial(hook, layer))
        for layer, (o_proj, _) in enumerate(projections(judge.model))
    ]
    try:
        judge.logits(row_of(family, name), removed=removed)
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_zeroed_heads(family: str, keep: float, padding: str) -> None:
    model, inputs = subject(family), inputs_of(family, NAMES, padding)
    with vtprune.patch(model, "spatten", keep=keep, **OPTIONS) as patch:
        logits, report = model(**inputs).logits, patch.report()
    total = projections(model)[0][1]
    layers = len(report.layers)
    assert sorted(report.heads) == list(range(1, layers))
    for sample, (name, found) in enumerate(zip(NAMES, claims(report, family, NAMES), strict=True)):
        heads = of_row(report, sample)
        shown = logits[sample][inputs["attention_mask"][sample].bool()]
        assert_row(family, name, shown, heads, found.how)
        if name == "text":
            assert all(rows == list(range(total)) for rows in heads.values())
            continue
        counts = {layer: len(rows) for layer, rows in heads.items()}
        assert abs(total + sum(counts.values()) - 0.8 * total * layers) <= 0.5
        assert sorted(counts.values(), reverse=True) == list(counts.values())
        assert heads == cascade(family, name, counts, found.removed)
    assert any("silenced, not removed" in note for note in report.notes)


@dataclass(frozen=True, kw_only=True)
class Fixed(vtprune.Method):
    """Silences heads 0 and 2, or 1, of every second row from layer 1 on, and all but head 3 from layer 3 on."""

    key: ClassVar[str] = "test-heads"
    keep: int | float = 0.5

    def site(self, facts: vtprune.ModelFacts) -> vtprune.Site:
        return PROJECTOR

    def decide(self, view: vtprune.View) -> vtprune.Selection:
        return vtprune.Selection.of(torch.arange(view.k).expand(len(view.features), -1))

    def head_stages(self, facts: vtprune.ModelFacts) -> list[HeadStage]:
        return [HeadStage(1, self.some), HeadStage(3, self.last)]

    def some(self, view: HeadView) -> HeadSelection:
        keep = torch.ones_like(view.alive)
        keep[0::2, [0, 2]] = False
        keep[1::2, 1] = False
        return HeadSelection(keep)

    def last(self, view: HeadView) -> HeadSelection:
        keep = torch.zeros_like(view.alive)
        keep[:, 3] = True
        return HeadSelection(keep)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_sample_has_heads_of_its_own(family: str) -> None:
    model, inputs = subject(family), inputs_of(family, NAMES)
    with vtprune.patch(model, Fixed()) as patch:
        logits, report = model(**inputs).logits, patch.report()
    assert len({str(of_row(report, sample)) for sample in range(len(NAMES))}) == 3
    for sample, (name, found) in enumerate(zip(NAMES, claims(report, family, NAMES), strict=True)):
        shown = logits[sample][inputs["attention_mask"][sample].bool()]
        assert_row(family, name, shown, of_row(report, sample), found.how)


METHODS = [
    pytest.param(lambda: Fixed(), id="fixed"),
    pytest.param(lambda: methods.create("spatten", keep=0.5, **OPTIONS), id="spatten"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation_with_and_without_cache_is_the_judges(family: str, method: Any) -> None:
    model, names = subject(family), ("one", "text", "large")
    inputs = inputs_of(family, names)
    with vtprune.patch(model, method()) as patch:
        cached = greedy(model, inputs, steps=4)
        report = patch.report()
        free = greedy(model, inputs, steps=4, use_cache=False)
        again = patch.report()
    assert cached.tolist() == free.tolist()
    assert report.heads == again.heads
    for sample, (name, found) in enumerate(zip(names, claims(report, family, names), strict=True)):
        judge = judge_of(family)
        with zeroed(judge, of_row(report, sample)):
            assert (
                judge.greedy(row_of(family, name), 4, banned=BANNED, **found.how) == cached[sample].tolist()
            )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_beams_and_repeated_rows(family: str) -> None:
    model, inputs = subject(family), inputs_of(family, ("one", "text"))
    with vtprune.patch(model, "spatten", **OPTIONS) as patch:
        cached = greedy(model, inputs, steps=4, num_beams=3)
        assert len(next(iter(patch.report().heads.values()))) == 6
        assert cached.tolist() == greedy(model, inputs, steps=4, num_beams=3, use_cache=False).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_heads_stay_silent_in_later_turns(family: str) -> None:
    """Behind the cache: text in one chunk, and a token alone."""
    model, judge, text = subject(family), judge_of(family), [30, 31, 32]
    inputs = row_of(family, "large")
    n = inputs["input_ids"].shape[1]
    with vtprune.patch(model, Fixed()) as patch:
        out = model(**inputs, use_cache=True)
        report, cache = patch.report(), out.past_key_values
        chunk = model(input_ids=torch.tensor([text[:2]]), past_key_values=cache).logits[0]
        last = model(input_ids=torch.tensor([text[2:]]), past_key_values=cache).logits[0]
        assert patch.report().heads == report.heads
    (found,) = claims(report, family, ["large"])
    with zeroed(judge, of_row(report, 0)):
        expected = judge.logits(inputs, continuation=text, **found.how)[n:]
    torch.testing.assert_close(torch.cat([chunk, last]), expected, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_heads_follow_their_rows() -> None:
    """A cache whose rows change places, as beams do."""
    model, judge, names = subject("llava"), judge_of("llava"), ("one", "large")
    inputs = inputs_of("llava", names)
    with vtprune.patch(model, Fixed()) as patch:
        cache = model(**inputs, use_cache=True).past_key_values
        report = patch.report()
        cache.reorder_cache(torch.tensor([1, 0]))
        mask = torch.cat([inputs["attention_mask"][[1, 0]], torch.ones(2, 1, dtype=torch.long)], 1)
        token = torch.tensor([[30], [30]])
        logits = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[:, -1]
    found = claims(report, "llava", names)
    for row, sample in enumerate((1, 0)):
        with zeroed(judge, of_row(report, sample)):
            how = found[sample].how
            expected = judge.logits(row_of("llava", names[sample]), continuation=[30], **how)[-1]
        torch.testing.assert_close(logits[row], expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", ["llava", "internvl"])
@torch.no_grad()
def test_a_new_picture_wakes_no_heads(family: str) -> None:
    """Its tokens are pruned, and heads stay as the first pass decided."""
    model, judge = subject(family), judge_of(family)
    first, new = row_of(family, "one"), LVLMS[family].batch([[43, Image(9), 44, 45]])
    whole = joined(family, first, new)
    n = first["input_ids"].shape[1]
    with vtprune.patch(model, "spatten", keep=1.0, **OPTIONS) as patch:
        cache = model(**first, use_cache=True).past_key_values
        heads = of_row(patch.report(), 0)
        call = {**new, "attention_mask": whole["attention_mask"], "past_key_values": cache}
        logits = model(**call, use_cache=True).logits[0]
        assert of_row(patch.report(), 0) == heads
    with zeroed(judge, heads):
        expected = judge.logits(whole)[n:]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_nothing_stays_behind(family: str) -> None:
    model, inputs = subject(family), inputs_of(family, NAMES)
    dense = model(**inputs).logits
    before = {id(m): (list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with vtprune.patch(model, "spatten", **OPTIONS):
        assert not torch.equal(model(**inputs).logits, dense)
    assert before == {id(m): (list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**inputs).logits, dense)


@torch.no_grad()
def test_all_heads_by_default() -> None:
    model, inputs = subject("llava"), inputs_of("llava", NAMES)
    hooks = {id(o_proj): len(o_proj._forward_pre_hooks) for o_proj, _ in projections(model)}
    with vtprune.patch(model, "spatten") as patch:
        logits, report = model(**inputs).logits, patch.report()
        assert hooks == {id(o_proj): len(o_proj._forward_pre_hooks) for o_proj, _ in projections(model)}
    assert report.heads == {}
    assert not any("heads" in note for note in report.notes)
    assert_logits("llava", NAMES, inputs, logits, report)


def test_report_tells_the_heads() -> None:
    with vtprune.patch(subject("llava"), Fixed()) as patch, torch.no_grad():
        subject("llava")(**inputs_of("llava", NAMES))
        report = patch.report()
        assert "silences heads from decoder layer 1 on" in repr(patch)
    assert report.to_dict()["heads"]["1"] == [[1, 3], [0, 1, 2, 3], [0, 2, 3], [1, 3]]
    assert report.to_dict()["heads"]["3"] == [[3], [0, 1, 2, 3], [3], [3]]
    assert "heads from decoder layer 3 on: [1, 4, 1, 1] of 4 per sample speak" in str(report)


def test_gradients_are_those_of_zeroed_heads_and_checkpointing_is_refused() -> None:
    model, judge, inputs = subject("llava"), judge_of("llava"), row_of("llava", "one")
    weights = [m.language_model.layers[1].self_attn.v_proj.weight for m in (model.model, judge.model.model)]
    with vtprune.patch(model, "spatten", keep=1.0, **OPTIONS) as patch:
        found = torch.autograd.grad(model(**inputs).logits.square().sum(), weights[0])[0]
        heads = of_row(patch.report(), 0)
        model.train()
        model.gradient_checkpointing_enable()
        try:
            with pytest.raises(vtprune.UnsupportedCallError, match="checkpointing"):
                model(**inputs)
        finally:
            model.gradient_checkpointing_disable()
            model.eval()
    with zeroed(judge, heads):
        expected = torch.autograd.grad(judge.model(**inputs).logits.square().sum(), weights[1])[0]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert float(expected.abs().max()) > 100 * TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Wrong(Fixed):
    """Decides wrongly about heads."""

    key: ClassVar[str] = "test-wrong-heads"
    layer: int = 1
    needs_: tuple[vtprune.Signal, ...] = ()
    answer: Any = None

    def head_stages(self, facts: vtprune.ModelFacts) -> list[HeadStage]:
        return [HeadStage(self.layer, lambda view: self.answer, self.needs_)]


def test_wrong_decisions_are_errors() -> None:
    model, inputs = subject("llava"), row_of("llava", "one")
    for answer, reason in (
        (None, "is no HeadSelection"),
        (HeadSelection(torch.ones(2, 4, dtype=torch.bool)), "is no HeadSelection of shape"),
        (HeadSelection(torch.zeros(1, 4, dtype=torch.bool)), "without any"),
    ):
        with vtprune.patch(model, Wrong(answer=answer)), pytest.raises(vtprune.VTPruneError, match=reason):
            model(**inputs)
    early, other = vtprune.Signal("decoder_head_outputs", 1), vtprune.Signal("text_attention", 0)
    for method, reason in (
        (Wrong(layer=9), "decoder layers"),
        (Wrong(needs_=(early,)), "not known yet"),
        (Wrong(layer=2, needs_=(other,)), "says nothing about heads"),
    ):
        with pytest.raises(vtprune.InvalidOptionError, match=reason):
            vtprune.patch(model, method)
    with pytest.raises(vtprune.InvalidOptionError, match="head stages only"):
        vtprune.patch(model, Probe(where=vtprune.Site("decoder", 2), signals=(early,)))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_received_attention_is_carried_across_removals(family: str) -> None:
    judge, names = judge_of(family), ("two", "text", "large")
    signals = tuple(vtprune.Signal("decoder_received", layer) for layer in range(3))
    before = [methods.create("random", keep=k, where="decoder", layer=i) for i, k in ((1, 0.7), (2, 0.5))]
    probe = Probe(keep=0.3, where=vtprune.Site("decoder", 3), signals=signals)
    with vtprune.patch(subject(family), [*before, probe]) as patch:
        subject(family)(**inputs_of(family, names))
        report = patch.report()
    seen = iter(probe.seen)
    for name, found in zip(names, claims(report, family, names), strict=True):
        row: Row = row_of(family, name)
        found.removed.pop(3, None)
        received = []
        for layer in range(3):
            weights = judge.attention(row, layer, removed=found.removed)
            gone = {c for first, columns in found.removed.items() if first <= layer for c in columns}
            asking = [c for c in range(weights.shape[1]) if c not in gone]
            received.append(weights[:, asking].sum(1))
        gone = {c for columns in found.removed.values() for c in columns}
        for unit in visual(family, name).units:
            _, index, values = next(seen)
            assert index.tolist() == [i for i, c in enumerate(unit.columns) if c not in gone]
            for signal, expected in zip(signals, received, strict=True):
                columns = [unit.columns[i] for i in index.tolist()]
                torch.testing.assert_close(values[signal], expected[:, columns], atol=1e-5, rtol=1e-4)
