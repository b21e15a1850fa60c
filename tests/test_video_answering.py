"""Questions about many videos: resuming, errors, order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("av", reason="clips are written by PyAV (pip install vtprune[video])")

from vtprune.errors import InvalidOptionError
from vtprune.eval.world import video
from vtprune.video.answering import Answer, Answerer, Places, Protocol, answer_videos, answered, find_videos
from vtprune.video.reading import Frame
from vtprune.video.selection import create_selector


class Brightness(Answerer):
    """Answers with the mean brightness of the frames."""

    def __init__(self, **about: Any) -> None:
        self.about = {"model": "brightness", **about}

    def answer(self, frames: Sequence[Frame], question: str, places: Places) -> Answer:
        if "fail" in question:
            raise ValueError("no such model")
        text = " ".join(f"{frame.image.mean():.1f}" for frame in frames)
        return Answer(text, 10 * len(frames), len(frames))


PROTOCOL = Protocol("how bright?", create_selector("uniform"), keep=3, candidates=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for i in range(3):
        (root / f"part{i % 2}").mkdir(exist_ok=True)
        video.clip("val", 10 + i, "motion").write(root / f"part{i % 2}" / f"clip{i}.mp4")
    (root / "part0" / "broken.mp4").write_bytes(b"no video at all" * 99)
    (root / "notes.txt").write_text("not a video")
    return root


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run."""
    output = tmp_path_factory.mktemp("whole") / "whole.jsonl"
    list(answer_videos([folder], PROTOCOL, Brightness(), output))
    return output


def rows(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for row in found:
        row.pop("seconds")
    return found


def test_every_video_has_one_line_and_errors_are_recorded(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a" / "out.jsonl"
    results = list(answer_videos([folder], PROTOCOL, Brightness(), output))
    names = [Path(r.video).name for r in results]
    assert names == ["broken.mp4", "clip0.mp4", "clip2.mp4", "clip1.mp4"]
    broken, *good = rows(output)
    assert broken["error"].startswith("BrokenVideoError")
    assert broken["answer"] is None
    assert all(row["error"] is None and len(row["times"]) == 3 for row in good)
    assert {row["tokens_in"] for row in good} == {30}
    assert {row["tokens_out"] for row in good} == {3}
    assert len({row["answer"] for row in good}) == 3
    assert set(results[1].seconds) == {"read", "select", "read_chosen", "answer"}
    # Nothing is left to do.
    assert list(answer_videos([folder], PROTOCOL, Brightness(), output)) == []


def test_errors_of_the_model_are_recorded(folder: Path, tmp_path: Path) -> None:
    protocol = Protocol("fail", create_selector("uniform"), keep=1, candidates=2)
    (result,) = answer_videos([folder / "part0" / "clip0.mp4"], protocol, Brightness(), tmp_path / "o.jsonl")
    assert result.error == "ValueError: no such model"


@pytest.mark.parametrize("cut", [40, 700, 10**6])
def test_a_file_that_was_cut_anywhere_is_completed(
    folder: Path, whole: Path, tmp_path: Path, cut: int
) -> None:
    output = tmp_path / "cut.jsonl"
    content = whole.read_bytes()
    output.write_bytes(content[: min(cut, len(content) - 1)])
    list(answer_videos([folder], PROTOCOL, Brightness(), output))
    assert rows(output) == rows(whole)


def test_a_killed_process_goes_on(folder: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed.jsonl"
    program = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_video_answering import PROTOCOL, Brightness, answer_videos
        for _ in answer_videos([{str(folder)!r}], PROTOCOL, Brightness(), {str(output)!r}):
            time.sleep(0.05)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    end = time.monotonic() + 60
    while time.monotonic() < end and (not output.exists() or output.read_bytes().count(b"\n") < 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = output.read_bytes().count(b"\n")
    assert before >= 2
    list(answer_videos([folder], PROTOCOL, Brightness(), output))
    assert rows(output) == rows(whole)


def test_another_run_is_not_mixed_in(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    one = folder / "part0" / "clip0.mp4"
    list(answer_videos([one], PROTOCOL, Brightness(), output))
    for protocol, answerer in (
        (Protocol("else?", create_selector("uniform"), keep=3, candidates=8), Brightness()),
        (Protocol("how bright?", create_selector("random"), keep=3, candidates=8), Brightness()),
        (PROTOCOL, Brightness(keep=9)),
    ):
        with pytest.raises(InvalidOptionError, match="another run"):
            list(answer_videos([one], protocol, answerer, output))
    output.write_text("{}\n")
    with pytest.raises(InvalidOptionError, match="line 1 is no answer"):
        answered(output, "")


def test_videos_are_found(folder: Path, tmp_path: Path) -> None:
    one = folder / "part1" / "clip1.mp4"
    assert find_videos([one, folder / "part1"]) == [one]
    assert find_videos([folder / "notes.txt"]) == [
        folder / "notes.txt"
    ]  # asked for by name: its error is recorded
    with pytest.raises(InvalidOptionError, match="does not exist"):
        find_videos([folder / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidOptionError, match="no video under"):
        find_videos([tmp_path / "empty"])


@pytest.mark.parametrize("wrong", [{"question": " "}, {"candidates": 0}])
def test_wrong_protocols(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError):
        Protocol(**{"question": "?", "selector": create_selector("uniform"), **wrong})


def test_output_is_on_disk_before_the_next_video(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd))[1])
    output = tmp_path / "out.jsonl"
    for number, _ in enumerate(answer_videos([folder], PROTOCOL, Brightness(), output), start=1):
        assert len(synced) == number == output.read_bytes().count(b"\n")
