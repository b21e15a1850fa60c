"""How LLaVA-NeXT packs tiles, asked of transformers without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# TilePacking looks the last two up in the module of what it is given.
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

from vtprune.integrations.base import FeatureCall, Packing
from vtprune.integrations.llava_next import TilePacking
from vtprune.layout import TokenLayout

__all__ = ["get_anyres_image_grid_shape", "image_size_to_num_patches", "packing_of"]


class _Stock:
    """What :class:`TilePacking` asks of a model."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def pack_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return LlavaNextModel.pack_image_features(self, *args, **kwargs)  # type: ignore[arg-type]


def packing_of(config: Any, grid: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> Packing:
    """What the prompt shows of the tiles of pictures.

    Args:
        config: of a LLaVA-NeXT.
        grid: rows and columns of the tokens of a tile.
        sizes: (height, width) of the pictures.
    """
    strategy = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    packing = TilePacking(_Stock(config), resamples=False, options=lambda call: strategy)  # type: ignore[arg-type]
    return packing(FeatureCall("image", {"image_sizes": list(sizes)}), [TokenLayout(*grid)])
