"""The controls: what they keep, and that chance depends on the picture and the seed alone."""

from __future__ import annotations

from math import floor

import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.views import EXAMPLES, lists, make_view

from vtprune.methods.keep_all import KeepAll
from vtprune.methods.random import Random
from vtprune.methods.stride import Stride


@EXAMPLES
@given(st.integers(1, 3), st.integers(1, 60), st.data())
def test_stride_and_keep_all(images: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    view = make_view(torch.zeros(images, n, 1), {}, k)
    assert lists(Stride(keep=k).decide(view)) == [[floor((i + 0.5) * n / k) for i in range(k)]] * images
    assert lists(KeepAll().decide(view)) == [list(range(n))] * images


@EXAMPLES
@given(st.integers(0, 10), st.integers(2, 40), st.data())
def test_random_knows_seed_and_picture_only(seed: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n - 1))
    both = lists(Random(keep=k, seed=seed).decide(make_view(torch.zeros(2, n, 1), {}, k, seeds=[7, 8])))
    for g, picture in enumerate((7, 8)):
        alone = make_view(torch.ones(1, n, 1), {}, k, seeds=[picture])
        assert lists(Random(keep=k, seed=seed).decide(alone)) == [both[g]]
        assert len(set(both[g])) == k


def test_random_is_uniform() -> None:
    n, k, draws = 20, 5, 4000
    view = make_view(torch.zeros(draws, n, 1), {}, k, seeds=range(draws))
    counts = torch.bincount(torch.cat(list(Random(keep=k).decide(view).index)), minlength=n).double()
    expected, deviation = draws * k / n, (draws * (k / n) * (1 - k / n)) ** 0.5
    assert (counts - expected).abs().max() < 4.5 * deviation
