"""Published figures stand as in their sources, and outcomes beside them."""

import pytest
from lmms.common import row_of, write_rows

import vtprune
from vtprune.eval.cli import main
from vtprune.eval.lmms import published


def test_published_figures_are_whole_and_name_their_sources():
    figures = published.load()
    for one in figures.figures:
        assert one.sources, one
        assert set(one.sources) <= set(figures.sources), one
        assert one.values, one
        assert set(one.values) <= set(published.BENCHMARKS), one
        assert one.model in published.models()
        assert one.key is None or one.key in {"dense", "no-image", *vtprune.list_methods()}, one
        assert one.baseline is None or figures.dense(one) is not None, one
        for name, value in one.values.items():
            assert 0 < value < (2800 if name.startswith("MME") else 100), one
    assert set(figures.sources) == {key for one in figures.figures for key in one.sources}


# From VTC-CLS' own figure, FasterVLM's EVAL.md, HoliTom's and VidCom2's figures, and the HoloV and QCPruner papers.
@pytest.mark.parametrize(
    ("model", "tokens", "method", "source", "benchmark", "value"),
    [
        ("LLaVA-1.5-7B", "64", "VTC-CLS", "vtc-cls", "POPE", 78.8),
        ("LLaVA-1.5-7B", "128", "VTC-CLS", "vtc-cls", "SEED", 62.2),
        ("LLaVA-1.5-7B", "144", "FasterVLM", "fastervlm", "MME perception", 1433.76),
        ("LLaVA-1.5-7B", "58", "FastV", "fastervlm", "GQA", 51.2),
        ("LLaVA-1.5-7B", "64", "FastV", "holov", "POPE", 48.0),
        ("LLaVA-1.5-7B", "64", "FastV", "calibration", "POPE", 36.1),
        ("LLaVA-1.5-7B", "64", "CDPruner", "qcpruner", "MME perception", 1403),
        ("LLaVA-1.5-7B", "192", "DART", "holov", "MME", 1856),
        ("LLaVA-OneVision-7B", "25 %", "DyCoke", "holitom", "EgoSchema", 59.5),
        ("LLaVA-OneVision-7B", "10 %", "VisionZip", "holitom", "Video-MME", 53.4),
        ("LLaVA-OneVision-7B", "25 %", "Random", "vidcom2", "MLVU", 59.7),
        ("LLaVA-OneVision-7B", "15 %", "SparseVLM", "vidcom2", "Video-MME", 53.4),
    ],
)
def test_published_figures_stand_as_in_their_sources(model, tokens, method, source, benchmark, value):
    (found,) = [
        one
        for one in published.load().figures
        if (one.model, one.tokens, one.method) == (model, tokens, method) and source in one.sources
    ]
    assert found.values[benchmark] == value


def test_outcomes_stand_beside_published_figures(tmp_path, capsys):
    rows = [
        row_of("dense", None, "gqa", "exact_match", 0.60),
        row_of("vtc-cls", 64, "gqa", "exact_match", 0.54),
        row_of("vtc-cls", 64, "mme", "mme_perception_score", 1400.0),
        row_of("vtc-cls", 64, "pope", "pope_accuracy", 0.8),  # papers report F1
    ]
    path = write_rows(tmp_path / "results.jsonl", rows)
    outcomes = published.read_outcomes(path)
    model = published.model_of(outcomes, path)
    done = published.compare(published.load(), outcomes, model)
    (line,) = [one for one in done.lines if one.figure.key == "vtc-cls"]
    assert (line.benchmark, line.measured, line.published) == ("GQA", pytest.approx(54.0), 55.7)
    assert line.kept == pytest.approx(0.9)
    assert line.kept_published == pytest.approx(55.7 / 62.0)
    assert {one.benchmark for one in done.lines} == {"GQA"}
    assert main(["published", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "-1.7" in shown
    assert "source, vtc-cls: github.com/THU-MIG/VTC-CLS" in shown
    assert "VTC-CLS: tokens that enter the language model" in shown


def test_comparison_says_what_it_cannot_know(tmp_path, capsys):
    path = write_rows(tmp_path / "results.jsonl", [row_of("vtc-cls", 63, "gqa", "exact_match", 0.5)])
    assert main(["published", str(path)]) == 2
    assert "it has GQA under vtc-cls" in capsys.readouterr().err
    path = write_rows(
        tmp_path / "other.jsonl", [row_of("vtc-cls", 64, "gqa", "exact_match", 0.5, model="mine")]
    )
    assert main(["published", str(path)]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["published", str(path), "--model", "LLaVA-1.5-7B"]) == 0
    path = write_rows(tmp_path / "bad.jsonl", [{"a": 1}])
    assert main(["published", str(path)]) == 2
    assert "neither" in capsys.readouterr().err
    limited = [
        row_of("vtc-cls", 64, "gqa", "exact_match", 0.5, limit=5),
    ]
    outcomes = published.read_outcomes(write_rows(tmp_path / "few.jsonl", limited))
    assert "--limit" in published.compare(published.load(), outcomes, "LLaVA-1.5-7B").notes[0]
    assert main(["published", "--method", "fastv", "--tokens", "65"]) == 2
    assert "tokens: all, 192" in capsys.readouterr().err


def test_a_group_of_many_tasks_counts_only_when_it_is_whole():
    parts = [
        published.Outcome(
            "m", "random", 0.25, f"mvbench_{i}", "mvbench_accuracy", float(i), 1.0, 1.0, 1, False
        )
        for i in range(20)
    ]
    benchmark = published.BENCHMARKS["MVBench"]
    assert published._value(parts, benchmark) == pytest.approx(9.5)
    assert published._value(parts[1:], benchmark) is None
