"""The down-sampling control: what a smaller picture would give for the same number of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vtprune.errors import UnsupportedMethodError
from vtprune.method import resolve_keep

Inputs = dict[str, Tensor]


def _tower(model: nn.Module) -> tuple[nn.Module, int, int]:
    """The vision tower, its patch size in pixels, and the id of the placeholder token."""
    config: Any = model.config
    base = getattr(model, "model", model)
    tower = getattr(base, "vision_tower", None)
    if not isinstance(tower, nn.Module) or not isinstance(
        getattr(config.vision_config, "patch_size", None), int
    ):
        raise UnsupportedMethodError(
            f"the down-sampling control knows towers of one picture size only (LLaVA), not {type(model).__name__}"
        )
    return tower, config.vision_config.patch_size, config.image_token_id


def shrink(model: nn.Module, inputs: Inputs, keep: int | float) -> Inputs:
    """Inputs with smaller pictures, and as many placeholders as the tower makes tokens of them.

    Pixels [B, 3, H, W] are resized (bicubic, antialiased, after normalisation) to s x s patches, s = floor(sqrt(k))
    with k the budget: the largest square of at most k tokens, so 48 becomes 36 = 6 x 6. The tower must run inside
    :func:`interpolated`, which resizes its position embeddings; it was not trained at that resolution. The encoder
    gets cheaper too, which pruning behind it does not.

    Args:
        model: a LLaVA.
        inputs: `input_ids`, `attention_mask` and `pixel_values` with one picture per row, all equally large.
        keep: budget as for `vtprune.patch`.

    Raises:
        UnsupportedMethodError: the model's tower takes no pictures of other sizes.
    """
    _, patch, placeholder = _tower(model)
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    rows, cols = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    side = math.isqrt(resolve_keep(keep, rows * cols))
    side = min(side, min(rows, cols))
    small = interpolate(
        pixels.float(), (side * patch, side * patch), mode="bicubic", antialias=True, align_corners=False
    )
    is_image = ids == placeholder
    stays = ~is_image | (is_image.long().cumsum(1) <= side * side)
    width = int(stays[0].sum())
    return {
        **inputs,
        "pixel_values": small.to(pixels.dtype),
        **{
            name: value[stays].view(len(ids), width)
            for name, value in inputs.items()
            if name != "pixel_values" and value.shape == ids.shape
        },
    }


@contextmanager
def interpolated(model: nn.Module) -> Iterator[None]:
    """Lets the vision tower resize its position embeddings to the picture it is given.

    Raises:
        UnsupportedMethodError: the model's tower takes no pictures of other sizes.
    """
    tower, _, _ = _tower(model)

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "interpolate_pos_encoding": True}

    # `generate` hands no such argument through, hence the hook.
    handle = tower.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        with torch.no_grad():
            yield
    finally:
        handle.remove()
