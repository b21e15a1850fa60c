"""MSTM: tokens that [CLS] attends to little are merged into similar ones that it attends to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.method import Method, ModelFacts, Signal, Site, Stage, View, check_choice, resolve_keep
from vtprune.ops import best_match, gather_tokens
from vtprune.scoring import by_count, geometric, inner_layers
from vtprune.selection import Selection, merged, topk


@dataclass(frozen=True, kw_only=True)
class MSTM(Method):
    """Text-agnostic, inside the ViT; the token mergence of "Multi-Scale And Token Mergence", without its training.

        s_i = mean_h A_h[CLS, i] of the layer before,   C = argtopk(s, k),   c(u) = argmax_{c in C} cos(x_u, x_c)
        x_c <- (s_c x_c + sum_{u -> c} s_u x_u) / (s_c + sum s_u)

    Source: Bian et al., "Multi-Scale And Token Mergence: Make Your ViT More Efficient" (arXiv 2306.04897). Only its
    abstract could be read: an importance criterion splits tokens, the less important merge into similar crucial
    ones, after multi-scale features were fused. The formulas, weights, layers and the keep ratio here are ours (layers
    and ratio per stage as in EViT: 0.7 before layers 3, 6 and 9, counted 4, 7, 10 of 12 as AS-ViT does).
    Left out: the fusion of multi-scale features and the fine-tuning, whose form is not known. No accuracy of the paper
    can be claimed for this method.

    Attributes:
        keep: tokens behind the last stage; all stages keep the same share.
        layers: where it acts, at the input of ViT layers; indices or fractions of the depth.
        scorer: "cls", or explicitly "received" (mean attention received) on encoders without [CLS].
    """

    key: ClassVar[str] = "mstm"
    substitutes = ({"scorer": "received"},)

    keep: int | float = 0.343
    layers: tuple[int | float, ...] = (4 / 12, 7 / 12, 10 / 12)
    scorer: Literal["cls", "received"] = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer", self.scorer, ("cls", "received"))

    def stages(self, facts: ModelFacts) -> list[Stage]:
        layers = inner_layers(self.layers, facts.encoder_layers)
        return [
            Stage(
                Site("vit", layer),
                self.keep if i == len(layers) else None,
                partial(self.merge, stage=i, stages=len(layers)),
                (Signal("cls_attention" if self.scorer == "cls" else "received_attention", layer - 1),),
                must_prune=i == len(layers),
                positions=self.position_policy(facts),
            )
            for i, layer in enumerate(layers, start=1)
        ]

    def merge(self, view: View, stage: int, stages: int) -> Selection:
        """Stage 1 .. `stages`."""
        counts = [geometric(m, resolve_keep(self.keep, m), stage, stages) for m in view.n_original]
        return by_count(view, [min(view.n, count) for count in counts], self.decide)

    def decide(self, view: View) -> Selection:
        (attention,) = (view[signal] for signal in view.signals)
        if view.k == view.n:
            return Selection.everything(len(attention), view.n, attention.device)
        return mergence(attention.float().mean(1), view.features, view.k)


def mergence(scores: Tensor, features: Tensor, k: int) -> Selection:
    """Merges all but the k best tokens [G, N] into the best of largest cosine, weighted by score."""
    crucial = topk(scores, k).sort(-1).values
    _, nearest = best_match(features, gather_tokens(features, crucial))
    target = crucial.gather(1, nearest).scatter(1, crucial, crucial)
    mass = torch.zeros_like(scores).scatter_add(1, target, scores)
    return merged(crucial, target, scores / mass.gather(1, target))
