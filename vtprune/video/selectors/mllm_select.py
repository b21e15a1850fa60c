"""The best-scored frames that are not too close to one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vtprune.video.clip import Clip, FrameSelection, FrameSelector
from vtprune.video.embedding import Array
from vtprune.video.relevance import Relevance, relevance_of


@dataclass(frozen=True, kw_only=True)
class MLLMSelect(FrameSelector):
    """Greedy temporal non-maximum suppression over frame scores.

        delta = floor(N / (4 k));  k times: i* = argmax s, keep it, and forget all i with |i - i*| <= delta

    Source: M-LLM based video frame selection (two secondary accounts that agree; no code). There a language model with
    a learned score query gives s, trained on labels of larger models. That model is not here: `scorer` takes anyone's,
    and without one an embedder's similarity to the question takes its place, which the selection's notes declare.

    Attributes:
        scorer: (frames, question) -> s [N] in [0, 1].
    """

    key: ClassVar[str] = "mllm-select"

    scorer: Relevance | None = None

    def decide(self, clip: Clip, k: int | None) -> FrameSelection:
        scores, notes = relevance_of(clip, self.scorer)
        return FrameSelection(np.sort(suppressed(scores, k or clip.n)), scores, notes=notes)


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
