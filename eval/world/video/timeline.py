"""What is where and when in a clip: the ground truth, without a single pixel."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ..scenes import Box, atlas

WAYS = ("left", "right", "up", "down")
_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
EASING = (
    0.1  # of the way; the slowest frame of an eased path still goes 1 - 2 pi EASING = 0.37 of the mean speed
)


@dataclass(frozen=True)
class Track:
    """One thing during one of its appearances; wholly inside the picture at all times.

    Attributes:
        name: word used in questions.
        style: art style.
        start: first frame that shows it.
        stop: the frame after the last that shows it.
        size: width and height in pixels.
        side: longer side in pixels, as `Atlas.sticker` takes it.
        mirrored: whether it is drawn mirrored.
        brightness: factor of its colours.
        corner: top left corner (x, y) in its first frame.
        way: one of `WAYS`, or None for a thing that stands still.
        travel: pixels from the first to the last frame, along `way`.
        bend: pixels by which the middle of the path is off the straight line, across `way`.
        eased: whether it starts and ends more slowly; otherwise its speed is constant.
    """

    name: str
    style: str
    start: int
    stop: int
    size: tuple[int, int]
    side: int
    mirrored: bool
    brightness: float
    corner: tuple[int, int]
    way: str | None = None
    travel: int = 0
    bend: float = 0.0
    eased: bool = False

    @property
    def length(self) -> int:
        """Number of frames that show it."""
        return self.stop - self.start

    def overlaps(self, other: Track) -> bool:
        """Whether some frame shows both."""
        return self.start < other.stop and other.start < self.stop

    def box(self, frame: int) -> Box:
        """Pixel box (x0, y0, x1, y1) in a frame.

        Raises:
            ValueError: if the frame does not show it.
        """
        if not self.start <= frame < self.stop:
            raise ValueError(
                f"frame {frame} does not show the {self.name}; frames {self.start} to {self.stop - 1} do"
            )
        x, y = self.corner
        if self.way is not None:
            part = (frame - self.start) / (self.length - 1)
            along = part - EASING * math.sin(2 * math.pi * part) if self.eased else part
            across = round(self.bend * math.sin(math.pi * part))
            dx, dy = _STEPS[self.way]
            x += round(dx * self.travel * along) + (across if dx == 0 else 0)
            y += round(dy * self.travel * along) + (across if dy == 0 else 0)
        return x, y, x + self.size[0], y + self.size[1]


@dataclass(frozen=True)
class Event:
    """Something that happens: at ``time`` seconds (of frame ``frame``) the thing ``name`` ``what``
    ("appears" or "disappears"; the latter is the first frame without it)."""

    time: float
    frame: int
    what: str
    name: str


@dataclass(frozen=True)
class Timeline:
    """The ground truth of a clip.

    Attributes:
        seed: seed it was made from; the ranges of the splits never overlap.
        split: "train", "val", "test" or "final".
        kind: the kind of question it was made for.
        asked: the text of the question it was made for.
        length: number of frames.
        fps: frames per second; frame i is shown at i / fps seconds.
        background: kind of background.
        noise: standard deviation of the camera noise, of 255.
        flicker: amplitude of the slow change of light, of 255.
        tracks: appearances, by their first frame. Things that are visible together never overlap in the picture, and
            the appearances of one name have at least one frame between them.
    """

    seed: int
    split: str
    kind: str
    asked: str
    length: int
    fps: int
    background: str
    noise: float
    flicker: float
    tracks: tuple[Track, ...]

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.length / self.fps

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """What appears at all, by first appearance."""
        return tuple(dict.fromkeys(track.name for track in self.tracks))

    def appearances(self, name: str) -> tuple[Track, ...]:
        """The appearances of a name, in order."""
        return tuple(track for track in self.tracks if track.name == name)

    def visible(self, frame: int) -> tuple[Track, ...]:
        """What a frame shows.

        Raises:
            ValueError: if there is no such frame.
        """
        if not 0 <= frame < self.length:
            raise ValueError(f"no frame {frame}; the clip has frames 0 to {self.length - 1}")
        return tuple(track for track in self.tracks if track.start <= frame < track.stop)

    def events(self) -> tuple[Event, ...]:
        """Everything that appears or disappears inside the clip, in order of time."""
        found = []
        for track in self.tracks:
            if track.start > 0:
                found.append(Event(track.start / self.fps, track.start, "appears", track.name))
            if track.stop < self.length:
                found.append(Event(track.stop / self.fps, track.stop, "disappears", track.name))
        return tuple(sorted(found, key=lambda event: (event.frame, event.what, event.name)))

    def quarter(self, frame: int) -> int:
        """The quarter of the clip, 0 to 3, in which a frame starts."""
        return 4 * frame // self.length


def group(name: str) -> str:
    """The group of a thing, such as "fruit"."""
    return atlas().group_of[name]
