"""Control: uniformly random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import torch

from vtprune.method import View
from vtprune.methods.anywhere import Anywhere
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
        scores = []
        for index, n, image_seed in zip(view.index, view.n_original, view.image_seeds, strict=True):
            # A checksum, since a CPU generator reads only 32 bits of its seed.
            generator = torch.Generator().manual_seed(crc32(f"{self.seed} {image_seed}".encode()))
            scores.append(torch.rand(n, generator=generator).to(index.device)[index])
        return Selection.topk(torch.stack(scores), view.k)
