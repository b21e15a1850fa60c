"""LLaVA of transformers: CLIP or SigLIP tower, MLP projector, any Llama-like decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtprune.errors import UnsupportedModelError
from vtprune.integrations.base import Integration
from vtprune.integrations.hf import clip_like_tower, decoder_of, require_submodules
from vtprune.method import ModelFacts

TOWERS = ("clip_vision_model", "siglip_vision_model")


def integrate(model: nn.Module) -> Integration:
    """Describes a `LlavaForConditionalGeneration` or `LlavaModel`.

    Raises:
        UnsupportedModelError: the vision tower is neither CLIP nor SigLIP, or the layout is unknown.
    """
    name = type(model).__name__
    base = model.model if hasattr(model, "model") else model
    assert isinstance(base, nn.Module)
    require_submodules(base, ("vision_tower", "multi_modal_projector", "language_model.layers"), "llava")
    config: Any = model.config
    vision_tower = base.get_submodule("vision_tower")
    vision_config: Any = vision_tower.config
    if vision_config.model_type not in TOWERS:
        raise UnsupportedModelError(
            f"{name} with a {vision_config.model_type!r} vision tower is not supported; towers: {', '.join(TOWERS)}."
        )
    feature_layer = config.vision_feature_layer
    tower = clip_like_tower(
        vision_tower,
        base.get_submodule("multi_modal_projector"),
        [feature_layer] if isinstance(feature_layer, int) else list(feature_layer),
        config.vision_feature_select_strategy,
        name,
    )
    decoder = decoder_of(base.get_submodule("language_model"), name)
    layers = frozenset(range(len(tower.layers)))
    missing = (
        {}
        if tower.has_cls
        else {
            "cls_attention": f"the {vision_config.model_type} tower has no [CLS] token; use scorer='received'"
        }
    )
    signals = {"received_attention": layers, "encoder_keys": layers}
    if tower.has_cls:
        signals["cls_attention"] = layers
    signals["text_attention"] = frozenset(range(len(decoder.layers)))
    return Integration(
        facts=ModelFacts(
            name=name,
            encoder_layers=tower.used_layers,
            decoder_layers=len(decoder.layers),
            sites=frozenset({"vit", "encoder", "projector", "decoder"}),
            signals=signals,
            missing=missing,
        ),
        tower=tower,
        decoder=decoder,
        base=base,
        placeholders={"image": config.image_token_id},
    )
