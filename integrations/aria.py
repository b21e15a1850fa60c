"""Aria of transformers: a mixture of experts behind a resampler, whose tokens are learned queries."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtprune.integrations.base import Integration
from vtprune.integrations.hf import assemble, base_of, clip_like_tower, decoder_of
from vtprune.method import ENCODER_SIGNALS

QUERIES = "the tokens of Aria are learned queries, no token shows a place of the encoder's grid"


def integrate(model: nn.Module) -> Integration:
    """Describes an `AriaForConditionalGeneration` or `AriaModel`.

    Its tokens have an order but no place in the picture: their layout is one row.

    Raises:
        UnsupportedModelError: the layout is unknown.
    """
    base = base_of(model, ("vision_tower", "multi_modal_projector", "language_model.layers"), "aria")
    config: Any = model.config

    def tokens(grid: tuple[int, int], call: object) -> tuple[int, int]:
        return 1, config.projector_patch_to_query_dict[grid[0] * grid[1]]

    tower = clip_like_tower(base.get_submodule("vision_tower"), None, [-1], tokens=tokens)
    decoder = decoder_of(base.get_submodule("language_model"), type(model).__name__)
    missing = dict.fromkeys(ENCODER_SIGNALS, QUERIES)
    return assemble(model, base, [tower], decoder, sites=("projector", "decoder"), missing=missing)
