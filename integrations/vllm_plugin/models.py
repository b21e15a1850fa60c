"""vLLM's models with pruned pictures. Imported by vLLM, in whose processes the plugin has registered the names."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtprune.errors import VTPruneError
from vtprune.integrations.base import FeatureCall, VisionTower
from vtprune.integrations.vllm_plugin.pruning import Pruner
from vtprune.integrations.vllm_plugin.settings import KEY, Pruning, VLLMSettingsError, pruning_of
from vtprune.integrations.vllm_plugin.towers import clip_tower, internvl_tower

# What is overridden below without being part of vLLM's interface for plugins.
for _owner, _name in (
    (LlavaMultiModalProcessor, "_get_mm_hashes"),
    (LlavaProcessingInfo, "get_num_image_tokens"),
    (LlavaNextProcessingInfo, "get_num_image_tokens"),
    (InternS1ProcessingInfo, "get_hf_processor"),
):
    if not hasattr(_owner, _name):
        raise VTPruneError(
            f"{_owner.__name__} of this vLLM has no {_name}, so pictures cannot be pruned safely; use vllm 0.32."
        )

# A name of vLLM's, so that the line is shown by its handlers.
logger = init_logger("vllm.plugins.vtprune")

# transformers 5 saves towers without a level that vLLM 0.32 expects; checkpoints that have it stay as they are.
_FLAT_TOWER = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."
    }
)


class PrunedInfo:
    """Beside a ProcessingInfo of vLLM: how many tokens stay.

    Raises:
        VLLMSettingsError: vLLM is to take embeddings of pictures, which cannot be pruned.
    """

    ctx: Any

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)  # type: ignore[call-arg]
        if ctx.model_config.multimodal_config.enable_mm_embeds:
            raise VLLMSettingsError(
                "enable_mm_embeds: embeddings of pictures that are given pass the encoder by and cannot be pruned; leave it out."
            )

    @cached_property
    def pruning(self) -> Pruning:
        """What the model's configuration asks for."""
        model = self.ctx.model_config
        return pruning_of(model.hf_config, model.model, model.model_impl)


class PrunedProcessor:
    """Beside a MultiModalProcessor of vLLM: cache keys that tell methods and budgets apart."""

    info: Any

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Keys of the processor's, the encoder's and the prefix cache, also where several engines share one."""
        found: Mapping[str, list[str]] = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        digest = self.info.pruning.digest
        return {modality: [f"{key}-{KEY}-{digest}" for key in keys] for modality, keys in found.items()}


class Pruned(ABC):
    """Beside a model of vLLM: pictures lose tokens on their way to the language model."""

    # Tokens of the encoder are not those of the prompt, which adapters on the encoder count by.
    supports_tower_connector_lora = False
    pruner: Pruner

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        _check_parallel(vllm_config)
        model = vllm_config.model_config
        pruning = pruning_of(model.hf_config, model.model, model.model_impl)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.pruner = Pruner(self._tower(model.hf_config), pruning)
        logger.info("vtprune: %r on %s, positions without gaps", pruning.method, pruning.facts.name)

    @abstractmethod
    def _tower(self, config: Any) -> VisionTower:
        """Where the tokens are, for a model's configuration."""

    def _call(self, kwargs: Mapping[str, Any]) -> FeatureCall | None:
        """What the encoder has to know of a call beside the pixels."""
        return None

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """[k, D] per picture: as many rows as the prompt has placeholders."""
        stock = super().embed_multimodal  # type: ignore[misc]
        return self.pruner(lambda: stock(**kwargs), self._call(kwargs))


def _check_parallel(vllm_config: Any) -> None:
    """Raises VLLMSettingsError where processes would see parts of the encoder."""
    size = vllm_config.parallel_config.tensor_parallel_size
    if size > 1:
        raise VLLMSettingsError(
            f"tensor_parallel_size={size}: every process would see some of the encoder's heads and choose tokens by these; use 1."
        )


class _LlavaInfo(PrunedInfo, LlavaProcessingInfo):  # type: ignore[misc]
    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.pruning.left(
            super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        )


class _LlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _LlavaProcessor, info=_LlavaInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlava(Pruned, LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA with a CLIP or SigLIP tower."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | _FLAT_TOWER

    def _tower(self, config: Any) -> VisionTower:
        return clip_tower(
            self.vision_tower, self.multi_modal_projector, config, "LlavaForConditionalGeneration"
        )

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """See :meth:`Pruned.embed_multimodal`; pictures one by one if they lose different numbers of tokens on the way."""
        pixels: Any = kwargs.get("pixel_values")
        if pixels is None or not self.pruner.ragged:
            return super().embed_multimodal(**kwargs)
        rows: list[Tensor] = []
        kept: list[Tensor] = []
        for picture in pixels:
            rows += super().embed_multimodal(**{**kwargs, "pixel_values": picture.unsqueeze(0)})
            kept += self.pruner.kept
        self.pruner.kept = kept
        return rows


class _LlavaNextInfo(PrunedInfo, LlavaNextProcessingInfo):  # type: ignore[misc]
    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        whole: int = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        packing = self.pruning.family.packing
        assert packing is not None
        shown = [
            unit.layout.n_tokens
            for unit in packing(self.get_hf_config(), [(image_height, image_width)]).units
        ]
        return whole - sum(n - self.pruning.left(n) for n in shown)


class _LlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _LlavaNextProcessor, info=_LlavaNextInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlavaNext(Pruned, LlavaNextForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-NeXT: every tile has a budget of its own, newline tokens stay."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | _FLAT_TOWER

    def _tower(self, config: Any) -> VisionTower:
        name = "LlavaNextForConditionalGeneration"
        return clip_tower(self.vision_tower, self.multi_modal_projector, config, name)

    def _call(self, kwargs: Mapping[str, Any]) -> FeatureCall | None:
        return FeatureCall("image", {"image_sizes": kwargs["image_sizes"]})


class _InternVLInfo(PrunedInfo, InternS1ProcessingInfo):  # type: ignore[misc]
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_hf_processor(self, **kwargs: object) -> Any:
        """A processor whose tiles have as many tokens as stay of each."""
        processor = copy.copy(super().get_hf_processor(**kwargs))
        rows, cols = self.pruning.family.grid(self.ctx.model_config.hf_config)
        processor.image_seq_length = self.pruning.left(rows * cols)
        return processor


class _InternVLProcessor(PrunedProcessor, InternS1MultiModalProcessor):  # type: ignore[misc]
    pass


class _InternVLDummies(InternS1DummyInputsBuilder):  # type: ignore[misc]
    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        found = super().get_dummy_mm_data(seq_len, mm_counts, mm_options)
        return {"image": found["image"]}


@MULTIMODAL_REGISTRY.register_processor(_InternVLProcessor, info=_InternVLInfo, dummy_inputs=_InternVLDummies)
class PrunedInternVL(Pruned, InternS1ForConditionalGeneration):  # type: ignore[misc]
    """InternVL in the format of transformers, pictures only: every tile has a budget of its own."""

    def _tower(self, config: Any) -> VisionTower:
        return internvl_tower(self.vision_tower, self.multi_modal_projector, config)
