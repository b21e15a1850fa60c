"""The best-scored frames that are not too close to one another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vtprune.errors import InvalidOptionError
from vtprune.video.clip import Clip, FrameSelection, FrameSelector
from vtprune.video.embedding import Array
from vtprune.video.relevance import Relevance, relevance_of


@dataclass(frozen=True, kw_only=True)
class MLLMSelect(FrameSelector):
    """Greedy temporal non-maximum suppression over frame scores.

        delta = floor(N / (4 k));  k times: i* = argmax s, keep it, and forget all i with |i - i*| <= delta

    Source: M-LLM based video frame selection (two secondary accounts that agree; no code). There a language model with
    a learned score query gives s, trained on labels of larger models. Ours: s by a small trained network with such a
    query (:class:`vtprune.video.scorer.ScoreNetwork` says what of it is ours), which the package brings for its
    reference CLIP. With another embedder, and neither `weights` nor `scorer`, the embedder's similarity to the question
    takes its place. The selection's notes say which it was.

    Attributes:
        scorer: (frames, question) -> s [N] in [0, 1].
        weights: path of a file that `python -m vtprune.eval.training.frame_scorer` wrote for the clip's embedder.
    """

    key: ClassVar[str] = "mllm-select"

    scorer: Relevance | None = None
    weights: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            if self.scorer is not None:
                raise InvalidOptionError("scorer and weights are both given; give one of them.")
            object.__setattr__(self, "weights", os.fspath(self.weights))  # a path would not fit into reports

    def decide(self, clip: Clip, k: int | None) -> FrameSelection:
        scores, notes = self._scores(clip)
        return FrameSelection(np.sort(suppressed(scores, k or clip.n)), scores, notes=notes)

    def _scores(self, clip: Clip) -> tuple[Array, tuple[str, ...]]:
        if self.scorer is not None:
            return relevance_of(clip, self.scorer)
        from vtprune.video.scorer import FrameScorer, shipped

        path = self.weights or shipped(clip.embedder)
        if path is None:
            return relevance_of(clip, None)
        scorer = FrameScorer.load(path, clip.given_embedder)
        scores, notes = relevance_of(clip, lambda frames, question: scorer.of(clip.embeddings, question))
        return scores, (*notes, f"scores by a small network trained on {scorer.metadata['data']}")


def suppressed(scores: Array, k: int) -> Array:
    """[k] frames by greedy temporal non-maximum suppression of finite scores [N], ties going to the earlier one."""
    left = scores.astype(np.float64)
    delta = len(left) // (4 * k)
    chosen = []
    for _ in range(k):
        i = int(left.argmax())
        chosen.append(i)
        left[max(i - delta, 0) : i + delta + 1] = -np.inf
    return np.array(chosen)
