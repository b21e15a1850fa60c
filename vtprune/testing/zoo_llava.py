"""The LLaVA families of the zoo: fixed size, tiles, video."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .tiny import tiny_llava
from .zoo_base import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    Image,
    Prompt,
    TinyLVLM,
    Video,
    expand,
    finish,
    noise,
    pad_rows,
    settle,
    stack_videos,
    text_config,
    vision_config,
)

# LLaVA-NeXT: tiles of 16 px with 4 x 4 tokens. The sizes by Image.shape take 2, 3 and 4 tiles; unpadding cuts
# rows, columns and rows again.
NEXT_TILE, NEXT_SIDE = 16, 4
NEXT_GRIDS = [[16, 32], [32, 16], [32, 32], [48, 16]]
NEXT_SIZES = ((8, 32), (48, 8), (20, 30))

# LLaVA-OneVision: tiles of 20 px with 5 x 5 tokens; shape 2 has more tokens than anyres_max_2 allows and is
# resized.
OV_TILE, OV_SIDE, OV_MAX = 20, 5, 2
OV_GRIDS = [[20, 40], [40, 20], [40, 40], [60, 20]]
OV_SIZES = ((10, 40), (40, 8), (36, 40))


def _llava(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """LLaVA with a CLIP tower: 16 tokens per picture."""
    return settle(tiny_llava(attention, "clip", seed, layers))


def _llava_siglip(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """LLaVA with a SigLIP tower, every token of which is used: 16 tokens per picture."""
    return settle(tiny_llava(attention, "siglip", seed, layers))


def _llava_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    pixels: list[Tensor] = []

    def image(item: Image, _: int) -> list[int]:
        pixels.append(noise(Image(item.seed), 3, 32, 32))
        return [IMAGE_TOKEN] * 16

    batch = pad_rows(expand(prompts, image), padding)
    if pixels:
        batch["pixel_values"] = torch.stack(pixels)
    return batch


def _grid(size: tuple[int, int], grids: list[list[int]], tile: int) -> tuple[int, int]:
    """Tiles in height and width of a picture, as transformers chooses them."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size, grids)
    return height // tile, width // tile


def _unpadded(size: tuple[int, int], tiles: tuple[int, int], side: int) -> tuple[int, int]:
    """Token rows and columns that remain of a tiled picture once the tokens of its padding are cut."""
    (height, width), rows, cols = size, tiles[0] * side, tiles[1] * side
    if width / height > cols / rows:
        rows -= (rows - int(round(height * (cols / width), 7))) // 2 * 2
    else:
        cols -= (cols - int(round(width * (rows / height), 7))) // 2 * 2
    return rows, cols


def _stack_tiles(pixels: list[Tensor]) -> Tensor:
    """[images, most tiles, 3, height, width]: pictures with fewer tiles are filled with zeros."""
    most = max(len(p) for p in pixels)
    return torch.stack([torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in pixels])


def _next_config(cls: Any, layers: int, **changes: Any) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig

    return cls(
        vision_config=CLIPVisionConfig(**vision_config(NEXT_TILE, NEXT_TILE // NEXT_SIDE)),
        text_config=LlamaConfig(**text_config(layers)),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=NEXT_GRIDS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=NEXT_SIDE**2,
        **changes,
    )


def _llava_next(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """LLaVA-NeXT: the whole picture as one tile, then rows of all tiles, each ended by a newline vector."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    return finish(LlavaNextForConditionalGeneration, _next_config(LlavaNextConfig, layers), attention, seed)


def _llava_next_video(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """LLaVA-NeXT-Video: pictures as LLaVA-NeXT; frames of 4 x 4 tokens averaged to 2 x 2, no newlines."""
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = _next_config(LlavaNextVideoConfig, layers, video_token_index=VIDEO_TOKEN)
    return finish(LlavaNextVideoForConditionalGeneration, config, attention, seed)


def _next_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    pixels: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    videos: list[Tensor] = []

    def image(item: Image, _: int) -> list[int]:
        size = NEXT_SIZES[item.shape]
        tiles = _grid(size, NEXT_GRIDS, NEXT_TILE)
        rows, cols = _unpadded(size, tiles, NEXT_SIDE)
        pixels.append(noise(item, 1 + tiles[0] * tiles[1], 3, NEXT_TILE, NEXT_TILE))
        sizes.append(size)
        return [IMAGE_TOKEN] * (NEXT_SIDE**2 + rows * (cols + 1))

    def video(item: Video, _: int) -> list[int]:
        videos.append(noise(item, item.frames, 3, NEXT_TILE, NEXT_TILE))
        return [VIDEO_TOKEN] * (NEXT_SIDE**2 // 4 * item.frames)

    batch = pad_rows(expand(prompts, image, video), padding)
    if pixels:
        batch["pixel_values"] = _stack_tiles(pixels)
        batch["image_sizes"] = torch.tensor(sizes)
    if videos:
        batch["pixel_values_videos"] = stack_videos(videos)
    return batch


def _next_image_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    if any(isinstance(item, Video) for prompt in prompts for item in prompt):
        raise ValueError("this family has no video")
    return _next_batch(prompts, padding)


def _llava_onevision(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """LLaVA-OneVision: SigLIP tiles of 5 x 5 tokens; frames resized to 3 x 3, a newline vector per video.

    A picture is tiled only if it is the only one of its row; several pictures in one row have one tile each.
    """
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = vision_config(OV_TILE, OV_TILE // OV_SIDE, vision_use_head=False)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=Qwen2Config(**text_config(layers)),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=OV_GRIDS,
        vision_aspect_ratio=f"anyres_max_{OV_MAX}",
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return finish(LlavaOnevisionForConditionalGeneration, config, attention, seed)


def _onevision_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    pixels: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    videos: list[Tensor] = []
    n_images = [sum(isinstance(item, Image) for item in prompt) for prompt in prompts]

    def image(item: Image, i: int) -> list[int]:
        size = OV_SIZES[item.shape]
        sizes.append(size)
        if n_images[i] > 1:
            pixels.append(noise(item, 1, 3, OV_TILE, OV_TILE))
            return [IMAGE_TOKEN] * (OV_SIDE**2 + 1)
        tiles = _grid(size, OV_GRIDS, OV_TILE)
        rows, cols = _unpadded(size, tiles, OV_SIDE)
        pixels.append(noise(item, 1 + tiles[0] * tiles[1], 3, OV_TILE, OV_TILE))
        ratio = math.sqrt(rows * cols / (OV_MAX * OV_SIDE**2))
        if ratio > 1.1:
            rows, cols = int(rows // ratio), int(cols // ratio)
        return [IMAGE_TOKEN] * (OV_SIDE**2 + rows * (cols + 1))

    def video(item: Video, _: int) -> list[int]:
        videos.append(noise(item, item.frames, 3, OV_TILE, OV_TILE))
        return [VIDEO_TOKEN] * (item.frames * math.ceil(OV_SIDE / 2) ** 2 + 1)

    batch = pad_rows(expand(prompts, image, video), padding)
    if pixels:
        batch["pixel_values"] = _stack_tiles(pixels)
        batch["image_sizes"] = torch.tensor(sizes)
        batch["batch_num_images"] = torch.tensor(n_images)
    if videos:
        batch["pixel_values_videos"] = stack_videos(videos)
    return batch


def _video_llava(attention: str = "sdpa", seed: int = 0, layers: int = 4) -> nn.Module:
    """Video-LLaVA: a tower for pictures (16 tokens) and one for frames (17 tokens: [CLS] is kept)."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        VideoLlavaConfig,
        VideoLlavaForConditionalGeneration,
    )

    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**vision_config(32, 8)),
        text_config=LlamaConfig(**text_config(layers)),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=16,
        video_seq_length=34,
    )
    return finish(VideoLlavaForConditionalGeneration, config, attention, seed)


def _video_llava_batch(prompts: Sequence[Prompt], padding: str = "left") -> dict[str, Tensor]:
    from transformers import VideoLlavaForConditionalGeneration

    videos: list[Tensor] = []

    def video(item: Video, _: int) -> list[int]:
        videos.append(noise(item, item.frames, 3, 32, 32))
        return [VIDEO_TOKEN] * (17 * item.frames)

    pixels: list[Tensor] = []

    def image(item: Image, _: int) -> list[int]:
        pixels.append(noise(Image(item.seed), 3, 32, 32))
        return [IMAGE_TOKEN] * 16

    batch = pad_rows(expand(prompts, image, video), padding)
    if pixels:
        # Older releases have another name for it; newer ones accept that one with a warning.
        names = inspect.signature(VideoLlavaForConditionalGeneration.forward).parameters
        batch["pixel_values" if "pixel_values" in names else "pixel_values_images"] = torch.stack(pixels)
    if videos:
        batch["pixel_values_videos"] = stack_videos(videos)
    return batch


FAMILIES = (
    TinyLVLM("llava", _llava, _llava_batch),
    TinyLVLM("llava_siglip", _llava_siglip, _llava_batch),
    TinyLVLM("llava_next", _llava_next, _next_image_batch, variable_size=True),
    TinyLVLM("llava_next_video", _llava_next_video, _next_batch, has_video=True, variable_size=True),
    TinyLVLM("llava_onevision", _llava_onevision, _onevision_batch, has_video=True, variable_size=True),
    TinyLVLM("video_llava", _video_llava, _video_llava_batch, has_video=True),
)
