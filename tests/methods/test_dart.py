"""DART against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, SEEDS, best, cosine, lists, make_view, normal

import vtprune
from vtprune.method import Signal
from vtprune.methods import create

KEYS = Signal("decoder_keys", 1)


def literal(states: np.ndarray, keys: np.ndarray, k: int, most: int) -> list[int]:
    heads, n, _ = keys.shape
    norm = [math.sqrt(sum(float(x) ** 2 for h in range(heads) for x in keys[h, i])) for i in range(n)]
    norm = [round(1e4 * x / (sum(norm) / n)) if sum(norm) else 0 for x in norm]
    pivots = best(norm, min(most, k))
    kept = list(pivots)
    quota, extra = (k - len(pivots)) // len(pivots), (k - len(pivots)) % len(pivots)
    for turn, pivot in enumerate(pivots):
        free = [i for i in range(n) if i not in kept]
        unlike = [-cosine(states[pivot], states[i]) for i in free]
        kept += [free[i] for i in best(unlike, quota + (1 if turn < extra else 0))]
    return sorted(kept)


@EXAMPLES
@given(
    SEEDS,
    st.integers(1, 3),
    st.integers(1, 30),
    st.integers(1, 3),
    st.integers(1, 9),
    st.booleans(),
    st.data(),
)
def test_formula(
    seed: int, images: int, n: int, heads: int, pivots: int, ties: bool, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    keys = normal(seed, images, heads, n, 4, steps=1 if ties else None)
    states = normal(seed, images, n, 6)
    chosen = create("dart", pivots=pivots).decide(make_view(states, {KEYS: keys}, k))
    assert lists(chosen) == [literal(states[g].numpy(), keys[g].numpy(), k, pivots) for g in range(images)]
    assert all(len(kept) == k for kept in lists(chosen))


@pytest.mark.parametrize("pivots", [0, 1.5, True])
def test_pivots_are_checked(pivots: object) -> None:
    with pytest.raises(vtprune.InvalidOptionError, match="pivots"):
        create("dart", pivots=pivots)
