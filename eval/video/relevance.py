"""Relevance of frames to a question of the video world, by asking the measured model itself."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from torch import nn

from vtprune.video.embedding import Array
from vtprune.video.relevance import ChatRelevance

from ..world.questions import with_article
from ..world.scenes import atlas

PROMPT = "is there {objects}?"
YES = "yes"


def named_things(question: str) -> list[str]:
    """The things of the world that a question names, with their articles, each once, in their order."""
    names = frozenset(atlas().names)
    words = re.findall(r"\w+", question.lower())
    return [with_article(word) for word in dict.fromkeys(words) if word in names]


class ModelRelevance:
    """The largest probability with which a model says "yes" to "is there a cat?", over the things that a question names.

    QuoTA's relevance (:class:`vtprune.video.relevance.ChatRelevance`) with the question and the decoupling that fit the
    video world, whose small model knows no other words. Where a question names nothing all frames are equally relevant.

    Args:
        model: an unpatched image-text-to-text model.
        processor: its processor, with a chat template.
        batch_size: frames per forward pass.

    Raises:
        InvalidOptionError: "yes" is not one token of the model.
    """

    def __init__(self, model: nn.Module, processor: Any, batch_size: int = 120) -> None:
        self._ask = ChatRelevance(
            model, processor, named_things, with_objects=PROMPT, yes=YES, batch_size=batch_size
        )

    def __call__(self, frames: Array, question: str) -> Array:
        """frames [N, h, w, 3] uint8 RGB -> [N] probabilities."""
        things = named_things(question)
        if not things:
            return np.zeros(len(frames))
        # One thing at a time: asked about two, a yes does not say which.
        return np.asarray(np.max([self._ask(frames, thing) for thing in things], axis=0))
