"""Idefics3, SmolVLM, Gemma 3, PaliGemma, Mistral 3 and Aria."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .zoo_base import (
    BOS,
    BREAK,
    IMAGE_TOKEN,
    NEWLINE,
    PAD,
    TAG,
    TILE,
    TIME,
    VISION_END,
    VISION_START,
    Image,
    Prompt,
    TinyLVLM,
    Video,
    expand,
    finish,
    noise,
    pad_rows,
    text_config,
    vision_config,
)

SIZE, PATCH = 16, 4  # 4 x 4 patches per tile or picture
SPLIT = (1, 2)  # rows and columns of tiles of an Image of shape 1
MERGED = 4  # tokens per tile or picture where 2 x 2 patches make one
# Pixel rows that are no padding in an Image of shape 2: 3 of 4 rows of patches, the last of them in part.
VISIBLE = 9

MISTRAL_SIZES = ((2, 3), (4, 2), (3, 3))  # merged tokens in height and width, by Image.shape
ARIA_QUERIES = 5


def _idefics(config_class: Any, model_class: Any, attention: str, seed: int, layers: int) -> nn.Module:
    from transformers import LlamaConfig

    config = config_class(
        vision_config=vision_config(SIZE, PATCH),
        text_config=LlamaConfig(**text_config(layers)),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return finish(model_class, config, attention, seed)


def _idefics3(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """Idefics3: pixel shuffle to 4 tokens per tile; text tokens stand before each tile and end rows of tiles.

    Padded patches are masked inside the vision tower only; their tokens stay.
    """
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return _idefics(Idefics3Config, Idefics3ForConditionalGeneration, attention, seed, layers)


def _smolvlm(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """SmolVLM: as Idefics3; a video is a list of unsplit pictures with timestamps between them.

    `batch` takes pictures and videos together; the processor cannot, since both would be its pixel_values.
    """
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration, attention, seed, layers)


def _idefics_batch(prompts: Sequence[Prompt], padding: str, with_video: bool) -> dict[str, Tensor]:
    tiles: list[list[Tensor]] = [[] for _ in prompts]
    masks: list[list[Tensor]] = [[] for _ in prompts]
    run = [IMAGE_TOKEN] * MERGED
    whole = [VISION_START, TAG, *run, VISION_START]  # one token stands before and after

    def image(item: Image, i: int) -> list[int]:
        count = SPLIT[0] * SPLIT[1] + 1 if item.shape == 1 else 1
        pixels = noise(item, count, 3, SIZE, SIZE)
        mask = torch.ones(count, SIZE, SIZE, dtype=torch.long)
        if item.shape == 2:
            pixels[:, :, VISIBLE:] = 0
            mask[:, VISIBLE:] = 0
        tiles[i] += list(pixels)
        masks[i] += list(mask)
        if item.shape != 1:
            return whole
        row: list[int] = []
        for r in range(SPLIT[0]):
            for c in range(SPLIT[1]):
                row += [VISION_START, TILE + r * SPLIT[1] + c, *run]
            row.append(NEWLINE)
        return [*row, NEWLINE, *whole]

    def video(item: Video, i: int) -> list[int]:
        tiles[i] += list(noise(item, item.frames, 3, SIZE, SIZE))
        masks[i] += [torch.ones(SIZE, SIZE, dtype=torch.long)] * item.frames
        row = [TIME]
        for frame in range(item.frames):
            row += [NEWLINE, TIME, 20 + frame, *whole]
        return [*row, NEWLINE, NEWLINE]

    batch = pad_rows(expand(prompts, image, video if with_video else None), padding)
    most = max(len(t) for t in tiles)
    if most:
        # Missing tiles are all zeros, which is how the models recognise them.
        pixels = torch.zeros(len(prompts), most, 3, SIZE, SIZE)
        mask = torch.zeros(len(prompts), most, SIZE, SIZE, dtype=torch.long)
        for i, (row_tiles, row_masks) in enumerate(zip(tiles, masks, strict=True)):
            for j, (t, m) in enumerate(zip(row_tiles, row_masks, strict=True)):
                pixels[i, j], mask[i, j] = t, m
        batch["pixel_values"], batch["pixel_attention_mask"] = pixels, mask
    return batch


def _idefics3_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    return _idefics_batch(prompts, padding, with_video=False)


def _smolvlm_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    return _idefics_batch(prompts, padding, with_video=True)


def _gemma3(attention: str = "sdpa", seed: int = 0, layers: int = 6) -> nn.Module:
    """Gemma 3: 4 tokens per picture that see each other both ways; two layers with a window of 8, one full."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    text = text_config(
        layers,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)],
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**vision_config(SIZE, PATCH, vision_use_head=False)),
        text_config=Gemma3TextConfig(**text),
        mm_tokens_per_image=MERGED,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    return finish(Gemma3ForConditionalGeneration, config, attention, seed)


def _gemma3_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    pixels: list[Tensor] = []

    def image(item: Image, _: int) -> list[int]:
        pixels.append(noise(Image(item.seed), 3, SIZE, SIZE))
        return [NEWLINE, VISION_START, *[IMAGE_TOKEN] * MERGED, VISION_END, NEWLINE]

    batch = pad_rows(expand(prompts, image), padding)
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    if pixels:
        batch["pixel_values"] = torch.stack(pixels)
    return batch


def _paligemma(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """PaliGemma: 16 tokens per picture; every token of the prompt, text too, sees every other.

    Tokens generated later see what precedes them. The processor refuses prompts without a picture; the model
    takes them, and `batch` starts such a row with <bos>.
    """
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        SiglipVisionConfig,
    )

    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**vision_config(SIZE, PATCH, vision_use_head=False)),
        text_config=GemmaConfig(**text_config(layers, head_dim=8, num_key_value_heads=1)),
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
    )
    return finish(PaliGemmaForConditionalGeneration, config, attention, seed)


def _paligemma_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    pixels: list[Tensor] = []

    def image(item: Image, _: int) -> list[int]:
        pixels.append(noise(Image(item.seed), 3, SIZE, SIZE))
        return [IMAGE_TOKEN] * (SIZE // PATCH) ** 2

    rows = expand(prompts, image)
    for row in rows:
        # The processor puts <bos> after the last picture and a line break at the end.
        last = max((i for i, token in enumerate(row) if token == IMAGE_TOKEN), default=-1)
        row.insert(last + 1, BOS)
        row.append(NEWLINE)
    batch = pad_rows(rows, padding)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])  # 1 is for a suffix to learn
    if pixels:
        batch["pixel_values"] = torch.stack(pixels)
    return batch


def _mistral3(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """Mistral 3: Pixtral tower, 2 x 2 merger; a text token ends every row of image tokens."""
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
    )

    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**vision_config(2 * PATCH * 8, PATCH, head_dim=8)),
        text_config=MistralConfig(**text_config(layers, head_dim=8, sliding_window=None)),
        image_token_index=IMAGE_TOKEN,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return finish(Mistral3ForConditionalGeneration, config, attention, seed)


def _mistral3_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    pixels: list[Tensor] = []

    def image(item: Image, _: int) -> list[int]:
        height, width = MISTRAL_SIZES[item.shape]
        pixels.append(noise(item, 3, 2 * PATCH * height, 2 * PATCH * width))
        return ([IMAGE_TOKEN] * width + [BREAK]) * (height - 1) + [IMAGE_TOKEN] * width + [VISION_END]

    batch = pad_rows(expand(prompts, image), padding)
    if pixels:
        height, width = (max(p.shape[d] for p in pixels) for d in (1, 2))
        batch["pixel_values"] = torch.stack(
            [nn.functional.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pixels]
        )
        batch["image_sizes"] = torch.tensor([p.shape[1:] for p in pixels])
    return batch


def _aria(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """Aria: learned queries make 5 tokens of a crop; two of four experts and shared ones."""
    from transformers import AriaConfig, AriaForConditionalGeneration, AriaTextConfig
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    text = text_config(layers, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    config = AriaConfig(
        vision_config=Idefics3VisionConfig(**vision_config(SIZE, PATCH)),
        text_config=AriaTextConfig(**text),
        projector_patch_to_query_dict={(SIZE // PATCH) ** 2: ARIA_QUERIES},
        image_token_index=IMAGE_TOKEN,
    )
    return finish(AriaForConditionalGeneration, config, attention, seed)


def _aria_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    pixels: list[Tensor] = []
    masks: list[Tensor] = []

    def image(item: Image, _: int) -> list[int]:
        crops = 2 if item.shape == 1 else 1
        crop = noise(item, crops, 3, SIZE, SIZE)
        mask = torch.ones(crops, SIZE, SIZE, dtype=torch.bool)
        if item.shape == 2:
            crop[:, :, VISIBLE:] = 0
            mask[:, VISIBLE:] = False
        pixels.append(crop)
        masks.append(mask)
        return [IMAGE_TOKEN] * (ARIA_QUERIES * crops)

    batch = pad_rows(expand(prompts, image), padding)
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
        batch["pixel_mask"] = torch.cat(masks)
    return batch


FAMILIES = (
    TinyLVLM("idefics3", _idefics3, _idefics3_batch, variable_size=True),
    TinyLVLM("smolvlm", _smolvlm, _smolvlm_batch, has_video=True, variable_size=True, ragged_videos=True),
    TinyLVLM("gemma3", _gemma3, _gemma3_batch),
    TinyLVLM("paligemma", _paligemma, _paligemma_batch),
    TinyLVLM("mistral3", _mistral3, _mistral3_batch, variable_size=True),
    TinyLVLM("aria", _aria, _aria_batch, variable_size=True),
)
