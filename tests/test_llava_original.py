"""The original `llava` package (llava-torch, installed without its pins) on stock transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtprune
from vtprune.errors import UnsupportedCallError, UnsupportedModelError

pytest.importorskip("llava", reason="pip install --no-deps llava-torch==1.2.2.post1")

SIDE, N = 4, 16


class Tower(nn.Module):
    """The package's CLIPVisionTower around a random CLIP, which it can otherwise only download."""

    def __new__(cls) -> Any:
        from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
        from transformers import CLIPVisionConfig, CLIPVisionModel

        config = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
        tower = CLIPVisionTower.__new__(CLIPVisionTower)
        nn.Module.__init__(tower)
        tower.vision_tower = CLIPVisionModel._from_config(config, attn_implementation="sdpa")
        tower.is_loaded, tower.select_layer, tower.select_feature = True, -2, "patch"
        return tower


def build(padding: str = "left") -> Any:
    """A random LlavaLlamaForCausalLM."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    config = LlavaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tokenizer_padding_side=padding,
        pretraining_tp=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlavaLlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        model.model.vision_tower = Tower()
        model.model.mm_projector = nn.Linear(32, 32)
        for name, p in model.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.4 if "embed_tokens" in name else 0.2)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def batch(rows: list[list[int | str]], padding: str = "left") -> tuple[Tensor, Tensor, Tensor]:
    """ids with -200 for "image", mask, images; a row without one takes a blank picture, as the package wants."""
    width = max(len(r) for r in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    images = []
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if padding == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor([-200 if x == "image" else x for x in row])
        mask[i, where] = 1
        seeds = [sum(x for x in row if x != "image") + k for k in range(row.count("image"))]
        images += [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in seeds]
        if not seeds:
            images.append(torch.zeros(3, 32, 32))
    return ids, mask.bool(), torch.stack(images)


ROWS: list[list[int | str]] = [
    [5, 6, "image", 7, 8],
    [9, 10, 11],
    [12, "image", 13, 14, "image", 15, 16, 17],
]


def cut(model: Any, row: list[int | str], kept: list[list[int]], extra: Tensor) -> Tensor:
    """Logits of the stock decoder at the surviving columns of one row, tokens cut out by hand."""
    ids, mask, images = batch([row])
    with torch.no_grad():
        *_, embeds, _ = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, images)
        stays: list[int] = []
        at = 0
        pictures = iter(kept)
        for item in row:
            if item == "image":
                stays += [at + i for i in next(pictures)]
                at += N
            else:
                stays.append(at)
                at += 1
        positions = torch.tensor([*stays, *range(at, at + len(extra))])
        embeds = torch.cat([embeds[:, stays], model.model.embed_tokens(extra)[None]], 1)
        ones = torch.ones(1, embeds.shape[1], dtype=torch.long)
        hidden = model.model(
            inputs_embeds=embeds, position_ids=positions[None], attention_mask=ones, use_cache=False
        ).last_hidden_state
        logits: Tensor = model.lm_head(hidden)[0]
    return logits


CASES = [
    ("divprune", {"positions": "original"}),
    ("stride", {"where": "encoder"}),
    ("random", {"where": "vit", "layer": 1}),
    ("vtc-cls", {"positions": "original"}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_forward_equals_the_shortened_sequence(method: str, options: dict[str, Any], padding: str) -> None:
    model = build(padding)
    ids, mask, images = batch(ROWS, padding)
    with vtprune.patch(model, method, keep=5, **options) as patch, torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, images=images, use_cache=True).logits
        report = patch.report()
    assert report.visual_tokens_in == [N, 0, 2 * N]
    assert report.visual_tokens_out == [5, 0, 10]
    if options.get("where") == "vit":
        return  # what is cut inside the tower changes the features; the next test covers the counts
    for i, row in enumerate(ROWS):
        kept = [list(image.kept.values())[-1].tolist() for image in report.images if image.sample == i]
        expected = cut(model, row, kept, torch.zeros(0, dtype=torch.long))
        length = sum(N if x == "image" else 1 for x in row)
        last = logits.shape[1] - 1 if padding == "left" else length - 1
        torch.testing.assert_close(logits[i, last], expected[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["divprune", "vtc-cls", "fastv", "visionzip"])
def test_generate(method: str) -> None:
    model = build()
    ids, mask, images = batch(ROWS)
    with vtprune.patch(model, method, keep=5) as patch:
        together = model.generate(ids, images=images, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert patch.report().visual_tokens_out == [5, 0, 10]
        assert patch.report().decode_steps == 5
        beams = model.generate(ids, images=images, attention_mask=mask, max_new_tokens=4, num_beams=3)
        assert patch.report().visual_tokens_out == [5] * 3 + [0] * 3 + [10] * 3
        assert beams.shape == (3, 4)
        for i, row in enumerate(ROWS):
            one, one_mask, one_images = batch([row])
            alone = model.generate(
                one, images=one_images, attention_mask=one_mask, max_new_tokens=6, do_sample=False
            )
            assert torch.equal(together[i], alone[0])


def test_greedy_tokens_equal_the_cut_sequence() -> None:
    model = build()
    row = ROWS[0]
    ids, mask, images = batch([row])
    with vtprune.patch(model, "divprune", keep=5, positions="original") as patch:
        tokens = model.generate(ids, images=images, attention_mask=mask, max_new_tokens=6, do_sample=False)[0]
        kept = [list(image.kept.values())[-1].tolist() for image in patch.report().images]
    done = torch.zeros(0, dtype=torch.long)
    for token in tokens:
        assert cut(model, row, kept, done)[-1].argmax() == token
        done = torch.cat([done, token[None]])


def test_text_only_generation_and_undo() -> None:
    model = build()
    ids, mask, images = batch(ROWS)
    before = model(input_ids=ids, attention_mask=mask, images=images).logits
    attributes = set(vars(model)) | set(vars(model.model))
    text = torch.tensor([[5, 6, 7]])
    dense = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=4, do_sample=False)
    with vtprune.patch(model, "fastv", keep=4):
        model.generate(ids, images=images, attention_mask=mask, max_new_tokens=2)
        patched = model.generate(
            text, attention_mask=torch.ones_like(text), max_new_tokens=4, do_sample=False
        )
        with pytest.raises(UnsupportedCallError, match="tiles"):
            model.generate(ids[:1], images=[images[0]], attention_mask=mask[:1], max_new_tokens=2)
    assert torch.equal(dense, patched)
    assert torch.equal(model(input_ids=ids, attention_mask=mask, images=images).logits, before)
    assert set(vars(model)) | set(vars(model.model)) == attributes


def test_refusals() -> None:
    model = build()
    model.model.vision_tower.select_feature = "cls_patch"
    with pytest.raises(UnsupportedModelError, match="visual token"):
        vtprune.patch(model, "fastv")
    model.model.vision_tower = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="load_model"):
        vtprune.patch(model, "fastv")
