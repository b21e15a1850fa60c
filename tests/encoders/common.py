"""What the tests of encoders alone share: tiny encoders, pictures, methods that do as told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import vtprune
from vtprune.testing.zoo import ENCODERS

TOLERANCE = 1e-4
SIZE = (32, 40)
TIMM_OPTIONS: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 7,
}
VITS: dict[str, dict[str, Any]] = {
    "vit cls avg": {"global_pool": "avg"},
    "vit reg token": {"reg_tokens": 4},
    "vit reg avg": {"global_pool": "avg", "reg_tokens": 4},
    "vit no cls": {"global_pool": "avg", "class_token": False},
    "vit map": {"global_pool": "map", "class_token": False},
    "vit qk norm": {"qk_norm": True},
}
EVAS: dict[str, dict[str, Any]] = {
    "eva token": {"use_rot_pos_emb": True, "global_pool": "token"},
    "eva mixed": {
        "use_rot_pos_emb": True,
        "global_pool": "token",
        "rope_type": "mixed",
        "rope_grid_indexing": "xy",
        "attn_type": "rope",
    },
    "eva post-norm": {"use_post_norm": True, "global_pool": "token"},
    "eva split projections": {"use_rot_pos_emb": True, "qkv_fused": False, "dynamic_img_size": True},
    "eva no cls": {"use_rot_pos_emb": True, "class_token": False, "global_pool": "avg"},
}
NAMES = (*ENCODERS, *VITS, *EVAS, "siglip head")
TIMM = tuple(n for n in NAMES if not n.startswith("hf_") and n != "siglip head")
HF = tuple(n for n in NAMES if n not in TIMM)
KEEP = 5
ENCODER = vtprune.Site("encoder")
NO_CLS = ("hf_siglip", "siglip head", "vit no cls", "vit map", "eva no cls")


def build(name: str, attention: str = "sdpa") -> Any:
    """A fresh model; `attention` matters to those of transformers."""
    if name in TIMM:
        pytest.importorskip("timm")
    if name in ENCODERS:
        return ENCODERS[name].build(**({"attention": attention} if name in HF else {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name in VITS:
            from timm.models.vision_transformer import VisionTransformer

            model: Any = VisionTransformer(**TIMM_OPTIONS, **VITS[name])
        elif name in EVAS:
            from timm.models.eva import Eva

            try:
                model = Eva(**TIMM_OPTIONS, **EVAS[name])
            except TypeError as error:  # some versions cannot build post-norm blocks
                pytest.skip(f"this timm cannot build it: {error}")
        else:
            from transformers import SiglipVisionConfig, SiglipVisionModel

            config = SiglipVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            )
            model = SiglipVisionModel._from_config(config, attn_implementation=attention)
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.2)
    return model.eval()


@functools.cache
def subject(name: str, attention: str = "sdpa") -> Any:
    """The model that is patched; shared by tests that leave it as they found it."""
    return build(name, attention)


def pictures(name: str, n: int = 2, seed: int = 1) -> Tensor:
    if name in ENCODERS:
        return ENCODERS[name].pixels(n, seed)
    size = (32, 32) if name == "siglip head" else SIZE
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def outputs(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, prefix + kept, D] and what is pooled from them."""
    if hasattr(model, "forward_features"):
        return model.forward_features(images), model(images)
    out = model(images)
    pooled = out.pooler_output
    return out.last_hidden_state, out.last_hidden_state[:, :1] if pooled is None else pooled


@contextmanager
def patched(model: Any, method: Any, **options: Any) -> Iterator[vtprune.Patch]:
    patch = vtprune.patch(model, method, **options)
    try:
        yield patch
    finally:
        patch.remove()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name}: attributes"] = sorted(module.__dict__)
        state[f"{name}: class"] = type(module)
        for key, value in module.__dict__.items():
            if "hooks" in key and hasattr(value, "items"):
                state[f"{name}: {key}"] = dict(value)
    state["state_dict"] = list(model.state_dict())
    return state


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def ids(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(map(str, value.values())) or "default"
    return None


@dataclass(frozen=True, kw_only=True)
class Scripted(vtprune.Method):
    """Does what the test says at one site."""

    key: ClassVar[str] = "test-scripted"
    keep: int | float = KEEP
    where: vtprune.Site = ENCODER
    reads: tuple[vtprune.Signal, ...] = ()
    script: list[Callable[[vtprune.View], vtprune.Selection]] = field(default_factory=list)

    def site(self, facts: vtprune.ModelFacts) -> vtprune.Site:
        return self.where

    def needs(self, facts: vtprune.ModelFacts) -> tuple[vtprune.Signal, ...]:
        return self.reads

    def decide(self, view: vtprune.View) -> vtprune.Selection:
        return self.script[0](view)


def first_k(view: vtprune.View) -> vtprune.Selection:
    """Keeps the first k tokens."""
    return vtprune.Selection.of(torch.arange(view.k).expand(len(view.features), -1))


def boom(view: vtprune.View) -> vtprune.Selection:
    """A bug in a method."""
    raise RuntimeError("boom")
