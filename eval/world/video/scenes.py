"""Clips: a timeline with its pictures, made frame by frame."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..scenes import SIZE, FloatArray, atlas, painted_background
from . import files
from .questions import KINDS, Question, ask
from .stories import make_timeline
from .timeline import Timeline

FLICKER_SECONDS = 7.0


class VideoScene(Timeline):
    """A clip of 96 x 96 pixels with its ground truth; no more than one frame is in memory at a time."""

    @functools.cached_property
    def canvas(self) -> FloatArray:
        """The empty background, (96, 96, 3) float32 in 0..255."""
        return painted_background(self.background, np.random.default_rng((self.seed, self.length, 1)))

    def frame(self, index: int) -> NDArray[np.uint8]:
        """The picture of a frame, (96, 96, 3) uint8 RGB.

        Raises:
            ValueError: if there is no such frame.
        """
        picture = self.canvas.copy()
        for track in self.visible(index):
            x0, y0, x1, y1 = track.box(index)
            colour, cover = atlas().sticker(track.name, track.style, track.side)
            if track.mirrored:
                colour, cover = colour[:, ::-1], cover[:, ::-1]
            window = np.s_[y0:y1, x0:x1]
            picture[window] = picture[window] * (1 - cover) + colour * np.float32(track.brightness)
        if self.flicker:
            turn = index / self.fps / FLICKER_SECONDS
            picture += np.float32(self.flicker * math.sin(2 * math.pi * turn))
        if self.noise:
            rng = np.random.default_rng((self.seed, self.length, 2, index))
            picture += rng.standard_normal(picture.shape, np.float32) * np.float32(self.noise)
        pixels: NDArray[np.uint8] = np.clip(picture, 0, 255).astype(np.uint8)
        return pixels

    def owner(self, index: int) -> NDArray[np.int8]:
        """What each pixel of a frame shows, (96, 96) int8: -1 background, else an index into ``visible(index)``.

        Raises:
            ValueError: if there is no such frame.
        """
        owner = np.full((SIZE, SIZE), -1, np.int8)
        for number, track in enumerate(self.visible(index)):
            x0, y0, x1, y1 = track.box(index)
            cover = atlas().sticker(track.name, track.style, track.side)[1][..., 0]
            owner[y0:y1, x0:x1][(cover[:, ::-1] if track.mirrored else cover) > 0.5] = number
        return owner

    def frames(self) -> Iterator[tuple[float, NDArray[np.uint8]]]:
        """Time in seconds and picture of every frame, in order."""
        for index in range(self.length):
            yield index / self.fps, self.frame(index)

    def write(self, path: Path | str, codec: str = files.CODEC) -> Path:
        """Write the clip as an mp4 file, whole or not at all; see `files.write`."""
        return files.write(path, (self.frame(index) for index in range(self.length)), self.fps, codec)

    @functools.cached_property
    def questions(self) -> tuple[Question, ...]:
        """Every question of every kind that has one answer here; the one the clip was made for comes first.

        Only the first is balanced over its answers; of the others a clip has as many as it happens to have.
        """
        found = [question for kind in KINDS for question in ask(self, kind)]
        return tuple(
            sorted(found, key=lambda question: (question.kind, question.text) != (self.kind, self.asked))
        )

    @property
    def question(self) -> Question:
        """The question the clip was made for."""
        return self.questions[0]

    @property
    def caption(self) -> str:
        """A sentence that names what appears in the clip, in order of appearance."""
        return "a video of " + " and ".join(
            f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in self.names
        )


def clip(split: str, index: int, kind: str, frames: int | None = None) -> VideoScene:
    """The clip of an index that was made for a kind of question.

    Clips made for a kind have each of its answers equally often: every run of as many clips as there are answers,
    from a multiple of that number on, has each once. Their length says nothing about the answer.

    Args:
        split: "train", "val", "test" or "final"; no two splits share a clip.
        index: 0 to 99,999,999.
        kind: one of `KINDS`.
        frames: number of frames, 8 to 3,600; None draws it: one to four minutes for ``needle``, otherwise 8 to 120
            frames or (but for ``still``) one to three minutes. Another number makes another clip.

    Raises:
        ValueError: if an argument is out of its range.
    """
    line = make_timeline(split, index, kind, frames)
    return VideoScene(**{name: getattr(line, name) for name in Timeline.__dataclass_fields__})
