"""A clip's candidate frames, and what choosing among them means.

A selector never sees a file or a video model. It receives a :class:`Clip` and returns a :class:`FrameSelection`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from vtprune.errors import InvalidOptionError, NonFiniteScoresError, VTPruneError
from vtprune.video.embedding import Array, Embedder


class ClipError(VTPruneError, ValueError):
    """A clip or a selection of its frames is not what it has to be, or lacks what a selector reads."""


@dataclass(frozen=True, eq=False)
class Clip:
    """The candidate frames of one video, small, in the order of time.

    Attributes:
        times: [N] seconds, not decreasing; N >= 1.
        frames: [N, h, w, 3] uint8 RGB.
        duration: seconds.
        captions: texts that describe the clip; a single one may be given as a string.
        question: what is asked about it.
        embedder: for `embeddings` and `text`.

    Raises:
        ClipError: shapes or types are others, there is no frame, or times decrease or are not finite.
    """

    times: Array
    frames: Array
    duration: float
    captions: Sequence[str] = ()
    question: str | None = None
    embedder: Embedder | None = None

    def __post_init__(self) -> None:
        frames, times = np.asarray(self.frames), np.asarray(self.times, dtype=np.float64)
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
            raise ClipError(
                f"frames are {frames.dtype} of shape {frames.shape}; give uint8 RGB frames [N, h, w, 3]."
            )
        if not frames.size:
            raise ClipError(f"frames have shape {frames.shape}, so there is none; give at least one frame.")
        if times.shape != frames.shape[:1]:
            raise ClipError(f"times have shape {times.shape} for {len(frames)} frames; give one per frame.")
        if not np.isfinite(times).all() or (np.diff(times) < 0).any():
            raise ClipError("times decrease or are not finite; give seconds in ascending order.")
        if not 0 <= self.duration < np.inf:
            raise ClipError(f"duration={self.duration}; give seconds >= 0.")
        captions = (self.captions,) if isinstance(self.captions, str) else tuple(self.captions)
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "captions", captions)

    @property
    def n(self) -> int:
        """Candidate frames."""
        return len(self.frames)

    @cached_property
    def embeddings(self) -> Array:
        """[N, D] float64 unit vectors of the frames.

        Raises:
            ClipError: there is no embedder, or it gives anything else.
        """
        return self._checked(self.given_embedder.frames(self.frames), self.n, "frames")

    def text(self, text: str) -> Array:
        """[D] float64 unit vector of a text.

        Raises:
            ClipError: there is no embedder, or it gives anything else.
        """
        vector: Array = self._checked(self.given_embedder.text([text]), 1, "text")[0]
        return vector

    @property
    def query(self) -> Array:
        """[D] unit vector of what to look for: the mean of the captions' vectors or, without captions, the question's.

        Raises:
            ClipError: there is neither, or no embedder.
        """
        texts = self.captions or ([self.question] if self.question else [])
        if not texts:
            raise ClipError("the clip has neither captions nor a question; give one of them.")
        return unit(np.mean([self.text(text) for text in texts], axis=0))

    @property
    def given_embedder(self) -> Embedder:
        """The embedder.

        Raises:
            ClipError: there is none.
        """
        if self.embedder is None:
            raise ClipError(
                "the clip has no embedder; give one, such as vtprune.video.embedding.CLIPEmbedder()."
            )
        return self.embedder

    def _checked(self, vectors: Array, count: int, of: str) -> Array:
        vectors = np.asarray(vectors, dtype=np.float64)
        name = f"{type(self.embedder).__name__}.{of}"
        if vectors.ndim != 2 or len(vectors) != count:
            raise ClipError(f"{name} gave shape {vectors.shape}; it has to give [{count}, D].")
        if not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
            raise ClipError(f"{name} gave vectors whose length is not 1; normalise them.")
        return unit(vectors)


@dataclass(frozen=True, eq=False)
class FrameSelection:
    """Which frames of a clip are kept.

    Attributes:
        indices: [K] int64, ascending, none twice.
        scores: [N] of all candidates, larger is better, or None where nothing is scored.
        tokens: [K] int64, visual tokens that each kept frame is to get, or None to leave that to others.
        notes: what a reader of results must know, such as a substitute for a part of the method.

    Raises:
        ClipError: indices are not ascending, or there is none, or `tokens` has another length.
        NonFiniteScoresError: a score is NaN.
    """

    indices: Array
    scores: Array | None = None
    tokens: Array | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        indices = np.asarray(self.indices, dtype=np.int64)
        if indices.ndim != 1 or not len(indices) or indices[0] < 0 or (np.diff(indices) <= 0).any():
            raise ClipError(f"indices {indices.tolist()} are not ascending frame numbers >= 0.")
        object.__setattr__(self, "indices", indices)
        if self.scores is not None:
            object.__setattr__(self, "scores", checked(self.scores))
        if self.tokens is not None:
            tokens = np.asarray(self.tokens, dtype=np.int64)
            if tokens.shape != indices.shape or (tokens < 1).any():
                raise ClipError(
                    f"tokens {tokens.tolist()} for {len(indices)} frames; give one count >= 1 each."
                )
            object.__setattr__(self, "tokens", tokens)

    @classmethod
    def top(cls, scores: Array, k: int, notes: tuple[str, ...] = ()) -> FrameSelection:
        """The k largest scores [N], ties going to the earlier frame."""
        return cls(np.sort(best(scores, k)), scores, notes=notes)


class FrameSelector(ABC):
    """Chooses frames of a clip. Subclasses are frozen dataclasses whose fields are their options.

    Attributes:
        key: name in the registry.
        adaptive: whether it finds the number of frames by itself where none is given.
    """

    key: ClassVar[str]
    adaptive: ClassVar[bool] = False

    def select(self, clip: Clip, k: int | None) -> FrameSelection:
        """Chooses k frames, all if the clip has no more.

        Args:
            clip: the candidates.
            k: frames to keep, or None to let an `adaptive` selector decide.

        Raises:
            InvalidOptionError: k is no int >= 1, or None where the selector needs a number.
            ClipError: the clip lacks what the selector reads (an embedder, captions, a question).
            NonFiniteScoresError: a score is NaN.
        """
        if k is None and not self.adaptive:
            raise InvalidOptionError(f"{self.key!r} cannot find the number of frames by itself; give k >= 1.")
        if k is not None and (isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1):
            raise InvalidOptionError(f"k={k!r}: give an int >= 1 (frames to keep).")
        chosen = self.decide(clip, None if k is None else min(int(k), clip.n))
        if chosen.indices[-1] >= clip.n or (chosen.scores is not None and chosen.scores.shape != (clip.n,)):
            raise ClipError(f"{self.key!r} gave indices or scores that do not fit {clip.n} frames.")
        return chosen

    @abstractmethod
    def decide(self, clip: Clip, k: int | None) -> FrameSelection:
        """The rule; k is at most the number of frames, and None for `adaptive` selectors only."""


def checked(scores: Array) -> Array:
    """Scores as float64.

    Raises:
        NonFiniteScoresError: one is NaN.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if np.isnan(scores).any():
        raise NonFiniteScoresError(f"{int(np.isnan(scores).sum())} of {scores.size} frame scores are NaN.")
    return scores


def best(scores: Array, k: int) -> Array:
    """[k] indices of the k largest scores [N], best first, ties going to the earlier frame."""
    return np.argsort(-checked(scores), kind="stable")[:k]


def unit(x: Array) -> Array:
    """Vectors [..., D] of length 1; zero stays zero."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.asarray(x / np.where(length > 0, length, 1))


def min_max(x: Array, rounding: float = 1e-6) -> Array:
    """Scores [N] stretched to [0, 1]; zeros where all are equal up to `rounding`, which would be stretched, too."""
    span = x.max() - x.min()
    return np.asarray((x - x.min()) / span) if span > rounding else np.zeros(len(x))


def spread(n: int, k: int) -> Array:
    """[k] the middles of k equal parts of n frames: floor((i + 1/2) n / k) for i = 0 .. k - 1; distinct for k <= n."""
    return (2 * np.arange(k) + 1) * n // (2 * k)
