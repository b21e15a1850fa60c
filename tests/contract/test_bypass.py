"""Methods that carry tokens past layers in training: against the stock layers run on lists of tokens, and their limits."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contract.common import FAMILIES, batch_of, rows_of
from contract.test_lifecycle import (
    BoomError,
    clone_state,
    decoder_of,
    failing,
    hook_count,
    snapshot,
)
from contract.test_training import IGNORED, gradients, with_labels
from judge import rebuilt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from versions import HOOKS_INSIDE_CHECKPOINTS

import vtprune
from vtprune.methods import RandomLTD
from vtprune.testing.zoo import LVLMS

METHOD = "random-ltd"
CELLS = [pytest.param(f, METHOD, id=f"{f}-{METHOD}") for f in FAMILIES]
MAIN = [pytest.param(f, METHOD, id=f"{f}-{METHOD}") for f in ("llava", "qwen2_5_vl", "internvl")]
HALF = {"keep": 0.5, "increase": 1}

Through = Mapping[int, Sequence[int]]


@functools.cache
def subject(family: str, attention: str = "sdpa") -> Any:
    """The model that is trained; apart from those of other tests, which are in evaluation mode."""
    return LVLMS[family].build(attention=attention).train()


@functools.cache
def twin(family: str) -> Any:
    """A model that is never patched, with eager attention, so that every layer is given its mask."""
    return rebuilt(LVLMS[family].build(), "eager").train()


def labelled(family: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in test_training, but on either side of padding."""
    inputs = with_labels(family, inputs)
    if family == "paligemma":
        mask = inputs["attention_mask"]
        suffix = (mask.flip(1).cumsum(1).flip(1) <= 3) & mask.bool()
        inputs["token_type_ids"] = suffix.long()
        inputs["labels"] = inputs["input_ids"].masked_fill(~suffix, IGNORED)
    return {**inputs, "labels": inputs["labels"].masked_fill(inputs["attention_mask"] == 0, IGNORED)}


def plainly(layer: Any, columns: Sequence[int]) -> Any:
    """The stock forward of a layer, run on a list of the tokens of one row."""
    stock = layer.forward

    def forward(hidden: Tensor, **kwargs: Any) -> Any:
        assert len(hidden) == 1
        part = torch.stack([hidden[0, c] for c in columns])[None]
        mask = kwargs["attention_mask"][0, 0]
        rows = [torch.stack([mask[q, k] for k in columns]) for q in columns]
        kwargs["attention_mask"] = torch.stack(rows)[None, None]
        kwargs["position_embeddings"] = tuple(
            torch.stack([t[..., c, :] for c in columns], -2) for t in kwargs["position_embeddings"]
        )
        kwargs["position_ids"] = None
        out = stock(part, **kwargs)
        made = out[0] if isinstance(out, tuple) else out
        whole = [made[0, columns.index(c)] if c in columns else hidden[0, c] for c in range(hidden.shape[1])]
        full = torch.stack(whole)[None]
        return (full, *out[1:]) if isinstance(out, tuple) else full

    return forward


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """The output of every decoder layer."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook) for layer in decoder_of(model).layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def reference(family: str, row: dict[str, Tensor], through: Through) -> tuple[Tensor, list[Tensor]]:
    """Logits [n, V] and the outputs [n, D] of all decoder layers for one row without padding."""
    model = twin(family)
    layers = decoder_of(model).layers
    for number, columns in through.items():
        layers[number].forward = plainly(layers[number], list(columns))
    try:
        with watched(model) as seen:
            logits = model(**{k: v for k, v in row.items() if k != "labels"}, use_cache=False).logits[0]
    finally:
        for number in through:
            del layers[number].forward
    return logits, [x[0] for x in seen]


def claimed(report: vtprune.Report, sample: int, mask: Tensor) -> dict[int, list[int]]:
    """Layer -> columns of a row alone that the report says went through it."""
    real = mask.nonzero()[:, 0].tolist()
    return {layer: [real.index(c) for c in rows[sample].tolist()] for layer, rows in report.through.items()}


def assert_close(found: Tensor, wanted: Tensor) -> None:
    worst = float((found - wanted).detach().abs().max())
    assert worst <= 1e-5 * (1 + float(wanted.detach().abs().max())), worst


def judge(family: str, padding: str, attention: str = "sdpa", **options: Any) -> vtprune.Report:
    """One training step of a batch of all rows against every row alone; returns its report."""
    model = subject(family, attention)
    inputs = labelled(family, batch_of(family, padding=padding))
    model.zero_grad(set_to_none=True)
    dense = model(**inputs).loss.detach()
    with watched(model) as seen, vtprune.patch(model, METHOD, **{**HALF, **options}) as patch:
        out = model(**inputs)
        out.loss.backward()
        report = patch.report()
    found = gradients(model)
    terms = []
    for sample, row in enumerate(rows_of(family).values()):
        alone = labelled(family, LVLMS[family].batch([row]))
        mask = inputs["attention_mask"][sample].bool()
        logits, layers = reference(family, alone, claimed(report, sample, mask))
        assert_close(out.logits[sample][mask], logits)
        for mine, theirs in zip(seen, layers, strict=True):
            assert mine.shape[:2] == inputs["input_ids"].shape
            assert_close(mine[sample][mask], theirs)
        labels = alone["labels"][0, 1:]
        terms.append((logits[:-1][labels != IGNORED], labels[labels != IGNORED]))
    expected = cross_entropy(torch.cat([t[0] for t in terms]), torch.cat([t[1] for t in terms]))
    expected.backward()
    assert_close(out.loss, expected)
    assert (out.loss - dense).abs() > 1e-3, "this test could not fail"
    wanted = gradients(twin(family))
    assert len(wanted) > 20
    for name in {*found, *wanted}:
        zero = torch.zeros(())
        assert_close(found.get(name, zero), wanted.get(name, zero))
    return report


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("family", "method"), CELLS)
def test_a_training_step_equals_stock_layers_on_lists_of_tokens(
    family: str, method: str, padding: str
) -> None:
    report = judge(family, padding)
    depth = len(report.layers)
    lengths = report.layers[0].tokens
    assert report.engaged
    assert report.training_step == 0
    assert sorted(report.through) == list(range(1, depth - 1))
    for layer in report.layers:
        if layer.layer not in report.through:
            assert layer.tokens == lengths
            continue
        assert layer.tokens == [int(n / 2 + 0.5) for n in lengths]
        assert [len(c) for c in report.through[layer.layer]] == layer.tokens
        for columns in report.through[layer.layer]:
            assert columns.tolist() == sorted(set(columns.tolist()))
    drawn = [[c.tolist() for c in rows] for rows in report.through.values()]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i]), "layers share a draw"


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_all_text_goes_through_where_visual_tokens_are_drawn(family: str, method: str) -> None:
    """Rows differ in length then, also without padding."""
    report = judge(family, "left", tokens="visual", keep=3)
    visual = report.visual_tokens_in
    for layer in report.through:
        entry = report.layers[layer]
        assert entry.visual_tokens == [min(3, v) for v in visual]
        pairs = zip(entry.tokens, entry.visual_tokens, strict=True)
        text = [n - v for n, v in pairs]
        assert text == [n - v for n, v in zip(report.layers[0].tokens, visual, strict=True)]


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_eager_attention_and_an_absolute_length(family: str, method: str) -> None:
    """Rows shorter than that are whole."""
    report = judge(family, "right", "eager", keep=8)
    for layer in report.through:
        assert report.layers[layer].tokens == [min(8, n) for n in report.layers[0].tokens]


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_all_tokens_are_exactly_dense(family: str, method: str) -> None:
    model = subject(family)
    inputs = labelled(family, batch_of(family))
    stock = model(**inputs)
    stock.loss.backward()
    wanted = gradients(model)
    with vtprune.patch(model, method, keep=1.0) as patch:
        out = model(**inputs)
        out.loss.backward()
        report = patch.report()
    found = gradients(model)
    assert torch.equal(out.logits, stock.logits)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not report.engaged
    assert any("lets all tokens through" in note for note in report.notes)


@pytest.mark.parametrize(("family", "method"), CELLS)
@torch.no_grad()
def test_evaluation_is_dense_and_says_so(family: str, method: str) -> None:
    model = subject(family)
    inputs = batch_of(family)
    more = {"max_new_tokens": 3, "do_sample": False}
    model.eval()
    try:
        stock, text = model(**inputs).logits, model.generate(**inputs, **more)
        with vtprune.patch(model, method, **HALF) as patch:
            assert torch.equal(model(**inputs).logits, stock)
            report = patch.report()
            assert not report.engaged
            assert report.training_step is None
            assert any("in training only" in n and "evaluation mode" in n for n in report.notes)
            assert str(report.notes[0]) in str(report)
            assert torch.equal(model.generate(**inputs, **more), text)
            model(**batch_of(family, "text"))
            assert any("in training only" in note for note in patch.report().notes)
            model.train()
            # generate() of a model in training mode is no training step, with and without a cache.
            for use_cache in (True, False):
                assert torch.equal(model.generate(**inputs, **more, use_cache=use_cache), text)
                assert any("generate() ran" in note for note in patch.report().notes)
            model(**inputs)
            assert patch.report().training_step == 0
            assert patch.report().engaged
    finally:
        model.train()


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_undo_is_exact_also_after_errors(family: str, method: str) -> None:
    model = subject(family)
    inputs = labelled(family, batch_of(family))
    before, tensors, hooks = snapshot(model), clone_state(model), hook_count(model)
    stock = model(**inputs).logits.detach()
    with vtprune.patch(model, method, **HALF) as patch:
        first = model(**inputs).logits.detach()
        assert not torch.equal(first, stock)
        for layer in decoder_of(model).layers:
            with failing(layer.self_attn), pytest.raises(BoomError):
                model(**inputs)
        model(**inputs)
        assert patch.report().training_step == 1, "a failed call counts as a step"
        assert patch.report().engaged
    assert snapshot(model) == before
    assert hook_count(model) == hooks
    assert torch.equal(model(**inputs).logits, stock)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tensors.values(), strict=True))


@pytest.mark.parametrize(("family", "method"), MAIN)
def test_the_schedule_counts_training_passes(family: str, method: str) -> None:
    model = subject(family)
    inputs = batch_of(family, "one")
    n = inputs["input_ids"].shape[1]
    with vtprune.patch(model, method, keep=4, increase=2, steps=5) as patch:
        for step in range(7):
            model(**inputs)
            length = min(n, (m := int(step / 5 * (n - 4) + 4)) - m % 2)
            report = patch.report()
            assert report.training_step == step
            assert report.layers[1].tokens == [length]
            assert report.engaged == (length < n)
            model.eval()
            model(**inputs)
            assert patch.report().layers[1].tokens == [n]
            model.train()
    columns = []
    for first_step in (0, 0, 3):
        with vtprune.patch(model, method, **HALF, first_step=first_step) as patch:
            model(**inputs)
            columns.append(patch.report().through[1][0].tolist())
            if not first_step:
                for _ in range(3):
                    model(**inputs)
                columns.append(patch.report().through[1][0].tolist())
    assert columns[0] == columns[2] != columns[1]
    assert columns[1] == columns[3] == columns[4], "a resumed run goes on with the same draws"


@pytest.mark.parametrize(("family", "method"), MAIN)
def test_text_alone_is_bypassed_too(family: str, method: str) -> None:
    model = subject(family)
    inputs = LVLMS[family].batch([[20, 21, 22, 23, 24, 25, 26], [20, 21, 22]], padding="left")
    with vtprune.patch(model, method, **HALF) as patch:
        out = model(**inputs).logits
        report = patch.report()
        assert report.images == []
        assert report.engaged
        assert [layer.tokens for layer in report.layers[:2]] == [[7, 3], [4, 2]]
        assert "no visual tokens" in str(report)
        assert "carried past" in str(report)
        model(**batch_of(family))
        assert patch.report().training_step == 1
    for sample, row in enumerate(inputs["attention_mask"].bool()):
        alone = {k: v[sample : sample + 1, row] for k, v in inputs.items()}
        logits, _ = reference(family, alone, claimed(report, sample, row))
        assert_close(out[sample][row], logits)


@pytest.mark.parametrize(("family", "method"), MAIN)
def test_gradient_checkpointing(family: str, method: str) -> None:
    model = LVLMS[family].build().train()
    inputs = labelled(family, batch_of(family))
    losses, found = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with vtprune.patch(model, method, **HALF) as patch:
            if checkpointing and HOOKS_INSIDE_CHECKPOINTS:
                with pytest.raises(vtprune.UnsupportedCallError, match="checkpointing"):
                    model(**inputs)
                return
            losses.append(model(**inputs).loss)
            losses[-1].backward()
            assert patch.report().engaged
            found.append(gradients(model))
    assert torch.equal(*losses)
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


@pytest.mark.parametrize(("family", "method"), MAIN)
def test_pruning_and_bypassing_together(family: str, method: str) -> None:
    """What is left behind a pruning stage is drawn from; columns stay those of the prompt."""
    model = subject(family)
    inputs = batch_of(family)
    stages = [vtprune.methods.create("stride", keep=0.5, where="decoder", layer=2), RandomLTD(**HALF)]
    with vtprune.patch(model, stages) as patch:
        model(**inputs).logits.sum().backward()
        report = patch.report()
    model.zero_grad(set_to_none=True)
    whole, pruned = report.layers[0].tokens, report.layers[3].tokens
    assert pruned < whole
    assert report.layers[1].tokens == [int(n / 2 + 0.5) for n in whole]
    assert report.layers[2].tokens == [int(n / 2 + 0.5) for n in pruned]
    for sample, columns in enumerate(report.through[2]):
        mine = [i for i in report.images if i.sample == sample]
        dropped = sum(i.tokens_in - i.tokens_out for i in mine)
        assert whole[sample] - pruned[sample] == dropped
        assert inputs["attention_mask"][sample, columns].all()
    with pytest.raises(vtprune.InvalidOptionError, match="layer 1"):
        vtprune.patch(model, [vtprune.methods.create("fastv", keep=0.5, layer=2), RandomLTD(**HALF)])
    with pytest.raises(vtprune.InvalidOptionError, match="at most once"):
        vtprune.patch(model, [RandomLTD(**HALF), RandomLTD(**HALF)])


@pytest.mark.parametrize(("family", "method"), MAIN)
def test_what_cannot_be_right_is_refused(family: str, method: str) -> None:
    from transformers import DynamicCache

    model = subject(family)
    inputs = batch_of(family)
    with vtprune.patch(model, method, **HALF) as patch:
        with pytest.raises(vtprune.UnsupportedCallError, match="past_key_values"):
            model(**inputs, past_key_values=DynamicCache(), use_cache=True)
        out = model(**inputs, use_cache=True)
        assert out.past_key_values is None
        assert any("no key-value cache" in note for note in patch.report().notes)
        hooks = decoder_of(model).layers[1]._forward_hooks
        stolen = hooks.pop(next(iter(hooks)))
        assert stolen is not None
        for call in (inputs, batch_of(family, "text")):
            with pytest.raises(vtprune.InertPruningError, match="removed by other code"):
                model(**call)


@pytest.mark.parametrize(("family", "method"), MAIN)
def test_hidden_states_have_the_full_length(family: str, method: str) -> None:
    """Whoever asked for them before the patch, too: their recorders are hooks on the same layers."""
    model = subject(family)
    inputs = batch_of(family)
    before = model(**inputs, output_hidden_states=True).hidden_states
    with vtprune.patch(model, method, **HALF):
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert [s.shape for s in states] == [s.shape for s in before]
    assert torch.equal(states[1], before[1])
    assert not torch.equal(states[2], before[2])


@pytest.mark.parametrize(("family", "method"), MAIN)
def test_frozen_layers_pass_gradients_on(family: str, method: str) -> None:
    """Only what stands in front of the language model learns."""
    model = subject(family)
    inputs = labelled(family, batch_of(family))
    with vtprune.patch(model, method, **HALF):
        model(**inputs).loss.backward()
        wanted = gradients(model)
    decoder_of(model).requires_grad_(False)
    try:
        with vtprune.patch(model, method, **HALF):
            model(**inputs).loss.backward()
            found = gradients(model)
    finally:
        model.requires_grad_(True)
    assert found
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4)
