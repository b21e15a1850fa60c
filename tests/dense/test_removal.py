"""Tokens are gone from the cache and from the arithmetic, and removing nothing is never silent."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from dense.common import (
    ALL_SITES,
    METHODS,
    PAIRS,
    SITES,
    Scripted,
    assert_logits,
    batch,
    build,
    judge,
    options_of,
    patched,
    snapshot,
    subject,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune.testing import IMAGE_TOKEN, VIDEO_TOKEN, llava_inputs

# ------------------------------------------------------------------------------------ physical


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_tokens_are_gone_from_the_cache(method: str, family: str, attention: str) -> None:
    model = subject(family, attention)
    with patched(model, method, **options_of(method, family)) as patch:
        for kind in ("one", "two", "ragged"):
            inputs = batch(family, kind)
            layers = model(**inputs, use_cache=True).past_key_values.layers
            report = patch.report()
            assert len(layers) == len(report.layers) == 4
            lengths = [layer.keys.shape[-2] for layer in layers]
            assert lengths == [max(entry.tokens) for entry in report.layers]
            nbytes = [layer.keys.nbytes + layer.values.nbytes for layer in layers]
            assert [entry.kv_bytes for entry in report.layers] == nbytes
            assert report.kv_bytes == sum(nbytes)
            for number, entry in enumerate(report.layers):
                for sample in range(len(inputs["input_ids"])):
                    visual = 0
                    for image in (i for i in report.images if i.sample == sample):
                        passed = [
                            k
                            for site, k in image.kept.items()
                            if not site.startswith("decoder") or int(site[8:-1]) <= number
                        ]
                        visual += len(passed[-1]) if passed else image.layout.n_tokens
                    is_visual = inputs["input_ids"][sample]
                    text = int(inputs["attention_mask"][sample].sum())
                    text -= int(((is_visual == IMAGE_TOKEN) | (is_visual == VIDEO_TOKEN)).sum())
                    assert entry.visual_tokens[sample] == visual
                    assert entry.tokens[sample] == visual + text
            if method != "keep-all":
                assert lengths[-1] < inputs["attention_mask"].sum(1).max()


# ------------------------------------------------------------------------------------ arithmetic


@functools.cache
def bigger_llava() -> Any:
    """Hidden 128, 8 layers, 144 tokens, eager attention (all products are visible to the counter)."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    heads = {"hidden_size": 128, "num_attention_heads": 4}
    vision = CLIPVisionConfig(
        **heads, intermediate_size=256, num_hidden_layers=3, image_size=96, patch_size=8
    )
    text = LlamaConfig(
        **heads,
        intermediate_size=344,
        num_hidden_layers=8,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=144,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("keep", [72, 16])
@pytest.mark.parametrize("where", ["projector", "decoder", "fastv"])
@torch.no_grad()
def test_floating_point_operations_fall_by_the_analytic_count(where: str, keep: int) -> None:
    model = bigger_llava()
    inputs = llava_inputs([[1, 10, 11, "image", 12, 13, 14]], n_tokens=144, size=96)
    n, removed = inputs["input_ids"].shape[1], 144 - keep

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        return counter.get_total_flops()

    stock = count()
    with patched(
        model,
        *(("fastv",) if where == "fastv" else ("stride",)),
        keep=keep,
        **(SITES[where] if where != "fastv" else {}),
    ):
        pruned = count()
    d, kv, inner = 128, 64, 344
    per_token = 2 * (d * d + 2 * d * kv + d * d + 3 * d * inner)
    products = 2 * 2 * d * (n**2 - (n - removed) ** 2)  # query x key and weights x value, all heads
    depth = 8 if where == "projector" else 6
    saved = depth * (removed * per_token + products)
    assert abs(stock - pruned - saved) < 0.02 * min(saved, pruned)


# ------------------------------------------------------------------------------------ inert


@pytest.mark.parametrize("site", ALL_SITES, ids=str)
@torch.no_grad()
def test_returning_everything_is_inert(site: vtprune.Site) -> None:
    def everything(view: vtprune.View) -> vtprune.Selection:
        return vtprune.Selection.everything(len(view.features), view.n, view.features.device)

    for family in ("clip", "qwen"):
        method = Scripted(where=site, script=[everything])
        with patched(subject(family), method), pytest.raises(vtprune.InertPruningError):
            subject(family)(**batch(family))


def clear_hooks(module: nn.Module) -> int:
    """Forgets all forward hooks of a module, as foreign code might; returns how many there were."""
    lost = 0
    for key, value in module.__dict__.items():
        if key.startswith("_forward") and "hooks" in key and hasattr(value, "clear"):
            lost += len(value)
            value.clear()
    return lost


@pytest.mark.parametrize("method", ["vtc-cls", "fastv", "stride", "divprune"])
@pytest.mark.parametrize("part", ["language_model", "language_model.layers"])
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_lost_decoder_hooks_are_inert_pruning(family: str, part: str, method: str) -> None:
    model, inputs = build(family), batch(family)
    patch = vtprune.patch(model, method, **options_of(method, family))
    if sum(clear_hooks(module) for module in model.model.get_submodule(part).modules()):
        with pytest.raises(vtprune.InertPruningError):
            model(**inputs)
    else:
        assert_logits(judge(family), inputs, model(**inputs).logits, patch.report())


LOSABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("random", {"where": "vit", "layer": 1}),
    "vtc-cls": ("vtc-cls", {}),
    "encoder": ("stride", {"where": "encoder"}),
    "projector": ("stride", {}),
    "fastv": ("fastv", {}),
}


@pytest.mark.parametrize("case", LOSABLE)
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_no_lost_hook_passes_silently(family: str, case: str) -> None:
    """Whichever module loses its hooks: the next call is right, or an error."""
    inputs = batch(family)
    model = build(family)
    model(**inputs)
    method, options = LOSABLE[case]
    options = {**options_of(method, family), **options}

    def hooked() -> dict[str, Any]:
        return {k: v for k, v in snapshot(model).items() if "_forward" in k and "hooks" in k}

    before = hooked()
    with patched(model, method, **options):
        names = {key.split(":")[0] for key, hooks in hooked().items() if hooks != before[key]}
    assert len(names) >= 2
    for name in names:
        model = build(family)
        patch = vtprune.patch(model, method, **options)
        assert clear_hooks(model.get_submodule(name))
        try:
            logits = model(**inputs).logits
        except (vtprune.VTPruneError, RuntimeError, ValueError, LookupError):
            continue
        assert patch.report().engaged, f"silently unpruned without the hooks of {name}"
        assert_logits(judge(family), inputs, logits, patch.report())
