"""Baseline: one frame of every shot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vtprune.errors import InvalidOptionError
from vtprune.video.clip import Clip, FrameSelection, FrameSelector, spread
from vtprune.video.histogram import hsv_histograms


@dataclass(frozen=True, kw_only=True)
class Shots(FrameSelector):
    """Cuts the clip where colours change and keeps the middle of each shot, longest shots first.

        distance_i = sum over bins |v_i - v_(i-1)| / 2 of the frames' HSV histograms, in [0, 1]
        a shot begins at frame 0 and wherever distance_i > threshold

    With a budget below the number of shots the longest get one frame each (ties: the earlier). With a larger one every
    shot gets one, then one frame after the other goes to the shot with the most frames per frame given, had it one more
    (D'Hondt), and a shot's frames lie in the middles of equal parts of it. Lengths are counted in candidate frames.

    Source: none in particular; histogram difference is the classical detector of cuts. A baseline.

    Attributes:
        threshold: histogram distance of a cut, in [0, 1]; ours.
    """

    key: ClassVar[str] = "shots"
    adaptive: ClassVar[bool] = True

    threshold: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InvalidOptionError(f"threshold={self.threshold}: give a number in [0, 1].")

    def decide(self, clip: Clip, k: int | None) -> FrameSelection:
        distance = np.abs(np.diff(hsv_histograms(clip.frames), axis=0)).sum(1) / 2
        starts = np.append(0, np.flatnonzero(distance > self.threshold) + 1)
        lengths = np.diff(np.append(starts, clip.n))
        k = len(starts) if k is None else k
        given = np.zeros(len(starts), dtype=np.int64)
        given[np.argsort(-lengths, kind="stable")[:k]] = 1
        for _ in range(k - len(starts)):
            given[np.where(given < lengths, lengths / (given + 1), -1).argmax()] += 1
        kept = [
            start + spread(int(n), int(g)) for start, n, g in zip(starts, lengths, given, strict=True) if g
        ]
        return FrameSelection(np.concatenate(kept))
