"""Vision transformers of timm as encoders alone: VisionTransformer, DeiT, and Eva (EVA-02, DINOv3, PE, RoPE-ViT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.errors import UnsupportedCallError, UnsupportedModelError
from vtprune.integrations.base import AttentionTap, Integration, encoder_facts
from vtprune.integrations.towers import BatchedViT

# Attention modules that hand all heads of q and k to `q_norm` and `k_norm`, before any rotary embedding.
ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention")


def integrate(model: nn.Module) -> Integration:
    """Describes a `VisionTransformer`, `VisionTransformerDistilled` or `Eva` of timm.

    Site `vit` removes tokens between blocks, site `encoder` behind the last block (before the final norm), so
    `forward_features` returns [B, prefix + kept, D] and pooling sees survivors only. Where images of a batch keep
    different counts, rows behind an image's survivors are padding.

    Raises:
        UnsupportedModelError: blocks of a kind whose attention cannot be read.
    """
    name = type(model).__name__
    net: Any = model
    blocks = list(model.get_submodule("blocks").children())
    attentions = [getattr(block, "attn", None) for block in blocks]
    for block, attn in zip(blocks, attentions, strict=True):
        if not any(c.__name__ in ATTENTIONS for c in type(attn).__mro__):
            found = "no `attn`" if attn is None else f"a {type(attn).__name__}"
            raise UnsupportedModelError(
                f"{name} has blocks whose attention cannot be read ({type(block).__name__} with {found}); supported: "
                f"blocks with an `attn` of class {', '.join(ATTENTIONS)}."
            )
    has_cls = net.cls_token is not None
    plain = any(c.__name__ == "PatchEmbed" for c in type(net.patch_embed).__mro__)

    def grid(height: int, width: int) -> tuple[int, int]:
        dropout = net.patch_drop
        if net.training and getattr(dropout, "prob", 0) > 0:
            raise UnsupportedCallError(
                f"{name} drops random patches in training (patch_drop_rate={dropout.prob}), so its tokens form no "
                "grid; set patch_drop_rate=0 or call eval()"
            )
        if net.grad_checkpointing and torch.is_grad_enabled():
            raise UnsupportedCallError(
                f"gradient checkpointing of {name} runs blocks again in the backward pass, where nothing would be pruned; "
                "call set_grad_checkpointing(False), or run under torch.no_grad()"
            )
        rows, cols = net.patch_embed.dynamic_feat_size((height, width))
        return int(rows), int(cols)

    def tap(layer: int) -> AttentionTap:
        attn: Any = attentions[layer]

        def heads(outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, None]:
            q, k = outputs
            if kwargs.get("is_causal"):
                raise UnsupportedCallError(
                    f"{name} was called with is_causal=True; signals are measured on bidirectional attention. Leave it "
                    "out, or use a method that reads no attention"
                )
            rope = kwargs.get("rope")
            if rope is None:
                return q, k, None
            from timm.layers.pos_embed_sincos import apply_rot_embed_cat

            half, prefix = getattr(attn, "rotate_half", False), attn.num_prefix_tokens
            for x in (rotated := [q.clone(), k.clone()]):
                x[:, :, prefix:] = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
            return rotated[0], rotated[1], None

        return AttentionTap(attn, (attn.q_norm, attn.k_norm), heads, attn.scale, attn.proj)

    def pools() -> str | None:
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
        patch=net.patch_embed.patch_size if plain else None,
        tap=tap,
        # Without fused attention, older versions add a bool mask to the logits as if it were numbers.
        additive_mask=lambda: not all(getattr(attn, "fused_attn", False) for attn in attentions),
        mask_argument="attn_mask",
        pools=pools,
        tables="rope" if getattr(net, "rope", None) is not None else None,
        entry=model.get_submodule("patch_embed"),
        refuses={
            "forward_intermediates": "intermediate features are reshaped into a full grid, which pruned tokens are not; use forward_features()"
        },
    )
    facts = encoder_facts(name, len(blocks), has_cls, values=False, pixels=plain)
    return Integration(facts=facts, towers=[tower])
