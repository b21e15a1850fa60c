"""Insertion and deletion curves against the independent judge, and against what can be known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from judge import Judge

import vtprune
from vtprune.eval.auc import insertion_deletion
from vtprune.testing.zoo import LVLMS, Image, Video

ROWS = {
    "one": [20, 21, Image(1), 22, 23, 24],
    "two": [20, Image(2, 1), 21, Image(3, 2), 22, 23, 24, 25],
    "text": [20, 21, 22, 23],
    "video": [20, 26, Video(4, 2), 27, 28],
}


def setting(family, *names, padding="left"):
    inputs = LVLMS[family].batch([ROWS[n] for n in names], padding=padding)
    rows = [LVLMS[family].batch([ROWS[n]]) for n in names]
    return LVLMS[family].build(), Judge(LVLMS[family].build()), inputs, rows


def rankings(model, inputs):
    with vtprune.patch(model, "keep-all") as patch, torch.no_grad():
        model(**inputs)
        images = patch.report().images
    generator = torch.Generator().manual_seed(5)
    return images, [torch.randperm(i.tokens_in, generator=generator) for i in images]


def units(judge, rows, images):
    """Per row the judge's units with the number of the image in the report, told apart by place and size."""
    out = []
    numbers = iter(range(len(images)))
    for sample, row in enumerate(rows):
        mine = [next(numbers) for i in images if i.sample == sample]
        found = judge.prompt(row).units
        assert [(u.rows, u.cols) for u in found] == [
            (images[n].layout.rows, images[n].layout.cols) for n in mine
        ]
        out.append(list(zip(mine, found, strict=True)))
    return out


def expected(judge, rows, images, kept_of):
    """[B] probability of the dense answer with only kept_of(image, n) left, by hiding columns."""
    values = []
    for row, mine in zip(rows, units(judge, rows, images), strict=True):
        target = int(judge.logits(row)[-1].argmax())
        gone = {c for n, u in mine for i, c in enumerate(u.columns) if i not in kept_of(n, len(u.columns))}
        values.append(judge.logits(row, {0: gone})[-1].softmax(-1)[target])
    return torch.stack(values)


@pytest.mark.parametrize(
    ("family", "names", "padding"),
    [
        ("llava", ("one", "two", "text"), "left"),
        ("llava", ("two", "one"), "right"),
        ("llava_next", ("one",), "left"),
        ("qwen2_5_vl", ("two", "video"), "left"),
    ],
)
def test_curves_are_the_judges(family, names, padding):
    model, judge, inputs, rows = setting(family, *names, padding=padding)
    images, order = rankings(model, inputs)
    result = insertion_deletion(model, inputs, order, points=4)
    for point in range(4):
        count = lambda n, point=point: math.floor(point / 3 * n + 0.5)
        best = lambda i, n, count=count: order[i][: max(1, count(n))].tolist()
        worst = lambda i, n, count=count: order[i][min(n - 1, count(n)) :].tolist()
        torch.testing.assert_close(
            result.insertion[:, point], expected(judge, rows, images, best), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            result.deletion[:, point], expected(judge, rows, images, worst), atol=1e-5, rtol=1e-4
        )
    # trapezoids of width 1/3
    for curve, area in ((result.insertion, result.insertion_auc), (result.deletion, result.deletion_auc)):
        by_hand = (curve[:, 0] / 2 + curve[:, 1] + curve[:, 2] + curve[:, 3] / 2) / 3
        torch.testing.assert_close(area, by_hand, atol=1e-6, rtol=1e-5)


def test_both_ends_and_a_row_without_pictures():
    model, judge, inputs, rows = setting("llava", "one", "text")
    _, order = rankings(model, inputs)
    insertion, deletion, insertion_auc, deletion_auc = insertion_deletion(model, inputs, order, points=3)
    dense = torch.stack([judge.logits(row)[-1].softmax(-1).max() for row in rows])
    torch.testing.assert_close(insertion[:, -1], dense, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(deletion[:, 0], dense, atol=1e-5, rtol=1e-4)
    assert insertion.shape == deletion.shape == (2, 3)
    # nothing can be taken from a prompt without pictures
    torch.testing.assert_close(torch.stack([insertion_auc[1], deletion_auc[1]]), dense[[1, 1]])


def test_the_best_order_by_brute_force_beats_its_reverse():
    """Ranks every token by what the judge says the answer is worth with this token alone."""
    model, judge, inputs, (row,) = setting("llava", "one")
    images, _ = rankings(model, inputs)
    n = images[0].tokens_in
    alone = torch.stack([expected(judge, [row], images, lambda i, n, k=k: {k})[0] for k in range(n)])
    order = alone.argsort(descending=True)
    good = insertion_deletion(model, inputs, order[None], points=n + 1)
    bad = insertion_deletion(model, inputs, order.flip(0)[None], points=n + 1)
    torch.testing.assert_close(good.insertion[0, 1], alone.max(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bad.insertion[0, 1], alone.min(), atol=1e-5, rtol=1e-4)
    # what is inserted in one order is left by deletion in the other
    torch.testing.assert_close(good.insertion[:, 1:], bad.deletion[:, :-1].flip(1), atol=1e-6, rtol=1e-5)
    assert good.insertion_auc > bad.insertion_auc


def test_a_method_is_asked_for_every_size():
    model, judge, inputs, rows = setting("llava", "one", "two")
    images, _ = rankings(model, inputs)
    method = vtprune.methods.DivPrune(keep=1)
    result = insertion_deletion(model, inputs, method, points=3)
    sets = {}
    for k in {max(1, (i.tokens_in + 1) // 2) for i in images}:
        with vtprune.patch(model, "divprune", keep=k) as patch, torch.no_grad():
            model(**inputs)
            sets[k] = [list(i.kept.values())[-1].tolist() for i in patch.report().images]
    half = lambda i, n: sets[max(1, (n + 1) // 2)][i]
    other = lambda i, n: set(range(n)) - set(half(i, n))
    torch.testing.assert_close(
        result.insertion[:, 1], expected(judge, rows, images, half), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        result.deletion[:, 1], expected(judge, rows, images, other), atol=1e-5, rtol=1e-4
    )


def test_refusals_and_no_trace():
    model, _, inputs, _ = setting("llava", "two")
    _, order = rankings(model, inputs)
    with torch.no_grad():
        before = model(**inputs).logits
    for wrong, reason in (
        (order[:1], "1 rankings were given for 2 images"),
        ([order[0], order[0] * 0], "every index from 0 to"),
    ):
        with pytest.raises(vtprune.InvalidOptionError, match=reason):
            insertion_deletion(model, inputs, wrong)
    with pytest.raises(vtprune.InvalidOptionError, match="at least 2"):
        insertion_deletion(model, inputs, order, points=1)
    text = LVLMS["llava"].batch([ROWS["text"]])
    with pytest.raises(vtprune.VTPruneError, match="no images"):
        insertion_deletion(model, text, order)
    insertion_deletion(model, inputs, order, points=2)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
