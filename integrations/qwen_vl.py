"""The Qwen-VL models of transformers from Qwen2-VL on: a packed ViT without [CLS], a merger, M-RoPE."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.integrations.base import AttentionTap, Integration
from vtprune.integrations.hf import assemble, base_of, decoder_of
from vtprune.integrations.towers import PackedViT


def integrate(model: nn.Module) -> Integration:
    """Describes a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3-VL-MoE.

    Raises:
        UnsupportedModelError: the layout is unknown.
    """
    base = base_of(model, ("visual.blocks", "visual.merger", "language_model.layers"), "qwen_vl")
    visual = base.get_submodule("visual")
    vision: Any = visual.config
    blocks = list(visual.get_submodule("blocks").children())
    patch_embed: Any = visual.get_submodule("patch_embed")

    def order(grid_thw: Tensor) -> Tensor:
        if not hasattr(vision, "window_size"):
            return torch.arange(int(grid_thw.prod(-1).sum()) // vision.spatial_merge_size**2)
        from transformers.vision_utils import get_vision_window_index

        index: Tensor = get_vision_window_index(
            grid_thw,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )[0]
        return index

    def tap(layer: int) -> AttentionTap:
        attn: Any = blocks[layer].get_submodule("attn")

        def heads(outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            (qkv,) = outputs
            q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(1)
            rotary = sys.modules[type(attn).__module__].apply_rotary_pos_emb_vision
            q, k = rotary(q, k, *kwargs["position_embeddings"])
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return q, k, v

        head_dim = attn.qkv.in_features // attn.num_heads
        return AttentionTap(attn, (attn.qkv,), heads, head_dim**-0.5, attn.proj)

    deepstack = getattr(visual, "deepstack_merger_list", None)
    tower = PackedViT(
        module=visual,
        layers=blocks,
        projector=visual.get_submodule("merger"),
        unit=vision.spatial_merge_size**2,
        channels=patch_embed.in_channels,
        order=order,
        tap=tap,
        side_outputs=[] if deepstack is None else list(deepstack),
    )
    decoder = decoder_of(
        base.get_submodule("language_model"),
        type(model).__name__,
        mrope=True,
        inject=None if deepstack is None else "_deepstack_process",
    )
    calls = {"image": "get_image_features", "video": "get_video_features"}
    return assemble(model, base, [tower], decoder, video=True, calls=calls)
