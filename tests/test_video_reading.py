"""Reading video: the right frame at every time, and a clear error for everything that is not a readable video.

Every frame of the test clips carries its number as ten black or white blocks, which the judge reads back.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import damage
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.errors import InvalidOptionError
from vtprune.video import reading
from vtprune.video.backends import Backends, Request
from vtprune.video.reading import (
    BrokenVideoError,
    DamagedVideoWarning,
    NotAVideoError,
    TruncatedVideoWarning,
    VideoBackendError,
    VideoError,
    VideoFileError,
    VideoTimeoutError,
    VideoTimeRangeError,
    VideoTooLargeError,
    probe,
    read_frames,
)

av = pytest.importorskip("av", reason="PyAV is not installed")

WIDTH, HEIGHT, BLOCKS = 160, 64, 10
VARIABLE = [0, 10, 20, 500, 1500, 1510, 1900, 1940, 3000, 3200, 3210, 3500]  # milliseconds
BACKENDS = [
    pytest.param(n, marks=pytest.mark.skipif(find_spec(m) is None, reason=f"{m} is not installed"))
    for n, m in Backends.modules.items()
]


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """The number in the upper half (bit b in block b), blue below."""
    image = np.zeros((height, width, 3), np.uint8)
    for bit in range(BLOCKS):
        image[: height // 2, bit * width // BLOCKS : (bit + 1) * width // BLOCKS] = 255 * (number >> bit & 1)
    image[height // 2 :] = (0, 0, 255)
    return image


def number(image: np.ndarray) -> int:
    """The judge: the number that the picture shows."""
    row = image[image.shape[0] // 4].mean(-1)
    at = [int((bit + 0.5) * len(row) / BLOCKS) for bit in range(BLOCKS)]
    return sum(int(row[x] > 128) << bit for bit, x in enumerate(at))


def write(
    path: Path,
    milliseconds: list[int] | None = None,
    frames: int = 100,
    fps: int = 25,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    rotation: int = 0,
    sound: float = 0.0,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    hold: int = 0,
    muxing: dict[str, str] | None = None,
) -> Path:
    """A clip of numbered frames at even or given times, the last one held, with `sound` seconds of silence."""
    os.environ.setdefault("SVT_LOG", "1")  # errors only
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    ticks = [1000 * i // fps for i in range(frames)] if milliseconds is None else milliseconds
    with av.open(str(path), "w", options=muxing or {}) as container:
        fast = {"preset": "ultrafast", "bf": "2"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=fps, options={"g": "12", **fast, **(options or {})})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if sound:
            add_sound(container, sound)
        for index, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(index % 1024, *size), "rgb24")
            frame.pts = index if milliseconds is None else tick
            frame.time_base = Fraction(1, fps if milliseconds is None else 1000)
            container.mux(stream.encode(frame))
        for packet in stream.encode(None):
            if hold and packet.pts == ticks[-1]:
                packet.duration = hold
            container.mux(packet)
    return path


def add_sound(container: Any, seconds: float) -> None:
    stream = container.add_stream("aac", rate=8000, layout="mono")
    for start in range(0, int(8000 * seconds), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 8000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    """4 s at 25 fps with B-frames, a keyframe every 12 frames."""
    return write(folder / "even.mp4")


@pytest.fixture(scope="module")
def uneven(folder: Path) -> Path:
    return write(folder / "uneven.mp4", VARIABLE)


def shown_at(seconds: float, starts: list[float]) -> int:
    """The definition, literally: the last frame that has begun."""
    begun = [i for i, start in enumerate(starts) if start <= seconds + 0.0005]
    return begun[-1]


# --- the right frame -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_frame_in_order(clip: Path, backend: str) -> None:
    frames = list(read_frames(clip, backend=backend))
    assert [number(f.image) for f in frames] == list(range(100))
    assert [f.time for f in frames] == pytest.approx([i / 25 for i in range(100)], abs=1e-6)
    assert all(f.image.shape == (HEIGHT, WIDTH, 3) and f.image.dtype == np.uint8 for f in frames)
    assert np.abs(frames[3].image[50, 80].astype(int) - (0, 0, 255)).max() < 12  # red and blue not exchanged


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        ({"count": 8}, [(i + 0.5) * 0.5 for i in range(8)]),
        ({"count": 1}, [2.0]),
        ({"fps": 3}, [i / 3 for i in range(12)]),
        ({"every": 1.5}, [0.0, 1.5, 3.0]),
        ({"every": 100.0}, [0.0]),
        ({"fps": 50}, [i / 50 for i in range(200)]),
        ({"times": [0.0, 0.039, 0.04, 0.04, 3.5, 3.999, 4.0]}, [0.0, 0.039, 0.04, 0.04, 3.5, 3.999, 4.0]),
    ],
)
def test_sampling(clip: Path, backend: str, sampling: dict[str, Any], wanted: list[float]) -> None:
    frames = list(read_frames(clip, backend=backend, **sampling))
    starts = [i / 25 for i in range(100)]
    assert [number(f.image) for f in frames] == [shown_at(t, starts) for t in wanted]
    assert [f.time for f in frames] == pytest.approx([number(f.image) / 25 for f in frames], abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_variable_frame_rate(uneven: Path, backend: str) -> None:
    starts = [ms / 1000 for ms in VARIABLE]
    wanted = [0.0, 0.009, 0.01, 0.3, 0.5, 1.499, 1.505, 1.92, 2.9, 3.0, 3.205, 3.5]
    frames = list(read_frames(uneven, wanted, backend=backend))
    assert [number(f.image) for f in frames] == [shown_at(t, starts) for t in wanted]
    assert [f.time for f in frames] == pytest.approx([starts[number(f.image)] for f in frames], abs=1e-6)
    assert probe(uneven, backend=backend).variable_rate in (True, None)


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".ts", ".mov"])
def test_containers(folder: Path, suffix: str) -> None:
    """Matroska rounds to milliseconds, a transport stream starts at 1.4 s: time 0 is the first frame all the same."""
    path = write(folder / f"container{suffix}", codec="mpeg4" if suffix == ".avi" else "libx264")
    info = probe(path, backend="pyav")
    assert info.duration == pytest.approx(4.0, abs=0.05)
    assert info.variable_rate is False
    wanted = [0.0, 0.5, 1.0, 2.9, 3.95]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames = list(read_frames(path, wanted, backend="pyav"))
    assert [number(f.image) for f in frames] == [shown_at(t, [i / 25 for i in range(100)]) for t in wanted]
    assert [f.time for f in frames] == pytest.approx([number(f.image) / 25 for f in frames], abs=6e-4)


def test_a_stream_without_timestamps(folder: Path) -> None:
    path = write(folder / "elementary.h264", frames=50, options={"bf": "0"})
    frames = list(read_frames(path, backend="pyav"))
    assert [number(f.image) for f in frames] == list(range(50))
    assert [f.time for f in frames] == pytest.approx([i / 25 for i in range(50)], abs=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turn", [90, 180, -90])
def test_rotation_is_applied(folder: Path, backend: str, turn: int) -> None:
    path = write(folder / f"turned{turn}.mp4", frames=30, rotation=turn)
    upright = (WIDTH, HEIGHT) if turn == 180 else (HEIGHT, WIDTH)
    info = probe(path, backend=backend)
    assert (info.width, info.height) == upright
    assert info.rotation == turn % 360
    for frame in read_frames(path, [0.0, 1.0], backend=backend):
        assert frame.image.shape == (upright[1], upright[0], 3)
        assert number(np.rot90(frame.image, -turn // 90)) == round(frame.time * 25)


def test_av1(folder: Path) -> None:
    path = write(folder / "av1.mp4", frames=40, codec="libsvtav1", options={"preset": "12", "g": "16"})
    info = probe(path)
    assert (info.codec, info.backend) == ("av1", "pyav")
    assert [number(f.image) for f in read_frames(path, every=0.4)] == [0, 10, 20, 30]


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_are_scaled_down_but_never_up(clip: Path, backend: str) -> None:
    (small,) = read_frames(clip, [2.0], max_side=80, backend=backend)
    assert small.image.shape == (32, 80, 3)
    assert number(small.image) == 50
    (same,) = read_frames(clip, [2.0], max_side=1000, backend=backend)
    assert same.image.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_frame(folder: Path, backend: str) -> None:
    path = write(folder / f"one-{backend}.mp4", frames=1)
    for sampling in ({"count": 3}, {"fps": 100}, {"every": 5}, {}):
        frames = list(read_frames(path, backend=backend, **sampling))
        assert {number(f.image) for f in frames} == {0}
        assert {f.time for f in frames} == {0.0}
    assert len(list(read_frames(path, count=3, backend=backend))) == 3


def test_probe(clip: Path) -> None:
    info = probe(clip)
    assert (info.frames, info.fps, info.width, info.height) == (100, 25.0, WIDTH, HEIGHT)
    assert (info.duration, info.rotation, info.codec, info.variable_rate) == (4.0, 0, "h264", False)
    assert info.path == clip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_last_picture_held_for_long_is_no_truncation(folder: Path, backend: str) -> None:
    path = write(folder / "held.mp4", [0, 100, 200, 300], hold=5000, options={"bf": "0"})
    assert probe(path, backend="pyav").duration == pytest.approx(5.3, abs=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        times = [f.time for f in read_frames(path, [0.1, 0.3, 0.5], backend=backend)]
        assert times == pytest.approx([0.1, 0.3, 0.3], abs=1e-6)
        assert len(list(read_frames(path, count=10, backend=backend))) == 10


def test_sound_longer_than_the_picture_is_no_truncation(folder: Path) -> None:
    path = write(folder / "sound.mp4", sound=6.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(read_frames(path, count=10, backend="pyav"))) == 10


@pytest.fixture(scope="module")
def long_clip(folder: Path) -> Path:
    """40 s at 25 fps; keyframes every 5 s, so that short steps decode and long ones seek."""
    return write(folder / "long.mp4", frames=1000, options={"g": "125"})


@settings(max_examples=12, deadline=None, derandomize=True)
@given(wanted=st.lists(st.floats(0, 40), min_size=1, max_size=6).map(sorted))
def test_any_times_on_a_clip_that_needs_seeks(long_clip: Path, wanted: list[float]) -> None:
    frames = read_frames(long_clip, wanted, backend="pyav")
    starts = [i / 25 for i in range(1000)]
    assert [number(f.image) for f in frames] == [shown_at(t, starts) for t in wanted]


def test_seeks_are_made_where_they_pay_and_given_up_where_not(long_clip: Path, folder: Path) -> None:
    decoder = Backends.by_name["pyav"](Request(str(long_clip), "pyav"), lambda: None)
    landings: list[float] = []
    for seconds in (0.0, 1.0, 21.0, 39.0):
        shown = decoder.shown(seconds)
        assert shown is not None
        landings.append(shown.time)
    assert landings == [0.0, 1.0, 21.0, 39.0]
    single = write(folder / "single.mp4", frames=400, options={"g": "100000"})
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1

    decoder = Backends.by_name["pyav"](Request(str(single), "pyav"), beat)
    for seconds in range(0, 16, 3):
        shown = decoder.shown(float(seconds))
        assert shown is not None
        assert shown.time == seconds
    # The head's and the tail's packets, the frames once, and one useless seek; with every seek it were 1800.
    assert beats < 3 * 400


# --- what is not a readable video ------------------------------------------------------------------------------


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    with pytest.raises(VideoFileError, match="does not exist"):
        read_frames(tmp_path / "nothing.mp4")
    with pytest.raises(VideoFileError, match="is a folder"):
        probe(tmp_path)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    with pytest.raises(BrokenVideoError, match="is empty"):
        probe(empty)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoFileError, match="not a regular file"):
        probe(tmp_path / "pipe.mp4")
    with pytest.raises(VideoFileError, match=r"does not exist|cannot be read"):
        probe("null\0byte.mp4")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WebP", "TIFF"])
def test_pictures_called_mp4(tmp_path: Path, kind: str) -> None:
    from PIL import Image

    path = tmp_path / "picture.mp4"
    Image.fromarray(picture(3)).save(path, format=kind)
    with pytest.raises(NotAVideoError, match=f"still picture \\({kind}\\)"):
        probe(path)


def test_sound_only(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        add_sound(container, 2.0)
    with pytest.raises(NotAVideoError, match="no video stream, only audio"):
        probe(path)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("content", [b"not a video at all\n" * 99, bytes(4096), b"\0\0\0\x18ftypmp42"])
def test_no_video_inside(tmp_path: Path, backend: str, content: bytes) -> None:
    path = tmp_path / "noise.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"noise\.mp4"):
        list(read_frames(path, count=2, backend=backend))


def test_zero_length(tmp_path: Path) -> None:
    path = tmp_path / "zero.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.start_encoding()
    with pytest.raises(BrokenVideoError):
        probe(path)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_truncated(folder: Path, suffix: str, backend: str) -> None:
    """The header at the front promises 4 s; what is left of them is read, and the loss is reported."""
    if backend == "decord":
        pytest.skip("decord leaves truncated files to the next backend, as 'auto' shows")
    whole = folder / f"front{suffix}"
    if not whole.exists():
        write(whole, muxing={"movflags": "faststart"} if suffix == ".mp4" else {})
    cut = folder / f"cut{suffix}"
    data = whole.read_bytes()
    pictures = data.index(b"mdat") if suffix == ".mp4" else 0
    cut.write_bytes(data[: (pictures + len(data)) // 2])
    reader = read_frames(cut, every=0.2, backend=backend)
    with pytest.warns(TruncatedVideoWarning, match=r"end at .* of the declared [34]\.\d"):
        frames = list(reader)
    assert 3 < len(frames) < 17
    assert [number(f.image) for f in frames] == [5 * i for i in range(len(frames))]
    assert any("declared" in sentence for sentence in reader.damage)
    with pytest.warns(TruncatedVideoWarning):
        assert 15 < len(list(read_frames(cut, backend=backend))) < 90
    with pytest.warns(TruncatedVideoWarning):
        assert list(read_frames(cut, [3.8], backend=backend)) == []


def test_twenty_damaged_copies(tmp_path: Path) -> None:
    """`python tests/damage.py` reads 200; `run` raises if one takes over 20 s or gives nothing without a word."""
    found, seconds, silent = damage.run(20, tmp_path, "pyav")
    assert sum(found.values()) == len(seconds) == 20
    kinds = {kind for _, kind in found}
    assert any("Warning" in kind for kind in kinds)
    assert any("Error" in kind for kind in kinds)
    assert silent == []


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_no_false_alarm(suffix: str, tmp_path: Path) -> None:
    """Uneven times, and open groups of pictures, whose first frames lack references after every seek."""
    path = tmp_path / f"healthy{suffix}"
    with av.open(str(path), "w") as container:
        params = "open-gop=1:keyint=20:min-keyint=20:bframes=3:scenecut=0"
        stream = container.add_stream("libx264", rate=25, options={"x264-params": params, "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        texture = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
        for i in range(90):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, i, 1), "rgb24")
            frame.pts, frame.time_base = 40 * i + i * i * 13 % 29, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    samplings: tuple[dict[str, Any], ...] = ({}, {"count": 16}, {"times": [0.5, 2.1, 3.3]})
    for backend in ("auto", "pyav", "opencv"):
        if backend == "opencv" and not find_spec("cv2"):
            continue
        for sampling in samplings:
            with read_frames(path, backend=backend, **sampling) as reader, warnings.catch_warnings():
                warnings.simplefilter("ignore", DamagedVideoWarning)
                assert list(reader)
            assert reader.damage == (), (backend, sampling)


@pytest.mark.parametrize("length", [188, 192])
def test_damage_of_transport_streams(clip: Path, tmp_path: Path, length: int) -> None:
    suffix, options = (".ts", {}) if length == 188 else (".m2ts", {"mpegts_m2ts_mode": "1"})
    whole = tmp_path / f"whole{suffix}"
    with av.open(str(clip)) as original, av.open(str(whole), "w", format="mpegts", options=options) as target:
        stream = target.add_stream_from_template(original.streams.video[0])
        for packet in original.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    assert whole.stat().st_size % length == 0
    data = whole.read_bytes()
    middle = len(data) // 2 // length * length
    cases = {
        "intact": (data, None),
        "cut": (data[: middle - 60], "ends within a packet"),
        "gap": (data[:middle] + data[middle + 3 * length :], "gaps in"),
        "start": (bytes(20) + data[20:], "do not begin"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        reader = read_frames(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DamagedVideoWarning)
            assert list(reader)
        if message is None:
            assert reader.damage == ()
        else:
            assert any(message in sentence for sentence in reader.damage), (name, reader.damage)


def test_concealed_damage_is_reported(tmp_path: Path) -> None:
    """decord fills in what it cannot decode and raises nothing."""
    pytest.importorskip("decord")
    whole = next(path for path in damage.make_clips(tmp_path) if path.name == "h264.mp4")
    data, rng = bytearray(whole.read_bytes()), random.Random(1)
    damage.flip_in_body(data, rng)
    path = tmp_path / "flipped.mp4"
    path.write_bytes(data)
    reader = read_frames(path, count=16, backend="decord")
    with pytest.warns(DamagedVideoWarning, match="decoder complained .* error while decoding MB"):
        assert len(list(reader)) == 16


def test_holes_are_reported(clip: Path, tmp_path: Path) -> None:
    data = bytearray(clip.read_bytes())
    at = data.index(b"mdat") + len(data) // 3
    data[at : at + 600] = bytes(600)
    broken = tmp_path / "hole.mp4"
    broken.write_bytes(data)
    reader = read_frames(broken, backend="pyav")
    with pytest.warns(DamagedVideoWarning):
        frames = list(reader)
    assert len(frames) > 10
    assert reader.damage


def test_too_large(clip: Path) -> None:
    for backend in ("auto", "pyav", "opencv"):
        if backend == "auto" or find_spec(Backends.modules[backend]):
            with pytest.raises(VideoTooLargeError, match="160 x 64 pixels exceed the limit of 10000"):
                list(read_frames(clip, backend=backend, max_pixels=10_000))


def test_huge_dimensions_in_the_header(folder: Path, tmp_path: Path) -> None:
    data = bytearray(write(folder / "part2.mp4", codec="mpeg4", frames=5).read_bytes())
    at = data.index(b"mp4v", data.index(b"stsd")) + 4 + 24
    data[at : at + 4] = b"\xff\xff\xff\xff"
    path = tmp_path / "huge.mp4"
    path.write_bytes(data)
    try:
        frames = list(read_frames(path))
    except VideoError:
        return
    assert all(f.image.shape == (HEIGHT, WIDTH, 3) for f in frames)  # the decoder knew better than the header


def test_times_beyond_the_end(clip: Path) -> None:
    with pytest.raises(VideoTimeRangeError, match=r"time 5 s is beyond the end at 4 s"):
        list(read_frames(clip, [1.0, 5.0]))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"fps": 0}, "fps must be positive"),
        ({"every": float("nan")}, "every must be positive"),
        ({"count": 0}, "count must be an int"),
        ({"count": 2.5}, "count must be an int"),
        ({"max_side": 0}, "max_side must be"),
        ({"times": []}, "one or more seconds"),
        ({"times": [2.0, 1.0]}, "ascending"),
        ({"times": [-1.0]}, "ascending"),
        ({"fps": 1, "count": 2}, "fps and count are given"),
        ({"backend": "decrod"}, "Did you mean 'decord'"),
        ({"timeout": 0}, "timeout must be"),
    ],
)
def test_bad_options(clip: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidOptionError, match=told):
        read_frames(clip, **options)


def test_no_backend_installed(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backends, "modules", {"pyav": "no_such_module"})
    with pytest.raises(VideoBackendError, match=r"vtprune\[video\]"):
        read_frames(clip)


def test_a_missing_backend_names_the_extra(
    clip: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (site / name).exists():
            (tmp_path / name).symlink_to(site / name)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p] + [str(tmp_path)])
    with pytest.raises(VideoBackendError, match=r"cannot be imported.*vtprune\[video\]"):
        probe(clip, backend="pyav")


# --- the watched process ---------------------------------------------------------------------------------------


@pytest.fixture
def fake_decoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """Puts a module of the given source before the real decoder in the worker's path."""

    def put(module: str, source: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    return put


def gone(process: int) -> bool:
    """Whether the process has ended and was reaped."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_hanging_decoder_is_killed(clip: Path, fake_decoder: Callable[[str, str], None]) -> None:
    fake_decoder("av", "import time\ntime.sleep(600)\n")
    reader = read_frames(clip, backend="pyav", timeout=0.5)
    begin = time.monotonic()
    with pytest.raises(VideoTimeoutError, match=r"even\.mp4: the decoder gave no sign of life for 0\.5 s"):
        next(reader)
    assert time.monotonic() - begin < 2
    assert list(reader) == []


def test_backends_that_all_hang_share_the_time(clip: Path, fake_decoder: Callable[[str, str], None]) -> None:
    for module in Backends.modules.values():
        fake_decoder(module, "import time\ntime.sleep(600)\n")
    begin = time.monotonic()
    with pytest.raises(VideoTimeoutError, match=r"pyav: the decoder gave no sign of life"):
        probe(clip, timeout=0.9)
    assert time.monotonic() - begin < 3


def test_a_crashing_decoder_is_an_error_with_its_signal(
    clip: Path, fake_decoder: Callable[[str, str], None]
) -> None:
    fake_decoder("av", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    with pytest.raises(BrokenVideoError, match=r"crashed .signal SIGSEGV"):
        probe(clip, backend="pyav")


def test_auto_goes_on_with_the_next(clip: Path, fake_decoder: Callable[[str, str], None]) -> None:
    if find_spec("decord") is None:
        pytest.skip("decord is not installed")
    fake_decoder("decord", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    reader = read_frames(clip, count=4)
    assert [number(f.image) for f in reader] == [12, 37, 62, 87]
    assert reader.info.backend == "pyav"


def test_auto_goes_on_in_the_middle(clip: Path) -> None:
    if find_spec("decord") is None:
        pytest.skip("decord is not installed")
    reader = read_frames(clip)
    numbers = [number(next(reader).image) for _ in range(30)]
    assert reader.info.backend == "decord"
    assert reader.process_id is not None
    os.kill(reader.process_id, signal.SIGKILL)
    numbers += [number(f.image) for f in reader]
    assert numbers == list(range(100))
    assert reader.info.backend == "pyav"


def test_a_killed_worker_without_another_backend(clip: Path) -> None:
    reader = read_frames(clip, backend="pyav")
    next(reader)
    assert reader.process_id is not None
    os.kill(reader.process_id, signal.SIGKILL)
    with pytest.raises(BrokenVideoError, match="SIGKILL"):
        list(reader)


def test_the_worker_is_reaped(clip: Path) -> None:
    def finished() -> Iterator[int]:
        reader = read_frames(clip, count=3)
        yield from (reader.process_id or 0 for _ in reader)

    assert all(gone(p) for p in list(finished()))
    with read_frames(clip) as reader:
        next(reader)
        process = reader.process_id
    assert process is not None
    assert gone(process)
    with pytest.raises(StopIteration):
        next(reader)
    dropped = read_frames(clip)
    next(dropped)
    process = dropped.process_id
    del dropped
    gc.collect()
    assert process is not None
    assert gone(process)


@pytest.mark.parametrize("end", ["", "import os; os._exit(0)"])
def test_no_worker_outlives_the_interpreter(clip: Path, end: str) -> None:
    program = (
        "import sys\nfrom vtprune.video.reading import read_frames\n"
        f"reader = read_frames({str(clip)!r})\nnext(reader)\nprint(reader.process_id, flush=True)\n{end}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    limit = time.monotonic() + 5
    while not gone(int(done.stdout)) and time.monotonic() < limit:
        time.sleep(0.05)
        # A worker whose parent was cut off is reaped by init, or stays a zombie where there is no init.
        status = Path(f"/proc/{int(done.stdout)}/status")
        if status.exists() and "State:\tZ" in status.read_text():
            return
    assert gone(int(done.stdout))
    assert done.stderr == ""


def test_several_readers_at_a_time(clip: Path, uneven: Path) -> None:
    readers = [read_frames(clip), read_frames(uneven, backend="pyav"), read_frames(clip, backend="pyav")]
    taken = [[number(next(r).image) for r in readers] for _ in range(12)]
    assert taken == [[i, i, i] for i in range(12)]
    for reader in readers:
        reader.close()


def test_a_slow_consumer_is_no_hang_and_memory_stays_bounded(clip: Path) -> None:
    reader = read_frames(clip, backend="pyav", timeout=2.0)
    next(reader)
    time.sleep(0.3)
    worker = reader._worker
    assert worker is not None
    assert worker._messages.qsize() <= reading.IN_FLIGHT
    assert len(list(reader)) == 99


def test_the_worker_starts_without_torch_and_fast(
    clip: Path, fake_decoder: Callable[[str, str], None]
) -> None:
    source = (
        "import sys\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "raise ImportError('heavy: ' + str(sorted(heavy)))\n"
    )
    fake_decoder("av", source)
    begin = time.monotonic()
    with pytest.raises(VideoBackendError, match=r"heavy: \[\]"):
        probe(clip, backend="pyav")
    assert time.monotonic() - begin < 5  # usually 0.1 s; the bound only catches an import of torch
