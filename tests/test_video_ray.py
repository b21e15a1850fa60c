"""`video-qa` on Ray Data: what comes out is what one process writes, whatever happens to the workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="clips are written by PyAV (pip install vtprune[video])")

from vtprune.errors import InvalidOptionError
from vtprune.video.answering import Answer, Answerer, AnswererSource, Places, Protocol, answer_videos
from vtprune.video.distributed import MissingRayError, WorkerError
from vtprune.video.reading import Frame
from vtprune.video.selection import create_selector

TESTS = Path(__file__).resolve().parent
PROTOCOL = Protocol("how bright?", create_selector("random"), keep=3, candidates=8)
DEADLY, DEADLY_ONCE = 48, 32  # heights of clips


@dataclass(frozen=True)
class Source(AnswererSource):
    """A model that is killed by clips of one height, and once by those of another.

    Attributes:
        marks: folder in which deaths leave a mark.
        failure: "load" or "answer": raises there.
    """

    marks: str | None = None
    failure: str = ""
    gpus: int = 0

    @property
    def about(self) -> dict[str, Any]:
        return {"model": "brightness"}

    def open(self, threads: int | None) -> Answerer:
        if self.failure == "load":
            raise KeyError("no weights")
        return Brightness(self)


class Brightness(Answerer):
    """Answers with the mean brightness of every frame."""

    def __init__(self, source: Source) -> None:
        self.about, self.source = source.about, source

    def answer(self, frames: Sequence[Frame], question: str, places: Places) -> Answer:
        if self.source.failure == "answer":
            raise KeyError("no such layer")
        height = frames[0].image.shape[0]
        if self.source.marks is not None and height in (DEADLY, DEADLY_ONCE):
            mark = Path(self.source.marks) / f"{height}-{os.getpid()}"
            if height == DEADLY or not list(mark.parent.glob(f"{height}-*")):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return Answer(" ".join(f"{frame.image.mean():.2f}" for frame in frames), 9, len(frames))


def write(path: Path, height: int, seed: int) -> None:
    """One second of changing grey."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, height, "yuv420p"
        for index in range(10):
            picture = np.full((height, 64, 3), (seed * 37 + index * 11) % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for seed in range(9):
        write(root / f"{seed}.mp4", {2: DEADLY, 5: DEADLY_ONCE}.get(seed, 64), seed)
    (root / "7broken.mp4").write_bytes(b"no video at all" * 99)
    return root


def rows(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for row in found:
        row.pop("seconds")
    return found


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process writes."""
    output = tmp_path_factory.mktemp("whole") / "whole.jsonl"
    assert len(list(answer_videos([folder], PROTOCOL, Source(), output))) == 10
    return rows(output)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray that was there before, whose workers find this module."""
    ray = pytest.importorskip("ray", reason="pip install vtprune[ray]")
    pytest.importorskip("ray.data", reason="pip install vtprune[ray]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        )
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        context = ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=1 << 28,
        )
        yield context
        ray.shutdown()


def test_two_workers_write_what_one_process_writes(
    cluster: Any,
    folder: Path,
    whole: list[dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import ray

    marks, output = tmp_path / "marks", tmp_path / "out.jsonl"
    marks.mkdir()
    source = Source(marks=str(marks))
    arriving = answer_videos(
        [folder], PROTOCOL, source, output, workers=2, address=cluster.address_info["gcs_address"]
    )
    for number, result in enumerate(arriving, start=1):
        assert output.read_bytes().count(b"\n") == number
        assert result.video == whole[number - 1]["video"]
    found = rows(output)
    dead = found[2].pop("error")
    assert dead.startswith("WorkerError: the worker process died at this video, and again")
    assert found[2] == {
        **{k: v for k, v in whole[2].items() if k != "error"},
        **dict.fromkeys(("answer", "tokens_in", "tokens_out")),
        "times": [],
    }
    assert found[:2] + found[3:] == whole[:2] + whole[3:]
    assert found[8]["error"].startswith("BrokenVideoError")
    assert len(list(marks.glob(f"{DEADLY}-*"))) == 2
    assert len(list(marks.glob(f"{DEADLY_ONCE}-*"))) == 1
    assert ray.is_initialized()
    assert list(answer_videos([folder], PROTOCOL, source, output, workers=2)) == []
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    assert "Execution plan" not in said.out + said.err


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("load", "a worker cannot load the model: KeyError: 'no weights'"),
        ("answer", "KeyError: 'no such layer' .at .*0.mp4.$"),
    ],
)
def test_what_is_no_fault_of_a_video_ends_the_run(
    cluster: Any, folder: Path, tmp_path: Path, failure: str, message: str
) -> None:
    output = tmp_path / "out.jsonl"
    source = Source(failure=failure)
    with pytest.raises(WorkerError, match=message):
        list(answer_videos([folder], PROTOCOL, source, output, workers=1))
    assert not output.exists()


def test_a_gpu_that_is_not_there_and_another_cluster(cluster: Any, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(InvalidOptionError, match="needs 1 GPU, and Ray has 0"):
        list(answer_videos([folder], PROTOCOL, Source(gpus=1), output, workers=1))
    with pytest.raises(InvalidOptionError, match="is connected to the Ray at"):
        list(answer_videos([folder], PROTOCOL, Source(), output, workers=1, address="10.9.8.7:6379"))


def test_a_killed_run_goes_on_and_leaves_no_process(
    folder: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="pip install vtprune[ray]")
    output = tmp_path / "killed.jsonl"
    program = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        from test_video_ray import PROTOCOL, Source, answer_videos
        for _ in answer_videos([{str(folder)!r}], PROTOCOL, Source(), {str(output)!r}, workers=2):
            print("line", flush=True)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "VIDEO_RAY_TEST": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"line\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = output.read_bytes().count(b"\n")
    assert 1 <= before < 10
    list(answer_videos([folder], PROTOCOL, Source(), output))
    assert rows(output) == whole
    end = time.monotonic() + 30
    while (left := ours(tmp_path)) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []


def ours(folder: Path) -> list[str]:
    """Processes that were started with the folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"VIDEO_RAY_TEST={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
        except OSError:
            pass
    return found


def test_without_ray(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingRayError, match=r"pip install 'vtprune\[ray\]'"):
        list(answer_videos([folder], PROTOCOL, Source(), tmp_path / "o.jsonl", workers=1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"workers": 0}, "workers=0"),
        ({"workers": True}, "workers=True"),
        ({"address": "auto"}, "give workers=N"),
        ({"workers": 2, "answerer": Brightness(Source())}, "give an AnswererSource"),
    ],
)
def test_wrong_arguments(folder: Path, tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    given = {"answerer": Source(), **wrong}
    with pytest.raises(InvalidOptionError, match=message):
        list(answer_videos([folder], PROTOCOL, output=tmp_path / "o.jsonl", **given))


def test_a_source_is_opened_and_closed_in_this_process(folder: Path, tmp_path: Path) -> None:
    closed = []

    class Closing(Brightness):
        def close(self) -> None:
            closed.append(self)

    class Opening(Source):
        def open(self, threads: int | None) -> Answerer:
            return Closing(self)

    next(results := answer_videos([folder], PROTOCOL, Opening(), tmp_path / "o.jsonl"))
    assert closed == []
    results.close()
    assert len(closed) == 1
