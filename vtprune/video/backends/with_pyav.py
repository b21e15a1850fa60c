"""Reading with PyAV."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtprune.video.backends.base import TOLERANCE, Forward, Image, Request, Shown, load
from vtprune.video.errors import BrokenVideoError, NotAVideoError

HEAD_PACKETS = 300  # that a constant frame rate is judged by
TAIL_PACKETS = 3000  # of the last group of pictures, that the end is judged by
SEEK_BEYOND = 2.0  # seconds that are decoded rather than skipped by a seek, until a seek landed further back
TRANSPORTS = (
    (188, 0),
    (192, 4),
    (204, 0),
)  # bytes of a packet of a transport stream, where its first byte is
SYNC_PACKETS = 2000


class PyAV(Forward):
    """FFmpeg's own timestamps, seeks and rotation by PyAV.

    A seek is made when the wanted frame is more than `SEEK_BEYOND` seconds ahead; where it lands behind the frames
    already decoded (long groups of pictures), the distance is raised, so that no file is decoded over and over.
    """

    def __init__(self, request: Request, beat: Callable[[], None]):
        super().__init__(request, beat)
        self._av: Any = load("av", "PyAV")
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

    def shown(self, time: float) -> Shown | None:
        position = self._current.time if self._current else 0.0
        if time - position > self._reach and not self.ended:
            self._seek(time, position)
        return super().shown(time)

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


def _quarters(frame: Any) -> int:
    """Counter-clockwise quarter turns that make the frame upright."""
    quarters: int = round(frame.rotation / 90)
    return quarters % 4


def _clock(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
