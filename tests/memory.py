"""Memory and time of `vtprune video-qa` on a long file: `python tests/memory.py` makes a file of two hours, 1280 x 720 at 25 frames
per second (one minute of a moving pattern, repeated as packets), asks the reference model about it, and prints the peak of resident
memory of the command and all its children together, above that of the same command on a clip of two seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, RATE = 1280, 720, 25
SETTINGS = {
    "keyscore": ["--select", "keyscore", "--candidates", "64"],
    "uniform": ["--select", "uniform", "--candidates", "64"],
}


def write(path: Path, seconds: int) -> None:
    """A texture that moves; a keyframe every two seconds."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (HEIGHT // 40, WIDTH // 40, 3), dtype=np.uint8).repeat(40, 0).repeat(40, 1)
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "g": str(2 * RATE), "threads": "1"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(seconds * RATE):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, (index, 3 * index), (0, 1)), "rgb24")
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def repeat(source: Path, target: Path, times: int) -> int:
    """The packets of a file again and again; the number of frames."""
    with av.open(str(source)) as original:
        packets = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in original.demux(video=0) if p.size]
        template = original.streams.video[0]
        base = template.time_base
        length = round(len(packets) / RATE / base)
        with av.open(str(target), "w") as container:
            stream = container.add_stream_from_template(template)
            for number in range(times):
                for data, pts, dts, key in packets:
                    packet = av.Packet(data)
                    packet.stream, packet.time_base, packet.is_keyframe = stream, base, key
                    packet.pts, packet.dts = pts + number * length, dts + number * length
                    container.mux(packet)
    return times * len(packets)


def family(process: int) -> list[int]:
    """A process and all its descendants."""
    found = [process]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*"):
            try:
                found += [int(child) for child in (task / "children").read_text().split()]
            except OSError:
                continue
    return found


def resident(process: int) -> int:
    """Resident bytes; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def measure(video: Path, output: Path, arguments: list[str]) -> tuple[float, float, float]:
    """Seconds, peak MiB of the command with all its children, peak MiB of the children alone."""
    program = "import sys; from vtprune.eval.cli import main; sys.exit(main())"
    asked = [
        "video-qa",
        str(video),
        "--question",
        "how many things are there ?",
        "--output",
        str(output),
        *arguments,
    ]
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", program, *asked], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    peak = children = 0
    while process.poll() is None:
        each = [resident(one) for one in family(process.pid)]
        peak, children = max(peak, sum(each)), max(children, sum(each[1:]))
        time.sleep(0.02)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "0 of them with an error" in said, output.read_text()
    return time.monotonic() - begin, peak / 2**20, children / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        minute, short, long = (Path(name, f"{part}.mp4") for part in ("minute", "short", "long"))
        write(short, 2)
        write(minute, 60)
        frames = repeat(minute, long, options.minutes)
        print(
            f"{options.minutes} min, {frames} frames of {WIDTH} x {HEIGHT}, {long.stat().st_size / 2**20:.0f} MiB"
        )
        print(f"{'':22}{'seconds':>9}{'peak MiB':>10}{'children':>10}{'above the 2 s clip':>20}")
        for key, arguments in SETTINGS.items():
            peaks = []
            for video in (short, long):
                output = Path(name, f"{key}-{video.stem}.jsonl")
                seconds, peak, children = measure(video, output, arguments)
                peaks.append(peak)
                above = f"{peak - peaks[0]:.0f}" if video == long else ""
                print(
                    f"{key + ', ' + video.stem:22}{seconds:9.1f}{peak:10.0f}{children:10.0f}{above:>20}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
