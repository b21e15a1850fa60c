"""Control: uniformly random frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import numpy as np

from vtprune.video.clip import Clip, FrameSelection, FrameSelector


@dataclass(frozen=True, kw_only=True)
class Random(FrameSelector):
    """Keeps k uniformly drawn frames; the baseline every selector has to beat.

    The draw depends on `seed` and the frames alone. The scores are the drawn numbers, so rank correlations of other
    selectors can be read beside these.

    Attributes:
        seed: changes the draw.
    """

    key: ClassVar[str] = "random"

    seed: int = 0

    def decide(self, clip: Clip, k: int | None) -> FrameSelection:
        picture = crc32(np.ascontiguousarray(clip.frames).data)
        generator = np.random.default_rng(crc32(f"{self.seed} {picture}".encode()))
        return FrameSelection.top(generator.random(clip.n), k or clip.n)
