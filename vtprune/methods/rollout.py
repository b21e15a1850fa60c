"""Attention rollout: what reaches the output through all ViT layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.method import ModelFacts, Scored, Signal, Site, View, check_choice, resolve_layer
from vtprune.scoring import rollout


@dataclass(frozen=True, kw_only=True)
class Rollout(Scored):
    """Training-free, text-agnostic; keeps the tokens whose input flows most into [CLS].

        A'_l = (A_l + I) / 2, rows renormalised, A_l head-mean;   R = A'_L .. A'_1;   s_j = R[CLS, j]

    Source: Abnar & Zuidema, "Quantifying Attention Flow in Transformers" (ACL 2020); samiraabnar/attention_flow at
    8044f53. Theirs is a diagnosis; taking the k largest behind the encoder is ours, and so is the default budget. Their
    attention flow is :func:`vtprune.scoring.attention_flow`, offline only. Layers end with the last that
    reaches the features. Tokens that were pruned inside the ViT take no part. Positions are original.

    Attributes:
        first_layer: the first layer of the product, an index or a fraction of the depth.
        scorer: "cls", or explicitly "received" (ours: the mean over all tokens' rows of R) on encoders without
            [CLS].
    """

    key: ClassVar[str] = "rollout"
    substitutes = ({"scorer": "received"},)

    keep: int | float = 0.5
    first_layer: int | float = 0
    scorer: Literal["cls", "received"] = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer", self.scorer, ("cls", "received"))

    def site(self, facts: ModelFacts) -> Site:
        return facts.behind_encoder()

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        depth = facts.encoder_layers
        first = resolve_layer(self.first_layer, depth, "first_layer")
        maps = tuple(Signal("attention_map", layer) for layer in range(first, depth))
        # Read for what it proves alone: that row 0 of the maps is [CLS].
        return (*maps, Signal("cls_key", depth - 1)) if self.scorer == "cls" else maps

    def scores(self, view: View) -> Tensor:
        maps = [view[signal] for signal in view.signals if signal.kind == "attention_map"]
        p = maps[0].shape[-1] - view.n
        queries = torch.zeros_like(maps[0][:, 0], dtype=torch.float32)
        if self.scorer == "cls":
            queries[:, 0] = 1
        else:
            queries[:, p:] = 1 / view.n
        return rollout(maps, queries)[:, p:]
