"""Damaged and very long videos: `python tests/damage.py` breaks 200 copies of real clips and reads each of them;
`python tests/damage.py --hours 2` makes one long file and measures reading it.

A copy passes if the parent lives, the read ends within 20 s, and its damage is reported, by a `VideoError` or by frames with a
warning. Copies without a report are compared with the intact clip: "unharmed" gave the same frames at the same times,
bit for bit; "changed" and "fewer" did not, and are listed by name. The exit status says whether nothing crashed or hung.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import resource
import struct
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from vtprune.video.reading import DamagedVideoWarning, VideoError, read_frames

LIMIT = 20.0  # seconds for one read
FRAMES = 75

CLIPS = (
    ("h264.mp4", "libx264"),
    ("h264.mkv", "libx264"),
    ("part2.mp4", "mpeg4"),
    ("av1.mp4", "libsvtav1"),
    ("h264.ts", "libx264"),
)


def make_clips(folder: Path, frames: int = FRAMES) -> list[Path]:
    """Three seconds of moving texture in every codec that this PyAV can write."""
    import av

    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8).repeat(24, 0).repeat(24, 1)
    os.environ.setdefault("SVT_LOG", "1")  # errors only
    paths = []
    for name, codec in CLIPS:
        if codec not in av.codecs_available:
            continue
        with av.open(str(folder / name), "w", options={"fflags": "+bitexact"}) as container:
            # One thread, no lookahead and no tags: the same bytes in every run.
            options = {
                "g": "20",
                "threads": "1",
                "bf": "2",
                "crf": "25",
                "x264-params": "mbtree=0:rc-lookahead=0",
                "preset": "10" if "av1" in codec else "fast",
            }
            stream = container.add_stream(codec, rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
            for index in range(frames):
                shifted = np.roll(texture, (3 * index, 5 * index), (0, 1))[:128, :192]
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(shifted), "rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        paths.append(folder / name)
    return paths


def flip_in_header(data: bytearray, rng: random.Random) -> None:
    at = data.find(b"moov")
    start, end = (at, len(data)) if at > 0 else (0, 1000)
    for _ in range(rng.randint(1, 30)):
        data[rng.randrange(start, min(end, len(data)))] ^= 1 << rng.randrange(8)


def flip_in_body(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 200)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(1, len(data)) :]


def overwrite_header(data: bytearray, rng: random.Random) -> None:
    length = rng.randint(1, 64)
    data[:length] = rng.randbytes(length)


def wrong_box_size(data: bytearray, rng: random.Random) -> None:
    names = [
        b"moov",
        b"trak",
        b"mdia",
        b"stbl",
        b"stsd",
        b"stts",
        b"ctts",
        b"stsz",
        b"stco",
        b"stsc",
        b"mdat",
        b"ftyp",
    ]
    found = [data.find(n) for n in names if data.find(n) >= 4]
    at = rng.choice(found) - 4 if found else rng.randrange(0, 64)
    data[at : at + 4] = struct.pack(
        ">I", rng.choice([0, 1, 7, 8, 0x7FFFFFFF, 0xFFFFFFFF, rng.randrange(1 << 20)])
    )


def insert_zeros(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = bytes(rng.randint(1, 5000))


def drop_a_part(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randint(1, 3000)]


def huge_tables(data: bytearray, rng: random.Random) -> None:
    """The counts in the sample tables: billions of entries."""
    found = [data.find(n) for n in (b"stts", b"ctts", b"stsz", b"stco", b"stsc", b"stss") if data.find(n) > 0]
    at = (rng.choice(found) + 8) if found else rng.randrange(64)
    data[at : at + 8] = rng.randbytes(8)


DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip_in_header,
    flip_in_body,
    cut,
    overwrite_header,
    wrong_box_size,
    insert_zeros,
    drop_a_part,
    huge_tables,
)


Shown = list[tuple[float, str]]  # times in ms, and digests of pictures


def outcome(
    path: Path, backend: str, sampling: dict[str, float], intact: Sequence[Shown]
) -> tuple[str, float]:
    """What reading the file came to, and the seconds it took; `intact`: what each backend shows of the intact clip."""
    begin = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DamagedVideoWarning)
        try:
            shown = read(path, backend, sampling)
        except VideoError as error:
            return type(error).__name__, time.monotonic() - begin
    took = time.monotonic() - begin
    if caught:
        return caught[0].category.__name__, took
    if len(shown) < len(intact[0]):
        return f"{'no' if not shown else 'fewer'} frames", took
    # One backend may have gone on where another failed.
    same = len(shown) == len(intact[0]) and all(
        frame in whole for frame, *whole in zip(shown, *intact, strict=True)
    )
    return "unharmed" if same else "changed", took


def read(path: Path, backend: str, sampling: dict[str, float]) -> Shown:
    frames = read_frames(path, backend=backend, timeout=LIMIT - 5, **sampling)  # type: ignore[arg-type]
    return [(round(1000 * frame.time), hashlib.sha256(frame.image.data).hexdigest()) for frame in frames]


def undamaged(clip: Path, sampling: dict[str, float]) -> list[Shown]:
    """What each backend that reads the clip shows of it."""
    found = []
    for backend in ("pyav", "decord", "opencv"):
        with contextlib.suppress(VideoError):
            found.append(read(clip, backend, sampling))
    return [shown for shown in found if len(shown) == len(found[0])]


def run(
    copies: int, folder: Path, backend: str = "auto", seed: int = 0, verbose: bool = False
) -> tuple[Counter[tuple[str, str]], list[float], list[str]]:
    """Outcomes by (damage, kind), the seconds of each read, and the copies that lost or changed frames without a word.

    Raises:
        AssertionError: a read took longer than the limit, or nothing came of it without a word.
    """
    clips = make_clips(folder)
    samplings: tuple[dict[str, float], ...] = ({"count": 16}, {})
    intact = {(clip, full): undamaged(clip, samplings[full]) for clip in clips for full in (0, 1)}
    found: Counter[tuple[str, str]] = Counter()
    seconds, silent = [], []
    for copy in range(copies):
        rng = random.Random(seed * 1_000_003 + copy)
        clip, damage = clips[copy // len(DAMAGES) % len(clips)], DAMAGES[copy % len(DAMAGES)]
        data = bytearray(clip.read_bytes())
        damage(data, rng)
        path = folder / f"{copy}-{damage.__name__}{clip.suffix}"
        path.write_bytes(data)
        # Seeks in a damaged file are another way to fail than reading on.
        full = copy // 2 % 2
        kind, took = outcome(path, backend, samplings[full], intact[clip, full])
        assert took <= LIMIT, f"{path.name}: {took:.1f} s"
        assert kind != "no frames", f"{path.name}: neither frames nor an error"
        found[damage.__name__, kind] += 1
        name = f"{copy}-{damage.__name__} of {clip.name}, {'all frames' if full else '16 frames'}: {kind}"
        if kind in ("fewer frames", "changed"):
            silent.append(name)
        if verbose:
            print(name)
        seconds.append(took)
        path.unlink()
    return found, seconds, silent


def make_long(path: Path, hours: float, fps: int = 5) -> None:
    """A picture that changes, small and cheap: 160 × 90, a keyframe every 10 s."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"g": str(10 * fps), "preset": "ultrafast", "crf": "40"}
        )
        stream.width, stream.height, stream.pix_fmt = 160, 90, "yuv420p"
        image = np.zeros((90, 160, 3), np.uint8)
        for index in range(int(hours * 3600 * fps)):
            image[:, index // 50 % 160] = index % 251
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def measure_long(hours: float, folder: Path, backend: str) -> None:
    path = folder / "long.mp4"
    make_long(path, hours)
    print(f"{hours:g} h, {path.stat().st_size / 2**20:.1f} MiB, backend {backend}")
    for name, sampling in (("count=64", {"count": 64}), ("fps=1", {"fps": 1.0})):
        begin, frames, worker = time.monotonic(), 0, 0.0
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with read_frames(path, backend=backend, **sampling) as reader:  # type: ignore[arg-type]
            for index, _ in enumerate(reader):
                frames += 1
                if index % 50 == 0 or frames == 64:
                    worker = max(worker, peak(reader.process_id))
            used = reader.info.backend
        parent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"  {name}: {frames} frames by {used} in {time.monotonic() - begin:.1f} s; peak of the worker {worker:.0f} MiB, "
            f"of the parent {parent / 1024:.0f} MiB ({(parent - before) / 1024:.0f} MiB more than before)"
        )


def peak(process: int | None) -> float:
    """Peak resident MiB of a running process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def main() -> None:
    """Print the table, or the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--verbose", action="store_true", help="a line for each copy")
    parser.add_argument("--hours", type=float, help="measure a file of so many hours instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.hours:
            measure_long(options.hours, Path(name), options.backend)
            return
        found, seconds, silent = run(
            options.copies, Path(name), options.backend, options.seed, options.verbose
        )
    kinds = sorted({kind for _, kind in found})
    print(f"{'damage':18}" + "".join(f"{kind:>22}" for kind in kinds))
    for damage in [d.__name__ for d in DAMAGES]:
        print(f"{damage:18}" + "".join(f"{found[damage, kind]:22d}" for kind in kinds))
    print(
        f"{'all':18}" + "".join(f"{sum(n for (_, k), n in found.items() if k == kind):22d}" for kind in kinds)
    )
    print(f"without a report: {len(silent)}", *silent, sep="\n  ")
    print(
        f"{options.copies} copies, longest read {max(seconds):.2f} s, mean {sum(seconds) / len(seconds):.2f} s"
    )


if __name__ == "__main__":
    main()
