"""The video world: seeded clips with exact ground truth, real mp4 files of them, and questions about them.

It extends the picture world: the same things on the same backgrounds at the same size, which appear, disappear and
move, with long empty stretches. Like it, it measures how accuracy falls as frames and tokens are removed, and says
nothing about a large model.

The splits are train, val, test and final; their seeds lie in the picture world's ranges and never meet. The art style
`UNSEEN_STYLE` never occurs, and two backgrounds only in test and final.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import files
from .questions import KINDS, NEW_WORDS, QUARTERS, Question, answers
from .scenes import VideoScene, clip
from .stories import SPLITS

__all__ = [
    "KINDS",
    "NEW_WORDS",
    "QUARTERS",
    "SPLITS",
    "Question",
    "VideoExample",
    "VideoScene",
    "answers",
    "clip",
    "examples",
]

PER_SEED = 100_000
_VERSION = 1  # to be raised when the same timeline gives other pictures


@dataclass(frozen=True)
class VideoExample:
    """One question about one clip.

    Attributes:
        scene: the clip; no two splits share one.
        asked: the question with its ground truth in frames.
    """

    scene: VideoScene
    asked: Question

    @property
    def question(self) -> str:
        """The question in plain English."""
        return self.asked.text

    @property
    def answer(self) -> str:
        """The right answer, lower case."""
        return self.asked.answer

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.asked.kind

    @property
    def split(self) -> str:
        """One of `SPLITS`."""
        return self.scene.split

    @property
    def caption(self) -> str:
        """What the relevant moment shows (see `Question.caption`: it may name the answer)."""
        return self.asked.caption

    @property
    def needs_vision(self) -> bool:
        """Whether the question cannot be answered without the video."""
        return self.asked.needs_vision

    @property
    def prior(self) -> float:
        """Share of right answers of the best guess without the video; see `Question.prior`."""
        return self.asked.prior

    @property
    def relevant(self) -> tuple[tuple[float, float], ...]:
        """Half-open spans [start, end) in seconds that hold the answer; none where no moment does."""
        return tuple((start / self.scene.fps, stop / self.scene.fps) for start, stop in self.asked.spans)

    def relevance(self, times: Sequence[float] | NDArray[np.floating]) -> NDArray[np.float64]:
        """1 for every time (N,) in seconds whose frame holds the answer, else 0: (N,).

        What rank correlations of frame scores are computed against.
        """
        frames = np.floor(np.asarray(times, np.float64) * self.scene.fps + 1e-6)
        inside = np.zeros(frames.shape)
        for start, stop in self.asked.spans:
            inside[(frames >= start) & (frames < stop)] = 1.0
        return inside

    def path(self, folder: Path | str | None = None, codec: str = files.CODEC) -> Path:
        """The clip as an mp4 file, written on the first call and then kept.

        Several processes may ask at once; a file is only ever seen complete.

        Args:
            folder: where clips are kept; default `files.cache_dir`.
            codec: see `files.write`.

        Raises:
            ValueError: if there is no such codec.
            MissingCodecError: if PyAV or its encoder is missing.
        """
        scene = self.scene
        path = Path(folder or files.cache_dir()) / f"{scene.kind}-{digest(scene)}-{codec}.mp4"
        return path if path.is_file() else scene.write(path, codec)


def digest(scene: VideoScene) -> str:
    """16 hexadecimal digits that stand for everything a clip shows."""
    return hashlib.sha256(f"{_VERSION} {scene!r}".encode()).hexdigest()[:16]


def examples(
    split: str,
    limit: int,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    frames: int | None = None,
) -> list[VideoExample]:
    """Questions of a split, each about a clip of its own; kinds take turns and answers are balanced.

    Nothing is drawn or written yet.

    Args:
        split: one of `SPLITS`.
        limit: number of examples.
        kinds: kinds of questions.
        seed: selects another, disjoint set of clips (0 to 999).
        frames: see `clip`.

    Returns:
        The same arguments always give the same examples, and a smaller ``limit`` the first of a larger one.

    Raises:
        ValueError: if there is no such split or kind, or a number is out of range.
    """
    if not 0 <= seed < 1000:
        raise ValueError(f"seed must be between 0 and 999, got {seed}")
    if not kinds:
        raise ValueError(f"kinds is empty; choose some of {', '.join(KINDS)}")
    if not 0 <= limit <= PER_SEED * len(kinds):
        raise ValueError(f"limit must be between 0 and {PER_SEED * len(kinds)}, got {limit}")
    found = []
    for number in range(limit):
        turn, place = divmod(number, len(kinds))
        scene = clip(split, seed * PER_SEED + turn, kinds[place], frames)
        found.append(VideoExample(scene, scene.question))
    return found
