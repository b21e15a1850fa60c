"""Logits, counts, units and physical lengths of every method on every family, judged row by row."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from contract.common import CELLS, FAMILIES, KEY_CELLS, TOLERANCE, judge_of, options_of, patched, subject
from contract.evidence import (
    assert_budget,
    assert_counts,
    assert_lengths,
    assert_logits,
    assert_units,
    budget,
    claims,
    decisions,
    inputs_of,
    merges_of,
    prompts_of,
    ragged,
    row_of,
    visual,
)
from torch import Tensor

import vtprune
from vtprune import methods
from vtprune.testing.matrix import facts_of

RANDOM = [pytest.param(f, "random", id=f"{f}-random") for f in FAMILIES]
SITES: dict[str, dict[str, Any]] = {
    "encoder": {"where": "encoder"},
    "projector": {"where": "projector"},
    "decoder 1": {"where": "decoder", "layer": 1},
    "decoder 3": {"where": "decoder", "layer": 3},
}


def model_of(family: str, attention: str = "sdpa") -> Any:
    """The shared model; its cache tells spelled-out defaults from others."""
    return subject(family) if attention == "sdpa" else subject(family, attention)


@torch.no_grad()
def forward(
    family: str, names: tuple[str, ...], padding: str = "left", attention: str = "sdpa", **more: Any
) -> Any:
    """The subject's output for some rows."""
    return model_of(family, attention)(**inputs_of(family, names, padding), **more)


@functools.cache
def stock_logits(
    family: str, names: tuple[str, ...], padding: str = "left", attention: str = "sdpa"
) -> Tensor:
    """Those of the same model while it is not patched."""
    logits: Tensor = forward(family, names, padding, attention).logits
    return logits


def judge_cell(
    family: str,
    method: str,
    names: tuple[str, ...],
    padding: str,
    keep: int | float,
    attention: str = "sdpa",
    **more: Any,
) -> list[dict[str, Any]]:
    """One call of one cell: units, counts, logits of every row, and that something was at stake."""
    inputs = inputs_of(family, names, padding)
    options = options_of(family, method, keep, **more)
    model = model_of(family, attention)
    stock = stock_logits(family, names, padding, attention)
    with decisions(method) as seen, vtprune.patch(model, method, **options) as patch:
        logits = forward(family, names, padding, attention).logits
        report = patch.report()
    assert_units(report, family, names)
    assert_budget(report, method, keep)
    merges = merges_of(family, names, report, seen)
    assert_logits(family, names, inputs, logits, report, merges)
    last = [int(row.nonzero().max()) for row in inputs["attention_mask"]]
    moved = [float((stock[i, c] - logits[i, c]).abs().max()) for i, c in enumerate(last)]
    pictures = [bool(visual(family, name).units) for name in names]
    if method != "keep-all":
        assert min(m for m, p in zip(moved, pictures, strict=True) if p) > 10 * TOLERANCE, "cannot fail"
    assert report.engaged == (method != "keep-all")
    return merges


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("keep", [0.5, 3])
@pytest.mark.parametrize(("family", "method"), CELLS)
def test_a_ragged_batch_equals_its_rows(family: str, method: str, keep: int | float, padding: str) -> None:
    judge_cell(family, method, ragged(family), padding, keep)


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
def test_eager_attention(family: str, method: str) -> None:
    judge_cell(family, method, ragged(family), "left", 0.5, "eager")


@pytest.mark.parametrize(("family", "method"), [p for p in CELLS if p.values[1] == "visionzip"])
def test_half_of_the_budget_is_merged(family: str, method: str) -> None:
    """By default the smallest pictures have no merged token."""
    merges = judge_cell(family, method, ragged(family), "left", 0.5, contextual=0.5)
    assert all(bool(m["merged"]) == (n != "text") for m, n in zip(merges, ragged(family), strict=True))


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
def test_logits_to_keep(family: str, method: str) -> None:
    """The last columns of the caller's shape, whatever was removed among them."""
    names = ragged(family)
    with patched(family, method):
        whole = forward(family, names).logits
        for last in (1, 6):
            part = forward(family, names, logits_to_keep=last).logits
            torch.testing.assert_close(part, whole[:, -last:], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_other_rows(family: str, method: str) -> None:
    """Adjacent pictures, a video before a picture, two videos in a row."""
    names = [n for n in prompts_of(family) if n not in ragged(family)]
    judge_cell(family, method, tuple(names), "left", 0.3)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_keeping_everything_is_stock(family: str, method: str) -> None:
    names = tuple(prompts_of(family))
    stock = stock_logits(family, names)
    with patched(family, method, 1.0) as patch:
        logits = forward(family, names).logits
        report = patch.report()
    real = inputs_of(family, names)["attention_mask"].bool()
    torch.testing.assert_close(logits[real], stock[real], atol=TOLERANCE, rtol=TOLERANCE)
    assert not report.engaged
    assert_counts(report, 1.0)
    assert_units(report, family, names)


@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize(("family", "method"), RANDOM)
def test_random_at_every_site(family: str, method: str, where: str) -> None:
    options, names = SITES[where], ragged(family)
    if options["where"] not in facts_of(family)[2].sites:
        pytest.skip(f"declared: {family} has no site {where!r}")
    with patched(family, method, 0.4, **options) as patch:
        for padding in ("left", "right"):
            inputs = inputs_of(family, names, padding)
            logits = forward(family, names, padding).logits
            assert_units(patch.report(), family, names)
            assert_counts(patch.report(), 0.4)
            assert_logits(family, names, inputs, logits, patch.report())


@pytest.mark.parametrize(("family", "method"), RANDOM)
def test_random_inside_the_encoder(family: str, method: str) -> None:
    """Structure only: features of survivors change there."""
    if "vit" not in facts_of(family)[2].sites:
        with pytest.raises(vtprune.UnsupportedMethodError, match="no site 'vit'"):
            vtprune.patch(subject(family), method, keep=0.5, where="vit", layer=1)
        return
    names = ragged(family)
    with patched(family, method, 0.5, where="vit", layer=1) as patch:
        out = forward(family, names, use_cache=True)
        report = patch.report()
        assert_units(report, family, names)
        assert_counts(report, 0.5)
        assert [list(i.kept) for i in report.images] == [["vit[1]"]] * len(report.images)
        assert_lengths(family, names, out, report)
        mask = inputs_of(family, names)["attention_mask"].bool()
        for sample, name in enumerate(names):
            alone = forward(family, (name,)).logits[0]
            torch.testing.assert_close(
                out.logits[sample][mask[sample]], alone, atol=TOLERANCE, rtol=TOLERANCE
            )


def chains(family: str) -> dict[str, list[vtprune.Method]]:
    """Methods that act one after the other."""
    make = methods.create
    scorer = {} if "cls_attention" in facts_of(family)[2].signals else {"scorer": "received"}
    policy = "original" if facts_of(family)[2].mrope else "dense"
    found = {
        "stride, fastv": [make("stride", keep=0.75), make("fastv", keep=0.3, layer=2)],
        "two in the decoder": [
            make("random", keep=0.75, where="decoder", layer=1),
            make("random", keep=0.3, where="decoder", layer=3, seed=1),
        ],
        "dense, original, dense": [
            make("divprune", keep=0.8),
            make("stride", keep=0.5, where="decoder", layer=1),
            make("random", keep=0.3, where="decoder", layer=2, positions=policy),
        ],
    }
    if "received_attention" in facts_of(family)[2].signals:
        found["vtc-cls, fastv"] = [make("vtc-cls", keep=0.75, **scorer), make("fastv", keep=0.3, layer=1)]
    return found


@pytest.mark.parametrize(
    "chain", ["stride, fastv", "two in the decoder", "dense, original, dense", "vtc-cls, fastv"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_compositions(family: str, chain: str) -> None:
    names, parts = ragged(family), chains(family).get(chain)
    if parts is None:
        pytest.skip("declared: no signal of the encoder")
    with vtprune.patch(subject(family), parts) as patch:
        for padding in ("left", "right"):
            inputs = inputs_of(family, names, padding)
            logits = forward(family, names, padding).logits
            report = patch.report()
            assert_units(report, family, names)
            for image in report.images:
                assert [len(k) for k in image.kept.values()] == [
                    budget(part.keep, image.tokens_in) for part in parts
                ]
            assert_logits(family, names, inputs, logits, report)
        assert len(report.positions) == len(parts)
        assert len({len(c.removed) for c in claims(report, family, names)} - {0}) == 1


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_tokens_are_gone(family: str, method: str) -> None:
    """Stock layers process, and the cache holds, exactly what the report counts; alone and in a batch."""
    layers = judge_of(family).layers
    path = next(n for n, m in judge_of(family).model.named_modules() if m is layers)
    lengths: list[int] = []

    def measure(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        lengths.append(hidden.shape[1])

    with patched(family, method) as patch:
        handles = [
            layer.register_forward_hook(measure, with_kwargs=True)
            for layer in subject(family).get_submodule(path)
        ]
        try:
            for names in (("one",), ragged(family)):
                lengths.clear()
                out = forward(family, names, use_cache=True)
                assert_lengths(family, names, out, patch.report())
                assert lengths == [max(entry.tokens) for entry in patch.report().layers]
                if method != "keep-all":
                    assert lengths[-1] < inputs_of(family, names)["input_ids"].shape[1]
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_stock(family: str) -> None:
    """A batch without pictures passes a patched model untouched, and the report says so."""
    row = row_of(family, "text")
    with patched(family, "stride") as patch, torch.no_grad():
        logits = subject(family)(**row).logits[0]
        assert patch.report().images == []
        assert "no visual tokens" in str(patch.report())
    torch.testing.assert_close(logits, judge_of(family).logits(row), atol=TOLERANCE, rtol=TOLERANCE)
