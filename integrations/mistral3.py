"""Mistral 3 of transformers: a Pixtral tower for any picture size, a patch merger inside the projector."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.integrations.base import AttentionTap, Integration
from vtprune.integrations.hf import assemble, base_of, decoder_of, split_heads
from vtprune.integrations.towers import PackedGrid
from vtprune.method import VALUE_SIGNALS


def integrate(model: nn.Module) -> Integration:
    """Describes a `Mistral3ForConditionalGeneration` or `Mistral3Model`.

    The [IMG_BREAK] and [IMG_END] tokens are text and stay.

    Raises:
        UnsupportedModelError: the layout is unknown.
    """
    base = base_of(
        model,
        ("vision_tower.transformer.layers", "multi_modal_projector", "language_model.layers"),
        "mistral3",
    )
    config: Any = model.config
    tower = base.get_submodule("vision_tower")
    layers = list(tower.get_submodule("transformer.layers").children())

    def tap(layer: int) -> AttentionTap:
        attn: Any = layers[layer].get_submodule("attention")

        def heads(outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, None]:
            q, k = (split_heads(x, attn.head_dim) for x in outputs)
            cos, sin = kwargs["position_embeddings"]
            rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb
            q, k = rotate(q, k, cos, sin, unsqueeze_dim=0)
            return q, k, None

        return AttentionTap(attn, (attn.q_proj, attn.k_proj), heads, attn.head_dim**-0.5)

    vit = PackedGrid(tower, layers, config.vision_config.patch_size, config.spatial_merge_size, tap)
    decoder = decoder_of(base.get_submodule("language_model"), type(model).__name__)
    missing = dict.fromkeys(VALUE_SIGNALS, "the Pixtral encoder packs all pictures; its values are not read")
    return assemble(model, base, [vit], decoder, sites=("projector", "decoder"), missing=missing)
