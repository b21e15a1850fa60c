"""Reference operations against slow loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.errors import VTPruneError
from vtprune.integrations.base import Encoding
from vtprune.kernels import reference
from vtprune.layout import TokenLayout
from vtprune.ops import (
    attention_columns,
    attention_rows,
    best_match,
    compact,
    dpp_map,
    farthest_first,
    gather_many,
    gather_mask,
    merge_tokens,
    received_attention,
)
from vtprune.scoring import together
from vtprune.selection import Selection, merged

deterministic = settings(derandomize=True, deadline=None, max_examples=60)


@deterministic
@given(st.data())
def test_compact_keeps_order_and_pads(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4))
    keep = torch.tensor(rows)
    width = max(1, int(keep.sum(1).max())) + data.draw(st.integers(0, 2))
    left = data.draw(st.booleans())
    index, valid = compact(keep, width, left)
    assert index.shape == valid.shape == (len(rows), width)
    for row, i, v in zip(rows, index, valid, strict=True):
        wanted = [j for j, kept in enumerate(row) if kept]
        assert i[v].tolist() == wanted
        padding = [False] * (width - len(wanted))
        real = [True] * len(wanted)
        assert v.tolist() == (padding + real if left else real + padding)
        assert bool(((i >= 0) & (i < n)).all())


@deterministic
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_merge_is_a_weighted_sum(b: int, n: int, slots: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(b, n, 3, generator=g), torch.randn(b, n, generator=g)
    into = torch.randint(-1, slots, (b, n), generator=g)
    expected = torch.zeros(b, slots, 3)
    for i in range(b):
        for j in range(n):
            if into[i, j] >= 0:
                expected[i, into[i, j]] += weight[i, j] * x[i, j]
    torch.testing.assert_close(merge_tokens(x, into, weight, slots), expected)


def test_attention_rows_with_grouped_heads_and_mask() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 3, 8, generator=g), torch.randn(2, 2, 5, 8, generator=g)
    visible = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
    rows = attention_rows(q, k, 0.3, visible)
    for b in range(2):
        for h in range(4):
            logits = 0.3 * q[b, h] @ k[b, h // 2].T
            logits[:, ~visible[b]] = float("-inf")
            torch.testing.assert_close(rows[b, h], logits.softmax(-1))


def test_received_attention_is_the_column_mean() -> None:
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 3, 7, 4, generator=g), torch.randn(2, 3, 7, 4, generator=g)
    full = (q @ k.transpose(-1, -2) * 0.5).softmax(-1)
    torch.testing.assert_close(received_attention(q, k, 0.5), full.mean(2))
    torch.testing.assert_close(reference.attention_columns(q, k, 0.5, chunk=3), full.sum(2))
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 5:] = False
    short = (q[1:, :, :5] @ k[1:, :, :5].transpose(-1, -2) * 0.5).softmax(-1).mean(2)
    padded = received_attention(q, k, 0.5, valid)
    torch.testing.assert_close(padded[1:, :, :5], short)
    assert bool((padded[1, :, 5:] == 0).all())


@deterministic
@given(
    st.integers(1, 3), st.integers(1, 7), st.integers(0, 6), st.booleans(), st.booleans(), st.integers(0, 99)
)
def test_causal_columns_with_grouped_heads(
    b: int, n: int, past: int, hide: bool, ask: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(b, 4, n, 8, generator=g), torch.randn(b, 2, past + n, 8, generator=g)
    visible = torch.rand(b, past + n, generator=g) < 0.6 if hide else None
    asking = torch.rand(b, n, generator=g) < 0.6 if ask else None
    expected = torch.zeros(b, 4, past + n)
    for i in range(b):
        for h in range(4):
            for r in range(n):
                if asking is not None and not asking[i, r]:
                    continue
                logits = 0.3 * k[i, h // 2] @ q[i, h, r]
                for j in range(past + n):
                    own = j == past + r
                    if j > past + r or (visible is not None and not visible[i, j] and not own):
                        logits[j] = float("-inf")
                expected[i, h] += logits.softmax(-1)
    columns = attention_columns(q, k, 0.3, visible, asking, causal=True)
    torch.testing.assert_close(columns, expected)
    torch.testing.assert_close(
        reference.attention_columns(q, k, 0.3, visible, asking, True, chunk=2), expected
    )


@deterministic
@given(st.integers(1, 3), st.integers(1, 9), st.data())
def test_farthest_first_is_greedy(images: int, n: int, data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    k = data.draw(st.integers(1, n))
    # few different values, so that ties occur
    weight = torch.randint(0, 3, (images, n), generator=g).float()
    distance = torch.randint(-1, 4, (images, n, n), generator=g).float()
    lengths = torch.randint(1, n + 1, (images,), generator=g) if data.draw(st.booleans()) else None
    start = torch.zeros(images, dtype=torch.int64) if data.draw(st.booleans()) else None
    chosen = farthest_first(weight, distance, k, start, lengths)
    for i in range(images):
        there = n if lengths is None else int(lengths[i])
        free = list(range(there))
        order: list[int] = []
        while len(order) < k:
            if not free:
                order.append(-1)
                continue
            if order:
                value = [float(weight[i, j] * distance[i, order, j].clamp(min=0).min()) for j in free]
            else:
                value = [float(weight[i, j]) for j in free] if start is None else [-j for j in free]
            order.append(free.pop(value.index(max(value))))
        assert chosen[i].tolist() == order


@deterministic
@given(st.integers(1, 3), st.integers(1, 8), st.data())
def test_dpp_map_multiplies_determinants(images: int, n: int, data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    k = data.draw(st.integers(1, n))
    x = torch.randn(images, n, n + 2, generator=g, dtype=torch.float64)
    kernel = x @ x.transpose(1, 2)
    lengths = torch.randint(1, n + 1, (images,), generator=g) if data.draw(st.booleans()) else None
    chosen = dpp_map(kernel, k, lengths)
    for i in range(images):
        there = n if lengths is None else int(lengths[i])
        order: list[int] = []
        for _ in range(min(k, there)):
            free = [j for j in range(there) if j not in order]
            value = [float(torch.det(kernel[i][[*order, j]][:, [*order, j]])) for j in free]
            order.append(free[value.index(max(value))])
        assert chosen[i].tolist() == order + [-1] * (k - len(order))


def test_best_match_breaks_ties_by_the_lower_index() -> None:
    a = torch.tensor([[[1.0, 0], [0, 2], [0, 0]]])
    b = torch.tensor([[[0, 1.0], [3, 0], [5, 0]]])
    value, index = best_match(a, b)
    assert index.tolist() == [[1, 0, 0]]
    torch.testing.assert_close(value, torch.tensor([[1.0, 1, 0]]))


@deterministic
@given(st.integers(1, 3), st.integers(1, 7), st.data())
def test_gathering_many_and_masks(b: int, n: int, data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    k = data.draw(st.integers(1, n))
    index, other = (torch.randint(0, n, (b, k), generator=g) for _ in range(2))
    valid = torch.rand(b, k, generator=g) < 0.7 if data.draw(st.booleans()) else None
    hidden, ids = torch.randn(b, n, 5, generator=g), torch.randint(0, 99, (3, 1, n, 1), generator=g)
    mask = torch.rand(1, 2, n, n, generator=g) < 0.5
    states, places = gather_many([hidden, ids], [index, other], valid)
    shown = gather_mask(mask, index, valid)
    assert places.shape == (3, b, k, 1)
    for i in range(b):
        for s in range(k):
            there = valid is None or bool(valid[i, s])
            assert torch.equal(states[i, s], hidden[i, index[i, s]] if there else torch.zeros(5))
            assert torch.equal(places[:, i, s, 0], ids[:, 0, other[i, s], 0] * there)
            for t in range(k):
                may = mask[0, :, index[i, s], index[i, t]]
                if valid is not None and not valid[i, t]:
                    may = torch.zeros_like(may)
                if s == t and not there:
                    may = torch.ones_like(may)
                assert torch.equal(shown[i, :, s, t], may)


def test_selection_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert Selection.topk(scores, 2).index[0].tolist() == [1, 2]


def test_merged_points_every_token_at_its_slot() -> None:
    selection = merged(
        torch.tensor([[4, 1]]), torch.tensor([[1, 1, -1, 4, 4]]), torch.tensor([[0.5, 1, 9, 0.25, 1]])
    )
    x = torch.eye(5)
    expected = torch.tensor([[0.5, 1, 0, 0, 0], [0, 0, 0, 0.25, 1]])
    assert selection.index[0].tolist() == [1, 4]
    assert torch.equal(selection.apply(x), expected)


@deterministic
@given(st.data())
def test_a_ragged_selection_is_applied_image_by_image(data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    images, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    kept = [sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))) for _ in range(images)]
    selection = Selection(tuple(torch.tensor(k) for k in kept))
    names, x = torch.randint(0, 99, (images, n), generator=g), torch.randn(images, n, 3, generator=g)
    for i, (left, gone, new) in enumerate(
        zip(selection.index_of(names), selection.dropped(names), selection.apply_all(x), strict=True)
    ):
        assert left.tolist() == [int(names[i, j]) for j in kept[i]]
        assert gone.tolist() == [int(names[i, j]) for j in range(n) if j not in kept[i]]
        assert torch.equal(new, x[i, kept[i]])
        assert torch.equal(selection.image(i).apply(x[i]), new)


def drawn(data: st.DataObject, kind: str, images: int, n: int) -> Selection:
    """A selection that drops, merges into slots, adds to several, or does so across its images."""
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    counts = [data.draw(st.integers(1, n)) for _ in range(images)]
    index = tuple(torch.randperm(n, generator=g)[:k].sort().values for k in counts)
    if kind == "drop":
        return Selection(index)
    if kind == "slots":
        into = torch.stack([torch.randint(-1, k, (n,), generator=g) for k in counts])
        return Selection(index, into, 0.1 + torch.rand(images, n, generator=g))
    of = None
    if kind == "across":
        some = st.lists(st.integers(0, images - 1), min_size=1, unique=True)
        of = tuple(tuple(data.draw(some)) for _ in range(images))
    widths = [n if of is None else n * len(of[i]) for i in range(images)]
    # Zeros too: tokens that join nothing, or only survivors of some images.
    mix = [
        torch.rand(k, w, generator=g) * torch.randint(0, 2, (k, w), generator=g)
        for k, w in zip(counts, widths, strict=True)
    ]
    return Selection(index, mix=tuple(mix), sources=of)


@deterministic
@given(st.data())
def test_images_take_up_tokens_of_each_other(data: st.DataObject) -> None:
    images, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    chosen = drawn(data, "across", images, n)
    assert chosen.mix is not None
    assert chosen.sources is not None
    g = torch.Generator().manual_seed(0)
    x, sizes = torch.randn(images, n, 3, generator=g), torch.rand(images, n, generator=g)
    names = [[(s, j) for s in of for j in range(n)] for of in chosen.sources]
    total = dict.fromkeys(((i, j) for i in range(images) for j in range(n)), 0.0)
    for m, column in zip(chosen.mix, names, strict=True):
        for row in m.tolist():
            for at, w in zip(column, row, strict=True):
                total[at] += w
    for i, (m, column) in enumerate(zip(chosen.mix, names, strict=True)):
        for slot, row in enumerate(m.tolist()):
            value, size = torch.zeros(3), 0.0
            for at, w in zip(column, row, strict=True):
                value += w * x[at]
                size += 0 if w == 0 else w / total[at] * float(sizes[at])
            torch.testing.assert_close(chosen.apply_all(x)[i][slot], value)
            assert abs(float(chosen.sizes(sizes)[i][slot]) - size) < 1e-4
    alone = Selection(chosen.index[:1], mix=(chosen.mix[0][:, :n],))
    same = Selection(alone.index, mix=alone.mix, sources=((0,),))
    assert torch.equal(same.apply_all(x[:1])[0], alone.apply(x[0]))
    assert torch.equal(same.image(0).apply(x[0]), alone.apply(x[0]))


@deterministic
@given(st.data())
def test_selections_together_are_what_they_are_alone(data: st.DataObject) -> None:
    """Whatever stands beside them and in between, in vectors and in sizes."""
    n = data.draw(st.integers(1, 5))
    kinds = data.draw(
        st.lists(st.sampled_from(["drop", "slots", "spread", "across"]), min_size=1, max_size=4)
    )
    parts = [drawn(data, kind, data.draw(st.integers(1, 3)), n) for kind in kinds]
    total = sum(len(part.index) for part in parts)
    numbers = iter(data.draw(st.permutations(range(total))))
    places = [[next(numbers) for _ in part.index] for part in parts]
    x = torch.randn(total, n, 3, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(total, n)
    whole = together(parts, places)
    assert whole.merges == any(kind != "drop" for kind in kinds)
    for part, images in zip(parts, places, strict=True):
        values, sizes = part.apply_all(x[images]), part.sizes(ones[images])
        for i, g in enumerate(images):
            assert torch.equal(whole.index[g], part.index[i])
            torch.testing.assert_close(whole.apply_all(x)[g], values[i])
            torch.testing.assert_close(whole.sizes(ones)[g], sizes[i])
    in_order = together(parts)
    assert [i.tolist() for i in in_order.index] == [i.tolist() for part in parts for i in part.index]


def test_sizes_are_shared_out_from_those_before_the_merge() -> None:
    """The second image takes up half of a token of the first, which the first has given away by then."""
    tower: Any = None
    encoding = Encoding(tower, [TokenLayout(1, 2)] * 3, list, torch.device("cpu"))
    mix = (torch.tensor([[1.0, 1]]), torch.tensor([[0.0, 1, 1, 1]]))
    chosen = Selection((torch.tensor([0]),) * 2, mix=mix, sources=((0,), (0, 1)))
    encoding.resize([2, 0], 2, None, chosen)
    assert encoding.sizes is not None
    assert [sizes.tolist() for sizes in encoding.sizes] == [[2.5], [1, 1], [1.5]]
    encoding.resize([1], 2, torch.tensor([[4.0, 5]]), Selection((torch.tensor([0, 1]),)))
    assert encoding.sizes[1].tolist() == [1, 1]  # nothing was lost


def test_what_spans_images_is_not_cut() -> None:
    one = torch.tensor([0])
    chosen = Selection((one, one), mix=(torch.ones(1, 4), torch.ones(1, 2)), sources=((0, 1), (1,)))
    assert torch.equal(chosen.image(1).apply(torch.eye(2)), torch.ones(1, 2))
    with pytest.raises(VTPruneError, match=r"image 0 takes up tokens of images \(0, 1\).*together"):
        chosen.image(0)


@pytest.mark.parametrize(
    ("sources", "mix", "message"),
    [
        (((0,),), None, "need a matrix"),
        (((0,), (1,)), (torch.ones(1, 2),), "need a matrix"),
        (((1,),), (torch.ones(1, 2),), "image 0: the 2 columns"),
        (((0, 0, 0),), (torch.ones(1, 2),), "image 0: the 2 columns"),
        (((),), (torch.ones(1, 2),), "image 0: the 2 columns"),
    ],
)
def test_sources_fit_their_matrices(sources: Any, mix: Any, message: str) -> None:
    with pytest.raises(VTPruneError, match=message):
        Selection((torch.tensor([0]),), mix=mix, sources=sources)


def test_gather_reference() -> None:
    x = torch.arange(12.0).view(1, 4, 3)
    assert torch.equal(reference.gather_tokens(x, torch.tensor([[2, 0]])), x[:, [2, 0]])


def test_picture_checksum_ignores_the_last_bit_and_nothing_else() -> None:
    levels = torch.arange(256).repeat(3).view(3, 16, 16) / 255 * 4 - 2

    def checksum(pixels: torch.Tensor) -> int:
        tower: Any = None
        return Encoding(tower, [TokenLayout(4, 4)], lambda: [pixels], pixels.device).seeds()[0]

    changed = levels.clone()
    changed[1, 3, 5] += 4 / 255
    assert checksum(levels) == checksum(levels + 6e-8) == checksum(levels - 6e-8)
    assert checksum(levels) != checksum(changed)
