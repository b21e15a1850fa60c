"""DivPrune: the most diverse subset by max-min cosine distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vtprune.finite import check_finite
from vtprune.method import Method, ModelFacts, Site, View
from vtprune.ops import farthest_first
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class DivPrune(Method):
    """Training-free, text-agnostic, needs no attention; greedy max-min diversity (farthest first).

        D = 1 - cos;   first = argmax_i min_{j != i} D_ij;   next = argmax_{i not in S} min_{s in S} D_is

    Source: Alvar et al., "DivPrune" (CVPR 2025); vbdi/divprune at 799e2d9 (read, not copied: non-commercial
    licence). The authors' default ratio is 0.098, their count round(ratio N). Ties go to the lower index. Chosen
    tokens are never chosen again (theirs may be, among exact duplicates); the budget is per tile where pictures are tiled
    (theirs: one for the whole picture, newline tokens included). They count positions densely, as does `positions="auto"`.
    """

    key: ClassVar[str] = "divprune"
    authors_positions = "dense"

    keep: int | float = 0.098

    def site(self, facts: ModelFacts) -> Site:
        return Site("projector" if "projector" in facts.sites else "encoder")

    def decide(self, view: View) -> Selection:
        unit = normalize(view.features.float(), dim=-1)
        distance = 1 - unit @ unit.transpose(1, 2)  # [G, N, N]
        check_finite(distance)
        if view.n == view.k:
            return Selection.everything(len(unit), view.n, unit.device)
        itself = torch.eye(view.n, dtype=torch.bool, device=unit.device)
        first = distance.masked_fill(itself, float("inf")).amin(-1).argmax(-1)  # [G]
        return Selection.of(farthest_first(torch.ones_like(distance[:, 0]), distance, view.k, first))
