"""LLaVA of transformers: CLIP or SigLIP tower, MLP projector, any Llama-like decoder."""

from __future__ import annotations

from torch import nn

from vtprune.integrations.base import Integration
from vtprune.integrations.hf import assemble, base_of, decoder_of, llava_tower


def integrate(model: nn.Module) -> Integration:
    """Describes a `LlavaForConditionalGeneration` or `LlavaModel`.

    Raises:
        UnsupportedModelError: the vision tower is neither CLIP nor SigLIP, or the layout is unknown.
    """
    base = base_of(model, ("vision_tower", "multi_modal_projector", "language_model.layers"), "llava")
    tower = llava_tower(model, base, "vision_tower", "multi_modal_projector")
    decoder = decoder_of(base.get_submodule("language_model"), type(model).__name__)
    return assemble(model, base, [tower], decoder)
