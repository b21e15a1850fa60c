"""Video-LLaVA of transformers: one CLIP tower for images, another for frames, whose [CLS] enters the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vtprune.integrations.base import FeatureCall, Integration, Packing, Unit
from vtprune.integrations.hf import assemble, base_of, decoder_of, llava_tower
from vtprune.layout import TokenLayout


def _pack_frames(call: FeatureCall, layouts: Sequence[TokenLayout]) -> Packing:
    """A frame is shown as its [CLS] and its tokens; [CLS] is no content and is never removed."""
    units = []
    for i, layout in enumerate(layouts):
        everything = torch.arange(layout.n_tokens)
        units.append(Unit(layout, i, i, everything + 1, everything))
    return Packing(units, [layout.n_tokens + 1 for layout in layouts])


def integrate(model: nn.Module) -> Integration:
    """Describes a `VideoLlavaForConditionalGeneration` or `VideoLlavaModel`.

    Raises:
        UnsupportedModelError: the layout is unknown, or features are selected in an unknown way.
    """
    base = base_of(
        model, ("image_tower", "video_tower", "multi_modal_projector", "language_model.layers"), "video_llava"
    )
    towers = [
        llava_tower(model, base, "image_tower", "multi_modal_projector"),
        llava_tower(
            model, base, "video_tower", "multi_modal_projector", projector_prefix=1, pack=_pack_frames
        ),
    ]
    decoder = decoder_of(base.get_submodule("language_model"), type(model).__name__)
    calls = {"image": "get_image_features", "video": "get_video_features"}
    return assemble(model, base, towers, decoder, video=True, calls=calls)
