"""Control: evenly spaced frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.video.clip import Clip, FrameSelection, FrameSelector, spread


@dataclass(frozen=True, kw_only=True)
class Uniform(FrameSelector):
    """Keeps frame floor((i + 1/2) N / k) for i = 0 .. k - 1: coverage of the time without looking at the frames."""

    key: ClassVar[str] = "uniform"

    def decide(self, clip: Clip, k: int | None) -> FrameSelection:
        return FrameSelection(spread(clip.n, k or clip.n))
