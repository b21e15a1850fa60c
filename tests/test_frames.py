"""`vtprune frames`: what it writes, and what it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("av", reason="clips are written by PyAV (pip install vtprune[video])")

from vtprune.eval import cli
from vtprune.eval.frames import clock, shown
from vtprune.eval.world import video


@pytest.fixture(scope="module")
def needle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, video.VideoScene]:
    scene = video.clip("val", 3, "needle")
    path = tmp_path_factory.mktemp("clip") / "needle.mp4"
    scene.write(path)
    return path, scene


def run(*arguments: object) -> int:
    return cli.main(["frames", *map(str, arguments)])


def test_keyscore_finds_the_moment_of_the_caption(
    needle: tuple[Path, video.VideoScene], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, scene = needle
    question = next(q for q in scene.questions if q.kind == "needle")
    ((first, last),) = question.spans
    output = tmp_path / "found.json"
    arguments = ("--keep", 3, "--candidates", 160, "--caption", question.caption, "--output", output)
    assert run(path, "--select", "keyscore:proposals=all", *arguments) == 0
    record = json.loads(output.read_text())
    scores = [one["score"] for one in record["candidates"]]
    best = max(range(len(scores)), key=scores.__getitem__)
    fps = scene.fps
    assert first / fps <= record["candidates"][best]["time"] < last / fps
    assert best in record["chosen"]
    assert record["times"] == [record["candidates"][i]["time"] for i in record["chosen"]]
    assert len(record["candidates"]) == 160
    assert len(record["chosen"]) == 3
    assert record["captions"] == [question.caption]
    assert record["selector"]["name"] == "keyscore"
    assert record["selector"]["proposals"] == "all"
    assert clock(record["times"][0]) in capsys.readouterr().out
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.format == "PNG"
        assert min(sheet.size) > 800


def test_a_selector_that_scores_nothing(needle: tuple[Path, video.VideoScene], tmp_path: Path) -> None:
    output, sheet = tmp_path / "u.json", tmp_path / "sheet.png"
    assert (
        run(needle[0], "--select", "uniform", "--keep", 2, "--fps", 0.1, "--output", output, "--sheet", sheet)
        == 0
    )
    record = json.loads(output.read_text())
    assert {one["score"] for one in record["candidates"]} == {None}
    assert sheet.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--select", "keyscor"], "keyscore"),
        (["--select", "keyscore:alfa=1"], "alpha"),
        (["--select", "uniform"], "give k >= 1"),
        (["--select", "uniform", "--keep", "0"], "k=0"),
        (["--select", "keyscore"], "captions"),
        (["--candidates", "0"], "--candidates 0"),
        (["--fps", "-1"], "--fps -1"),
        (["--output", "a.png"], "two names"),
    ],
)
def test_wrong_arguments(
    needle: tuple[Path, video.VideoScene],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(needle[0], *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none.mp4", "--select", "uniform", "--keep", 1) == 2
    assert "none.mp4" in capsys.readouterr().err


def test_the_picture_shows_chosen_frames_and_others_between() -> None:
    assert shown(5, [1], 8) == [0, 1, 2, 3, 4]
    frames = shown(100, [3, 50, 51], 20)
    assert len(frames) == len(set(frames)) == 20
    assert {3, 50, 51} <= set(frames)
    assert frames == sorted(frames)
    assert max(b - a for a, b in itertools.pairwise(frames)) < 12
    assert shown(100, list(range(30)), 20) == list(range(30))


def test_clock() -> None:
    assert [clock(t) for t in (0, 7.46, 61, 3723.04)] == ["0:00.0", "0:07.5", "1:01.0", "1:02:03.0"]
    assert clock(59.98) == "1:00.0"
