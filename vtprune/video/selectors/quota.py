"""Tokens shared out among frames by their relevance to the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from vtprune.errors import InvalidOptionError
from vtprune.video.clip import Clip, ClipError, FrameSelection, FrameSelector, best, spread
from vtprune.video.embedding import Array
from vtprune.video.relevance import Relevance, relevance_of

ROUNDING = 1e-9  # of a share, in tokens


@dataclass(frozen=True, kw_only=True)
class Quota(FrameSelector):
    """Every frame gets tokens in proportion to the squared probability that it shows what is asked for.

        w_t = (100 p_t)^2,  B = k per_frame
        frames="all":  n_t = floor(B w_t / sum w), frames without a token vanish
        frames="top":  the k frames with the largest p, n_t = 1 + floor((B - k) w_t / sum of the k w)

    Source: QuoTA (MAC-AutoML/QuoTA ec194d7, arXiv 2503.08689): p, w and frames="all", with 196 tokens for each of
    64 ordinary frames. It resamples the tokens of a frame to n_t; this only says n_t (`FrameSelection.tokens`). Ours:
    frames="top", so that methods can be compared at k frames; evenly spaced frames where all p are equal, and even shares
    where all are 0; the substitute for the vision-language model where no `relevance` is given, which the selection's notes
    declare. With `cap`, the excess is shared out again by w until nobody has more; that it is repeated is inferred.

    Attributes:
        relevance: (frames, question) -> p [N] in [0, 1], such as :class:`vtprune.video.relevance.ChatRelevance`.
        per_frame: tokens of an ordinary frame.
        frames: see above; "all" may keep more than k frames.
        cap: most tokens that a frame may get, None for any number.
    """

    key: ClassVar[str] = "quota"

    relevance: Relevance | None = None
    per_frame: int = 196
    frames: Literal["top", "all"] = "top"
    cap: int | None = None

    def __post_init__(self) -> None:
        if self.per_frame < 1 or (self.cap is not None and self.cap < 1):
            raise InvalidOptionError(f"per_frame={self.per_frame}, cap={self.cap}: give ints >= 1.")
        if self.frames not in ("top", "all"):
            raise InvalidOptionError(f"frames={self.frames!r}: give 'top' or 'all'.")

    def decide(self, clip: Clip, k: int | None) -> FrameSelection:
        p, notes = relevance_of(clip, self.relevance)
        k = k or clip.n
        budget, w = k * self.per_frame, (100 * p) ** 2
        if self.frames == "top":
            kept = np.sort(best(p, k)) if p.max() > p.min() else spread(clip.n, k)
            cap = None if self.cap is None else self.cap - 1
            return FrameSelection(kept, p, 1 + shared(budget - k, w[kept], cap), notes)
        tokens = shared(budget, w, self.cap)
        kept = np.flatnonzero(tokens)
        if not len(kept):
            raise ClipError(f"{budget} tokens for {clip.n} frames leave none for any; raise k or per_frame.")
        return FrameSelection(kept, p, tokens[kept], notes)


def shared(budget: int, weights: Array, cap: int | None) -> Array:
    """[N] int64 floor(budget weights / sum), or even shares where the sum is 0; none above `cap`."""
    share = np.zeros(len(weights))
    open_ = np.ones(len(weights), dtype=bool)
    while open_.any():
        w = weights[open_] if weights[open_].sum() > 0 else np.ones(int(open_.sum()))
        share[open_] = (budget - share[~open_].sum()) * (w / w.sum())
        if cap is None or not (share > cap).any():
            break
        open_ &= share <= cap
        share = np.minimum(share, cap)
    # Five equal shares of five are one each, though the quotients' rounding may leave them just below.
    return np.floor(share + ROUNDING).astype(np.int64)
