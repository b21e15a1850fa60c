"""Arithmetic of paired comparisons, and the experiments that explain methods below `random`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vtprune import methods
from vtprune.eval import explanations
from vtprune.eval.accuracy import Kept, Outcome
from vtprune.eval.paired import mcnemar, paired, sign_flips
from vtprune.eval.world import examples
from vtprune.layout import TokenLayout
from vtprune.method import Signal, View

RESULTS = Path(__file__).resolve().parent.parent / "eval" / "results" / "explanations.jsonl"


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (0, 5), (3, 9), (7, 7), (12, 1)])
def test_mcnemar_counts_the_tosses_of_a_fair_coin(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    observed = abs(only_a - n / 2)
    tosses = [sum(t) for t in itertools.product((0, 1), repeat=n)]
    assert mcnemar(only_a, only_b) == pytest.approx(sum(abs(t - n / 2) >= observed for t in tosses) / 2**n)


def test_zeros_and_ones_get_mcnemar() -> None:
    a = [1, 1, 1, 0, 1, 1, 0, 1]
    b = [1, 0, 0, 0, 0, 0, 1, 0]
    result = paired(a, b)
    d = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(d) / 8
    assert (result.n, result.test) == (8, "exact McNemar")
    assert result.difference == pytest.approx(4 / 8)
    assert result.stderr == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in d) / 7 / 8))
    assert result.p == pytest.approx(2 * (1 + 6) / 2**6)


def test_shares_get_sign_flips() -> None:
    a = [1.0, 2 / 3, 1.0, 1 / 3, 1.0, 1.0, 0.0]
    b = [0.0, 1 / 3, 1.0, 2 / 3, 0.0, 1 / 3, 0.0]
    d = [x - y for x, y in zip(a, b, strict=True) if x != y]
    means = [
        abs(sum(s * x for s, x in zip(signs, d, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(d))
    ]
    exact = sum(m >= abs(sum(d)) - 1e-9 for m in means) / len(means)
    result = paired(a, b)
    assert result.test == "sign flips"
    assert result.p == pytest.approx(exact, abs=0.02)
    assert result == paired(a, b)  # a fixed seed


def test_no_difference_is_p_one() -> None:
    assert paired([0, 1, 1], [0, 1, 1]).p == 1
    assert sign_flips([0.0, 0.0]) == 1
    assert paired([0.5], [0.5]).stderr is None


@pytest.mark.parametrize(("a", "b"), [([1], [1, 0]), ([], []), ([2], [0]), ([0.5], [-0.1])])
def test_what_are_no_pairs_of_scores_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=r"pairs|average|outside"):
        paired(a, b)


def view_of(n: int, k: int, signals: Mapping[Signal, Tensor]) -> View:
    index = torch.arange(n).expand(2, n)
    return View(torch.zeros(2, n, 3), index, [TokenLayout(1, n)] * 2, k, [n, n], lambda: [5, 6], signals)


def test_every_run_is_compared_with_an_earlier_one_and_changes_something() -> None:
    seen: dict[str, explanations.Experiment] = {}
    for one in explanations.experiments():
        assert one.name not in seen
        if one.against is not None:
            assert one.method == seen[one.against].method
            assert one.variants != seen[one.against].variants
            assert one.hypothesis
            assert one.change
        seen[one.name] = one


def test_a_variant_keeps_the_options_and_the_method_as_it_is() -> None:
    method = methods.create("fastv", keep=3, layer=4)
    variant = explanations.changed(method, decide=explanations.draw)
    assert variant.options() == method.options()
    assert type(method).decide is methods.FastV.decide
    view = view_of(9, 3, {})
    scores = explanations.uniform(view)
    for row, chosen in zip(scores.tolist(), variant.decide(view).index, strict=True):
        assert chosen.tolist() == sorted(sorted(range(9), key=lambda i: -row[i])[:3])


def test_the_mean_over_queries_counts_those_that_see_a_token() -> None:
    received, text = Signal("decoder_received", 0), Signal("prompt_attention", 0)
    torch.manual_seed(0)
    values = torch.rand(2, 4, 9)
    prompt = torch.rand(2, 4, 5, 9)
    prompt[0, :, 3:] = 0  # a shorter prompt
    chosen = explanations.per_query(
        methods.create("spatten"), view_of(9, 4, {received: values, text: prompt})
    )
    for g, asking in enumerate((3, 5)):
        means = [float(values[g, :, i].sum()) / (9 - i + asking) for i in range(9)]
        assert chosen.index[g].tolist() == sorted(sorted(range(9), key=lambda i: -means[i])[:4])


def test_shown_is_the_share_of_boxes_that_hold_the_middle_of_a_kept_token() -> None:
    question = next(e for e in examples("val", 1) if len(e.boxes) == 2)
    (x0, y0, x1, y1), other = question.boxes
    inside = [
        i
        for i in range(144)
        if x0 <= 8 * (i % 12) + 4 < x1
        and y0 <= 8 * (i // 12) + 4 < y1
        and not (other[0] <= 8 * (i % 12) + 4 < other[2] and other[1] <= 8 * (i // 12) + 4 < other[3])
    ]
    bench = explanations.Bench(torch.nn.Identity(), None, [question], [])  # type: ignore[arg-type]
    assert bench.shown(Outcome([0.0], [""], {0: Kept(12, 12, (inside[0],))})) == 0.5
    assert bench.shown(Outcome([0.0], [""], {0: Kept(12, 12, tuple(range(144)))})) == 1


def test_a_hypothesis_survives_if_its_change_helps_beyond_chance() -> None:
    before, chance = [0.0] * 20 + [1.0] * 20, [1 / 3] * 40
    higher = explanations.experiments()[2]
    assert higher.expects == "higher"
    assert explanations.row(higher, [1.0] * 40, before, chance)["survives"]
    assert not explanations.row(higher, [1.0] * 5 + before[5:], before, chance)["survives"]  # p is 1/16
    assert not explanations.row(higher, [0.0] * 40, before, chance)["survives"]
    same = next(one for one in explanations.experiments() if one.expects == "same")
    assert explanations.row(same, before, before, chance)["survives"]
    assert not explanations.row(same, before[::-1], before, chance)["survives"]
    assert "survives" not in explanations.row(higher, before, None, chance)


def test_the_command_writes_a_row_per_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    explanations.main(["--method", "mstm", "--limit", "1", "--output", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    names = [one.name for one in explanations.experiments() if one.method in ("random", "mstm")]
    assert [row["name"] for row in rows] == names
    assert {row["command"] for row in rows} == {"python -m vtprune.eval.explanations --method mstm --limit 1"}
    assert [row["by_options"] for row in rows] == [True, True, False, False, False, True]
    assert rows[-1]["options"] == {"keep": 16, "layers": [4]}
    assert len(capsys.readouterr().out.splitlines()) == len(names)


def test_the_rows_in_the_repository_are_of_these_experiments() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert [row["name"] for row in rows] == [one.name for one in explanations.experiments()]
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        assert row["command"].startswith("python -m vtprune.eval.explanations")
        assert row["split"] == "val"
        if row["against"]:
            difference = row["accuracy"] - by_name[row["against"]]["accuracy"]
            assert row["difference"] == pytest.approx(difference, abs=1e-9)
