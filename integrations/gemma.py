"""PaliGemma and Gemma 3 of transformers: a SigLIP tower, and attention masks made around pictures."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtprune.integrations.base import Integration
from vtprune.integrations.hf import assemble, base_of, clip_like_tower, decoder_of


def integrate(model: nn.Module) -> Integration:
    """Describes a PaliGemma or a Gemma 3 with a vision tower.

    Gemma 3 pools patches inside its projector, so its tokens can be removed behind it only.

    Raises:
        UnsupportedModelError: the layout is unknown.
    """
    base = base_of(model, ("vision_tower", "multi_modal_projector", "language_model.layers"), "gemma")
    config: Any = model.config
    projector = base.get_submodule("multi_modal_projector")
    pools = hasattr(projector, "tokens_per_side")
    side: int = getattr(projector, "tokens_per_side", 0)
    tower = clip_like_tower(
        base.get_submodule("vision_tower"),
        None if pools else projector,
        [-1],
        tokens=lambda grid, call: (side, side) if pools else grid,
    )
    missing = {}
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        missing["text_attention"] = "the decoder caps its attention logits, which is not reproduced"
    decoder = decoder_of(base.get_submodule("language_model"), type(model).__name__, prepares_masks=True)
    sites = ("projector", "decoder") if pools else ("vit", "encoder", "projector", "decoder")
    return assemble(model, base, [tower], decoder, sites=sites, missing=missing)
