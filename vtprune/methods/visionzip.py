"""VisionZip: dominant tokens by [CLS] attention, the rest merged into contextual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vtprune.errors import InvalidOptionError
from vtprune.method import Method, ModelFacts, Signal, Site, View, check_choice
from vtprune.ops import best_match, gather_tokens
from vtprune.selection import Selection, merged, topk
from vtprune.space import Range, Space


@dataclass(frozen=True, kw_only=True)
class VisionZip(Method):
    """Training-free, text-agnostic; d dominant and c contextual tokens, d + c = k.

        a_j = sum_h A_h[CLS, j] in the last used ViT layer,   dominant = argtopk(a, d)

    Of the M remaining tokens every floor(M / c)-th (the first c of them) is a contextual target; each other one
    joins the target of largest cosine between head-mean keys, and a contextual token becomes
    target + mean(joined).

    Source: Yang et al., "VisionZip" (CVPR 2025); dvlab-research/VisionZip at 3151f6d. The authors' counts for
    64 are 54 dominant with [CLS] + 10 contextual, so their language model sees [CLS] + 53 + 10; here [CLS] is no visual
    token and the split is 54 + 10 (`keep=63, contextual=10 / 63` takes their patches). Output is in raster order (theirs:
    [CLS], dominant, contextual). They count positions densely, as does `positions="auto"`.

    Attributes:
        contextual: share of the budget for contextual tokens (authors: 10 of 64).
        scorer: "cls", or explicitly "received" (ours: mean attention received) on encoders without [CLS].
    """

    key: ClassVar[str] = "visionzip"
    authors_positions = "dense"
    substitutes = ({"scorer": "received"},)
    search_space: ClassVar[Mapping[str, Space]] = {"contextual": Range(0.0, 0.6)}

    contextual: float = 10 / 64
    scorer: Literal["cls", "received"] = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer", self.scorer, ("cls", "received"))
        if not 0 <= self.contextual < 1:
            raise InvalidOptionError(
                f"contextual={self.contextual} is no share; give a float in [0, 1), e.g. 0.15."
            )

    def site(self, facts: ModelFacts) -> Site:
        return facts.behind_encoder()

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        last = facts.encoder_layers - 1
        return (
            Signal("cls_attention" if self.scorer == "cls" else "received_attention", last),
            Signal("encoder_keys", last),
        )

    def decide(self, view: View) -> Selection:
        attention, keys = (view[signal] for signal in view.signals)
        n, k = view.n, view.k
        c = min(round(self.contextual * k), n - k)
        ranked = topk(attention.sum(1), n)
        dominant, rest = ranked[:, : k - c], ranked[:, k - c :].sort(-1).values
        if c == 0:
            return Selection.of(dominant)
        m = rest.shape[1]
        targets = rest[:, :: m // c][:, :c]
        _, nearest = best_match(gather_tokens(keys, rest), gather_tokens(keys, targets))  # [G, M]
        is_target = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, targets, True).gather(1, rest)
        joined = torch.zeros_like(targets).scatter_add(1, nearest, (~is_target).long())  # members per target
        share = 1.0 / joined.gather(1, nearest).clamp(min=1)
        everyone = torch.arange(n, device=ranked.device).expand_as(ranked)
        into = everyone.scatter(1, rest, torch.where(is_target, rest, targets.gather(1, nearest)))
        share = share.masked_fill(is_target, 1.0)
        weight = torch.ones(ranked.shape, device=ranked.device).scatter(1, rest, share)
        return merged(torch.cat([dominant, targets], 1), into, weight)
