"""Calls and options that cannot be right are refused before any damage; what cannot be ranked is an error or a note."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense.common import (
    ALL_SITES,
    METHODS,
    SITES,
    Scripted,
    assert_logits,
    batch,
    build,
    judge,
    merge_of,
    options_of,
    patched,
    snapshot,
    subject,
)
from torch import nn

import vtprune
from vtprune.testing import qwen_inputs

# ------------------------------------------------------------------------------------ calls


def refused_calls(model: Any, family: str) -> dict[str, Callable[[], Any]]:
    """Calls that cannot be pruned correctly."""
    inputs = batch(family, "one")
    n = inputs["input_ids"].shape[1]
    greedy_options = {"max_new_tokens": 3, "do_sample": False}
    square = torch.ones(1, 1, n, n).tril().bool()
    embeds = judge(family).decoder.embed_tokens(inputs["input_ids"])
    return {
        "static cache": lambda: model.generate(**inputs, cache_implementation="static", **greedy_options),
        "chunked prefill": lambda: model.generate(**inputs, prefill_chunk_size=7, **greedy_options),
        "4D mask": lambda: model(**{**inputs, "attention_mask": square}),
        "embeddings": lambda: model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]),
    }


@pytest.mark.parametrize("where", ["encoder", "decoder"])
@pytest.mark.parametrize("call", ["static cache", "chunked prefill", "4D mask", "embeddings"])
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_refused_before_any_damage(family: str, call: str, where: str) -> None:
    model, inputs = build(family), batch(family)
    stock = model(**inputs).logits
    before = snapshot(model)
    with patched(model, "stride", keep=5, **SITES[where]) as patch:
        armed = snapshot(model)
        with pytest.raises(vtprune.VTPruneError) as caught:
            refused_calls(model, family)[call]()
        assert len(str(caught.value)) > 30
        assert snapshot(model) == armed
        assert_logits(judge(family), inputs, model(**inputs).logits, patch.report())
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("method", ["vtc-cls", "fastv"])
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_unpatched_continuation_is_refused(family: str, method: str) -> None:
    model, inputs = build(family), batch(family, "one")
    with patched(model, method, **options_of(method, family)):
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(vtprune.VTPruneError):
        model(input_ids=torch.tensor([[21]]), past_key_values=cache)
    other = build(family)
    with pytest.raises(vtprune.VTPruneError):
        other(input_ids=torch.tensor([[21]]), past_key_values=cache)


# ------------------------------------------------------------------------------------ patches and scores


def refused_patches() -> dict[str, tuple[Any, dict[str, Any], str, str]]:
    """id -> model family, options, method, pattern of the message."""
    return {
        "option": ("clip", {"kepe": 0.5}, "fastv", "'keep'"),
        "method": ("clip", {"keep": 0.5}, "fastvv", "'fastv'"),
        "method far off": ("clip", {"keep": 0.5}, "qqq", "vtc-cls"),
        "keep=0": ("clip", {"keep": 0}, "fastv", "keep=1"),
        "keep=0.0": ("clip", {"keep": 0.0}, "fastv", "0.05"),
        "keep=1.5": ("clip", {"keep": 1.5}, "fastv", "1.0|keep=2"),
        "keep=-3": ("clip", {"keep": -3}, "fastv", "keep=1"),
        "keep=True": ("clip", {"keep": True}, "fastv", "int"),
        "keep=nan": ("clip", {"keep": float("nan")}, "fastv", "ratio"),
        "layer": ("clip", {"keep": 5, "layer": 9}, "fastv", "1 to 3"),
        "positions": ("clip", {"keep": 5, "positions": "densee"}, "fastv", "'dense'"),
        "cls": ("siglip", {"keep": 5}, "vtc-cls", "received"),
        "cls qwen": ("qwen", {"keep": 5}, "visionzip", "received"),
        "linear": ("linear", {"keep": 5}, "fastv", "(?i)llava"),
        "text model": ("llama", {"keep": 5}, "fastv", "(?i)llava"),
    }


@pytest.mark.parametrize("case", refused_patches())
@torch.no_grad()
def test_refused_patches_name_the_right_thing(case: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    family, options, method, pattern = refused_patches()[case]
    model: Any
    if family == "linear":
        model = nn.Linear(3, 3)
    elif family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    else:
        model = build(family)
        model(**batch(family))
    before = snapshot(model)
    with pytest.raises(vtprune.VTPruneError, match=pattern):
        vtprune.patch(model, method, **options)
    assert snapshot(model) == before


@torch.no_grad()
def test_patching_twice_is_refused() -> None:
    model = build("clip")
    with patched(model, "stride", keep=5), pytest.raises(vtprune.VTPruneError):
        vtprune.patch(model, "fastv", keep=5)
    with pytest.raises(vtprune.VTPruneError):
        vtprune.unpatch(model)
    vtprune.patch(model, "fastv", keep=5)
    vtprune.unpatch(model)


@torch.no_grad()
def test_nan_scores() -> None:
    def nan(view: vtprune.View) -> vtprune.Selection:
        return vtprune.Selection.topk(view.features.sum(-1) * float("nan"), view.k)

    model, inputs = build("clip"), batch("clip")
    for site in ALL_SITES:
        with patched(model, Scripted(where=site, script=[nan])), pytest.raises(vtprune.NonFiniteScoresError):
            model(**inputs)


@pytest.mark.parametrize("method", ["divprune", "fastv", "visionzip", "vtc-cls"])
@torch.no_grad()
def test_nan_weights(method: str) -> None:
    model = build("clip")
    model.model.vision_tower.encoder.layers[0].mlp.fc2.weight.fill_(float("nan"))
    with patched(model, method, keep=5), pytest.raises(vtprune.NonFiniteScoresError, match="NaN"):
        model(**batch("clip"))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_small_pictures_are_kept_whole_with_a_note(method: str) -> None:
    """Qwen: 8 and 24 tokens with a budget of 12."""
    model = subject("qwen")
    inputs = qwen_inputs([[1, 10, (2, 4), 12], [1, 10, (4, 6), 12]])
    options = options_of(method, "qwen", 12)
    with patched(model, method, **options) as patch:
        logits = model(**inputs).logits
        report = patch.report()
    merge = merge_of(judge("qwen"), method, options)
    assert_logits(judge("qwen"), inputs, logits, report, merge)
    assert report.images[0].tokens_out == 8
    if method != "keep-all":
        assert report.images[1].tokens_out < 24
        assert any("8" in note and "12" in note for note in report.notes)
