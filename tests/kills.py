"""Kill and restart `vtprune video-qa`: `python tests/kills.py` asks a question about 20 clips, once undisturbed and then with five
kills (SIGKILL to the whole process group) at random points, in one process and then with two Ray workers.

A run passes if its lines are those of the undisturbed run in everything but `seconds`, and no process is left. The exit status
says whether all did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vtprune.eval.world import video

MARK = "VTPRUNE_KILLS"  # in the environment of everything that a run starts
PAUSE = 0.2  # seconds, the longest between a point and its kill


def command(clips: Path, output: Path, workers: int | None) -> list[str]:
    program = "import sys; from vtprune.eval.cli import main; sys.exit(main())"
    arguments = ["video-qa", str(clips), "--question", "how many things are there ?", "--select", "keyscore"]
    arguments += ["--frames", "4", "--candidates", "16", "--method", "vtprune", "--keep", "4"]
    arguments += ["--threads", "1", "--output", str(output)]
    return [sys.executable, "-c", program, *arguments, *(["--workers", str(workers)] if workers else [])]


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines without `seconds`."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def left(mark: str) -> list[int]:
    """Processes that carry the mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def start(clips: Path, output: Path, workers: int | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(clips, output, workers),
        env={**os.environ, MARK: str(output)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()[-2000:]


def kill(process: subprocess.Popen[bytes], output: Path, at: int, pause: float) -> tuple[int, bool]:
    """Kills the run `pause` seconds after its line `at`; whole lines then, and whether one was cut off."""
    while lines(output) < at and process.poll() is None:
        time.sleep(0.005)
    time.sleep(pause)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    content = output.read_bytes() if output.exists() else b""
    return content.count(b"\n"), not (content.endswith(b"\n") or not content)


def disturbed(clips: Path, output: Path, workers: int | None, kills: int, count: int, seed: int) -> bool:
    """Whether no process was left; prints a line for each kill."""
    rng = random.Random(seed)
    points = sorted((rng.randrange(count), rng.uniform(0, PAUSE)) for _ in range(kills))
    clean = True
    for number, (at, pause) in enumerate(points, start=1):
        begin = lines(output)
        had, cut = kill(start(clips, output, workers), output, at, pause)
        end = time.monotonic() + 30
        while (alive := left(str(output))) and time.monotonic() < end:
            time.sleep(0.1)
        clean = clean and not alive
        print(
            f"{workers or 'in process':>10}{number:>6}{f'line {at} + {pause:.2f} s':>18}{begin:>9}{had:>9}"
            f"{'yes' if cut else 'no':>10}{len(alive):>16}",
            flush=True,
        )
    finish(start(clips, output, workers))
    return clean


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        clips, good = Path(name, "clips"), True
        clips.mkdir()
        for number, example in enumerate(video.examples("val", options.clips - 1)):
            shutil.copy(example.path(), clips / f"{number:02d}.mp4")
        (clips / "broken.mp4").write_bytes(b"no video at all" * 99)
        whole = Path(name, "whole.jsonl")
        finish(start(clips, whole, None))
        print(
            f"{'workers':>10}{'kill':>6}{'at':>18}{'before':>9}{'written':>9}{'cut line':>10}{'processes left':>16}"
        )
        for workers in (None, 2):
            output = Path(name, f"{workers}.jsonl")
            clean = disturbed(clips, output, workers, options.kills, options.clips, options.seed)
            same = rows(output) == rows(whole)
            good = good and clean and same
            print(
                f"{workers or 'in process':>10}: {lines(output)} lines, "
                f"{'identical to' if same else 'DIFFERENT from'} the undisturbed run but for the seconds"
            )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
