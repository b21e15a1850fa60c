"""Read the frames of a video file: streaming, at exact times, and never a hang or a crash.

A watched process decodes (:mod:`vtprune.video.worker`); whatever happens to it becomes a :class:`VideoError`.
Several readers may be open at a time; each has its own process, which ends with the reader, also when the consumer stops
early or the interpreter exits.

Times are seconds since the first frame's presentation timestamp, as the container has them (not index / fps). Pictures
are turned upright as the container's rotation says; non-square pixels are not stretched.

Damage in a file that can still be read: the frames that can be decoded are given at their true times, `damage` of the
reader says what was wrong, and at the end of reading one :class:`DamagedVideoWarning` is issued with the same text, or
its subclass :class:`TruncatedVideoWarning` if the file ends before its declared duration (samples beyond that end
are then not given).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vtprune.errors import InvalidOptionError, did_you_mean
from vtprune.video import errors
from vtprune.video.backends import Backends, Request, still_picture
from vtprune.video.errors import (
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
)
from vtprune.video.worker import BOOTSTRAP, FRAME, HEADER

__all__ = [
    "MAX_PIXELS",
    "BrokenVideoError",
    "DamagedVideoWarning",
    "Frame",
    "FrameReader",
    "NotAVideoError",
    "TruncatedVideoWarning",
    "VideoBackendError",
    "VideoError",
    "VideoFileError",
    "VideoInfo",
    "VideoTimeRangeError",
    "VideoTimeoutError",
    "VideoTooLargeError",
    "probe",
    "read_frames",
]

MAX_PIXELS = 1 << 26  # 8192 x 8192: 192 MiB as RGB
IN_FLIGHT = 2  # frames decoded ahead of the consumer

_FINAL = (NotAVideoError, VideoTooLargeError, VideoTimeRangeError)  # no other backend would say otherwise


@dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
        time: its presentation timestamp in seconds (of the frame shown, not the time that was asked for).
        image: [H, W, 3] uint8 RGB, upright.
    """

    time: float
    image: NDArray[np.uint8]


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about its video stream.

    Attributes:
        duration: seconds.
        frames: number of frames as declared by the container, or duration × fps where it declares none.
        fps: average frames per second.
        width, height: pixels of the upright picture.
        rotation: degrees counter-clockwise by which the stored picture is turned (0, 90, 180, 270); None if the
            backend does not tell (it may have turned the picture all the same).
        codec: the codec's or its decoder's name; None if the backend does not tell.
        variable_rate: whether timestamps are unevenly spaced, judged by the first 300 packets and the average; None
            if the backend does not tell.
        backend: which one reads the file.
    """

    path: Path
    duration: float
    frames: int
    fps: float
    width: int
    height: int
    rotation: int | None
    codec: str | None
    variable_rate: bool | None
    backend: str


class FrameReader(Iterator[Frame]):
    """Frames of one video, one at a time; also a context manager. Made by :func:`read_frames`.

    Memory is bounded by a few frames, however long the video is. `close` ends the decoding process; so do the end of the
    iteration, an error, and the reader's garbage collection.

    Attributes:
        damage: what was found broken; complete when the iteration has ended.
    """

    def __init__(self, path: Path, request: Request, timeout: float):
        self.damage: tuple[str, ...] = ()
        self._path = path
        self._request = request
        self._timeout = timeout
        self._auto = request.backend == "auto"
        self._backends = _installed() if self._auto else [request.backend]
        self._share = timeout / len(self._backends)
        self._failures: dict[str, VideoError] = {}
        self._info: VideoInfo | None = None
        self._given = 0
        self._worker: _Worker | None = None
        self._closed = False

    @property
    def info(self) -> VideoInfo:
        """What the file says of itself, and which backend reads it.

        Raises:
            VideoError: no backend can read the file.
        """
        while self._info is None:
            self._step()
        return self._info

    def __iter__(self) -> FrameReader:
        return self

    def __next__(self) -> Frame:
        while not self._closed:
            frame = self._step()
            if frame is not None:
                return frame
        raise StopIteration

    def close(self) -> None:
        """End the decoding process; nothing more is given."""
        self._closed = True
        if self._worker is not None:
            self._worker.close()

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def given_up(self) -> tuple[str, ...]:
        """What decoders were given up for being slow, and why: on a faster machine they might have read the file."""
        slow = {k: v for k, v in self._failures.items() if isinstance(v, VideoTimeoutError)}
        return tuple(f"{backend}: {error}" for backend, error in slow.items())

    @property
    def process_id(self) -> int | None:
        """The decoding process's id, for measuring it; None before the first step."""
        return None if self._worker is None else self._worker.process.pid

    def _step(self) -> Frame | None:
        if self._closed:
            raise VideoFileError(f"{self._path}: the reader is closed; open another by read_frames")
        if self._worker is None:
            backend = self._backends[len(self._failures)]
            skip = self._request.skip + self._given
            self._worker = _Worker(replace(self._request, backend=backend, skip=skip))
        try:
            return self._take(self._worker)
        except VideoError as error:
            self._worker.close()
            self._worker = None
            self._failures[self._backends[len(self._failures)]] = error
            if isinstance(error, _FINAL) or len(self._failures) == len(self._backends):
                self._closed = True
                raise self._verdict(error) from None
            return None
        except BaseException:
            self.close()
            raise

    def _take(self, worker: _Worker) -> Frame | None:
        kind, body = worker.message(self._timeout if worker.opened else self._share)
        if kind == b"f":
            time, height, width = FRAME.unpack_from(body)
            self._given += 1
            worker.ask(1)
            return Frame(time, np.frombuffer(body, np.uint8, offset=FRAME.size).reshape(height, width, 3))
        if kind == b"i":
            worker.opened = True
            self._info = VideoInfo(path=self._path, backend=worker.backend, **json.loads(body))
        elif kind == b"e":
            self.close()
            end = json.loads(body)
            # OpenCV may get over what PyAV rightly calls broken, and says nothing.
            broken = self._failures.get("pyav")
            failed = [f"pyav: {broken}"] if isinstance(broken, BrokenVideoError) else []
            if end["damage"] or failed:
                self.damage = (*failed, *end["damage"])
                warning = TruncatedVideoWarning if end["truncated"] else DamagedVideoWarning
                warnings.warn(f"{self._path}: {'; '.join(self.damage)}", warning, stacklevel=4)
        elif kind == b"x":
            told = json.loads(body)
            raise getattr(errors, told["error"], BrokenVideoError)(told["message"])
        return None

    def _verdict(self, last: VideoError) -> VideoError:
        if not self._auto or isinstance(last, _FINAL):
            return type(last)(f"{self._path}: {last}")
        said = "; ".join(f"{backend}: {error}" for backend, error in self._failures.items())
        return type(self._failures.get("pyav", last))(f"{self._path}: {said}")


class _Worker:
    """The decoding process of one request; killed and reaped with this object."""

    def __init__(self, request: Request):
        package = Path(__file__).resolve().parents[1]
        packages = [("vtprune", str(package)), ("vtprune.video", str(package / "video"))]
        self.backend = request.backend
        self.opened = False
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", BOOTSTRAP.format(path=sys.path, packages=packages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._messages: queue.SimpleQueue[tuple[bytes, bytearray]] = queue.SimpleQueue()
        # Receiving in a thread: a wait with a time limit, on every platform.
        threading.Thread(target=_receive, args=(self.process.stdout, self._messages), daemon=True).start()
        self._finalizer = weakref.finalize(self, _reap, self.process)
        self._write(json.dumps(asdict(request)).encode() + b"\n")
        self.ask(IN_FLIGHT)

    def _write(self, data: bytes) -> None:
        pipe = self.process.stdin
        assert pipe is not None
        try:
            pipe.write(data)
            pipe.flush()
        except OSError:
            pass  # it is gone: the next message says why

    def ask(self, frames: int) -> None:
        """Allow so many more frames."""
        self._write(b"." * frames)

    def message(self, timeout: float) -> tuple[bytes, bytearray]:
        """The next message.

        Raises:
            VideoTimeoutError: none came within `timeout` seconds.
            BrokenVideoError: the process died.
        """
        try:
            kind, body = self._messages.get(timeout=timeout)
        except queue.Empty:
            raise VideoTimeoutError(
                f"the decoder gave no sign of life for {timeout:g} s and was ended; "
                "raise timeout if the machine is slow"
            ) from None
        if kind:
            return kind, body
        code = self.process.wait()
        name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise BrokenVideoError(f"its decoder crashed ({name})")

    def close(self) -> None:
        """Kill and reap; harmless when repeated."""
        self._finalizer()


def _reap(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):  # unsent bytes for a dead process
            process.stdin.close()


def _receive(pipe: BinaryIO, messages: queue.SimpleQueue[tuple[bytes, bytearray]]) -> None:
    """Messages of `pipe` into the queue; at its end an empty one."""
    with pipe:
        while len(header := pipe.read(HEADER.size)) == HEADER.size:
            kind, length = HEADER.unpack(header)
            body = bytearray(length)
            view = memoryview(body)
            while view and (received := pipe.readinto(view)):  # type: ignore[attr-defined]
                view = view[received:]
            if view:
                break
            messages.put((kind, body))
    messages.put((b"", bytearray()))


def read_frames(
    path: str | os.PathLike[str],
    times: Sequence[float] | None = None,
    *,
    fps: float | None = None,
    count: int | None = None,
    every: float | None = None,
    max_side: int | None = None,
    backend: str = "auto",
    timeout: float = 20.0,
    max_pixels: int = MAX_PIXELS,
) -> FrameReader:
    """Stream frames of a video file, in order of time.

    At most one of the samplings; without one, every frame is given. A sample is the frame shown at its time, so a frame
    may be given several times, and `count` frames come for `count` samples of an undamaged file.

    Args:
        path: the file.
        times: seconds, ascending.
        fps: samples at 0, 1/fps, 2/fps, ... before the end.
        count: samples at the centres of so many equal parts of the duration.
        every: samples at 0, every, 2·every, ... seconds before the end.
        max_side: longest side in pixels that images are scaled down to, in the decoding process; None: as they are.
        backend: "decord", "pyav", "opencv", or "auto": those that are installed, in this order; where one fails, the
            next goes on with the frame at which it failed. `reader.info.backend` says which one reads.
        timeout: seconds without a frame or another sign of progress after which the decoder is killed. Under "auto"
            the installed backends share it until the first of them has opened the file.
        max_pixels: limit of width × height.

    Raises:
        InvalidOptionError: an argument is out of its range.
        VideoFileError, NotAVideoError, BrokenVideoError: at once if the path tells.
        VideoError: any kind, at the first frame or on the way.
    """
    file = _regular_file(path)
    given = {"times": times, "fps": fps, "count": count, "every": every}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise InvalidOptionError(f"{' and '.join(chosen)} are given; choose one sampling")
    for name, value in (("fps", fps), ("every", every)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InvalidOptionError(f"{name} must be positive and finite, got {value!r}")
    for name, whole in (("count", count), ("max_side", max_side), ("max_pixels", max_pixels)):
        if whole is not None and (isinstance(whole, bool) or not isinstance(whole, int) or whole < 1):
            raise InvalidOptionError(f"{name} must be an int of at least 1, got {whole!r}")
    seconds = None if times is None else [float(t) for t in times]
    if seconds is not None and not (
        seconds
        and all(math.isfinite(t) and t >= 0 for t in seconds)
        and all(a <= b for a, b in itertools.pairwise(seconds))
    ):
        raise InvalidOptionError("times must be one or more seconds >= 0 in ascending order; sort them first")
    request = Request(
        path=str(file),
        backend=_backend(backend),
        times=seconds,
        fps=fps,
        every=every,
        count=count,
        max_side=max_side,
        max_pixels=max_pixels,
    )
    return FrameReader(Path(path), request, _seconds(timeout))


def probe(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    timeout: float = 20.0,
    max_pixels: int = MAX_PIXELS,
) -> VideoInfo:
    """What a video file says of itself; its first frame is decoded, so a file that is probed can also be read.

    Arguments and errors as for :func:`read_frames`.
    """
    file = _regular_file(path)
    request = Request(path=str(file), backend=_backend(backend), count=0, max_pixels=max_pixels)
    with FrameReader(Path(path), request, _seconds(timeout)) as reader:
        return reader.info


def _regular_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    try:
        if file.is_dir():
            raise VideoFileError(f"{file} is a folder; give the path of one video file")
        if not file.exists():
            raise VideoFileError(f"{file} does not exist; give the path of a video file on this machine")
        if not file.is_file():
            raise VideoFileError(f"{file} is not a regular file; copy it into one")
        if file.stat().st_size == 0:
            raise BrokenVideoError(f"{file} is empty (0 bytes)")
        picture = still_picture(file)
    except (OSError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoFileError(f"{file} cannot be read: {error}") from None
    if picture is not None:
        raise NotAVideoError(f"{file} is a still picture ({picture}), not a video")
    return file.resolve()


def _backend(name: str) -> str:
    known = ["auto", *Backends.by_name]
    if name not in known:
        raise InvalidOptionError(f"unknown video backend {name!r}. {did_you_mean(name, known)}")
    return name


def _installed() -> list[str]:
    names = [
        name for name, module in Backends.modules.items() if importlib.util.find_spec(module) is not None
    ]
    if not names:
        raise VideoBackendError("no video decoder is installed; install PyAV: pip install 'vtprune[video]'")
    return names


def _seconds(timeout: float) -> float:
    if not (math.isfinite(timeout) and timeout > 0):
        raise InvalidOptionError(f"timeout must be positive and finite, got {timeout!r}")
    return timeout
