"""LLaVA of the original `llava` package (PyPI llava-torch): pictures become embeddings before the model is called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.errors import UnsupportedCallError, UnsupportedModelError
from vtprune.integrations.base import Integration, MergeCall, Merged
from vtprune.integrations.hf import assemble, clip_like_tower, decoder_of, require_submodules

IMAGE = -200  # llava.constants.IMAGE_TOKEN_INDEX
MERGE = "prepare_inputs_labels_for_multimodal"


def integrate(model: Any) -> Integration:
    """Describes a `LlavaLlamaForCausalLM` or `LlavaMistralForCausalLM` of llava 1.2.2 with its tower loaded.

    Raises:
        UnsupportedModelError: the tower is not loaded or not CLIP, its [CLS] is kept among the features, or the
            package is a fork with another merging method.
    """
    name = type(model).__name__
    stem = model.get_model()
    require_submodules(stem, ("layers", "mm_projector"), "llava (original)")
    if not isinstance(getattr(model.get_vision_tower(), "vision_tower", None), nn.Module):
        raise UnsupportedModelError(
            f"the vision tower of this {name} is not loaded; call model.get_vision_tower().load_model() first."
        )
    if "modalities" in inspect.signature(getattr(model, MERGE)).parameters:
        raise UnsupportedModelError(
            f"this {name} is of the LLaVA-NeXT fork of the package; load its weights with transformers instead."
        )
    wrapper = model.get_vision_tower()
    if wrapper.select_feature != "patch":
        raise UnsupportedModelError(
            f"mm_vision_select_feature={wrapper.select_feature!r} makes [CLS] a visual token; set it to 'patch'."
        )
    tower = clip_like_tower(wrapper.vision_tower, stem.mm_projector, [wrapper.select_layer])
    side = wrapper.vision_tower.config.image_size // wrapper.vision_tower.config.patch_size

    def read(arguments: Mapping[str, Any], result: Any) -> Merged | None:
        embeds: Tensor | None = result[4]
        if embeds is None:
            return None
        images = arguments["images"]
        if isinstance(images, (list, tuple)) or images.ndim == 5:
            raise UnsupportedCallError(
                "tiles and lists of pictures of the original llava package are not supported under a patch; give "
                "images as one tensor [images, 3, height, width], or use LLaVA-NeXT of transformers"
            )
        given, mask = arguments["input_ids"], arguments.get("attention_mask")
        rows: list[Tensor] = []
        used: list[int] = []
        number = 0
        for row, ids in enumerate(given):
            ids = ids if mask is None else ids[mask[row].bool()]
            n = int((ids == IMAGE).sum())
            used += range(number, number + n)
            number += max(n, 1)  # a row without pictures takes one from the list all the same
            rows.append(ids.repeat_interleave(torch.where(ids == IMAGE, side**2, 1)))
        length = embeds.shape[1]
        left = getattr(model.config, "tokenizer_padding_side", "right") == "left"
        whole = torch.zeros(len(rows), length, dtype=given.dtype, device=given.device)
        valid = torch.zeros_like(whole)
        for row, ids in enumerate(rows):
            ids = ids[:length]
            where = slice(length - len(ids), length) if left else slice(0, len(ids))
            whole[row, where] = ids
            valid[row, where] = 1
        return Merged(whole, None if mask is None else valid, used, images) if used else None

    decoder = decoder_of(stem, name)
    integration = assemble(model, model, [tower], decoder, image_token=IMAGE)
    integration.merge_call = MergeCall(model, MERGE, read)
    return integration
