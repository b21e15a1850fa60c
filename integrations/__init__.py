"""Which models are supported, and where their tokens are. Adding an entry here adds a model everywhere."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

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
        module: module of `vtprune.integrations` with the function `integrate`.
        kind: "lvlm" or "encoder".
    """

    name: str
    title: str
    classes: tuple[str, ...]
    library: str
    module: str
    kind: str

    def matches(self, model: nn.Module) -> bool:
        """Whether a class of the model is one of `classes`, by name, so that the library is not imported."""
        return any(
            c.__name__ in self.classes and c.__module__.split(".")[0] == self.library
            for c in type(model).__mro__
        )


FAMILIES: tuple[Family, ...] = (
    Family(
        "llava",
        "LLaVA (CLIP or SigLIP tower)",
        ("LlavaForConditionalGeneration", "LlavaModel"),
        "transformers",
        "llava",
        "lvlm",
    ),
    Family(
        "qwen2_5_vl",
        "Qwen2.5-VL",
        ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel"),
        "transformers",
        "qwen2_5_vl",
        "lvlm",
    ),
    Family("timm_vit", "timm VisionTransformer", ("VisionTransformer",), "timm", "timm_vit", "encoder"),
)


def integrate(model: nn.Module) -> Integration:
    """Describes a model by the first family that matches it.

    Raises:
        UnsupportedModelError: none does; says what is supported.
    """
    for family in FAMILIES:
        if family.matches(model):
            module = importlib.import_module(f"vtprune.integrations.{family.module}")
            integration: Integration = module.integrate(model)
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
