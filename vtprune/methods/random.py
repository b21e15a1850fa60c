"""Control: uniformly random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.method import View
from vtprune.methods.anywhere import Anywhere
from vtprune.scoring import uniform
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Random(Anywhere):
    """Keeps k uniformly drawn tokens of each image; the baseline every method has to beat.

    The draw depends on `seed` and the picture alone, not on the batch it is in.

    Attributes:
        seed: changes the draw.
    """

    key: ClassVar[str] = "random"

    seed: int = 0

    def decide(self, view: View) -> Selection:
        return Selection.topk(uniform(view, self.seed), view.k)
