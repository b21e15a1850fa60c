"""`vtprune video-qa` on the reference model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("av", reason="clips are written by PyAV (pip install vtprune[video])")

from vtprune.eval import cli
from vtprune.eval.world import video


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for i in range(2):
        video.clip("val", 20 + i, "motion").write(root / f"clip{i}.mp4")
    (root / "empty.mp4").write_bytes(b"")
    return root


def test_answers_and_goes_on(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "answers.jsonl"
    arguments = ["video-qa", str(clips), "--question", "how many things are there ?", "--frames", "2"]
    arguments += ["--candidates", "4", "--method", "divprune", "--keep", "6", "--output", str(output)]
    assert cli.main(arguments) == 0
    assert "3 videos: 3 answered now, 1 of them with an error, 0 before" in capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(row["video"]).name for row in rows] == ["clip0.mp4", "clip1.mp4", "empty.mp4"]
    assert rows[2]["error"].startswith("BrokenVideoError")
    for row in rows[:2]:
        assert row["answer"]
        assert (row["tokens_in"], row["tokens_out"]) == (2 * 16, 2 * 6)
        assert len(row["times"]) == 2
    content = output.read_bytes()
    assert cli.main(arguments) == 0
    assert "3 videos: 0 answered now, 0 of them with an error, 3 before" in capsys.readouterr().out
    assert output.read_bytes() == content
    assert cli.main([*arguments, "--keep", "3"]) == 2
    assert "another run" in capsys.readouterr().err
    assert output.read_bytes() == content


def test_every_frame_keeps_what_quota_allots(clips: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    arguments = [
        "video-qa",
        str(clips / "clip0.mp4"),
        "--question",
        "which way does the frog go ?",
        "--output",
        str(output),
    ]
    arguments += [
        "--select",
        "quota:cap=9",
        "--frames",
        "3",
        "--method",
        "vtc-cls:scorer=received",
        "--keep",
        "4",
        "--allot",
    ]
    assert cli.main(arguments) == 0
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    (said,) = [note for note in row["notes"] if note.startswith("tokens allotted to frames: ")]
    tokens = [int(word) for word in said.partition(": ")[2].split(",")]
    assert len(tokens) == 3
    assert row["tokens_out"] == sum(tokens)
    assert 3 * 4 - 3 <= sum(tokens) <= 3 * 4
    assert max(tokens) <= 9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--keep", "9"], "--keep is a budget of a --method"),
        (["--select", "unform"], "uniform"),
        (["--method", "divprun"], "divprune"),
        (["--new-tokens", "0"], "--new-tokens 0"),
        (["--question", " "], "the question is empty"),
        (["--allot", "--method", "vtprune", "--keep", "4"], "use --select quota"),
        (["--allot", "--select", "quota", "--keep", "4"], "needs a --method"),
        (["--allot", "--select", "quota", "--method", "vtprune", "--keep", "0.5"], "--keep N"),
        (["--allot", "--select", "quota", "--method", "evs", "--keep", "4"], "no scores of its own"),
    ],
)
def test_wrong_arguments(
    clips: Path, wrong: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.jsonl"
    assert cli.main(["video-qa", str(clips), "--question", "?", "--output", str(output), *wrong]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
