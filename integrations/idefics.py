"""Idefics3 and SmolVLM of transformers: tiles with padding patches, a SigLIP-like ViT, pixel shuffle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vtprune.integrations.base import Integration
from vtprune.integrations.hf import assemble, base_of, clip_like_tower, decoder_of


def _patches(kwargs: Mapping[str, Any]) -> Tensor | None:
    """[I, patches] bool, False for patches that are padding."""
    mask: Tensor | None = kwargs.get("patch_attention_mask")
    return None if mask is None or bool(mask.all()) else mask.flatten(1)


def integrate(model: nn.Module) -> Integration:
    """Describes an Idefics3 or SmolVLM.

    Patches cannot be removed inside the ViT, because pixel shuffle needs the whole grid.

    Raises:
        UnsupportedModelError: the layout is unknown.
    """
    base = base_of(model, ("vision_model", "connector.modality_projection", "text_model.layers"), "idefics")
    config: Any = model.config
    factor = config.scale_factor
    tower = clip_like_tower(
        base.get_submodule("vision_model"),
        base.get_submodule("connector.modality_projection"),
        [-1],
        tokens=lambda grid, call: (grid[0] // factor, grid[1] // factor),
        visible=_patches,
    )
    decoder = decoder_of(base.get_submodule("text_model"), type(model).__name__)
    return assemble(model, base, [tower], decoder, sites=("encoder", "projector", "decoder"))
