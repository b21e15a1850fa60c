"""What the backends share: what they are asked for, what they answer, and what the file or FFmpeg's log tells.

Time 0 is the first frame's presentation timestamp. The frame shown at t is the last one whose timestamp is at most
t + `TOLERANCE`, because containers round timestamps (Matroska: to a millisecond).
"""

from __future__ import annotations

import importlib
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtprune.video.errors import VideoBackendError, VideoTimeRangeError, VideoTooLargeError

Image = NDArray[np.uint8]

TOLERANCE = 0.00051  # seconds
LOG_BYTES = 1 << 20
# Of the bits of a picture. Missing references are told of after every seek in an open group of pictures, too.
COMPLAINT = re.compile(r"\[\w+ @ 0x\w+\] (.*(?:error while decoding MB|Error at MB|damaged at).*)")


@dataclass(frozen=True)
class Request:
    """What the worker is asked for.

    Attributes:
        times: seconds, ascending; or one of
        fps, every, count: a sampling over the duration; all None: every frame.
        skip: samples that another backend already gave.
        max_side: longest side of the images in pixels, None: as they are.
        max_pixels: limit of width × height of the video.
    """

    path: str
    backend: str
    times: list[float] | None = None
    fps: float | None = None
    every: float | None = None
    count: int | None = None
    skip: int = 0
    max_side: int | None = None
    max_pixels: int = 1 << 26

    def samples(self, duration: float) -> Iterator[float] | None:
        """Times to show in seconds, ascending, without those to skip; None for every frame.

        Raises:
            VideoTimeRangeError: one of `times` lies beyond the duration.
        """
        if self.times is not None:
            if self.times and self.times[-1] > duration + TOLERANCE:
                raise VideoTimeRangeError(
                    f"time {self.times[-1]:g} s is beyond the end at {duration:g} s; "
                    "ask for times from 0 to the duration that probe() gives"
                )
            return iter(self.times[self.skip :])
        if self.count is not None:
            return ((i + 0.5) * duration / self.count for i in range(self.skip, self.count))
        if (fps := self.fps) is not None:
            return _grid(lambda i: i / fps, self.skip, duration)
        if (every := self.every) is not None:
            return _grid(lambda i: i * every, self.skip, duration)
        return None


def _grid(time: Callable[[int], float], first: int, duration: float) -> Iterator[float]:
    index = first
    while index == 0 or time(index) < duration - TOLERANCE:
        yield time(index)
        index += 1


@dataclass(frozen=True)
class Shown:
    """A frame on the screen from `time` to `end` (seconds; `end` as the file declares it)."""

    time: float
    end: float
    frame: Any


class Decoder(ABC):
    """One opened video.

    Attributes:
        info: the fields of `VideoInfo` except path and backend.
        damage: sentences about what could not be decoded.
        truncated: whether the frames ended before the duration.
    """

    info: dict[str, Any]
    _slack: float = 0.25  # seconds by which the last frame may end before the duration of an intact file

    def __init__(self, request: Request, beat: Callable[[], None]):
        self.request = request
        self.beat = beat
        self.damage: list[str] = []
        self.truncated = False

    @abstractmethod
    def shown(self, time: float) -> Shown | None:
        """The frame at `time` seconds, not before that of the last call; None if there is none at all."""

    @abstractmethod
    def following(self) -> Shown | None:
        """The next frame of the stream; None at its end."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether no frame follows the one given last."""

    @abstractmethod
    def image(self, frame: Any) -> Image:
        """RGB [H, W, 3] uint8, upright, at most `max_side` long."""

    def report(self) -> list[str]:
        """`damage` at the end of reading."""
        if lines := complaints():
            self.damage.append(f"the decoder complained {len(lines)} times (the first: {lines[0]})")
        return self.damage

    def read(self) -> Iterator[tuple[float, Image]]:
        """Timestamp and image of every sample; of a truncated video, of those before its end."""
        times = self.request.samples(self.info["duration"])
        if times is None:
            yield from self._all()
            return
        for time in times:
            shown = self.shown(time)
            if shown is None or (time >= shown.end and self._cut_off(shown)):
                return
            yield shown.time, self.image(shown.frame)

    def _all(self) -> Iterator[tuple[float, Image]]:
        last = None
        frames = iter(self.following, None)
        for shown in islice(frames, self.request.skip, None):
            last = shown
            yield shown.time, self.image(shown.frame)
        if last is not None:
            self._cut_off(last)

    def _cut_off(self, last: Shown) -> bool:
        self.truncated = self.ended and self.missing(last)
        if self.truncated:
            duration = self.info["duration"]
            self.damage.append(f"the frames end at {last.end:.3f} s of the declared {duration:.3f} s")
        return self.truncated

    def missing(self, last: Shown) -> bool:
        """Whether frames are declared after the last one."""
        return bool(self.info["duration"] - last.end > self._slack)

    def limit(self, width: int, height: int) -> None:
        """Refuse pictures beyond the declared limit.

        Raises:
            VideoTooLargeError: they are.
        """
        if width * height > self.request.max_pixels:
            raise VideoTooLargeError(
                f"frames of {width} x {height} pixels exceed the limit of {self.request.max_pixels} pixels; "
                "raise max_pixels if the file is trusted and memory allows"
            )

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after `max_side`."""
        side = max(width, height)
        bound = self.request.max_side
        if bound is None or side <= bound:
            return width, height
        return max(1, round(width * bound / side)), max(1, round(height * bound / side))


class Forward(Decoder):
    """A decoder that takes the frames of the stream in order and holds the one on the screen and the one after it."""

    def __init__(self, request: Request, beat: Callable[[], None]):
        super().__init__(request, beat)
        self._current: Shown | None = None
        self._ahead: Shown | None = None
        self._stopped = False

    @abstractmethod
    def _next(self) -> Shown | None:
        """Decode the next frame; at the end of the stream, set `_stopped` and return None."""

    @property
    def ended(self) -> bool:
        return self._stopped and self._ahead is None

    def following(self) -> Shown | None:
        shown, self._ahead = self._ahead, None
        if shown is None and not self._stopped:
            shown = self._next()
        if shown is not None:
            self._current = shown
        return shown

    def shown(self, time: float) -> Shown | None:
        while True:
            if self._ahead is None and not self._stopped:
                self._ahead = self._next()
            if self._ahead is None:
                return self._current
            if self._ahead.time > time + TOLERANCE:
                if self._current is None:
                    return self._ahead  # the beginning is lost; its own time says so
                return self._current
            self._current, self._ahead = self._ahead, None


def still_picture(path: Path) -> str | None:
    """The format's name if the file begins like a still picture, whatever its suffix says."""
    with path.open("rb") as file:
        head = file.read(16)
    for magic, name in (
        (b"\x89PNG\r\n", "PNG"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"BM", "BMP"),
        (b"II*\0", "TIFF"),
    ):
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"heic", b"mif1"):
        return "AVIF or HEIC"
    return None


def complaints(errors: int = 2) -> list[str]:
    """What FFmpeg wrote about damaged pictures, where the descriptor is a file, as in the worker.

    decord and OpenCV conceal what they cannot decode and have no other word for it.
    """
    if not stat.S_ISREG(os.fstat(errors).st_mode):
        return []
    lines = os.pread(errors, LOG_BYTES, 0).decode(errors="replace").splitlines()
    return [found[1] for line in lines if (found := COMPLAINT.match(line))]


def load(module: str, name: str) -> Any:
    """The optional library `module`, imported only now; `name` is what errors call it.

    Raises:
        VideoBackendError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise VideoBackendError(
            f"{name} cannot be imported ({brief(error)}); install it with: pip install 'vtprune[video]'"
            if module == "av"
            else f"{name} cannot be imported ({brief(error)}); install it, or PyAV: pip install 'vtprune[video]'"
        ) from None


def brief(error: BaseException) -> str:
    """The first line of what the error says."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
