"""timm's VisionTransformer, with or without class token and register tokens, as an encoder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.errors import UnsupportedModelError
from vtprune.integrations.base import AttentionTap, Integration
from vtprune.integrations.towers import BatchedViT
from vtprune.method import ModelFacts


def integrate(model: nn.Module) -> Integration:
    """Describes a `timm.models.vision_transformer.VisionTransformer`.

    Site `vit` removes tokens between blocks, site `encoder` behind the last block (before the final norm), so
    `forward_features` returns [B, prefix + kept, D] and pooling sees survivors only.

    Raises:
        UnsupportedModelError: blocks of a kind whose attention cannot be read.
    """
    name = type(model).__name__
    net: Any = model
    blocks = list(model.get_submodule("blocks").children())
    attentions = [block.get_submodule("attn") for block in blocks if hasattr(block, "attn")]
    if len(attentions) != len(blocks) or not all(
        isinstance(getattr(a, "qkv", None), nn.Module) for a in attentions
    ):
        raise UnsupportedModelError(
            f"{name} has blocks without a fused `attn.qkv` (found {type(blocks[0]).__name__}); "
            "supported: timm's Block with Attention."
        )
    has_cls = net.cls_token is not None

    def grid(height: int, width: int) -> tuple[int, int]:
        rows, cols = net.patch_embed.patch_size
        return height // rows, width // cols

    def tap(layer: int) -> AttentionTap:
        attn: Any = attentions[layer]

        def heads(outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
            (qkv,) = outputs
            q, k, _ = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return attn.q_norm(q), attn.k_norm(k)

        return AttentionTap(attn, (attn.qkv,), heads, attn.scale)

    def accepts_ragged() -> str | None:
        if net.attn_pool is not None or net.global_pool not in ("", "token"):
            return f"pooling {net.global_pool!r} of {name} would average the padding"
        return None

    tower = BatchedViT(
        module=model,
        layers=blocks,
        used_layers=len(blocks),
        projector=None,
        restores=False,
        has_cls=has_cls,
        prefix=net.num_prefix_tokens,
        projector_prefix=net.num_prefix_tokens,
        grid=grid,
        tap=tap,
        additive_mask=lambda: False,
        mask_argument="attn_mask",
        accepts_ragged=accepts_ragged,
        entry=model.get_submodule("patch_embed"),
        refuses={
            "forward_intermediates": "intermediate features are reshaped into a full grid, which pruned tokens are not; use forward_features()"
        },
    )
    layers = frozenset(range(len(blocks)))
    signals = {"received_attention": layers, "encoder_keys": layers}
    if has_cls:
        signals["cls_attention"] = layers
    return Integration(
        facts=ModelFacts(
            name=name,
            encoder_layers=len(blocks),
            decoder_layers=0,
            sites=frozenset({"vit", "encoder"}),
            signals=signals,
            missing={}
            if has_cls
            else {"cls_attention": f"this {name} has no class token; use scorer='received'"},
        ),
        towers=[tower],
    )
