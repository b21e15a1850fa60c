"""What the families of :mod:`vtprune.testing.zoo` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .tiny import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START, VOCABULARY, padded

PAD, BOS, EOS = 0, 1, 2
# Separators that are text to the model: ends of image rows, tags of tiles, line breaks, timestamps.
BREAK, TAG, NEWLINE, TIME = 7, 8, 9, 10
TILE = 11  # + index of a tile of a split image, up to FIRST_TEXT
FIRST_TEXT = 20
TEXT_IDS = (FIRST_TEXT, VOCABULARY)

__all__ = [
    "BOS",
    "BREAK",
    "EOS",
    "IMAGE_TOKEN",
    "NEWLINE",
    "PAD",
    "TAG",
    "TEXT_IDS",
    "TILE",
    "TIME",
    "VIDEO_TOKEN",
    "VISION_END",
    "VISION_START",
    "VOCABULARY",
    "Image",
    "Prompt",
    "TinyEncoder",
    "TinyLVLM",
    "Video",
    "expand",
    "finish",
    "noise",
    "pad_rows",
    "settle",
    "stack_videos",
    "text_config",
    "vision_config",
]


@dataclass(frozen=True)
class Image:
    """A picture of a prompt.

    Args:
        seed: with `shape` it decides the pixels entirely, in any batch and row.
        shape: 0 is the family's default; 1 and 2 are other sizes, where the family has variable sizes.
    """

    seed: int = 0
    shape: int = 0

    def __post_init__(self) -> None:
        if self.shape not in range(3):
            raise ValueError(f"the shape of an Image is 0, 1 or 2, not {self.shape!r}")


@dataclass(frozen=True)
class Video:
    """A video of a prompt.

    Args:
        seed: decides the pixels, together with `frames` and `shape`.
        frames: as the language model sees them (temporal patches on Qwen).
        shape: 0 is the family's default; 1 and 2 are other sizes on Qwen, where clips of a batch may differ.
        seconds: between two frames: `second_per_grid_ts` of Qwen2.5-VL, the time in words of Qwen3-VL; no other
            family is told.
    """

    seed: int = 0
    frames: int = 2
    shape: int = 0
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in range(3):
            raise ValueError(f"the shape of a Video is 0, 1 or 2, not {self.shape!r}")


Prompt = Sequence["int | Image | Video"]
"""Text token ids, pictures and videos."""


@dataclass(frozen=True)
class TinyLVLM:
    """A family of vision-language models.

    Args:
        name: key in `LVLMS`.
        build: `build(attention="sdpa", seed=0, layers=...)` gives the model in eval mode and float32.
        batch: `batch(prompts, padding="left")` gives keyword arguments for `model` and `model.generate`;
            input_ids and attention_mask are [rows, tokens].
        has_video: whether prompts may hold videos.
        variable_size: whether `Image.shape` matters.
        ragged_videos: whether videos of a batch may have different numbers of frames.
        text_ids: half-open range of token ids that are text.
    """

    name: str
    build: Callable[..., nn.Module]
    batch: Callable[..., dict[str, Tensor]]
    has_video: bool = False
    variable_size: bool = False
    ragged_videos: bool = False
    text_ids: tuple[int, int] = TEXT_IDS


@dataclass(frozen=True)
class TinyEncoder:
    """A vision encoder.

    Args:
        name: key in `ENCODERS`.
        build: `build(seed=0)` gives the model in eval mode and float32; those of transformers take
            `attention` too.
        pixels: `pixels(n, seed=0)` gives [n, 3, height, width], which `model(pixels)` takes.
    """

    name: str
    build: Callable[..., nn.Module]
    pixels: Callable[..., Tensor]


def noise(item: Image | Video, *shape: int) -> Tensor:
    """Pixels of an item, [*shape], decided by the item alone."""
    # Odd multipliers keep items apart; a video and an image of one seed differ too.
    kind, detail = (1, item.shape) if isinstance(item, Image) else (2, item.frames + 31 * item.shape)
    generator = torch.Generator().manual_seed(item.seed * 10007 + detail * 101 + kind)
    return torch.randn(shape, generator=generator)


def expand(
    prompts: Sequence[Prompt],
    image: Callable[[Image, int], list[int]],
    video: Callable[[Video, int], list[int]] | None = None,
) -> list[list[int]]:
    """Token ids per row; `image` and `video` give those of an item, from the item and the row's index."""
    rows: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        row: list[int] = []
        for item in prompt:
            if isinstance(item, Image):
                row += image(item, i)
            elif isinstance(item, Video):
                if video is None:
                    raise ValueError("this family has no video")
                row += video(item, i)
            else:
                row.append(item)
        rows.append(row)
    return rows


def pad_rows(rows: Sequence[Sequence[int]], padding: str) -> dict[str, Tensor]:
    """input_ids and attention_mask, [rows, tokens] each."""
    if padding not in ("left", "right"):
        raise ValueError(f"padding is 'left' or 'right', not {padding!r}")
    ids, mask = padded(rows, padding)
    return {"input_ids": ids, "attention_mask": mask}


def stack_videos(videos: Sequence[Tensor]) -> Tensor:
    """[videos, frames, 3, height, width] of [frames, 3, height, width] each."""
    if len({v.shape for v in videos}) > 1:
        raise ValueError("this family takes one number of frames per batch")
    return torch.stack(list(videos))


def text_config(layers: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a grouped-query decoder's configuration."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **changes,
    }


def vision_config(size: int, patch: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a four-layer vision transformer's configuration."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": patch,
        **changes,
    }


def finish(cls: Any, config: Any, attention: str, seed: int, std: float = 0.2) -> nn.Module:
    """The random model of a configuration, in eval mode, set up for greedy generation without an end.

    Args:
        std: of the matrices; embeddings have twice as much. Larger than the default initialisation, so that
            attention is far from uniform.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = cls._from_config(config, attn_implementation=attention)
        for name, p in model.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=2 * std if "embed_tokens" in name else std)
    return settle(model)


def settle(model: nn.Module) -> nn.Module:
    """Sets eval mode and a generation that neither ends nor yields a placeholder or separator."""
    model.eval()
    generation: Any = model.generation_config
    generation.eos_token_id = None
    generation.pad_token_id = PAD
    generation.suppress_tokens = list(range(FIRST_TEXT))
    return model
