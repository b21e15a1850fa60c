"""`vtprune bench`: what it counts, what it times, and when it refuses."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import vtprune
from vtprune.eval import cli
from vtprune.eval.bench import command, run
from vtprune.eval.bench.alone import kernels_alone
from vtprune.eval.bench.markdown import markdown
from vtprune.eval.bench.roofline import Peaks, Work, measure_peaks
from vtprune.eval.bench.run import RAGGED, bench, plan
from vtprune.eval.bench.shapes import SHAPES
from vtprune.eval.bench.timing import first_token
from vtprune.eval.prompts import EvaluationError

PEAKS = Peaks(1e11, 1e10)


def test_work_counts_flops_and_bytes() -> None:
    layer = nn.Linear(8, 16, bias=False)
    x = torch.randn(5, 8)
    with torch.no_grad(), Work() as work:
        layer(x)
    assert work.model == [(2 * 5 * 8 * 16, 4 * (5 * 8 + 8 * 16 + 5 * 16))]
    assert work.seconds(Peaks(10.0, 1e9)) == pytest.approx(2 * 5 * 8 * 16 / 10)
    assert work.seconds(Peaks(1e9, 10.0)) == pytest.approx(work.moved / 10)


def test_work_counts_rows_of_a_lookup_not_its_table() -> None:
    table, rows = torch.randn(1000, 4), torch.tensor([3, 5])
    with Work() as work:
        torch.nn.functional.embedding(rows, table)
    assert work.model == [(0.0, 2 * 2 * 4 * 4 + 2 * 8)]


def test_work_counts_attention_with_fewer_key_heads() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    with torch.no_grad(), Work() as work:
        torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert work.flops == 2 * 2 * 4 * 5 * 7 * (8 + 8)


def test_the_limit_knows_nothing_of_vtprune() -> None:
    """Pruning by any rule leaves the same work to the model."""
    shape = SHAPES["llava-1.5-1b"]
    model = shape.build("cpu", torch.float32, 4, narrow=True)
    inputs = shape.inputs(model, 1, [10], 0)
    counted = {}
    for method in ("random", "divprune", "vtprune", "keep-all"):
        options = {} if method == "keep-all" else {"keep": 64}
        with torch.no_grad(), vtprune.patch(model, method, **options), Work() as work:
            first_token(model, inputs)
        counted[method] = work
    assert counted["random"].flops == counted["divprune"].flops == counted["vtprune"].flops
    assert counted["random"].flops < 0.7 * counted["keep-all"].flops
    # Seconds differ by masks and the like alone.
    seconds = [counted[m].seconds(PEAKS) for m in ("random", "divprune", "vtprune")]
    assert max(seconds) < 1.02 * min(seconds)
    own = {m: sum(flops for flops, _ in work.own) for m, work in counted.items()}
    assert own["random"] == own["keep-all"] == 0 < own["divprune"] < own["vtprune"]


def test_rows(capsys: pytest.CaptureFixture[str]) -> None:
    shape = SHAPES["llava-1.5-1b"]
    model = shape.build("cpu", torch.float32, 4, narrow=True)
    ways = plan(["vtc-cls", RAGGED, "visionzip:scorer=received"], [64], with_usual=True)
    assert [w.name for w in ways] == [
        "dense",
        "vtc-cls",
        "vtc-cls, the usual way",
        RAGGED,
        "visionzip:scorer=received",
    ]
    steps: list[str] = []
    rows = bench(shape, model, ways, 3, PEAKS, 4, rounds=2, on_step=steps.append)
    assert len(steps) == len(ways) * 3
    dense, ours, usual, ragged, _ = rows
    assert dense.tokens_out == dense.tokens_in == 3 * 576
    assert dense.limit is dense.ttft_speedup is None
    assert ours.tokens_out == ragged.tokens_out == 3 * 64
    assert ours.limit is not None
    assert ours.ttft_speedup is not None
    assert ours.limit > 1
    assert ours.achieved == ours.ttft_speedup.median / ours.limit
    # The longest row counts: 80 of 576 tokens instead of 64.
    assert ragged.limit is not None
    assert ragged.limit < ours.limit
    assert usual.ttft_speedup is not None
    assert usual.limit is None
    assert usual.peak_ratio is not None
    assert ours.peak_ratio is not None
    assert usual.peak_ratio > ours.peak_ratio


def test_ways_that_cannot_run_are_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    shape = SHAPES["vit-l"]
    model = shape.build("cpu", torch.float32, None, narrow=True)
    skipped: list[tuple[str, str]] = []
    rows = bench(
        shape,
        model,
        plan(["fastv", "tome"], [64], with_usual=False),
        1,
        PEAKS,
        0,
        rounds=1,
        on_skip=lambda name, reason: skipped.append((name, reason)),
    )
    assert [row.method for row in rows] == ["dense", "tome"]
    assert [name for name, _ in skipped] == ["fastv"]
    assert rows[1].prefill_ms is None
    assert rows[1].decode_ms is None
    assert rows[1].encoder_ms is not None


def test_no_speed_on_a_red_gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def red(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        assert command[1:] == ["-m", "vtprune.testing.kernel_checks", "cpu"]
        return subprocess.CompletedProcess(command, 1, "FAILED gather: wide\n1 passed, 1 failed\n", "")

    monkeypatch.setattr(run.subprocess, "run", red)
    with pytest.raises(EvaluationError, match="FAILED gather: wide"):
        run.gate(torch.device("cpu"))
    assert cli.main(["bench", "--output", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())


def test_the_command_writes_rows_and_a_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "gate", lambda device: "kernel checks: 1 passed, 0 failed")
    monkeypatch.setattr(command, "measure_peaks", lambda device, dtype: PEAKS)
    shape = SHAPES["llava-1.5-1b"]
    build = type(shape).build

    def narrow(self: object, device: object, dtype: object, layers: object) -> nn.Module:
        return build(shape, device, dtype, 4, narrow=True)

    monkeypatch.setattr(type(shape), "build", narrow)
    arguments = ["bench", "--method", "random", "--keep", "0.25", "--layers", "4", "--rounds", "1"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    (results,) = tmp_path.glob("bench-*-float32-torch*.jsonl")
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["dense", "random"]
    assert rows[1]["layers"] == 4
    assert rows[1]["layers_of_model"] == 22
    assert rows[1]["versions"]["torch"] == torch.__version__
    assert "llava-1.5-1b, 4 layers, batch 1, keep 0.25" in results.with_suffix(".svg").read_text()


@pytest.mark.parametrize("wrong", [["--batch", "0"], ["--rounds", "0"], ["--method", "fastw"]])
def test_wrong_arguments(wrong: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "gate", lambda device: pytest.fail("measured"))
    assert cli.main(["bench", *wrong, "--output", str(tmp_path)]) == 2


def test_kernels_alone_cover_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.eval.bench import alone

    monkeypatch.setattr(alone, "repeated", lambda call, device: 1e-3)
    rows = list(kernels_alone(torch.device("cpu"), torch.float32, PEAKS))
    missing = {"backend", "compact", "received_attention", "gather_mask"}
    assert {row.operation for row in rows} == set(vtprune.ops.__all__) - missing
    assert all(row.backend == "reference" for row in rows)


def test_peaks_are_measured() -> None:
    peaks = measure_peaks(torch.device("cpu"), torch.float32)
    assert peaks.flops > 1e8
    assert peaks.bandwidth > 1e7


def test_arguments_have_help() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser, int)
    assert all(action.help for action in parser._actions)


def test_the_page_holds_the_generated_tables() -> None:
    root = Path(__file__).parent.parent
    page = (root / "docs" / "speed.md").read_text(encoding="utf-8")
    (results,) = (root / "eval" / "results").glob("bench-amd-epyc-float32-*.jsonl")
    found = re.search(r"<!-- bench -->\n(.*?)\n<!-- /bench -->", page, re.DOTALL)
    assert found is not None
    assert found[1] == markdown(results), "update docs/speed.md with `python -m vtprune.eval.bench.markdown`"
