"""Frames scored by what they add to a clip's caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from vtprune.errors import InvalidOptionError
from vtprune.video.clip import Clip, FrameSelection, FrameSelector, best, min_max, unit
from vtprune.video.embedding import Array
from vtprune.video.selectors.stacfp import STACFP


@dataclass(frozen=True, kw_only=True)
class KeyScore(FrameSelector):
    """Caption similarity, temporal distinctiveness and contextual drop impact.

        s_i = cos(e_i, c)
        t_i = 1 - max_{0 < |j - i| <= window} cos(e_i, e_j)          temporal="distinct"
        t_i = cos(e_i, mean of e_j over |j - i| <= window)           temporal="representative"
        d_i = cos(mean e, c) - cos(mean of all e but e_i, c)
        score_i = alpha s^_i + beta t^_i + gamma d^_i                ^: min-max over the clip

    with e the unit frame embeddings and c that of the captions (their mean) or, without captions, of the question. Kept
    are the best-scored frames among the proposals.

    Source: KeyScore (arXiv 2510.06509; no public code found). The three cues are from the abstract; inferred are
    their forms (its first version speaks of representativeness, later ones of distinctiveness), the equal weights,
    `window`, and a question in the place of a caption. Ours: with a budget k, STACFP looks for k to 2k proposals; without
    one all its proposals are kept.

    Attributes:
        alpha, beta, gamma: weights of the cues, >= 0, not all 0.
        temporal: see above.
        window: how many neighbours on each side count, >= 1.
        proposals: "stacfp", or "all" frames (which needs a budget).
        time_weight, most, trials, seed: options of STACFP.
    """

    key: ClassVar[str] = "keyscore"
    adaptive: ClassVar[bool] = True

    alpha: float = 1 / 3
    beta: float = 1 / 3
    gamma: float = 1 / 3
    temporal: Literal["distinct", "representative"] = "distinct"
    window: int = 2
    proposals: Literal["stacfp", "all"] = "stacfp"
    time_weight: float = STACFP.time_weight
    most: int = STACFP.most
    trials: int = STACFP.trials
    seed: int = STACFP.seed

    def __post_init__(self) -> None:
        weights = (self.alpha, self.beta, self.gamma)
        if not (all(0 <= w < np.inf for w in weights) and sum(weights) > 0):
            raise InvalidOptionError(f"alpha, beta, gamma = {weights}: give weights >= 0, not all 0.")
        if self.temporal not in ("distinct", "representative"):
            raise InvalidOptionError(f"temporal={self.temporal!r}: give 'distinct' or 'representative'.")
        if self.proposals not in ("stacfp", "all"):
            raise InvalidOptionError(f"proposals={self.proposals!r}: give 'stacfp' or 'all'.")
        if self.window < 1:
            raise InvalidOptionError(f"window={self.window}: give an int >= 1.")
        self._proposer()

    def decide(self, clip: Clip, k: int | None) -> FrameSelection:
        if self.proposals == "all" and k is None:
            raise InvalidOptionError("proposals='all' does not say how many frames to keep; give k >= 1.")
        scores = self.scores(clip)
        if self.proposals == "all":
            among = np.arange(clip.n)
        else:
            proposer = self._proposer()
            x = proposer.points(clip)
            among = np.sort(proposer.proposals(x, k or 2, 2 * k if k else self.most))
        return FrameSelection(np.sort(among[best(scores[among], k or len(among))]), scores)

    def scores(self, clip: Clip) -> Array:
        """[N] KeyScore of every frame.

        Raises:
            ClipError: the clip has no embedder, or neither captions nor a question.
        """
        e, c = clip.embeddings, clip.query
        similarity = e @ c
        if self.temporal == "distinct":
            closest = np.full(clip.n, -1.0 if clip.n > 1 else 1.0)
            for gap in range(1, min(self.window, clip.n - 1) + 1):
                cosine = (e[gap:] * e[:-gap]).sum(1)
                closest[gap:] = np.maximum(closest[gap:], cosine)
                closest[:-gap] = np.maximum(closest[:-gap], cosine)
            temporal = 1 - closest
        else:
            w = self.window
            around = np.stack([e[max(i - w, 0) : i + w + 1].sum(0) for i in range(clip.n)])
            temporal = (e * unit(around)).sum(1)
        total = e.sum(0)
        drop = unit(total) @ c - unit(total - e) @ c
        # One of N frames moves the mean by about 1 / N.
        cues = min_max(similarity), min_max(temporal), min_max(drop, 1e-6 / clip.n)
        return np.asarray(self.alpha * cues[0] + self.beta * cues[1] + self.gamma * cues[2])

    def _proposer(self) -> STACFP:
        return STACFP(time_weight=self.time_weight, most=self.most, trials=self.trials, seed=self.seed)
