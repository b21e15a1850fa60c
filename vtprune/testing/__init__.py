"""Tiny random models and inputs, built from configurations; for our tests and for those of integrators.

:mod:`vtprune.testing.zoo` has every supported family behind one interface.
"""

from __future__ import annotations

from .tiny import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    VOCABULARY,
    llava_inputs,
    qwen_inputs,
    tiny_llava,
    tiny_qwen2_5_vl,
)

__all__ = [
    "IMAGE_TOKEN",
    "VIDEO_TOKEN",
    "VISION_END",
    "VISION_START",
    "VOCABULARY",
    "llava_inputs",
    "qwen_inputs",
    "tiny_llava",
    "tiny_qwen2_5_vl",
]
