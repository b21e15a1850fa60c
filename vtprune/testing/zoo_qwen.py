"""The Qwen families of the zoo and InternVL, which has a Qwen decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .tiny import tiny_qwen2_5_vl
from .zoo_base import (
    IMAGE_TOKEN,
    NEWLINE,
    TIME,
    VIDEO_TOKEN,
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
    settle,
    text_config,
    vision_config,
)

# Merged tokens in height and width, by Image.shape; odd sides, so that windows of Qwen2.5-VL are ragged.
QWEN_SIZES = ((3, 4), (5, 2), (2, 3))
QWEN_VIDEOS = ((2, 3), (3, 3), (4, 1))  # the same of a frame, by Video.shape
QWEN_PATCH, QWEN_MERGE = 4, 2
DEEPSTACK = (0, 1, 2)

TILE_SIZE, TILE_TOKENS = 24, 9  # InternVL: 6 x 6 patches, 3 x 3 tokens after pixel shuffle
TILES = (1, 3, 4)  # by Image.shape: no split, 2 + thumbnail, 3 + thumbnail

_IDS: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _rope(section: list[int], **changes: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **changes}


def _qwen2_vl(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """Qwen2-VL: 2 x 2 merger, sections of M-RoPE; its vision `hidden_size` is the decoder's."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        vision_config={
            "depth": 4,
            "embed_dim": 32,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": QWEN_PATCH,
            "spatial_merge_size": QWEN_MERGE,
            "temporal_patch_size": 2,
        },
        text_config=text_config(layers, rope_parameters=_rope([1, 1, 2])),
        **_IDS,
    )
    return finish(Qwen2VLForConditionalGeneration, config, attention, seed)


def _qwen2_5_vl(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """Qwen2.5-VL: as Qwen2-VL, with windowed vision layers and time in seconds for video."""
    return settle(tiny_qwen2_5_vl(attention, seed, layers))


def _qwen3_config(cls: Any, layers: int, **changes: Any) -> Any:
    return cls(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": QWEN_PATCH,
            "spatial_merge_size": QWEN_MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": list(DEEPSTACK),
        },
        text_config=text_config(
            layers, head_dim=8, rope_parameters=_rope([2, 1, 1], mrope_interleaved=True), **changes
        ),
        **_IDS,
    )


def _qwen3_vl(attention: str = "sdpa", seed: int = 0, layers: int = 5) -> nn.Module:
    """Qwen3-VL: interleaved M-RoPE; features of three vision layers are added after three decoder layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    return finish(Qwen3VLForConditionalGeneration, _qwen3_config(Qwen3VLConfig, layers), attention, seed)


def _qwen3_vl_moe(attention: str = "sdpa", seed: int = 0, layers: int = 5) -> nn.Module:
    """Qwen3-VL with two of four experts per token."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    config = _qwen3_config(
        Qwen3VLMoeConfig, layers, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )
    return finish(Qwen3VLMoeForConditionalGeneration, config, attention, seed)


def _qwen_batch(prompts: Sequence[Prompt], padding: str, style: str) -> dict[str, Tensor]:
    data: dict[str, list[Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    seconds: list[float] = []

    def add(kind: str, item: Image | Video, frames: int, height: int, width: int) -> None:
        patches = frames * height * width * QWEN_MERGE**2
        data[kind].append(noise(item, patches, 3 * 2 * QWEN_PATCH**2))
        grids[kind].append([frames, QWEN_MERGE * height, QWEN_MERGE * width])

    def image(item: Image, _: int) -> list[int]:
        height, width = QWEN_SIZES[item.shape]
        add("image", item, 1, height, width)
        return [VISION_START, *[IMAGE_TOKEN] * (height * width), VISION_END]

    def video(item: Video, _: int) -> list[int]:
        height, width = QWEN_VIDEOS[item.shape]
        seconds.append(item.seconds)
        add("video", item, item.frames, height, width)
        frame = [VIDEO_TOKEN] * (height * width)
        if style != "qwen3":
            return [VISION_START, *frame * item.frames, VISION_END]
        # Qwen3-VL puts the time in words before every frame and wraps each of them.
        row: list[int] = []
        for i in range(item.frames):
            row += [TIME, 20 + int(i * item.seconds), VISION_START, *frame, VISION_END]
        return row

    batch = pad_rows(expand(prompts, image, video), padding)
    ids = batch["input_ids"]
    batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int() + 2 * (ids == VIDEO_TOKEN).int()
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if data[kind]:
            batch[f"pixel_values{suffix}"] = torch.cat(data[kind])
            batch[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
    if style == "qwen2_5" and data["video"]:
        batch["second_per_grid_ts"] = torch.tensor(seconds)
    return batch


def _qwen2_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    return _qwen_batch(prompts, padding, "qwen2")


def _qwen2_5_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    return _qwen_batch(prompts, padding, "qwen2_5")


def _qwen3_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    return _qwen_batch(prompts, padding, "qwen3")


def _internvl(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """InternVL: tiles of 6 x 6 patches and [CLS], pixel shuffle to 3 x 3 tokens.

    Tiles follow each other without separators; frames of a video are pictures, each wrapped.
    """
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        Qwen2Config,
    )

    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision_config(TILE_SIZE, 4, layer_scale_init_value=0.5)),
        text_config=Qwen2Config(**text_config(layers)),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=TILE_TOKENS,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return finish(InternVLForConditionalGeneration, config, attention, seed)


def _internvl_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    pixels: list[Tensor] = []

    def image(item: Image, _: int) -> list[int]:
        tiles = TILES[item.shape]
        pixels.append(noise(item, tiles, 3, TILE_SIZE, TILE_SIZE))
        return [VISION_START, *[IMAGE_TOKEN] * (TILE_TOKENS * tiles), VISION_END]

    def video(item: Video, _: int) -> list[int]:
        # A video is a list of one-tile pictures: "Frame1: <img>...</img>\nFrame2: ..."
        pixels.append(noise(item, item.frames, 3, TILE_SIZE, TILE_SIZE))
        row: list[int] = []
        for i in range(item.frames):
            row += [NEWLINE] * (i > 0)
            row += [TIME, 20 + i, VISION_START, *[IMAGE_TOKEN] * TILE_TOKENS, VISION_END]
        return row

    batch = pad_rows(expand(prompts, image, video), padding)
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    return batch


FAMILIES = (
    TinyLVLM("qwen2_vl", _qwen2_vl, _qwen2_batch, has_video=True, variable_size=True, ragged_videos=True),
    TinyLVLM(
        "qwen2_5_vl", _qwen2_5_vl, _qwen2_5_batch, has_video=True, variable_size=True, ragged_videos=True
    ),
    TinyLVLM("qwen3_vl", _qwen3_vl, _qwen3_batch, has_video=True, variable_size=True, ragged_videos=True),
    TinyLVLM(
        "qwen3_vl_moe", _qwen3_vl_moe, _qwen3_batch, has_video=True, variable_size=True, ragged_videos=True
    ),
    TinyLVLM("internvl", _internvl, _internvl_batch, has_video=True, variable_size=True, ragged_videos=True),
)
