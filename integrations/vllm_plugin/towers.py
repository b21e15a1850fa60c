"""Where the tokens are in vLLM's vision encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.integrations.base import AttentionTap, VisionTower
from vtprune.integrations.hf import split_heads
from vtprune.integrations.towers import BatchedViT
from vtprune.integrations.vllm_plugin.families import FAMILIES, sizes_of

NO_MASK = "vLLM's vision encoders take no padding mask"


def clip_tower(tower: Any, projector: nn.Module, config: Any, family: str) -> VisionTower:
    """vLLM's CLIP or SigLIP, which holds only the layers that are used; queries, keys and values come from one projection.

    Args:
        tower: `vision_tower` of a LLaVA.
        projector: its `multi_modal_projector`.
        config: of the whole model.
        family: key in `FAMILIES`.
    """
    layers = list(tower.vision_model.encoder.layers)
    patch = config.vision_config.patch_size
    packing = FAMILIES[family].packing

    def tap(layer: int) -> AttentionTap:
        attn = layers[layer].self_attn

        def heads(outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (split_heads(x, attn.head_dim) for x in outputs[0].chunk(3, dim=-1))
            return q, k, v

        return AttentionTap(attn, (attn.qkv_proj,), heads, attn.scale, attn.out_proj)

    has_cls = FAMILIES[family].has_cls(config)
    return BatchedViT(
        module=tower,
        layers=layers,
        used_layers=len(layers),
        projector=projector,
        restores=True,
        has_cls=has_cls,
        prefix=int(has_cls),
        projector_prefix=0,
        grid=lambda h, w: (h // patch, w // patch),
        patch=(patch, patch),
        tap=tap,
        additive_mask=lambda: False,
        accepts_ragged=lambda: NO_MASK,
        pack=None
        if packing is None
        else lambda call, layouts: packing(config, sizes_of(call.arguments["image_sizes"])),
    )


def internvl_tower(tower: Any, projector: nn.Module, config: Any) -> VisionTower:
    """vLLM's encoder of InternVL in the format of transformers."""
    layers = list(tower.encoder.layer)
    rows, cols = config.vision_config.patch_size
    ratio = config.downsample_ratio

    def tap(layer: int) -> AttentionTap:
        attn = layers[layer].attention

        def heads(outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = outputs
            if attn.qk_normalization:
                q, k = attn.q_norm(q), attn.k_norm(k)
            q, k, v = (split_heads(x, attn.head_dim) for x in (q, k, v))
            return q, k, v

        return AttentionTap(
            attn, (attn.q_proj, attn.k_proj, attn.v_proj), heads, attn.scale, attn.projection_layer
        )

    return BatchedViT(
        module=tower,
        layers=layers,
        used_layers=len(layers),
        projector=projector,
        restores=True,
        has_cls=True,
        prefix=1,
        projector_prefix=0,
        grid=lambda h, w: (h // rows, w // cols),
        patch=(rows, cols),
        tap=tap,
        additive_mask=lambda: False,
        accepts_ragged=lambda: NO_MASK,
        tokens=lambda grid, call: (int(grid[0] * ratio), int(grid[1] * ratio)),
    )
