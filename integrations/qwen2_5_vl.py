"""Qwen2.5-VL of transformers: packed window-attention ViT without [CLS], 2 x 2 merger, M-RoPE."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.integrations.base import AttentionTap, Integration
from vtprune.integrations.hf import decoder_of, require_submodules
from vtprune.integrations.towers import PackedViT
from vtprune.method import ModelFacts


def integrate(model: nn.Module) -> Integration:
    """Describes a `Qwen2_5_VLForConditionalGeneration` or `Qwen2_5_VLModel`.

    Raises:
        UnsupportedModelError: the layout is unknown, or decoder layers use sliding windows.
    """
    from transformers.vision_utils import get_vision_window_index

    name = type(model).__name__
    base = model.model if hasattr(model, "model") else model
    assert isinstance(base, nn.Module)
    require_submodules(base, ("visual.blocks", "visual.merger", "language_model.layers"), "qwen2_5_vl")
    config: Any = model.config
    visual = base.get_submodule("visual")
    vision: Any = config.vision_config
    blocks = list(visual.get_submodule("blocks").children())

    def order(grid_thw: Tensor) -> Tensor:
        index: Tensor = get_vision_window_index(
            grid_thw,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )[0]
        return index

    def tap(layer: int) -> AttentionTap:
        attn = blocks[layer].get_submodule("attn")
        head_dim = vision.hidden_size // vision.num_heads

        def heads(outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
            (qkv,) = outputs
            q, k, _ = qkv.unflatten(-1, (3, vision.num_heads, head_dim)).unbind(1)
            rotary = sys.modules[type(attn).__module__].apply_rotary_pos_emb_vision
            q, k = rotary(q, k, *kwargs["position_embeddings"])
            return q.transpose(0, 1)[None], k.transpose(0, 1)[None]

        return AttentionTap(attn, (attn.get_submodule("qkv"),), heads, head_dim**-0.5)

    tower = PackedViT(
        module=visual,
        layers=blocks,
        projector=visual.get_submodule("merger"),
        unit=vision.spatial_merge_size**2,
        order=order,
        tap=tap,
    )
    decoder = decoder_of(base.get_submodule("language_model"), name, mrope=True)
    layers = frozenset(range(len(blocks)))
    return Integration(
        facts=ModelFacts(
            name=name,
            encoder_layers=len(blocks),
            decoder_layers=len(decoder.layers),
            sites=frozenset({"vit", "encoder", "projector", "decoder"}),
            signals={
                "received_attention": layers,
                "encoder_keys": layers,
                "text_attention": frozenset(range(len(decoder.layers))),
            },
            missing={"cls_attention": "the Qwen2.5-VL encoder has no [CLS] token; use scorer='received'"},
            mrope=True,
        ),
        tower=tower,
        decoder=decoder,
        base=base,
        placeholders={"image": config.image_token_id, "video": config.video_token_id},
    )
