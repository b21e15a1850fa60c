"""Rank correlations against the literal definitions, and scipy where it is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.errors import InvalidOptionError, NonFiniteScoresError
from vtprune.video.correlation import kendall_tau, rank_agreement, spearman_rho

PAIRS = st.integers(0, 30).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(-4, 4), min_size=n, max_size=n)] * 2)
)


def literal_tau(x: list[int], y: list[int]) -> float:
    concordant = discordant = tied_x = tied_y = pairs = 0
    for i in range(len(x)):
        for j in range(i):
            pairs += 1
            tied_x += x[i] == x[j]
            tied_y += y[i] == y[j]
            product = (x[i] - x[j]) * (y[i] - y[j])
            concordant += product > 0
            discordant += product < 0
    below = (pairs - tied_x) * (pairs - tied_y)
    return (concordant - discordant) / math.sqrt(below) if below else math.nan


def literal_rho(x: list[int], y: list[int]) -> float:
    def ranks(values: list[int]) -> list[float]:
        return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

    a, b, middle = ranks(x), ranks(y), (len(x) + 1) / 2
    over = sum((p - middle) * (q - middle) for p, q in zip(a, b, strict=True))
    below = sum((p - middle) ** 2 for p in a) * sum((q - middle) ** 2 for q in b)
    return over / math.sqrt(below) if below else math.nan


@settings(max_examples=150, deadline=None)
@given(PAIRS)
def test_both_are_their_definitions(pair: tuple[list[int], list[int]]) -> None:
    x, y = pair
    assert np.isclose(kendall_tau(np.array(x), np.array(y)), literal_tau(x, y), equal_nan=True)
    assert np.isclose(spearman_rho(np.array(x), np.array(y)), literal_rho(x, y), equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(PAIRS)
def test_both_agree_with_scipy(pair: tuple[list[int], list[int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = pair
    if len(x) < 2 or len(set(x)) < 2 or len(set(y)) < 2:
        return
    assert np.isclose(kendall_tau(np.array(x), np.array(y)), stats.kendalltau(x, y).statistic)
    assert np.isclose(spearman_rho(np.array(x), np.array(y)), stats.spearmanr(x, y).statistic)


def test_extremes() -> None:
    x = np.arange(1000.0) ** 3
    for correlation in (kendall_tau, spearman_rho):
        assert correlation(x, np.log1p(x)) == pytest.approx(1)
        assert correlation(x, -x) == pytest.approx(-1)
        assert math.isnan(correlation(x, np.ones(1000)))
        assert correlation(np.array([0, np.inf, -np.inf]), np.array([1, 2, 0])) == pytest.approx(1)


def test_means_over_annotators_then_videos() -> None:
    scores = [np.array([1.0, 2, 3]), np.array([1.0, 2, 3, 4]), np.array([1.0, 1.0])]
    relevance = [
        np.array([[1, 2, 3], [3, 2, 1], [5, 6, 7], [2, 2, 2]]),
        np.array([0, 0, 0, 1]),
        np.array([1, 2]),
    ]
    tau, rho, videos = rank_agreement(scores, relevance)
    assert videos == 2
    assert tau == pytest.approx((1 / 3 + 3 / math.sqrt(6 * 3)) / 2)
    assert rho == pytest.approx((1 / 3 + literal_rho([1, 2, 3, 4], [0, 0, 0, 1])) / 2)
    nothing = rank_agreement([np.ones(3)], [np.arange(3)])
    assert math.isnan(nothing.tau)
    assert nothing.videos == 0


def test_random_scores_do_not_correlate() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.random(60) for _ in range(200)]
    tau, rho, _ = rank_agreement(scores, [np.arange(60) // 20] * 200)
    assert abs(tau) < 0.03
    assert abs(rho) < 0.03


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="shapes"):
        kendall_tau(np.ones(2), np.ones(3))
    with pytest.raises(NonFiniteScoresError):
        spearman_rho(np.array([1, np.nan]), np.ones(2))
    with pytest.raises(InvalidOptionError, match="videos"):
        rank_agreement([np.ones(2)], [])
