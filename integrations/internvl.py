"""InternVL of transformers: a ViT with [CLS], pixel shuffle (four patches make a token), an MLP projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.integrations.base import AttentionTap, Integration
from vtprune.integrations.hf import assemble, base_of, decoder_of, padding_reason, split_heads
from vtprune.integrations.towers import BatchedViT


def integrate(model: nn.Module) -> Integration:
    """Describes an `InternVLForConditionalGeneration` or `InternVLModel`.

    Patches cannot be removed inside the ViT, because pixel shuffle needs the whole grid.

    Raises:
        UnsupportedModelError: the layout is unknown.
    """
    base = base_of(
        model, ("vision_tower.encoder.layer", "multi_modal_projector", "language_model.layers"), "internvl"
    )
    config: Any = model.config
    vision: Any = config.vision_config
    tower = base.get_submodule("vision_tower")
    layers = list(tower.get_submodule("encoder.layer").children())
    rows, cols = vision.patch_size

    def tap(layer: int) -> AttentionTap:
        attn: Any = layers[layer].get_submodule("attention")

        def heads(outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = outputs
            q, k, v = (split_heads(x, attn.head_dim) for x in (attn.q_norm(q), attn.k_norm(k), v))
            return q, k, v

        return AttentionTap(
            attn, (attn.q_proj, attn.k_proj, attn.v_proj), heads, attn.scale, attn.projection_layer
        )

    def tokens(grid: tuple[int, int], call: object) -> tuple[int, int]:
        return int(grid[0] * config.downsample_ratio), int(grid[1] * config.downsample_ratio)

    vit = BatchedViT(
        module=tower,
        layers=layers,
        used_layers=config.vision_feature_layer % (len(layers) + 1),
        projector=base.get_submodule("multi_modal_projector"),
        restores=True,
        has_cls=True,
        prefix=1,
        projector_prefix=0,
        grid=lambda h, w: (h // rows, w // cols),
        patch=(rows, cols),
        tap=tap,
        additive_mask=lambda: vision._attn_implementation == "eager",
        accepts_ragged=padding_reason(vision),
        tokens=tokens,
    )
    decoder = decoder_of(base.get_submodule("language_model"), type(model).__name__)
    return assemble(model, base, [vit], decoder, sites=("encoder", "projector", "decoder"))
