"""Control: evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vtprune.method import SITE_KINDS, Method, ModelFacts, Site, View, check_choice
from vtprune.methods.random import any_site
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Stride(Method):
    """Keeps token floor((i + 1/2) N / k) for i = 0 .. k - 1: spatial coverage without looking at the picture.

    Attributes:
        where, layer: as for `random`.
    """

    key: ClassVar[str] = "stride"

    where: Literal["vit", "encoder", "projector", "decoder"] = "projector"
    layer: int | float = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("where", self.where, SITE_KINDS)

    def site(self, facts: ModelFacts) -> Site:
        return any_site(facts, self.where, self.layer)

    def decide(self, view: View) -> Selection:
        i = torch.arange(view.k, device=view.features.device)
        index = ((2 * i + 1) * view.n) // (2 * view.k)
        return Selection.of(index.expand(len(view.features), -1))
