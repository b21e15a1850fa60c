"""Control: evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune.method import View
from vtprune.methods.anywhere import Anywhere
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Stride(Anywhere):
    """Keeps token floor((i + 1/2) N / k) for i = 0 .. k - 1: spatial coverage without looking at the picture."""

    key: ClassVar[str] = "stride"

    def decide(self, view: View) -> Selection:
        i = torch.arange(view.k, device=view.features.device)
        index = ((2 * i + 1) * view.n) // (2 * view.k)
        return Selection.of(index.expand(len(view.features), -1))
