"""The decoders behind :mod:`vtprune.video.reading`: PyAV, decord and OpenCV, alike in what they answer.

They run in the worker process (see :mod:`vtprune.video.worker`), which starts without torch: this file may import
numpy, the decoder it is asked for, and :mod:`vtprune.video.errors`.

Time 0 is the first frame's presentation timestamp. The frame shown at t is the last one whose timestamp is at most
t + `TOLERANCE`, because containers round timestamps (Matroska: to a millisecond).
"""

from __future__ import annotations

import importlib
import os
import re
import stat
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vtprune.video.errors import (
    BrokenVideoError,
    NotAVideoError,
    VideoBackendError,
    VideoTimeRangeError,
    VideoTooLargeError,
)

Image = NDArray[np.uint8]

TOLERANCE = 0.00051  # seconds
HEAD_PACKETS = 300  # that a constant frame rate is judged by
TAIL_PACKETS = 3000  # of the last group of pictures, that the end is judged by
SEEK_BEYOND = 2.0  # seconds that are decoded rather than skipped by a seek, until a seek landed further back
TRANSPORTS = (
    (188, 0),
    (192, 4),
    (204, 0),
)  # bytes of a packet of a transport stream, where its first byte is
SYNC_PACKETS = 2000
LOG_BYTES = 1 << 20
# Of the bits of a picture. Missing references are told of after every seek in an open group of pictures, too.
COMPLAINT = re.compile(r"\[\w+ @ 0x\w+\] (.*(?:error while decoding MB|Error at MB|damaged at).*)")
DECORD_SECONDS = 2048  # its float32 timestamps are within 0.06 ms until there


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


class PyAV(Decoder):
    """FFmpeg's own timestamps, seeks and rotation by PyAV.

    A seek is made when the wanted frame is more than `SEEK_BEYOND` seconds ahead; where it lands behind the frames
    already decoded (long groups of pictures), the distance is raised, so that no file is decoded over and over.
    """

    def __init__(self, request: Request, beat: Callable[[], None]):
        super().__init__(request, beat)
        self._av: Any = _load("av", "PyAV")
        self._ahead: Shown | None = None
        self._open()
        head = self._head()
        first = self._next()
        if first is None:
            raise BrokenVideoError("no frame can be decoded" + self._first_error())
        self._ahead = first
        frame = first.frame
        self.limit(frame.width, frame.height)
        quarter = _quarters(frame)
        width, height = (frame.width, frame.height)[:: -1 if quarter % 2 else 1]
        self.info = {
            "duration": head.duration,
            "frames": self._stream.frames or round(head.duration * head.fps),
            "fps": head.fps,
            "width": width,
            "height": height,
            "rotation": quarter * 90,
            "codec": self._stream.codec_context.codec.canonical_name,
            "variable_rate": head.variable,
        }
        self._slack = head.slack
        self._last = head.last

    def missing(self, last: Shown) -> bool:
        if self._last is not None:
            return self._last - last.time > self._slack
        return super().missing(last)

    def _open(self) -> None:
        try:
            # A playlist inside the file must not make the decoder open addresses.
            self._container = self._av.open(
                self.request.path, options={"protocol_whitelist": "file"}, metadata_errors="ignore"
            )
        except self._av.error.FFmpegError as error:
            raise BrokenVideoError(f"cannot be opened: {error}") from None
        cover = self._av.stream.Disposition.attached_pic
        streams = [s for s in self._container.streams.video if not s.disposition & cover]
        if not streams:
            kinds = sorted({s.type for s in self._container.streams})
            if not kinds:
                raise BrokenVideoError("its header declares no stream")
            raise NotAVideoError(f"has no video stream, only {' and '.join(kinds)}")
        self._stream = streams[0]
        context = self._stream.codec_context
        if context is None:
            raise BrokenVideoError("its video stream has a codec that no decoder of PyAV knows")
        self.limit(context.width, context.height)
        context.options = {"max_pixels": str(self.request.max_pixels)}
        context.thread_type = "AUTO"
        context.thread_count = min(4, os.cpu_count() or 1)
        self._base = self._stream.time_base
        self._origin: int | None = self._stream.start_time
        self._errors = 0
        self._corrupt = 0
        self._lost = 0
        self._why = ""
        self._reach = SEEK_BEYOND
        self._stopped = False
        self._current: Shown | None = None
        self._frames = self._decode()

    def _head(self) -> _Head:
        """Frame rate and duration from the headers, and from packets (on a second handle) where those say nothing."""
        stream, container = self._stream, self._container
        duration, slack = 0.0, 0.1
        if stream.duration:
            duration = float(stream.duration * stream.time_base)
        elif (text := stream.metadata.get("DURATION")) is not None:  # Matroska
            duration = _clock(text)
        elif container.duration:
            duration = container.duration / self._av.time_base
            if len(container.streams) > 1:  # it may be the sound's, which is often longer than the picture
                slack = 2.0
        pts: list[float] = []
        end = 0.0
        origin = (stream.start_time or 0) * float(stream.time_base)
        with self._av.open(self.request.path, options={"protocol_whitelist": "file"}) as other:
            track = other.streams[stream.index]
            # A header may end before the last frame begins (reordered frames of variable rate): ask the tail too.
            for part in ("head", "tail"):
                try:
                    if part == "tail":
                        other.seek(round((duration + origin) / float(track.time_base)), stream=track)
                    for index, packet in enumerate(other.demux(track)):
                        self.beat()
                        if packet.pts is not None:
                            start = float(packet.pts * packet.time_base)
                            end = max(end, start - origin)
                            if part == "head":
                                pts.append(start)
                        if duration and index >= (HEAD_PACKETS if part == "head" else TAIL_PACKETS):
                            break
                except self._av.error.FFmpegError:
                    pass  # decoding meets it again and reports it
                if not duration or len(pts) < HEAD_PACKETS:
                    break
        pts = sorted(pts)[: -16 if len(pts) >= HEAD_PACKETS else None]  # reordering leaves holes at the end
        steps = np.diff(pts)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if not fps:
            fps = (len(pts) - 1) / (pts[-1] - pts[0]) if len(pts) > 1 and pts[-1] > pts[0] else 25.0
        # Two ticks: each end of a step may be rounded.
        variable = len(steps) > 0 and float(steps.max() - steps.min()) > 2.5 * float(stream.time_base)
        if len(steps) > 0 and stream.frames and duration:
            variable = variable or abs(duration / stream.frames - steps.mean()) > max(
                0.05 * steps.mean(), duration / stream.frames**2 + 2 * float(stream.time_base)
            )
        # Not the packets' durations: they are steps of decoding, which reordering makes longer than those of showing.
        if not duration or end >= duration:
            duration = end + 1 / fps
        index = stream.index_entries
        last = None
        if stream.frames and len(index) == stream.frames:
            last = index[len(index) - 1].timestamp * float(stream.time_base) - origin
        return _Head(duration, fps, bool(variable), max(slack, 3 / fps), last)

    def _decode(self) -> Iterator[Any]:
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except self._av.error.FFmpegError as error:
                self._failed(error)
                packet = None  # decoding of what is left in the decoder
            self.beat()
            # The demuxer met a gap, such as missing packets of a transport stream: whole frames may be gone unseen.
            self._lost += packet is not None and packet.is_corrupt
            try:
                yield from self._stream.codec_context.decode(packet)
            except self._av.error.EOFError:
                pass
            except self._av.error.FFmpegError as error:
                self._failed(error)
            if packet is None:
                return

    def _failed(self, error: Exception) -> None:
        self._errors += 1
        self._why = self._why or str(error)

    def _first_error(self) -> str:
        return f" ({self._errors} decoding errors, the first: {self._why})" if self._errors else ""

    def _next(self) -> Shown | None:
        frame = next(self._frames, None)
        if frame is None:
            self._stopped = True
            return None
        self._corrupt += bool(frame.is_corrupt)
        self.limit(frame.width, frame.height)
        rate = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        if frame.pts is None:  # elementary streams have no clock
            before = self._ahead or self._current
            time = before.end if before else 0.0
        else:
            if self._origin is None:
                self._origin = frame.pts
            time = float((frame.pts - self._origin) * self._base)
        length = float(frame.duration * self._base) if frame.duration else 1 / rate
        return Shown(time, time + length, frame)

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
        position = self._current.time if self._current else 0.0
        if time - position > self._reach and not self.ended:
            self._seek(time, position)
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

    def _seek(self, time: float, position: float) -> None:
        for back in (0.0, 1.0, 4.0, 16.0, 64.0, time):
            target = max(time - back, 0.0)
            self.beat()
            try:
                self._container.seek(
                    round(target / float(self._base)) + (self._origin or 0),
                    stream=self._stream,
                    backward=True,
                )
            except self._av.error.FFmpegError:
                if back == 0.0:
                    self._reach = float("inf")  # not seekable: forward from where it stands
                    return
                continue
            self._frames, self._stopped, self._ahead = self._decode(), False, None
            landed = self._next()
            if landed is not None and (landed.time <= time + TOLERANCE or target == 0.0):
                self._current, self._ahead = None, landed
                if landed.time <= position:
                    self._reach = max(self._reach, 2 * (time - landed.time))
                return

    def image(self, frame: Any) -> Image:
        width, height = self.fitted(frame.width, frame.height)
        rgb = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
        return np.ascontiguousarray(np.rot90(rgb, _quarters(frame)))

    def report(self) -> list[str]:
        if self._errors:
            self.damage.append(f"{self._errors} packets could not be decoded (the first: {self._why})")
        if self._corrupt:
            self.damage.append(f"{self._corrupt} frames were flagged as corrupt by the decoder")
        if self._lost:
            self.damage.append(f"the stream has gaps in {self._lost} places, where frames may be missing")
        if self.transport and (why := broken_transport(Path(self.request.path))):
            self.damage.append(why)
        return self.damage

    @property
    def transport(self) -> bool:
        """Whether the file is an MPEG transport stream."""
        return bool(self._container.format.name == "mpegts")


@dataclass(frozen=True)
class _Head:
    duration: float
    fps: float
    variable: bool
    slack: float
    last: float | None  # where the last frame begins at the earliest, if an index of all frames says so


class Decord(Decoder):
    """decord, for the files it reads right: what it would answer wrongly or hide is refused here.

    decord 0.6 repeats frames it cannot decode, knows no AV1, and tells neither codec, rotation nor declared duration;
    those come from PyAV's header where PyAV is installed, and a file whose frames do not fill its declared duration
    is left to the next backend.
    """

    def __init__(self, request: Request, beat: Callable[[], None]):
        super().__init__(request, beat)
        decord: Any = _load("decord", "decord")
        decord.logging.set_level(decord.logging.ERROR)
        header = self._header()
        beat()
        try:
            self._reader = decord.VideoReader(request.path, ctx=decord.cpu(0), num_threads=1, fault_tol=1)
            clock = self._reader.get_frame_timestamp(range(len(self._reader)))
            fps = float(self._reader.get_avg_fps())
            first = self._reader[0].asnumpy()
        except (decord.DECORDError, RuntimeError, AssertionError) as error:
            raise BrokenVideoError(f"cannot be opened: {_brief(error)}") from None
        self._errors = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError)
        if clock[-1, 1] - clock[0, 0] > DECORD_SECONDS:
            raise VideoBackendError(f"decord's timestamps are too coarse beyond {DECORD_SECONDS} s (float32)")
        clock = np.round(
            np.asarray(clock, dtype=np.float64) - float(clock[0, 0]), 6
        )  # 0.3 from float32's 0.30000001
        self._starts: list[float] = clock[:, 0].tolist()
        self._ends: list[float] = clock[:, 1].tolist()
        self._index = -1
        steps = np.diff(self._starts)
        if len(steps) and steps.min() <= 0:
            raise VideoBackendError("decord gives no ascending timestamps for this file")
        height, width = first.shape[:2]
        self.limit(width, height)
        self.info = {
            "duration": self._ends[-1],
            "frames": len(self._starts),
            "fps": fps,
            "width": width,
            "height": height,
            "rotation": None,
            "codec": None,
            "variable_rate": len(steps) > 0 and bool(steps.max() - steps.min() > 2.5e-3),
        }
        if header is not None:
            self.info.update({k: header.info[k] for k in ("duration", "codec", "rotation", "variable_rate")})
            same = (header.info["width"], header.info["height"], header.info["frames"])
            if same != (width, height, len(self._starts)):
                raise VideoBackendError(
                    "decord sees another picture size or frame count than the header declares"
                )

    def _header(self) -> PyAV | None:
        try:
            header = PyAV(self.request, self.beat)
        except VideoBackendError:
            return None
        if header.info["duration"] > DECORD_SECONDS:  # before decord spends minutes on its index
            raise VideoBackendError(f"decord's timestamps are too coarse beyond {DECORD_SECONDS} s (float32)")
        if header.transport:
            raise VideoBackendError("decord hides the gaps of transport streams")
        if header.info["codec"] == "av1":
            raise VideoBackendError("decord has no decoder for AV1")
        return header

    def missing(self, last: Shown) -> bool:
        return False  # such a file was refused above

    @property
    def ended(self) -> bool:
        return self._index >= len(self._starts) - 1

    def following(self) -> Shown | None:
        return None if self.ended else self._at(self._index + 1)

    def shown(self, time: float) -> Shown | None:
        return self._at(max(0, bisect_right(self._starts, time + TOLERANCE) - 1))

    def _at(self, index: int) -> Shown:
        self._index = index
        return Shown(self._starts[index], self._ends[index], index)

    def image(self, frame: int) -> Image:
        self.beat()
        try:
            rgb: Image = self._reader[frame].asnumpy()
        except self._errors as error:
            raise BrokenVideoError(f"frame {frame} cannot be decoded: {_brief(error)}") from None
        size = self.fitted(rgb.shape[1], rgb.shape[0])
        if size == (rgb.shape[1], rgb.shape[0]):
            return np.ascontiguousarray(rgb)
        pillow: Any = importlib.import_module("PIL.Image")
        return np.asarray(pillow.fromarray(rgb).resize(size, pillow.Resampling.BOX))


class OpenCV(Decoder):
    """OpenCV, forward only: its seeks go by frame number, which is wrong for a variable frame rate."""

    def __init__(self, request: Request, beat: Callable[[], None]):
        super().__init__(request, beat)
        os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
        os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")
        self._cv2: Any = _load("cv2", "OpenCV")
        cv2 = self._cv2
        self._capture = cv2.VideoCapture(request.path, cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise BrokenVideoError("OpenCV cannot open it")
        self.limit(int(self._get("FRAME_WIDTH")), int(self._get("FRAME_HEIGHT")))
        self._fps = self._get("FPS") or 25.0
        self._origin: float | None = None
        self._read = 0
        self._stopped = False
        self._current: Shown | None = None
        self._ahead: Shown | None = None
        first = self._next()
        if first is None:
            raise BrokenVideoError("no frame can be decoded")
        self._ahead = first
        height, width = first.frame.shape[:2]
        count = max(1, round(self._get("FRAME_COUNT")))
        end = max(count / self._fps, self._last_start(count) + 1 / self._fps)
        code = int(self._get("FOURCC"))
        self._slack = max(0.25, 3 / self._fps)
        self.info = {
            "duration": end,
            "frames": count,
            "fps": self._fps,
            "width": width,
            "height": height,
            "rotation": -round(self._get("ORIENTATION_META")) % 360,
            "codec": "".join(chr(code >> 8 * i & 255) for i in range(4)).strip("\0 ") or None,
            "variable_rate": None,
        }

    def missing(self, last: Shown) -> bool:
        return self._read < self.info["frames"] and super().missing(last)

    def _last_start(self, count: int) -> float:
        """Where the last frame begins, since count / fps is too short for some variable rates; 0 if unknown."""
        tail = self._cv2.VideoCapture(self.request.path, self._cv2.CAP_FFMPEG)
        tail.set(self._cv2.CAP_PROP_POS_FRAMES, count - 1)
        self.beat()
        found = tail.grab()
        start = float(tail.get(self._cv2.CAP_PROP_POS_MSEC)) / 1000
        tail.release()
        return start - (self._origin or 0.0) if found else 0.0

    def _get(self, name: str) -> float:
        return float(self._capture.get(getattr(self._cv2, f"CAP_PROP_{name}")))

    def _next(self) -> Shown | None:
        self.beat()
        good, picture = self._capture.read()
        if not good:
            self._stopped = True
            return None
        self._read += 1
        self.limit(picture.shape[1], picture.shape[0])
        clock = self._get("POS_MSEC") / 1000
        if self._origin is None:
            self._origin = clock
        return Shown(clock - self._origin, clock - self._origin + 1 / self._fps, picture)

    @property
    def ended(self) -> bool:
        return self._stopped and self._ahead is None

    def following(self) -> Shown | None:
        shown, self._ahead = self._ahead, None
        return shown or (None if self._stopped else self._next())

    def shown(self, time: float) -> Shown | None:
        while True:
            if self._ahead is None and not self._stopped:
                self._ahead = self._next()
            if self._ahead is None or self._ahead.time > time + TOLERANCE:
                return self._current or self._ahead
            self._current, self._ahead = self._ahead, None

    def image(self, frame: Any) -> Image:
        size = self.fitted(frame.shape[1], frame.shape[0])
        if size != (frame.shape[1], frame.shape[0]):
            frame = self._cv2.resize(frame, size, interpolation=self._cv2.INTER_AREA)
        return np.ascontiguousarray(frame[..., ::-1])


class Backends:
    """The backends by name, in the order in which "auto" tries them."""

    by_name: ClassVar[dict[str, type[Decoder]]] = {"decord": Decord, "pyav": PyAV, "opencv": OpenCV}
    modules: ClassVar[dict[str, str]] = {"decord": "decord", "pyav": "av", "opencv": "cv2"}


def open_video(request: Request, beat: Callable[[], None]) -> Decoder:
    """The decoder of `request.backend` on its file.

    Raises:
        VideoError: it is not installed, or cannot read the file.
    """
    return Backends.by_name[request.backend](request, beat)


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


def broken_transport(path: Path) -> str | None:
    """What is wrong with the first `SYNC_PACKETS` packets and the length of an MPEG transport stream; None if nothing is.

    Such a file declares neither its length nor its frames, so that a part of one is a valid shorter file, but for its last
    packet. Packets are 188 bytes, 192 with time stamps in front or 204 with check sums behind, and each begins with 0x47.
    """
    with path.open("rb") as file:
        head = file.read(SYNC_PACKETS * 204)
        size = file.seek(0, os.SEEK_END)
    grids = [(head[first::length].count(0x47), length, first) for length, first in TRANSPORTS]
    found, length, first = max(grids, key=lambda grid: grid[0] / len(head[grid[2] :: grid[1]]))
    if found < len(head[first::length]):
        return f"{len(head[first::length]) - found} packets do not begin as those of a transport stream"
    if size % length:
        return "the file ends within a packet: it was cut off, or a part of it is missing"
    return None


def _load(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise VideoBackendError(
            f"{name} cannot be imported ({_brief(error)}); install it with: pip install 'vtprune[video]'"
            if module == "av"
            else f"{name} cannot be imported ({_brief(error)}); install it, or PyAV: pip install 'vtprune[video]'"
        ) from None


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _quarters(frame: Any) -> int:
    """Counter-clockwise quarter turns that make the frame upright."""
    quarters: int = round(frame.rotation / 90)
    return quarters % 4


def _clock(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
