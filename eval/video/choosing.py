"""Frames of a clip, chosen by every selector once, and how well the choice meets what is known of the clip."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np

from vtprune.video.clip import Clip, FrameSelection
from vtprune.video.correlation import rank_agreement
from vtprune.video.embedding import Array, Embedder
from vtprune.video.relevance import Relevance

from ..settings import DRAWS
from ..world.video import VideoExample
from .inputs import ReadClip
from .settings import ALL_FRAMES, CHAT, Selection


class Chooser:
    """Chooses frames of one clip for one question; what several selections need is computed once.

    Args:
        example: the question.
        clip: its candidate frames.
        embedder: of frames and texts.
        relevance: the measured model's.
    """

    def __init__(
        self, example: VideoExample, clip: ReadClip, embedder: Embedder, relevance: Relevance
    ) -> None:
        self.example, self.clip = example, clip
        self._embedder = embedder
        self._plain = Clip(
            times=clip.times,
            frames=clip.frames,
            duration=clip.duration,
            question=example.question,
            embedder=embedder,
        )
        self._relevance = relevance
        self._said: dict[str, Array] = {}
        self._chosen: dict[tuple[Selection, int], FrameSelection] = {}

    def fresh(self) -> Chooser:
        """The same with nothing computed yet."""
        return Chooser(self.example, self.clip, self._embedder, self._relevance)

    def choose(self, selection: Selection, run: int = 0) -> FrameSelection:
        """The frames of a selection in one of its draws.

        Raises:
            VTPruneError: the selector cannot choose here.
        """
        key = selection, run if selection.draws else 0
        if key not in self._chosen:
            self._chosen[key] = self._choose(*key)
        return self._chosen[key]

    def _choose(self, selection: Selection, run: int) -> FrameSelection:
        if selection.name == ALL_FRAMES:
            return FrameSelection(np.arange(len(self.clip.frames)))
        clip = self._plain
        if selection.captions:
            clip = dataclasses.replace(clip, captions=self.example.caption)
            vars(clip)["embeddings"] = self._plain.embeddings  # cached there: both show the same frames
        asks = self._ask if selection.relevance == CHAT else None
        return selection.selector(run, asks).select(clip, selection.frames)

    def _ask(self, frames: Array, question: str) -> Array:
        if question not in self._said:
            self._said[question] = self._relevance(frames, question)
        return self._said[question]

    def recall(self, chosen: FrameSelection) -> float | None:
        """Share of the spans that hold the answer of which a frame was chosen; None where no moment holds it."""
        times = self.clip.times[chosen.indices]
        hit = [bool(((times >= start) & (times < stop)).any()) for start, stop in self.example.relevant]
        return sum(hit) / len(hit) if hit else None

    def agreement(self, scores: Sequence[Array]) -> tuple[float | None, float | None]:
        """Kendall's tau and Spearman's rho of frame scores [N] with the known relevance, averaged over draws.

        None where they are not defined, because all frames are equally relevant or all scores equal.
        """
        known = self.example.relevance(self.clip.times)
        tau, rho, _ = rank_agreement(scores, [known] * len(scores))
        return (None, None) if math.isnan(tau) else (tau, rho)

    def random_agreement(self) -> tuple[float | None, float | None]:
        """That of random scores."""
        draws = Selection("random", (), 1)
        scores = [self.choose(draws, run).scores for run in range(DRAWS)]
        return self.agreement([one for one in scores if one is not None])


def selection_seconds(chooser: Chooser, selection: Selection) -> float:
    """Wall time of a selection, with everything it computes; the chooser must be new."""
    start = time.perf_counter()
    chooser.choose(selection)
    return time.perf_counter() - start
