"""Which models are supported, and where their tokens are. Adding an entry here adds a model everywhere."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtprune.errors import UnsupportedModelError
from vtprune.integrations.base import Integration


@dataclass(frozen=True)
class Family:
    """One supported model family.

    Attributes:
        name: its key.
        title: name for people.
        classes: names of the classes that can be patched.
        library: top-level package that defines them.
        module: module of `vtprune.integrations` that describes it.
        kind: "lvlm" or "encoder".
        function: the module's function that does.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    library: str
    module: str
    kind: str
    function: str = "integrate"

    def matches(self, model: nn.Module) -> bool:
        """Whether a class of the model is one of `classes`, by name, so that the library is not imported."""
        return any(
            c.__name__ in self.classes and c.__module__.split(".")[0] == self.library
            for c in type(model).__mro__
        )


def _lvlm(name: str, title: str, stem: str, module: str, function: str = "integrate") -> Family:
    """An LVLM of transformers with classes `stem`ForConditionalGeneration and `stem`Model."""
    classes = (f"{stem}ForConditionalGeneration", f"{stem}Model")
    return Family(name, title, classes, "transformers", module, "lvlm", function)


FAMILIES: tuple[Family, ...] = (
    _lvlm("llava", "LLaVA", "Llava", "llava"),
    _lvlm("llava_next", "LLaVA-NeXT", "LlavaNext", "llava_next", "llava_next"),
    _lvlm("llava_next_video", "LLaVA-NeXT-Video", "LlavaNextVideo", "llava_next", "llava_next_video"),
    _lvlm("llava_onevision", "LLaVA-OneVision", "LlavaOnevision", "llava_next", "llava_onevision"),
    _lvlm("video_llava", "Video-LLaVA", "VideoLlava", "video_llava"),
    _lvlm("qwen2_vl", "Qwen2-VL", "Qwen2VL", "qwen_vl"),
    _lvlm("qwen2_5_vl", "Qwen2.5-VL", "Qwen2_5_VL", "qwen_vl"),
    _lvlm("qwen3_vl", "Qwen3-VL", "Qwen3VL", "qwen_vl"),
    _lvlm("qwen3_vl_moe", "Qwen3-VL-MoE", "Qwen3VLMoe", "qwen_vl"),
    _lvlm("internvl", "InternVL", "InternVL", "internvl"),
    _lvlm("idefics3", "Idefics3", "Idefics3", "idefics"),
    _lvlm("smolvlm", "SmolVLM", "SmolVLM", "idefics"),
    _lvlm("gemma3", "Gemma 3", "Gemma3", "gemma"),
    _lvlm("paligemma", "PaliGemma", "PaliGemma", "gemma"),
    _lvlm("mistral3", "Mistral 3 (Pixtral)", "Mistral3", "mistral3"),
    _lvlm("aria", "Aria", "Aria", "aria"),
    Family(
        "llava_original",
        "LLaVA (original package)",
        ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"),
        "llava",
        "llava_original",
        "lvlm",
    ),
    Family("timm_vit", "timm VisionTransformer", ("VisionTransformer",), "timm", "timm_vit", "encoder"),
    Family("timm_deit", "timm DeiT", ("VisionTransformerDistilled",), "timm", "timm_vit", "encoder"),
    Family("timm_eva", "timm EVA-02 and DINOv3", ("Eva",), "timm", "timm_vit", "encoder"),
    Family("hf_clip", "CLIP", ("CLIPVisionModel",), "transformers", "hf_vit", "encoder"),
    Family("hf_siglip", "SigLIP", ("SiglipVisionModel",), "transformers", "hf_vit", "encoder"),
    Family("hf_vit", "ViT", ("ViTModel",), "transformers", "hf_vit", "encoder"),
    Family("hf_dinov2", "DINOv2", ("Dinov2Model",), "transformers", "hf_vit", "encoder"),
    Family(
        "hf_dinov2_reg",
        "DINOv2 with registers",
        ("Dinov2WithRegistersModel",),
        "transformers",
        "hf_vit",
        "encoder",
    ),
    Family("hf_dinov3", "DINOv3", ("DINOv3ViTModel",), "transformers", "hf_vit", "encoder"),
)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a PEFT model or a DistributedDataParallel wrapper; any other model as it is."""
    if type(model).__module__.split(".")[0] == "peft" and hasattr(model, "get_base_model"):
        adapted: Any = model
        return unwrap(adapted.get_base_model())
    return unwrap(model.module) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _refuse_compiled(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise UnsupportedModelError(
                f"{f'{path!r} of this {type(model).__name__}' if path else 'this model'} is compiled by torch.compile, which "
                "does not notice that hooks come and go; patch a model that is not compiled (of `torch.compile(model)` the "
                "`model`), and call that."
            )


def integrate(model: nn.Module) -> Integration:
    """Describes a model by the first family that matches it.

    Raises:
        UnsupportedModelError: none does; says what is supported. Or the model, or a part of it, is compiled.
    """
    _refuse_compiled(model)
    for family in FAMILIES:
        if family.matches(model):
            module = importlib.import_module(f"vtprune.integrations.{family.module}")
            integration: Integration = getattr(module, family.function)(model)
            return integration
    supported = "; ".join(f"{f.title}: {', '.join(f.classes)} of {f.library}" for f in FAMILIES)
    inner = next(
        (
            f"its submodule {path!r} is a {type(child).__name__}, which is supported: patch that"
            for path, child in model.named_modules()
            if path and any(f.matches(child) for f in FAMILIES)
        ),
        "it has no vision encoder that vtprune knows, so there are no visual tokens to prune",
    )
    raise UnsupportedModelError(f"{type(model).__name__} is not supported ({inner}). Supported: {supported}.")
