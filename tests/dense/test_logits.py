"""Logits, losses, gradients and decisions of pruned LLaVA and Qwen2.5-VL are those of the dense reference, for any prompt."""

from __future__ import annotations

from typing import Any

import dense_reference as ref
import pytest
import torch
from dense.common import (
    DENSE_ON_LLAVA,
    EVERY_PAIR,
    FAMILIES,
    METHODS,
    PAIRS,
    SITES,
    TOLERANCE,
    assert_logits,
    batch,
    build,
    greedy,
    how,
    judge,
    kept_of,
    merge_of,
    options_of,
    patched,
    subject,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import vtprune
from vtprune.testing import IMAGE_TOKEN, VIDEO_TOKEN, llava_inputs, qwen_inputs

# ------------------------------------------------------------------------------------ the judge judges itself


@pytest.mark.parametrize(("family", "attention"), EVERY_PAIR)
@torch.no_grad()
def test_reference_without_pruning_is_the_stock_model(family: str, attention: str) -> None:
    reference, inputs = judge(family, attention), batch(family)
    stock = reference.model(**inputs).logits
    for sample, row in enumerate(reference.split(inputs)):
        frames = reference.frames(row)
        for frame in frames:
            by_hand = (
                reference.qwen_run(frame)[0] if family == "qwen" else reference.clip_run(frame.pixels)[0]
            )
            torch.testing.assert_close(reference.project(by_hand), frame.projected, atol=1e-5, rtol=0)
        keep_all = [{"decoder[2]": range(f.n)} for f in frames]
        for kept in ([{} for _ in frames], keep_all):
            shown = stock[sample][inputs["attention_mask"][sample].bool()]
            torch.testing.assert_close(reference.row_logits(row, kept), shown, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["clip", "qwen"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "keep-all"])
@torch.no_grad()
def test_judge_notices_a_wrong_index(family: str, method: str) -> None:
    """One swapped survivor, one missing survivor, or the wrong position policy must not pass."""
    model, reference, inputs = subject(family), judge(family), batch(family, "one")
    options = options_of(method, family)
    with patched(model, method, **options) as patch:
        logits = model(**inputs).logits
        report = patch.report()
    row = reference.split(inputs)[0]
    true = how(row, report, 0)
    if method == "visionzip":
        del true["merge"]
        assert (reference.row_logits(row, **true) - logits[0]).abs().max() > 1e-3  # merging matters
        return
    # The last site that removed something; those behind it kept what there was.
    sites, before = {}, list(range(report.images[0].layout.n_tokens))
    for site, index in true["kept"][0].items():
        if len(index) < len(before):
            free = next(i for i in before if i not in index.tolist())
            sites, last, before = {**sites, site: index.tolist()}, site, index.tolist()
    for wrong in (sorted([*before[1:], free]), before[1:]):
        if not wrong:
            continue
        logits_wrong = reference.row_logits(row, **{**true, "kept": [{**sites, last: wrong}]})
        assert (logits_wrong[-1] - logits[0, -1]).abs().max() > 1e-3
    other = () if true["dense_sites"] else tuple(sites)
    logits_wrong = reference.row_logits(row, **{**true, "dense_sites": other})
    assert (logits_wrong[-1] - logits[0, -1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize(("family", "attention"), EVERY_PAIR)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_keep_everything_changes_nothing(method: str, family: str, attention: str) -> None:
    model, inputs = subject(family, attention), batch(family)
    stock, text = model(**inputs).logits, greedy(model, inputs, 4)
    with patched(model, method, **options_of(method, family, keep=1.0)) as patch:
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(model(**inputs).logits[real], stock[real], atol=TOLERANCE, rtol=0)
        assert not patch.report().engaged
        assert torch.equal(greedy(model, inputs, 4), text)


@pytest.mark.parametrize(("family", "attention"), EVERY_PAIR)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_logits_equal_the_dense_reference(method: str, family: str, attention: str) -> None:
    model, reference = subject(family, attention), judge(family, attention)
    options = options_of(method, family)
    merge = merge_of(reference, method, options)
    with patched(model, method, **options) as patch:
        for kind in ("one", "two", "text", "ragged"):
            inputs = batch(family, kind)
            logits = model(**inputs).logits
            report = patch.report()
            assert_logits(reference, inputs, logits, report, merge)
            if method in ("keep-all",) or kind == "text":
                continue
            stock = reference.model(**inputs).logits
            assert (stock[0, -1] - logits[0, -1]).abs().max() > 1e-2, "this test could not fail"
            policy = "dense" if method in DENSE_ON_LLAVA and family != "qwen" else "original"
            if method in (*DENSE_ON_LLAVA, "fastv", "random", "stride"):
                assert set(report.positions.values()) == {policy}
                assert all(len(list(i.kept.values())[-1]) == 5 for i in report.images)


@pytest.mark.parametrize("positions", ["original", "dense"])
@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_site_and_position_policy(family: str, where: str, positions: str) -> None:
    if family == "qwen" and positions == "dense":
        with pytest.raises(vtprune.VTPruneError, match="M-RoPE"):
            vtprune.patch(subject(family), "random", keep=5, positions="dense", **SITES[where])
        return
    model, inputs = subject(family), batch(family)
    with patched(model, "random", keep=0.3, positions=positions, **SITES[where]) as patch:
        logits = model(**inputs).logits
        report = patch.report()
        assert set(report.positions.values()) == {positions}
        assert_logits(judge(family), inputs, logits, report)
        text = greedy(model, inputs, 1)
        for sample, row in enumerate(judge(family).split(inputs)):
            assert text[sample].tolist() == judge(family).greedy(row, 1, **how(row, report, sample))


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("where", ["vit", "decoder"])
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_other_layers(family: str, where: str, layer: int) -> None:
    if family == "clip" and (where, layer) == ("vit", 3):
        # Its output does not reach the features of a model that uses hidden_states[-2].
        with pytest.raises(vtprune.VTPruneError):
            vtprune.patch(subject(family), "random", keep=5, where=where, layer=layer)
        return
    model, inputs = subject(family), batch(family)
    with patched(model, "stride", keep=5, where=where, layer=layer) as patch:
        assert_logits(judge(family), inputs, model(**inputs).logits, patch.report())


@torch.no_grad()
def test_report_lists_pictures_in_reading_order() -> None:
    """Also where a video stands before a picture, whose features the model computes first."""
    with patched(subject("qwen"), "stride", keep=5) as patch:
        subject("qwen")(**qwen_inputs([[1, 10, (4, 6), 11], [1, (2, 3, 4), 31, (4, 4), (3, 2, 2), 33]]))
        grids = [
            (i.sample, i.layout.modality, i.layout.rows, i.layout.cols, i.layout.time)
            for i in patch.report().images
        ]
    assert grids == [
        (0, "image", 4, 6, 0),
        (1, "video", 3, 4, 0),
        (1, "video", 3, 4, 1),
        (1, "image", 4, 4, 0),
        (1, "video", 2, 2, 0),
        (1, "video", 2, 2, 1),
        (1, "video", 2, 2, 2),
    ]


@pytest.mark.parametrize("contextual", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_visionzip_merging(family: str, contextual: float) -> None:
    model, inputs = subject(family), batch(family)
    options = {**options_of("visionzip", family), "contextual": contextual}
    with patched(model, "visionzip", **options) as patch:
        merge = merge_of(judge(family), "visionzip", options)
        assert_logits(judge(family), inputs, model(**inputs).logits, patch.report(), merge)


# ------------------------------------------------------------------------------------ decisions


@pytest.mark.parametrize("keep", [3, 0.5])
@pytest.mark.parametrize(("family", "attention"), EVERY_PAIR)
@pytest.mark.parametrize("method", ["divprune", "fastv", "stride", "visionzip", "vtc-cls"])
@torch.no_grad()
def test_decisions_equal_a_literal_recomputation(
    method: str, family: str, attention: str, keep: float
) -> None:
    model, reference, inputs = subject(family, attention), judge(family, attention), batch(family)
    options = options_of(method, family, keep)
    scorer = options.get("scorer", "cls")
    with patched(model, method, **options) as patch:
        model(**inputs)
        report = patch.report()
    half = round(0.5 * reference.used_vit_layers)
    for sample, row in enumerate(reference.split(inputs)):
        found = [list(kept.values())[-1].tolist() for kept in kept_of(report, sample, row)]
        frames = reference.frames(row)
        counts = [ref.budget(keep, f.n) for f in frames]
        if method == "fastv":
            expected = ref.fastv_decisions(reference, row, keep, 2) if frames else []
        elif method == "stride":
            expected = [ref.stride_decision(f.n, k) for f, k in zip(frames, counts, strict=True)]
        elif method == "divprune":
            expected = [ref.divprune_decision(f.projected, k) for f, k in zip(frames, counts, strict=True)]
        elif method == "vtc-cls":
            expected = [
                ref.vtc_cls_decision(reference, f, k, half, scorer)
                for f, k in zip(frames, counts, strict=True)
            ]
        else:
            expected = [
                sorted(ref.visionzip_plan(reference, f, k, 10 / 64, scorer))
                for f, k in zip(frames, counts, strict=True)
            ]
        assert found == expected


@torch.no_grad()
def test_random_draws() -> None:
    """Another seed or picture draws other tokens; the same picture draws the same ones."""
    model, drawn = subject("clip"), []
    for seed, picture in ((0, 0), (0, 0), (1, 0), (0, 1)):
        with patched(model, "random", keep=6, seed=seed) as patch:
            model(**batch("clip", "one", seed=picture))
            drawn.append(patch.report().images[0].kept["projector"].tolist())
    assert drawn[0] == drawn[1]
    assert drawn[0] not in drawn[2:]
    assert all(len(set(d)) == 6 and d == sorted(d) for d in drawn)


# ------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_equal_the_shortened_sequence(method: str, family: str, attention: str) -> None:
    model, reference = build(family, attention), ref.Reference(build(family, attention))
    inputs = batch(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[(labels == IMAGE_TOKEN) | (labels == VIDEO_TOKEN)] = -100
    for row, mask in zip(labels, inputs["attention_mask"], strict=True):
        row[int(mask.argmax())] = -100  # the first token has nothing before it
    options = options_of(method, family)
    with patched(model, method, **options) as patch:
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        report = patch.report()
    merge = merge_of(reference, method, options)
    logits, targets = [], []
    for r, row in enumerate(reference.split(inputs)):
        shown = reference.row_logits(row, **how(row, report, r, merge))
        target = labels[r][inputs["attention_mask"][r].bool()][1:]
        logits.append(shown[:-1][target != -100])
        targets.append(target[target != -100])
    expected = cross_entropy(torch.cat(logits), torch.cat(targets))
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    wanted = {name: p.grad for name, p in reference.model.named_parameters() if p.grad is not None}
    names = [n for n in wanted if "projector" in n or "merger" in n or "embed_tokens" in n]
    assert len(names) > 3
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-3, msg=name)


# ------------------------------------------------------------------------------------ anything goes


prompt = st.lists(st.one_of(st.just("image"), st.integers(10, 60)), min_size=1, max_size=6)


@pytest.mark.parametrize("where", SITES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    prompts=st.lists(prompt, min_size=1, max_size=3),
    keep=st.one_of(st.integers(1, 15), st.floats(0.05, 0.95)),
    padding=st.sampled_from(["left", "right"]),
    positions=st.sampled_from(["original", "dense"]),
)
@torch.no_grad()
def test_any_prompt(where: str, prompts: list[list[Any]], keep: float, padding: str, positions: str) -> None:
    model, reference = subject("clip"), judge("clip")
    inputs = llava_inputs([[1, *p, 7] for p in prompts], padding=padding)
    with patched(model, "random", keep=keep, positions=positions, **SITES[where]) as patch:
        logits = model(**inputs).logits
        report = patch.report()
        assert_logits(reference, inputs, logits, report)
        if padding == "left":
            text = greedy(model, inputs, 2)
            for sample, row in enumerate(reference.split(inputs)):
                assert text[sample].tolist() == reference.greedy(row, 2, **how(row, report, sample))
