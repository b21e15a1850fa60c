"""Questions about a clip, answered from its timeline and never from its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..questions import with_article
from ..scenes import atlas
from .timeline import WAYS, Timeline, Track, group

KINDS = ("needle", "moment", "order", "when", "often", "motion", "still", "exists", "known")
QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")
MOST_OFTEN = 4
NEEDLE = (2, 6)  # frames of a thing that appears "for a moment"
STAYS = 4  # every other thing of such a clip stays at least this many times as long

# Groups that nobody confuses, for questions that need no video: those of one row never stand against each other.
_APART = (("fruit", "vegetable", "plant"), ("animal",), ("vehicle",))
KNOWN_GROUPS = tuple(name for row in _APART for name in row)

# Words of questions, answers and captions that the picture world's tokenizer does not know.
NEW_WORDS = (
    "after",
    "appear",
    "appears",
    "before",
    "comes",
    "down",
    "first",
    "for",
    "last",
    "moment",
    "move",
    "moves",
    "nothing",
    "often",
    "or",
    "quarter",
    "second",
    "third",
    "up",
    "video",
    "way",
    "when",
    "while",
)

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Question:
    """A question about one clip.

    Attributes:
        kind: one of `KINDS`.
        text: the question.
        answer: the answer, lower case.
        spans: half-open spans (start, stop) of the frames that hold the answer; none where the answer is "no" and
            where the question needs no video.
        caption: what those frames show that matters, in words that the reference CLIP knows. It names the answer
            where the answer is a thing, as the caption of a moment does.
    """

    kind: str
    text: str
    answer: str
    spans: Spans
    caption: str

    @property
    def needs_vision(self) -> bool:
        """Whether the question cannot be answered without the video (the modality importance of vision)."""
        return self.kind != "known"

    @property
    def prior(self) -> float:
        """Share of right answers of the best guess that knows the question and not the video."""
        names = len(atlas().names)
        return {
            "needle": 1 / names,
            "moment": 1 / (names - 1),
            "order": 1 / (names - 1),
            "when": 1 / len(QUARTERS),
            "often": 1 / MOST_OFTEN,
            "motion": 1 / len(WAYS),
            "still": 1 / names,
            "exists": 1 / 2,
            "known": 1.0,
        }[self.kind]


def answers(kind: str) -> tuple[str, ...]:
    """The answers of a kind; clips made for it have each of them equally often.

    Raises:
        ValueError: if there is no such kind.
    """
    few = {
        "when": QUARTERS,
        "often": tuple(str(number + 1) for number in range(MOST_OFTEN)),
        "motion": WAYS,
        "exists": ("yes", "no"),
        "known": KNOWN_GROUPS,
    }
    check_kind(kind)
    return few.get(kind, atlas().names)


def check_kind(kind: str) -> None:
    """Raise ValueError if there is no such kind of question."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")


def text_of(kind: str, name: str = "", other: str = "", side: str = "after") -> str:
    """The question of a kind about a thing.

    Args:
        kind: one of `KINDS`.
        name: the thing asked about, where there is one.
        other: for ``known``, the two groups, as `group_choices` writes them.
        side: for ``order``, "after" or "before".
    """
    return {
        "needle": "what appears for a moment?",
        "moment": f"what is there with the {name}?",
        "order": f"what comes {side} the {name}?",
        "when": f"when does the {name} appear?",
        "often": f"how often does the {name} appear?",
        "motion": f"which way does the {name} move?",
        "still": "what is there while nothing moves?",
        "exists": f"does {with_article(name)} appear?" if name else "",
        "known": f"is the {name} {other}?",
    }[kind]


def group_choices(name: str) -> list[str]:
    """What one can ask between, such as "a fruit or an animal"; nothing for a name of an ambiguous group."""
    mine = group(name)
    rows = [row for row in _APART if mine in row]
    if not rows:
        return []
    against = [other for row in _APART if row is not rows[0] for other in row]
    pairs = [pair for other in against for pair in ((mine, other), (other, mine))]
    return [f"{with_article(first)} or {with_article(second)}" for first, second in pairs]


def ask(timeline: Timeline, kind: str) -> Iterator[Question]:
    """Every question of a kind that has exactly one right answer in this clip.

    Raises:
        ValueError: if there is no such kind.
    """
    check_kind(kind)
    for text, answer, spans, things in _ASK[kind](timeline):
        yield Question(kind, text, answer, spans, " and ".join(with_article(thing) for thing in things))


_Found = tuple[str, str, Spans, tuple[str, ...]]  # text, answer, spans, things of the caption


def _span(track: Track) -> tuple[int, int]:
    return track.start, track.stop


def _single(timeline: Timeline) -> list[Track]:
    return [track for track in timeline.tracks if len(timeline.appearances(track.name)) == 1]


def _needle(timeline: Timeline) -> Iterator[_Found]:
    short = [track for track in timeline.tracks if track.length <= NEEDLE[1]]
    if len(short) != 1 or short[0] not in _single(timeline) or timeline.length < STAYS * short[0].length:
        return
    (needle,) = short
    if all(track is needle or track.length >= STAYS * needle.length for track in timeline.tracks):
        yield text_of("needle"), needle.name, (_span(needle),), (needle.name,)


def _moment(timeline: Timeline) -> Iterator[_Found]:
    for track in _single(timeline):
        company = [other for other in timeline.tracks if other is not track and other.overlaps(track)]
        if len(company) == 1:
            (other,) = company
            span = max(track.start, other.start), min(track.stop, other.stop)
            yield text_of("moment", track.name), other.name, (span,), (track.name, other.name)


def _order(timeline: Timeline) -> Iterator[_Found]:
    alone = [
        track
        for track in timeline.tracks
        if not any(other is not track and other.overlaps(track) for other in timeline.tracks)
    ]
    for first, second in zip(timeline.tracks, timeline.tracks[1:], strict=False):
        if first in alone and second in alone and first.name != second.name:
            spans = (_span(first), _span(second))
            for asked, answer, side in ((first, second, "after"), (second, first, "before")):
                if len(timeline.appearances(asked.name)) == 1:
                    text = text_of("order", asked.name, side=side)
                    yield text, answer.name, spans, (asked.name, answer.name)


def _when(timeline: Timeline) -> Iterator[_Found]:
    for track in _single(timeline):
        quarter = timeline.quarter(track.start)
        if quarter == timeline.quarter(track.stop - 1):
            yield text_of("when", track.name), QUARTERS[quarter], (_span(track),), (track.name,)


def _often(timeline: Timeline) -> Iterator[_Found]:
    for name in timeline.names:
        found = timeline.appearances(name)
        if len(found) <= MOST_OFTEN:
            yield text_of("often", name), str(len(found)), tuple(map(_span, found)), (name,)


def _motion(timeline: Timeline) -> Iterator[_Found]:
    for track in _single(timeline):
        if track.way is not None:
            yield text_of("motion", track.name), track.way, (_span(track),), (track.name,)


def _still(timeline: Timeline) -> Iterator[_Found]:
    shown: set[str] = set()
    frames = []
    for frame in range(timeline.length):
        visible = timeline.visible(frame)
        if visible and all(track.way is None for track in visible):
            shown.update(track.name for track in visible)
            frames.append(frame)
    if len(shown) == 1 and any(track.way is not None for track in timeline.tracks):
        (name,) = shown
        yield text_of("still"), name, _spans(frames), (name,)


def _spans(frames: list[int]) -> Spans:
    """Half-open spans of ascending frames."""
    found: list[tuple[int, int]] = []
    for frame in frames:
        if found and found[-1][1] == frame:
            found[-1] = found[-1][0], frame + 1
        else:
            found.append((frame, frame + 1))
    return tuple(found)


def _exists(timeline: Timeline) -> Iterator[_Found]:
    for name in timeline.names:
        spans = tuple(map(_span, timeline.appearances(name)))
        yield text_of("exists", name), "yes", spans, (name,)
    absent = [name for name in atlas().names if name not in timeline.names]
    rng = np.random.default_rng((timeline.seed, timeline.length))
    chosen = [absent[i] for i in rng.permutation(len(absent))[: len(timeline.names)]]
    chosen += [name for name in absent if text_of("exists", name) == timeline.asked]
    for name in dict.fromkeys(chosen):
        yield text_of("exists", name), "no", (), (name,)


def _known(timeline: Timeline) -> Iterator[_Found]:
    for name in timeline.names:
        for pair in group_choices(name):
            yield text_of("known", name, pair), group(name), (), (name,)


_ASK: dict[str, Callable[[Timeline], Iterator[_Found]]] = {
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
