"""SMDL: the set of tokens that is varied and like the picture, grown greedily."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vtprune.errors import InvalidOptionError
from vtprune.finite import check_finite
from vtprune.method import Method, ModelFacts, Site, View
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Submodular(Method):
    """Training-free, text-agnostic, needs no attention; greedy maximisation of a set function over features.

        F(S) = l2 eff(S) + l3 cons(S);   k times: S <- S + argmax_{i not in S} F(S + i)
        eff(S) = sum_{i in S} min_{j in S, j != i} arccos(cos(f_i, f_j)) / pi   (0 for one token)
        cons(S) = cos(mean of S, mean of all tokens)

    Source: Chen et al., "Less is More: Fewer Interpretable Region via Submodular Subset Selection" (ICLR 2024);
    RuoyuChen10/SMDL-Attribution at faea7f0, an attribution of image regions, not a pruning method.
    Deviations: confidence (l1) and collaboration (l4) need a model call per candidate, so they are left out; consistency
    (theirs: the probability of the class) is the cosine to the picture's mean feature. Weights are 1, the default of their
    class (their CLIP run: .05 for eff). Tokens
    instead of regions, behind the encoder, and the default budget are ours. Ties go to the lower index; positions
    are original. Cost is k N^2 comparisons.

    Attributes:
        effectiveness: l2.
        consistency: l3.
    """

    key: ClassVar[str] = "submodular"

    keep: int | float = 0.1
    effectiveness: float = 1.0
    consistency: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.effectiveness < 0 or self.consistency < 0 or not self.effectiveness + self.consistency > 0:
            raise InvalidOptionError(
                f"effectiveness={self.effectiveness}, consistency={self.consistency}: give weights of at least 0, not both 0."
            )

    def site(self, facts: ModelFacts) -> Site:
        return Site("projector") if "projector" in facts.sites else facts.behind_encoder()

    def decide(self, view: View) -> Selection:
        x = view.features.double()
        images, n = x.shape[:2]
        unit, target = normalize(x, dim=-1), normalize(x.mean(1), dim=-1).unsqueeze(-1)
        angle = (unit @ unit.transpose(1, 2)).clamp(-1, 1).arccos() / math.pi  # [G, N, N]
        check_finite(angle)
        nearest = x.new_full((images, n), math.inf)  # of every token to the set
        inside = torch.zeros_like(nearest, dtype=torch.bool)
        total = torch.zeros_like(x[:, 0])
        rows = torch.arange(images, device=x.device)
        for size in range(view.k):
            # What a member is away from the others once candidate i is in: [G, i, member].
            members = torch.minimum(nearest.unsqueeze(1), angle).where(inside.unsqueeze(1), 0).sum(-1)
            value = self.effectiveness * (members + nearest if size else torch.zeros_like(members))
            value = value + self.consistency * (normalize(total.unsqueeze(1) + x, dim=-1) @ target)[..., 0]
            chosen = value.masked_fill(inside, -math.inf).argmax(-1)
            # `nearest` of a member leaves the member itself out.
            nearest = torch.minimum(
                nearest, angle[rows, chosen].index_put((rows, chosen), x.new_tensor(math.inf))
            )
            inside[rows, chosen] = True
            total = total + x[rows, chosen]
        return Selection.where(inside)
