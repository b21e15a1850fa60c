"""Rank correlation between frame scores and known relevance.

Source: "Rethinking the Evaluation of Video Summaries" (CVPR 2019, mayu-ot/rethinking-evs 7a3b05e): Kendall's tau and
Spearman's rho per annotator, averaged over annotators, then over videos; always to be read beside random scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vtprune.errors import InvalidOptionError
from vtprune.video.clip import checked
from vtprune.video.embedding import Array


class Agreement(NamedTuple):
    """Mean rank correlations; NaN where none is defined.

    Attributes:
        tau: Kendall's tau-b.
        rho: Spearman's rho.
        videos: videos that they are the mean of.
    """

    tau: float
    rho: float
    videos: int


def kendall_tau(x: Array, y: Array) -> float:
    """Kendall's tau-b of x [N] and y [N]: ties are in neither the numerator nor their side of the denominator.

        tau_b = (concordant - discordant) / sqrt((pairs - tied in x) (pairs - tied in y))

    Returns:
        In [-1, 1]; NaN where all values of one side are equal or N < 2. O(N^2) time, O(N) memory.

    Raises:
        InvalidOptionError: lengths differ.
        NonFiniteScoresError: a value is NaN.
    """
    a, b = _ranked(x, y)
    concordant, untied_a, untied_b = 0, 0, 0
    for i in range(1, len(a)):
        over_a, over_b = np.sign(a[i] - a[:i]), np.sign(b[i] - b[:i])
        concordant += int((over_a * over_b).sum())
        untied_a += int(np.count_nonzero(over_a))
        untied_b += int(np.count_nonzero(over_b))
    return concordant / math.sqrt(untied_a * untied_b) if untied_a and untied_b else math.nan


def spearman_rho(x: Array, y: Array) -> float:
    """Spearman's rho of x [N] and y [N]: Pearson's correlation of their ranks, tied values sharing their mean rank.

    Returns:
        In [-1, 1]; NaN where all values of one side are equal or N < 2.

    Raises:
        InvalidOptionError: lengths differ.
        NonFiniteScoresError: a value is NaN.
    """
    a, b = _ranked(x, y)
    a, b = a - a.mean() if len(a) else a, b - b.mean() if len(b) else b
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return min(max(float(a @ b) / spread, -1.0), 1.0) if spread > 0 else math.nan


def rank_agreement(scores: Sequence[Array], relevance: Sequence[Array]) -> Agreement:
    """Mean over videos of the mean over annotators of both correlations.

    Annotators to whom all frames of a video are equal, and videos with no other annotator or with equal scores, say
    nothing about ranks and are left out of the means.

    Args:
        scores: per video [N], of a selector.
        relevance: per video [A, N], or [N] for one annotator.

    Raises:
        InvalidOptionError: numbers of videos or frames differ.
        NonFiniteScoresError: a value is NaN.
    """
    if len(scores) != len(relevance):
        raise InvalidOptionError(
            f"{len(scores)} videos have scores, {len(relevance)} a relevance; give both."
        )
    taus, rhos = [], []
    for mine, known in zip(scores, relevance, strict=True):
        annotators = np.atleast_2d(np.asarray(known))
        pairs = [(kendall_tau(mine, row), spearman_rho(mine, row)) for row in annotators]
        defined = [pair for pair in pairs if not math.isnan(pair[0])]
        if defined:
            tau, rho = np.mean(defined, axis=0)
            taus.append(float(tau))
            rhos.append(float(rho))
    if not taus:
        return Agreement(math.nan, math.nan, 0)
    return Agreement(float(np.mean(taus)), float(np.mean(rhos)), len(taus))


def _ranked(x: Array, y: Array) -> tuple[Array, Array]:
    """Mean ranks of both, from 0."""
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 1 or x.shape != y.shape:
        raise InvalidOptionError(f"scores and relevance have shapes {x.shape} and {y.shape}; give [N] twice.")
    return _ranks(checked(x)), _ranks(checked(y))


def _ranks(x: Array) -> Array:
    """Ranks [N] from 0, tied values sharing their mean rank."""
    if not len(x):
        return x
    _, where, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count + 1) / 2)[where])
