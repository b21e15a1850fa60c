"""Model families that can be pruned in vLLM: what methods may know of them, and how many tokens a picture has.

Everything here follows from the configuration alone, so that it is the same in vLLM's front end, which sizes the
placeholders, and in its workers, which remove the tokens. vLLM is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import UnsupportedModelError
from vtprune.integrations.base import Packing
from vtprune.method import CLS_SIGNALS, DECODER_SIGNALS, ENCODER_SIGNALS, HEAD_SIGNALS, ModelFacts

PREFIX = "VTPrune"
ONCE = (
    "vLLM encodes a picture once for all prompts, and every layer of its language model holds the same tokens, so a method "
    "can neither read the prompt nor prune between these layers"
)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        architecture: vLLM's name of it.
        model: our class in `models`.
        sites: where tokens can be removed.
        grid: configuration -> rows and columns of the tokens of an encoder image.
        depth: configuration -> ViT layers whose output reaches the features.
        has_cls: configuration -> whether the encoder has a [CLS] token.
        check: raises UnsupportedModelError for configurations that cannot be pruned.
        packing: (configuration, (height, width) of the pictures) -> what the prompt shows of them; None where every encoder
            image is shown as it is.
    """

    architecture: str
    model: str
    sites: tuple[str, ...]
    grid: Callable[[Any], tuple[int, int]]
    depth: Callable[[Any], int]
    has_cls: Callable[[Any], bool]
    check: Callable[[Any], None]
    packing: Callable[[Any, Sequence[tuple[int, int]]], Packing] | None = None

    @property
    def pruned(self) -> str:
        """Our name of the architecture."""
        return PREFIX + self.architecture

    def facts(self, config: Any, folder: str | None) -> ModelFacts:
        """What methods may know.

        Raises:
            UnsupportedModelError: this configuration cannot be pruned.
        """
        self.check(config)
        name = f"{self.architecture} in vLLM"
        depth = self.depth(config)
        missing = dict.fromkeys((*DECODER_SIGNALS, *HEAD_SIGNALS), ONCE)
        if not self.has_cls(config):
            missing |= dict.fromkeys(CLS_SIGNALS, f"the vision encoder of {name} has no [CLS] token")
        # Also those that vLLM does not load: methods choose by the model's depth, and are refused if they choose these.
        layers = frozenset(range(config.vision_config.num_hidden_layers))
        return ModelFacts(
            name=name,
            encoder_layers=depth,
            decoder_layers=config.get_text_config().num_hidden_layers,
            sites=frozenset(self.sites),
            signals={kind: layers for kind in ENCODER_SIGNALS if kind not in missing},
            missing=missing,
            folder=folder,
        )


def _clip_grid(config: Any) -> tuple[int, int]:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side


def _clip_depth(config: Any) -> int:
    depth: int = config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1)
    return depth


def _has_cls(config: Any) -> bool:
    return bool(config.vision_config.model_type == "clip_vision_model")


def _check_llava(config: Any) -> None:
    tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if tower not in ("clip_vision_model", "siglip_vision_model"):
        raise UnsupportedModelError(
            f"a LLaVA with a {tower!r} vision tower cannot be pruned in vLLM; towers: clip_vision_model, siglip_vision_model."
        )
    want = "default" if _has_cls(config) else "full"
    if strategy != want:
        raise UnsupportedModelError(
            f"vision_feature_select_strategy={strategy!r} with a {tower!r} tower makes [CLS] a visual token or drops a patch; "
            f"set it to {want!r}."
        )
    if not isinstance(config.vision_feature_layer, int):
        raise UnsupportedModelError(
            f"vision_feature_layer={config.vision_feature_layer!r}: features of several layers are not supported in vLLM yet; "
            "give one layer."
        )


def _internvl_grid(config: Any) -> tuple[int, int]:
    vision, ratio = config.vision_config, config.downsample_ratio
    rows, cols = (
        int(size // patch * ratio) for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
    )
    return rows, cols


def _tiles(config: Any, sizes: Sequence[tuple[int, int]]) -> Packing:
    from vtprune.integrations.vllm_plugin.tiles import packing_of  # imports a model of transformers

    return packing_of(config, _clip_grid(config), sizes)


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            "LlavaForConditionalGeneration",
            "PrunedLlava",
            ("vit", "encoder", "projector"),
            _clip_grid,
            _clip_depth,
            _has_cls,
            _check_llava,
        ),
        Family(
            "LlavaNextForConditionalGeneration",
            "PrunedLlavaNext",
            # Tiles lose different numbers of padding tokens, and layers of vLLM's encoders take no mask.
            ("encoder", "projector"),
            _clip_grid,
            _clip_depth,
            _has_cls,
            _check_llava,
            _tiles,
        ),
        Family(
            "InternVLForConditionalGeneration",
            "PrunedInternVL",
            # Pixel shuffle needs the whole grid.
            ("encoder", "projector"),
            _internvl_grid,
            lambda config: int(config.vision_config.num_hidden_layers),
            lambda config: True,
            lambda config: None,
        ),
    )
}


def sizes_of(value: Tensor | Sequence[Tensor]) -> list[tuple[int, int]]:
    """(height, width) of pictures from what vLLM hands to models."""
    rows = value.tolist() if isinstance(value, torch.Tensor) else [torch.as_tensor(v).tolist() for v in value]
    return [(int(h), int(w)) for h, w in rows]
