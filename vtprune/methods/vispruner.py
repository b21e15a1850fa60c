"""VisPruner: half of the budget by [CLS] attention, half by thinning out duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune.errors import InvalidOptionError
from vtprune.finite import check_finite
from vtprune.method import View
from vtprune.methods.fastervlm import FasterVLM
from vtprune.ops import best_match, gather_tokens
from vtprune.selecting import unit
from vtprune.selection import Selection, topk

STEP = 8


@dataclass(frozen=True, kw_only=True)
class VisPruner(FasterVLM):
    """Training-free, text-agnostic; important and diverse tokens, before the projector.

        s_j = mean_h A_h[CLS, j];   important = argtopk(s, floor(important k))
        R = all others by descending s;   while |R| > k - |important|:
            every other token of R, from the first on, has the score max cosine to any of those between;
            the min(8, |R| - (k - |important|)) largest scores leave R; the rest of these tokens by descending
            score, then those between, are the new R

    Source: Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in
    VLMs" (ICCV 2025); Theia-4869/VisPruner at aefa01a. important = 0.5 is the authors'; a default budget of a
    quarter is ours. Dense positions as theirs. Their code takes even |R| only; here the first half is the larger
    one, and no round removes more than it has. On tiled models theirs also ranks padding and drops newlines.

    Attributes:
        important: share of the budget that goes by attention.
        scorer: "cls", or explicitly "received" (mean attention received) on encoders without [CLS].
    """

    key: ClassVar[str] = "vispruner"

    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise InvalidOptionError(
                f"important={self.important} is no share; give a float in [0, 1], e.g. 0.5."
            )

    def decide(self, view: View) -> Selection:
        (attention,) = (view[signal] for signal in view.signals)
        ranked = topk(attention.mean(1), view.n)
        by_attention = int(view.k * self.important)
        diverse = view.k - by_attention
        rest = ranked[:, by_attention:] if diverse else ranked[:, :0]
        features = unit(view.features)
        check_finite(features)
        while rest.shape[1] > diverse:
            here, between = rest[:, ::2], rest[:, 1::2]
            closest, _ = best_match(gather_tokens(features, here), gather_tokens(features, between))
            leave = min(STEP, rest.shape[1] - diverse, here.shape[1])
            kept = topk(closest, here.shape[1])[:, leave:]
            rest = torch.cat([here.gather(1, kept), between], 1)
        return Selection.of(torch.cat([ranked[:, :by_attention], rest], 1))
