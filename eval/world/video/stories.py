"""The plots of clips: for every kind of question a timeline in which it has exactly one answer."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..scenes import (
    BACKGROUNDS,
    CELL,
    GRID,
    SIZE,
    UNSEEN_BACKGROUNDS,
    UNSEEN_STYLE,
    atlas,
    seed_range,
)
from .questions import (
    KINDS,
    MOST_OFTEN,
    NEEDLE,
    QUARTERS,
    STAYS,
    answers,
    check_kind,
    group_choices,
    text_of,
)
from .timeline import EASING, WAYS, Timeline, Track

SPLITS = ("train", "val", "test", "final")
INDICES = 100_000_000  # clips of a kind in a split
SHORTEST, LONGEST = 8, 3600  # frames of a clip
EVENT = 24  # most frames of an appearance that is no background to something else
MOVER = 3  # fewest frames of a movement
TRAVEL = (24, 60)  # pixels of a movement
_STREAM = 0x766964  # keeps the random numbers of clips apart from those of pictures with the same seed


def clip_seed(split: str, index: int, kind: str) -> int:
    """The seed of a clip: inside the picture world's range of the split, and its own for every kind and index.

    Raises:
        ValueError: if there is no such split, kind or index.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    check_kind(kind)
    if not 0 <= index < INDICES:
        raise ValueError(f"index must be between 0 and {INDICES - 1}, got {index}")
    return seed_range(split).start + KINDS.index(kind) * INDICES + index


def make_timeline(split: str, index: int, kind: str, frames: int | None = None) -> Timeline:
    """The timeline of a clip; see `vtprune.eval.world.video.clip`.

    Raises:
        ValueError: if there is no such split, kind or index, or the number of frames is out of range.
    """
    seed = clip_seed(split, index, kind)
    if frames is not None and not SHORTEST <= frames <= LONGEST:
        raise ValueError(f"a clip has {SHORTEST} to {LONGEST} frames, got {frames}")
    rng = np.random.default_rng((_STREAM, seed, frames or 0))
    length, fps = _length(kind, rng)
    kinds = BACKGROUNDS if split in ("train", "val") else BACKGROUNDS + UNSEEN_BACKGROUNDS
    background = kinds[rng.integers(len(kinds))]
    noise = float(rng.uniform(1, 4)) if rng.random() < 0.15 else 0.0
    flicker = float(rng.uniform(2, 8)) if rng.random() < 0.2 else 0.0
    wanted = _wanted(seed, index, kind)
    while True:
        stage = Stage(rng, frames or length)
        try:
            asked = _STORIES[kind](stage, wanted)
            break
        except _StageFullError:  # the random numbers go on, so the next attempt differs
            continue
    tracks = tuple(sorted(stage.tracks, key=lambda track: (track.start, track.stop, track.name)))
    return Timeline(seed, split, kind, asked, stage.length, fps, background, noise, flicker, tracks)


def _length(kind: str, rng: np.random.Generator) -> tuple[int, int]:
    """Frames and frames per second: needles in one to four minutes, the others from 8 frames to three minutes."""
    size = rng.random()
    if kind == "needle" or (size > 0.85 and kind != "still"):
        fps = int(rng.integers(2, 5))
        return round(fps * rng.uniform(60, 240 if kind == "needle" else 180)), fps
    fps = int(rng.choice((2, 4, 5)))
    return int(rng.integers(8, 33) if size < 0.5 else rng.integers(33, 121)), fps


def _wanted(seed: int, index: int, kind: str) -> str:
    """The answer of a clip: every run of as many clips as there are answers has each of them once."""
    options = answers(kind)
    block, place = divmod(index, len(options))
    order = np.random.default_rng((_STREAM, seed - index, block)).permutation(len(options))
    return options[int(order[place])]


class _StageFullError(Exception):
    """There is no place left for a thing."""


class Stage:
    """Puts things on a stage of `length` frames so that no two ever overlap in the picture.

    A thing that stands still takes one of 3 x 3 cells while it is there; a thing that moves takes a row or a column.
    """

    def __init__(self, rng: np.random.Generator, length: int) -> None:
        self.rng = rng
        self.length = length
        self.tracks: list[Track] = []
        self._cells: list[frozenset[int]] = []
        self._used: set[str] = set()

    def name(self, pool: tuple[str, ...] = ()) -> str:
        """A thing that was not on stage yet, of the pool or of all."""
        free = [name for name in pool or atlas().names if name not in self._used]
        name = free[self.rng.integers(len(free))]
        self._used.add(name)
        return name

    def reserve(self, name: str) -> str:
        """Keep this name from being drawn."""
        self._used.add(name)
        return name

    def slots(self, count: int, gap: int = 0, shortest: int = 1) -> list[tuple[int, int]]:
        """Spans of frames in order, at least ``gap`` frames apart, with the rest of the clip empty around them."""
        room = (self.length - gap * (count - 1)) // count
        longest = max(2, min(EVENT, self.length // 5), shortest)
        lengths = self.rng.integers(min(max(2, shortest), room), min(longest, room) + 1, count)
        slack = self.length - int(lengths.sum()) - gap * (count - 1)
        shifts = np.sort(self.rng.integers(0, slack + 1, count))
        starts = np.concatenate(([0], np.cumsum(lengths[:-1] + gap))) + shifts
        return [(int(start), int(start + length)) for start, length in zip(starts, lengths, strict=True)]

    def _taken(self, start: int, stop: int) -> frozenset[int]:
        busy = [
            cells
            for track, cells in zip(self.tracks, self._cells, strict=True)
            if track.start < stop and start < track.stop
        ]
        return frozenset().union(*busy)

    def lanes(self, start: int, stop: int) -> list[tuple[str, frozenset[int]]]:
        """The ways a thing could move during these frames, with the cells it would take."""
        if not MOVER <= stop - start <= EVENT:
            return []
        taken = self._taken(start, stop)
        rows = [frozenset(range(GRID * row, GRID * row + GRID)) for row in range(GRID)]
        columns = [frozenset(range(column, GRID * GRID, GRID)) for column in range(GRID)]
        lanes = [(way, lane) for way in WAYS for lane in (rows if way in ("left", "right") else columns)]
        return [(way, lane) for way, lane in lanes if not lane & taken]

    def put(self, name: str, start: int, stop: int) -> None:
        """A thing that stands still in a free cell."""
        free = sorted(set(range(GRID * GRID)) - self._taken(start, stop))
        if not free:
            raise _StageFullError
        cell = free[self.rng.integers(len(free))]
        style, side, size, mirrored, brightness = self._look(name)
        row, column = divmod(cell, GRID)
        x = column * CELL + int(self.rng.integers(CELL - size[0] + 1))
        y = row * CELL + int(self.rng.integers(CELL - size[1] + 1))
        self._cells.append(frozenset([cell]))
        self.tracks.append(Track(name, style, start, stop, size, side, mirrored, brightness, (x, y)))

    def move(self, name: str, start: int, stop: int, wanted: str | None = None) -> None:
        """A thing that moves at least one pixel from frame to frame, the ``wanted`` way or any."""
        rng = self.rng
        lanes = [(way, lane) for way, lane in self.lanes(start, stop) if wanted in (None, way)]
        if not lanes:
            raise _StageFullError
        ways = list(dict.fromkeys(way for way, _ in lanes))
        way = ways[rng.integers(len(ways))]
        choices = [lane for of, lane in lanes if of == way]
        lane = choices[rng.integers(len(choices))]
        style, side, size, mirrored, brightness = self._look(name)
        level = way in ("left", "right")
        along, across = size if level else size[::-1]
        steps = stop - start - 1
        travel = int(rng.integers(max(TRAVEL[0], steps), min(TRAVEL[1], SIZE - along) + 1))
        first = int(rng.integers(SIZE - along - travel + 1))
        if way in ("left", "up"):
            first = SIZE - along - first
        room = (CELL - across) // 2
        middle = (min(lane) // GRID if level else min(lane)) * CELL + room
        corner = (first, middle) if level else (middle, first)
        eased = (1 - 2 * math.pi * EASING) * travel >= steps + 1 and rng.random() < 0.5
        self._cells.append(lane)
        self.tracks.append(
            Track(
                *(name, style, start, stop, size, side, mirrored, brightness, corner, way, travel),
                bend=float(rng.uniform(-room, room)),
                eased=bool(eased),
            )
        )

    def show(self, name: str, start: int, stop: int) -> None:
        """A thing that stands still or, where there is room, perhaps moves."""
        if self.lanes(start, stop) and self.rng.random() < 0.4:
            self.move(name, start, stop)
        else:
            self.put(name, start, stop)

    def _look(self, name: str) -> tuple[str, int, tuple[int, int], bool, float]:
        styles = [style for style in atlas().styles if style != UNSEEN_STYLE]
        style = styles[self.rng.integers(len(styles))]
        side = int(self.rng.integers(18, 28))
        height, width = atlas().sticker(name, style, side)[1].shape[:2]
        mirrored, brightness = bool(self.rng.random() < 0.5), float(self.rng.uniform(0.85, 1.0))
        return style, side, (width, height), mirrored, brightness


def _needle(stage: Stage, wanted: str) -> str:
    rng, length = stage.rng, stage.length
    stage.reserve(wanted)
    frames = int(rng.integers(NEEDLE[0], min(NEEDLE[1], length // STAYS) + 1))
    for _ in range(rng.integers(3)):
        stay = int(rng.integers(max(STAYS * frames, length // 3), length + 1))
        start = int(rng.integers(length - stay + 1))
        stage.put(stage.name(), start, start + stay)
    start = int(rng.integers(1, length - frames))
    stage.show(wanted, start, start + frames)
    return text_of("needle")


def _moment(stage: Stage, wanted: str) -> str:
    stage.reserve(wanted)
    slots = stage.slots(int(stage.rng.integers(2, 4)), shortest=2)
    place = stage.rng.integers(len(slots))
    asked = stage.name()
    for number, (start, stop) in enumerate(slots):
        pair = [asked, wanted] if number == place else [stage.name(), stage.name()]
        part = int(stage.rng.integers((stop - start + 1) // 2, stop - start + 1))
        late = start + int(stage.rng.integers(stop - start - part + 1))
        order = stage.rng.permutation(2)
        stage.show(pair[order[0]], start, stop)
        stage.show(pair[order[1]], late, late + part)
    return text_of("moment", asked)


def _order(stage: Stage, wanted: str) -> str:
    rng = stage.rng
    stage.reserve(wanted)
    slots = stage.slots(int(rng.integers(3, min(5, stage.length // 2) + 1)))
    names = [stage.name() for _ in slots]
    side, step = (("after", -1), ("before", 1))[rng.integers(2)]
    place = int(rng.integers(1, len(slots))) if step < 0 else int(rng.integers(len(slots) - 1))
    names[place] = wanted
    for name, (start, stop) in zip(names, slots, strict=True):
        stage.show(name, start, stop)
    return text_of("order", names[place + step], side=side)


def _when(stage: Stage, wanted: str) -> str:
    rng = stage.rng
    asked = stage.name()
    quarter = QUARTERS.index(wanted)
    first, end = (math.ceil(stage.length * edge / 4) for edge in (quarter, quarter + 1))
    frames = int(rng.integers(1 if end - first < 2 else 2, min(EVENT, end - first) + 1))
    start = int(rng.integers(first, end - frames + 1))
    stage.show(asked, start, start + frames)
    _extras(stage, int(rng.integers(1, 4)))
    return text_of("when", asked)


def _often(stage: Stage, wanted: str) -> str:
    asked = stage.name()
    for start, stop in stage.slots(int(wanted), gap=1):
        stage.show(asked, start, stop)
    for _ in range(stage.rng.integers(1, 4)):
        name = stage.name()
        for start, stop in stage.slots(int(stage.rng.integers(1, MOST_OFTEN + 1)), gap=1):
            stage.show(name, start, stop)
    return text_of("often", asked)


def _motion(stage: Stage, wanted: str) -> str:
    asked = stage.name()
    ((start, stop),) = stage.slots(1, shortest=MOVER)
    stage.move(asked, start, stop, wanted)
    if stage.rng.random() < 0.5:
        stage.move(stage.name(), start, stop)
    _extras(stage, int(stage.rng.integers(1, 3)))
    return text_of("motion", asked)


def _still(stage: Stage, wanted: str) -> str:
    rng, length = stage.rng, stage.length
    stage.reserve(wanted)
    pause = int(rng.integers(2, max(2, min(EVENT, length // 5)) + 1))
    choices = [
        start
        for start in range(length - pause + 1)
        if all(rest == 0 or rest >= MOVER for rest in (start, length - pause - start))
    ]
    start = choices[rng.integers(len(choices))]
    stop = start + pause
    early, late = rng.integers(0, min(4, start) + 1), rng.integers(0, min(4, length - stop) + 1)
    stage.put(wanted, start - int(early), stop + int(late))
    movers = [stage.name(), stage.name()]
    turn = 0
    for first, end in ((0, start), (stop, length)):
        if end - first >= MOVER and rng.random() < 0.7:
            frames = int(rng.integers(2, end - first + 1))
            at = int(rng.integers(first, end - frames + 1))
            stage.put(stage.name(), at, at + frames)
        while first < end:
            most = 4 * MOVER
            frames = end - first if end - first <= most + MOVER else int(rng.integers(MOVER, most + 1))
            stage.move(movers[turn % 2], first, first + frames)
            first, turn = first + frames, turn + 1
        turn += 1  # so that no mover stands right before and right after a pause
    return text_of("still")


def _exists(stage: Stage, wanted: str) -> str:
    count = int(stage.rng.integers(2, 5))
    names = [stage.name() for _ in range(count)]
    asked = names[stage.rng.integers(count)]
    if wanted == "no":
        like = atlas().groups[atlas().group_of[asked]] if stage.rng.random() < 0.5 else ()
        asked = stage.name(like if set(like) - set(names) else ())
    for name, (start, stop) in zip(names, stage.slots(count), strict=True):
        stage.show(name, start, stop)
    return text_of("exists", asked)


def _known(stage: Stage, wanted: str) -> str:
    asked = stage.name(atlas().groups[wanted])
    names = [asked, *(stage.name() for _ in range(stage.rng.integers(1, 3)))]
    slots = stage.slots(len(names))
    for number, place in enumerate(stage.rng.permutation(len(names))):
        stage.show(names[place], *slots[number])
    choices = group_choices(asked)
    return text_of("known", asked, choices[stage.rng.integers(len(choices))])


def _extras(stage: Stage, count: int) -> None:
    """Things that come and go without regard for the others."""
    for start, stop in stage.slots(count):
        stage.show(stage.name(), start, stop)


_STORIES: dict[str, Callable[[Stage, str], str]] = {
    "needle": _needle,
    "moment": _moment,
    "order": _order,
    "when": _when,
    "often": _often,
    "motion": _motion,
    "still": _still,
    "exists": _exists,
    "known": _known,
}
