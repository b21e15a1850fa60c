"""Tiny random LLaVA and Qwen2.5-VL with their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_TOKEN = 3
VIDEO_TOKEN = 4
VISION_START, VISION_END = 5, 6
VOCABULARY = 64


def tiny_llava(
    attention: str = "sdpa", tower: str = "clip", seed: int = 0, layers: int = 4, patches: int = 4
) -> nn.Module:
    """A random LLaVA: 8 px patches, 4 x 4 tokens per picture by default, grouped-query Llama decoder.

    Args:
        attention: "sdpa" or "eager".
        tower: "clip" (with [CLS]) or "siglip" (without).
        layers: decoder layers.
        patches: tokens along one side of a picture.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 8 * patches,
        "patch_size": 8,
    }
    vision = CLIPVisionConfig(**shape) if tower == "clip" else SiglipVisionConfig(**shape)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        vision_feature_layer=-2,
        image_seq_length=patches**2,
    )
    return _finish(LlavaForConditionalGeneration, config, attention, seed)


def tiny_qwen2_5_vl(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """A random Qwen2.5-VL: 8 px patches, 2 x 2 merger, windows of 4 x 4 tokens, M-RoPE, grouped queries."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 32,
            "tokens_per_second": 2,
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return _finish(Qwen2_5_VLForConditionalGeneration, config, attention, seed)


def _finish(cls: Any, config: Any, attention: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = cls._from_config(config, attn_implementation=attention)
        for name, p in model.named_parameters():
            if p.ndim > 1:
                # Larger than the default initialisation, so that attention is far from uniform.
                nn.init.normal_(p, std=0.4 if "embed_tokens" in name else 0.2)
    model.eval()
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    model.generation_config.pad_token_id = 0  # type: ignore[union-attr]
    # A random model would otherwise generate placeholders.
    model.generation_config.suppress_tokens = [IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END]  # type: ignore[union-attr]
    return model


def llava_inputs(
    prompts: Sequence[Sequence[int | str]],
    seed: int = 0,
    padding: str = "left",
    n_tokens: int = 16,
    size: int = 32,
) -> dict[str, Tensor]:
    """A batch for :func:`tiny_llava`.

    Args:
        prompts: per row token ids, with "image" where a picture stands. The picture is determined by `seed`, row
            content and order, so that a row alone has the same pictures as in a batch if `seed` is a per-row seed.
        padding: side.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, pixels = [], []
    for prompt in prompts:
        row: list[int] = []
        for item in prompt:
            if item == "image":
                row += [IMAGE_TOKEN] * n_tokens
                pixels.append(torch.randn(3, size, size, generator=generator))
            else:
                row.append(int(item))
        rows.append(row)
    ids, mask = padded(rows, padding)
    batch = {"input_ids": ids, "attention_mask": mask}
    if pixels:
        batch["pixel_values"] = torch.stack(pixels)
    return batch


def qwen_inputs(
    prompts: Sequence[Sequence[int | tuple[int, int] | tuple[int, int, int]]],
    seed: int = 0,
    padding: str = "left",
) -> dict[str, Tensor]:
    """A batch for :func:`tiny_qwen2_5_vl`.

    Args:
        prompts: per row token ids, with (rows, cols) of merged tokens where a picture stands and
            (frames, rows, cols) where a video stands.
        padding: side.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    data: dict[str, list[Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for prompt in prompts:
        row: list[int] = []
        for item in prompt:
            if isinstance(item, tuple):
                kind = "video" if len(item) == 3 else "image"
                t, h, w = item if len(item) == 3 else (1, *item)
                row += [
                    VISION_START,
                    *[VIDEO_TOKEN if kind == "video" else IMAGE_TOKEN] * (t * h * w),
                    VISION_END,
                ]
                grids[kind].append([t, 2 * h, 2 * w])
                data[kind].append(torch.randn(t * 4 * h * w, 3 * 2 * 4 * 4, generator=generator))
            else:
                row.append(item)
        rows.append(row)
    ids, mask = padded(rows, padding)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int() + 2 * (ids == VIDEO_TOKEN).int(),
    }
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if data[kind]:
            batch[f"pixel_values{suffix}"] = torch.cat(data[kind])
            batch[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
    return batch


def padded(rows: Sequence[Sequence[int]], padding: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [rows, tokens] each, padded on the "left" or the "right"."""
    width = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if padding == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return ids, mask
