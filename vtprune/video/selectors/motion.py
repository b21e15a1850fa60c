"""Baseline: frames that differ most from the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vtprune.video.clip import Clip, FrameSelection, FrameSelector


@dataclass(frozen=True, kw_only=True)
class Motion(FrameSelector):
    """Keeps the frames with the largest difference energy.

        score_i = mean over pixels and channels of (I_i - I_(i-1))^2,  I in [0, 1],  score_0 = 0

    Source: none in particular; frame differencing is the oldest motion detector. A baseline that looks at the frames
    and knows nothing of the question.
    """

    key: ClassVar[str] = "motion"

    def decide(self, clip: Clip, k: int | None) -> FrameSelection:
        scores = np.zeros(clip.n)
        for i in range(1, clip.n):
            change = clip.frames[i].astype(np.float32) - clip.frames[i - 1].astype(np.float32)
            scores[i] = np.square(change / 255).mean(dtype=np.float64)
        return FrameSelection.top(scores, k or clip.n)
