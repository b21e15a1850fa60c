"""Tiny random models of every supported family behind one interface, and inputs for them.

Prompts are lists of text token ids, :class:`Image` and :class:`Video`; `batch` lays out placeholders,
separators and pixel inputs as the family's processor does, with integers instead of a tokenizer::

    family = LVLMS["qwen3_vl"]
    model = family.build()
    model.generate(**family.batch([[20, Image(1), 21], [22, 23]]), max_new_tokens=4)
"""

from __future__ import annotations

from . import zoo_encoders, zoo_llava, zoo_others, zoo_qwen
from .zoo_base import Image, Prompt, TinyEncoder, TinyLVLM, Video

LVLMS: dict[str, TinyLVLM] = {
    family.name: family for family in (*zoo_llava.FAMILIES, *zoo_qwen.FAMILIES, *zoo_others.FAMILIES)
}
ENCODERS: dict[str, TinyEncoder] = {encoder.name: encoder for encoder in zoo_encoders.ENCODERS}

__all__ = ["ENCODERS", "LVLMS", "Image", "Prompt", "TinyEncoder", "TinyLVLM", "Video"]
