"""VTC-CLS: [CLS] attention summed over ViT layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.method import ModelFacts, Scored, Signal, Site, View, check_choice, resolve_layer
from vtprune.space import Range, Space


@dataclass(frozen=True, kw_only=True)
class VTCCls(Scored):
    """Training-free, text-agnostic; keeps the tokens that [CLS] attends to over an ensemble of layers.

        s_j = sum_{l = first_layer}^{L - 1} mean_h A^l_h[CLS, j],   keep = argtopk(s, k)

    L counts the ViT layers that reach the features, so the last block of a `hidden_states[-2]` model, whose
    output is not used, does not vote.

    Source: THU-MIG/VTC-CLS at e41ac9b (README, code). The authors give the first layer per benchmark (their
    argument parser defaults to 16 of 24); half the depth is ours. Their code removes tokens before the projector at batch size 1, and lets
    the language model count positions densely; so does `positions="auto"`.

    Attributes:
        first_layer: l0, an index or a fraction of the depth; `first_layer=-1` is the single-layer variant.
        scorer: "cls", or explicitly "received" (mean attention received from all tokens) as the accepted
            substitute on encoders without [CLS].
    """

    key: ClassVar[str] = "vtc-cls"
    authors_positions = "dense"
    substitutes = ({"scorer": "received"},)
    search_space: ClassVar[Mapping[str, Space]] = {"first_layer": Range(0.0, 0.95)}

    first_layer: int | float = 0.5
    scorer: Literal["cls", "received"] = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer", self.scorer, ("cls", "received"))

    def site(self, facts: ModelFacts) -> Site:
        return facts.behind_encoder()

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        depth = facts.encoder_layers
        kind: Literal["cls_attention", "received_attention"] = (
            "cls_attention" if self.scorer == "cls" else "received_attention"
        )
        return tuple(
            Signal(kind, layer)
            for layer in range(resolve_layer(self.first_layer, depth, "first_layer"), depth)
        )

    def scores(self, view: View) -> Tensor:
        layers = [view[signal].mean(1) for signal in view.signals]
        return torch.stack(layers).sum(0)
