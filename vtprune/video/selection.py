"""Frame selectors by name. Adding a line here registers one everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

from vtprune.errors import InvalidOptionError, UnknownMethodError, did_you_mean
from vtprune.video.clip import Clip, ClipError, FrameSelection, FrameSelector
from vtprune.video.embedding import CLIPEmbedder, Embedder
from vtprune.video.selectors.keyscore import KeyScore
from vtprune.video.selectors.mllm_select import MLLMSelect
from vtprune.video.selectors.motion import Motion
from vtprune.video.selectors.quota import Quota
from vtprune.video.selectors.random import Random
from vtprune.video.selectors.shots import Shots
from vtprune.video.selectors.stacfp import STACFP
from vtprune.video.selectors.uniform import Uniform

__all__ = [
    "SELECTORS",
    "STACFP",
    "CLIPEmbedder",
    "Clip",
    "ClipError",
    "Embedder",
    "FrameSelection",
    "FrameSelector",
    "KeyScore",
    "MLLMSelect",
    "Motion",
    "Quota",
    "Random",
    "Shots",
    "Uniform",
    "create_selector",
]

SELECTORS: dict[str, type[FrameSelector]] = {
    cls.key: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, FrameSelector) and cls is not FrameSelector
}


def create_selector(name: str, **options: Any) -> FrameSelector:
    """A frame selector from its registry key and options.

    Raises:
        UnknownMethodError: no such key; names the nearest ones.
        InvalidOptionError: unknown or out-of-range option.
    """
    if name not in SELECTORS:
        raise UnknownMethodError(f"there is no frame selector {name!r}. {did_you_mean(name, SELECTORS)}")
    cls: Any = SELECTORS[name]
    known = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise InvalidOptionError(
                f"frame selector {name!r} has no option {option!r}. {did_you_mean(option, known)}"
            )
    selector: FrameSelector = cls(**options)
    return selector
