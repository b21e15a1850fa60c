"""Tiny encoders of timm and transformers: four layers, 8 px patches, 4 x 5 tokens where size is free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .zoo_base import TinyEncoder

PATCH = 8
SQUARE = (32, 32)
WIDE = (32, 40)

_TIMM: dict[str, Any] = {"patch_size": PATCH, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 10}
_HF: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SQUARE[0],
    "patch_size": PATCH,
}


def _init(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.2)
    return model.eval()


def _timm_vit(seed: int = 0) -> nn.Module:
    """ViT with a class token."""
    from timm.models.vision_transformer import VisionTransformer

    return _init(lambda: VisionTransformer(img_size=WIDE, **_TIMM), seed)


def _timm_dinov2_reg(seed: int = 0) -> nn.Module:
    """DINOv2: layer scale, class token and 4 registers, of which none has a position embedding."""
    from timm.models.vision_transformer import VisionTransformer

    return _init(
        lambda: VisionTransformer(img_size=WIDE, init_values=0.5, reg_tokens=4, no_embed_class=True, **_TIMM),
        seed,
    )


def _timm_deit(seed: int = 0) -> nn.Module:
    """DeiT: class and distillation tokens."""
    from timm.models import deit

    model_class: Any = deit.VisionTransformerDistilled  # not annotated
    return _init(lambda: model_class(img_size=WIDE, **_TIMM), seed)


def _timm_eva(seed: int = 0) -> nn.Module:
    """EVA-02: rotary and absolute positions, SwiGLU, class token."""
    from timm.models.eva import Eva

    return _init(
        lambda: Eva(
            img_size=WIDE,
            mlp_ratio=2.0,
            swiglu_mlp=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(4, 5),
            **_TIMM,
        ),
        seed,
    )


def _timm_dinov3(seed: int = 0) -> nn.Module:
    """DINOv3: rotary positions only, layer scale, class token and 4 registers."""
    from timm.models.eva import Eva

    return _init(
        lambda: Eva(
            img_size=WIDE,
            dynamic_img_size=True,
            qkv_bias=False,
            init_values=0.5,
            rope_type="dinov3",
            rope_temperature=100,
            rope_rotate_half=True,
            use_rot_pos_emb=True,
            use_abs_pos_emb=False,
            num_reg_tokens=4,
            use_fc_norm=False,
            **_TIMM,
        ),
        seed,
    )


def _hf(model: str, config: str, **changes: Any) -> Callable[..., nn.Module]:
    def build(attention: str = "sdpa", seed: int = 0) -> nn.Module:
        import transformers

        model_class = getattr(transformers, model)
        settings = getattr(transformers, config)(**{**_HF, **changes})
        return _init(lambda: model_class._from_config(settings, attn_implementation=attention), seed)

    build.__doc__ = f"`transformers.{model}`."
    return build


def _pixels(size: tuple[int, int]) -> Callable[..., Tensor]:
    def pixels(n: int, seed: int = 0) -> Tensor:
        return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))

    pixels.__doc__ = f"Random pictures, [n, 3, {size[0]}, {size[1]}]."
    return pixels


ENCODERS = (
    TinyEncoder("timm_vit", _timm_vit, _pixels(WIDE)),
    TinyEncoder("timm_dinov2_reg", _timm_dinov2_reg, _pixels(WIDE)),
    TinyEncoder("timm_deit", _timm_deit, _pixels(WIDE)),
    TinyEncoder("timm_eva", _timm_eva, _pixels(WIDE)),
    TinyEncoder("timm_dinov3", _timm_dinov3, _pixels(WIDE)),
    TinyEncoder("hf_clip", _hf("CLIPVisionModel", "CLIPVisionConfig", intermediate_size=48), _pixels(SQUARE)),
    TinyEncoder(
        "hf_siglip",
        _hf("SiglipVisionModel", "SiglipVisionConfig", intermediate_size=48, vision_use_head=False),
        _pixels(SQUARE),
    ),
    # DINOv2 interpolates its position embeddings.
    TinyEncoder("hf_dinov2", _hf("Dinov2Model", "Dinov2Config", mlp_ratio=2), _pixels(WIDE)),
    TinyEncoder(
        "hf_dinov2_reg",
        _hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2, num_register_tokens=4),
        _pixels(WIDE),
    ),
    TinyEncoder(
        "hf_vit", _hf("ViTModel", "ViTConfig", intermediate_size=48, image_size=list(WIDE)), _pixels(WIDE)
    ),
    TinyEncoder(
        "hf_dinov3",
        _hf("DINOv3ViTModel", "DINOv3ViTConfig", intermediate_size=48, num_register_tokens=4),
        _pixels(WIDE),
    ),
)
