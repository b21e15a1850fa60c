"""Training batches of the video world, made on the fly from the clips and pictures of the train split.

A row of dialogue is the prefix ``<s> user : <vision start> visual tokens <vision end>`` followed by questions with
their answers. Each question sees the prefix and itself only, so to the model it is the only question.

The frames are the whole clip, or frames chosen from an even grid of candidates, whose temporal positions are their
places on that grid. Nothing is trained on pruned tokens of a frame.

`get_rope_index` of transformers lets the text behind a video begin at the largest position in height or width plus
one, and decoded tokens at the largest position of all plus one; earlier code let both begin at the latter. Half of the
rows have either, so that the model does not depend on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from ..batches import IGNORE, words
from ..models import BOS, EOS, PAD
from ..questions import ask as ask_picture
from ..scenes import MAX_STICKERS, SIZE, Scene, atlas, make_scene
from . import KINDS
from .model import MERGE, PATCH, PATCHES, SIDE, TOKENS, VIDEO_PAD, VISION_END, VISION_START, vocabulary
from .questions import MOST_OFTEN, NEEDLE, Question
from .scenes import VideoScene, clip
from .timeline import WAYS, Track

GUIDED = 6  # tokens of a row whose attention is guided
QUESTIONS = 150  # tokens of questions in a row
PREFIX = 4  # tokens before the visual ones
PATCH_PIXELS = 16  # of the 144 of a patch that must belong to a thing for the patch to show it
TOKEN_PIXELS = 32  # the same of the 576 of a token
STILL = len(WAYS)
MOVED = 5  # pixels after which a movement can be seen
PICTURE_KINDS = {"where": 1, "exists": 2, "count": 2, "relation": 3, "locate": 2}  # at most, per picture
WEIGHTS = {
    "needle": 4,
    "moment": 2,
    "order": 2.5,
    "often": 4,
    "motion": 3,
    "still": 3,
    "exists": 0.6,
    "known": 0.3,
}
STORIES = {
    "needle": 0.14,
    "moment": 0.08,
    "order": 0.2,
    "when": 0.06,
    "often": 0.24,
    "motion": 0.14,
    "still": 0.14,
}
WANTED = {"look": "wanted", "mate": "mate_wanted", "past": "past_wanted", "again": "again_wanted"}
ALL_KINDS = (*KINDS, *(f"picture {kind}" for kind in PICTURE_KINDS))
IndexArray = NDArray[np.int64]


def tiles(owner: NDArray[np.int8], size: int, pixels: int, things: int) -> IndexArray:
    """What each square of an owner map shows: [F, 96, 96] to [F, n * n], -1 for background."""
    side = SIZE // size
    cut = owner.reshape(-1, side, size, side, size).swapaxes(2, 3).reshape(len(owner), side * side, -1)
    shares = np.stack([(cut == index).sum(-1) for index in range(max(things, 1))], -1)
    return np.where(shares.max(-1) >= pixels, shares.argmax(-1), -1)


def soften(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames [N, 96, 96, 3] with colour at half the resolution, as video files store it."""
    values = pixels.astype(np.float32)
    light = values @ np.array([0.299, 0.587, 0.114], np.float32)
    colour = values - light[..., None]
    half = SIZE // 2
    mean = colour.reshape(-1, half, 2, half, 2, 3).mean((2, 4), keepdims=True)
    spread = np.broadcast_to(mean, (len(pixels), half, 2, half, 2, 3)).reshape(values.shape)
    softened: NDArray[np.uint8] = np.clip(light[..., None] + spread, 0, 255).astype(np.uint8)
    return softened


class FrameBatches(IterableDataset[dict[str, Tensor]]):
    """Endless batches for the vision tower: half pictures of the picture world, half frames of clips.

    Each batch holds for N frames: pixels [N, 96, 96, 3] uint8; label [N, 64] (0 background, 1.. names, last a sign)
    and centre [N, 64, 2] in 0..1 of every patch, in the order of the processor; token_label [N, 16] and
    token_centre [N, 16, 2] of every token.
    """

    def __init__(self, first: int, size: int) -> None:
        self.first, self.size = first, size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        torch.set_num_threads(1)
        step = self.first
        while True:
            rng = np.random.default_rng((step, 3))
            parts = [_of_picture(make_scene(step * self.size + i)) for i in range(self.size // 2)]
            while len(parts) < self.size:
                kind = KINDS[rng.integers(len(KINDS))]
                scene = clip("train", int(rng.integers(50_000_000)), kind)
                shown = [f for f in range(scene.length) if scene.visible(f)]
                if shown:
                    parts.append(_of_frame(scene, int(shown[rng.integers(len(shown))])))
            step += 1
            batch = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
            soft = rng.random(self.size) < 0.5
            batch["pixels"][soft] = soften(batch["pixels"][soft])
            yield {key: torch.from_numpy(value) for key, value in batch.items()}


def _of_picture(scene: Scene) -> dict[str, np.ndarray]:
    boxes = [sticker.box for sticker in scene.stickers]
    labels = [1 + atlas().names.index(sticker.name) for sticker in scene.stickers]
    missing = MAX_STICKERS - len(boxes)
    sign = scene.sign.box if scene.sign is not None else (0, 0, 0, 0)
    return _squares(
        scene.pixels,
        scene.owner,
        [*labels, *[0] * missing, 1 + len(atlas().names)],
        [*boxes, *[(0, 0, 0, 0)] * missing, sign],
    )


def _of_frame(scene: VideoScene, frame: int) -> dict[str, np.ndarray]:
    visible = scene.visible(frame)
    labels = [1 + atlas().names.index(track.name) for track in visible]
    return _squares(scene.frame(frame), scene.owner(frame), labels, [track.box(frame) for track in visible])


def _squares(
    pixels: NDArray[np.uint8], owner: NDArray[np.int8], labels: list[int], boxes: list[tuple[int, ...]]
) -> dict[str, np.ndarray]:
    label = np.array([*labels, 0])  # the last stands for background, index -1
    centre = np.array([[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in boxes] + [[0, 0]], np.float32) / SIZE
    fine = tiles(owner[None], PATCH, PATCH_PIXELS, len(labels))[0]
    fine = fine.reshape(SIDE, MERGE, SIDE, MERGE).swapaxes(1, 2).reshape(PATCHES * PATCHES)
    coarse = tiles(owner[None], PATCH * MERGE, TOKEN_PIXELS, len(labels))[0]
    return {
        "pixels": pixels,
        "label": label[fine],
        "centre": centre[fine],
        "token_label": label[coarse],
        "token_centre": centre[coarse],
    }


@dataclass(frozen=True)
class Shown:
    """Frames of a clip as the model sees them.

    Attributes:
        scene: the clip.
        frames: their numbers, ascending.
        places: their temporal positions, ascending.
        candidates: temporal positions there are.
    """

    scene: VideoScene
    frames: IndexArray
    places: IndexArray
    candidates: int

    def inside(self, spans: tuple[tuple[int, int], ...]) -> NDArray[np.bool_]:
        """Which frames lie in half-open spans: [F]."""
        found = np.zeros(len(self.frames), bool)
        for start, stop in spans:
            found |= (self.frames >= start) & (self.frames < stop)
        return found

    def of(self, track: Track) -> NDArray[np.bool_]:
        """Which frames show a track: [F]."""
        return self.inside(((track.start, track.stop),))

    def answers(self, question: Question) -> bool:
        """Whether these frames are enough to answer a question."""
        scene, seen = self.scene, [self.inside((span,)) for span in question.spans]
        if not all(one.any() for one in seen):
            return False
        if question.kind == "needle":
            count = int(seen[0].sum())
            others = [t for t in scene.tracks if (t.start, t.stop) != question.spans[0]]
            return all(int(self.of(t).sum()) > count for t in others if self.of(t).any())
        if question.kind == "often":
            return self.separate(question.spans)
        if question.kind == "motion":
            spans = question.spans[0]
            (track,) = (
                t
                for t in scene.tracks
                if (t.start, t.stop) == spans and f"the {t.name} move" in question.text
            )
            boxes = [track.box(int(frame)) for frame in self.frames[seen[0]]]
            return _distance(boxes[0], boxes[-1]) > MOVED
        return True

    def separate(self, spans: tuple[tuple[int, int], ...]) -> bool:
        """Whether there is a frame between any two consecutive spans."""
        gaps = [((first[1], second[0]),) for first, second in itertools.pairwise(spans)]
        return all(self.inside(gap).any() for gap in gaps)


def _distance(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return max(abs(first[0] - second[0]), abs(first[1] - second[1]))


def show(scene: VideoScene, count: int, candidates: int, rng: np.random.Generator) -> Shown:
    """Frames of a clip: an even grid of candidates, of which half at random and half around the relevant moment stay."""
    grid = ((np.arange(candidates) + 0.5) * scene.length / candidates).astype(np.int64)
    if count >= candidates:
        return Shown(scene, grid, np.arange(candidates), candidates)
    whole = Shown(scene, grid, np.arange(candidates), candidates)
    liking = rng.random(candidates)
    if rng.random() < 0.5:
        liking += whole.inside(scene.question.spans) * rng.uniform(0, 1)
    kept = np.sort(np.argsort(-liking)[:count])
    return Shown(scene, grid[kept], kept, candidates)


@dataclass(frozen=True)
class Bucket:
    """Rows of one shape.

    Attributes:
        frames: frames of a row; 1 stands for pictures.
        rows: rows of a batch.
        share: how often it comes.
    """

    frames: int
    rows: int
    share: float


BUCKETS = (
    Bucket(1, 32, 0.05),
    Bucket(8, 20, 0.12),
    Bucket(12, 16, 0.26),
    Bucket(24, 9, 0.15),
    Bucket(48, 4, 0.16),
    Bucket(120, 2, 0.26),
)


class VideoBatches(IterableDataset[dict[str, Tensor]]):
    """Endless batches of dialogue; every batch is of one of `BUCKETS`.

    Each batch holds, for B rows of F frames and T tokens:

    - pixels [B * F, 96, 96, 3] uint8; ids [B, T]; positions [3, B, T]; mask [B, 1, T, T] bool, True where a query (row)
      sees a key (column);
    - target [B, T], the next token where it belongs to an answer, else `IGNORE`; weight [B, T]; kind [B, T], index into
      `ALL_KINDS` where there is a target, else -1;
    - look [Q, 2], row and token of every question's last token, and wanted [Q, F * 16] bool, the visual tokens that hold
      its answer;
    - mate, past, again [M, 2], row and visual token of some things, and beside each what its attention is drawn to:
      mate_wanted [M, F * 16] bool, what is there with it; past_wanted, itself in earlier frames; again_wanted, float, the
      weight of each token where an appearance of its name began;
    - centre and shift [B, F * 16, 2] of the token's thing in 0..1, and how far it is from where it was first seen (NaN the
      first time);
    - for each of the F * 16 visual tokens of a row, `IGNORE` where it is not known: label; moves (`WAYS`, then still);
      ordinal (appearances of that name so far, less one); company (name of the only other thing there + 1, or 0); before
      (name of what was there before + 1, or 0); gone (name of what disappeared last + 1, or 0); brief (whether that was
      there for a moment only, or the token's own thing so far); restless (whether anything in the frame moves).
    """

    def __init__(self, first: int, buckets: tuple[Bucket, ...] = BUCKETS) -> None:
        self.first, self.buckets = first, buckets

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        torch.set_num_threads(1)
        ids = vocabulary()
        shares = np.array([bucket.share for bucket in self.buckets])
        step = self.first
        while True:
            rng = np.random.default_rng((step, 4))
            bucket = self.buckets[rng.choice(len(self.buckets), p=shares / shares.sum())]
            make = _picture_row if bucket.frames == 1 else _video_row
            rows = [make(step * 64 + i, bucket.frames, ids, rng) for i in range(bucket.rows)]
            step += 1
            ragged: dict[str, np.ndarray] = {}
            for key, mask in WANTED.items():
                pairs = [np.stack([np.full(len(row[key]), i), row[key]], 1) for i, row in enumerate(rows)]
                ragged |= {key: np.concatenate(pairs), mask: np.concatenate([row[mask] for row in rows])}
            batch = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key not in ragged}
            batch["pixels"] = batch["pixels"].reshape(-1, SIZE, SIZE, 3)
            if rng.random() < 0.7:
                batch["pixels"] = soften(batch["pixels"])
            batch["positions"] = batch["positions"].swapaxes(0, 1)
            yield {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in (batch | ragged).items()}


def _video_row(
    seed: int, frames: int, ids: dict[str, int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    kind = rng.choice(list(STORIES), p=list(STORIES.values()))  # the others are asked about every clip anyway
    dense = rng.random() < 0.55 or frames >= 120
    length = (
        int(rng.integers(max(frames, 8), 2 * frames + 1))
        if dense
        else int(rng.integers(max(24, frames), 241))
    )
    if dense and rng.random() < 0.6:
        length = max(frames, 8)
    scene = clip("train", seed % 90_000_000, kind, length)
    candidates = frames if dense else min(length, int(rng.choice((2, 3, 4, 6, 10)) * frames), 120)
    shown = show(scene, frames, max(candidates, frames), rng)
    chosen = _choose(shown, rng)
    seen = [(question, shown.inside(question.spans)) for question in chosen]
    facts, owners = _facts(shown)
    asked = [(question.kind, question.text, question.answer) for question in chosen]
    wanted = [_wanted(question, inside, shown, owners) for question, inside in seen]
    knowing = facts["company"] > 0
    wanted = [one & knowing if q.kind == "moment" else one for one, q in zip(wanted, chosen, strict=True)]
    row = _dialogue(asked, wanted, shown.places, shown.candidates, ids, rng)
    row["pixels"] = np.stack([scene.frame(int(frame)) for frame in shown.frames])
    return row | facts | _guides(facts, owners, rng) | _beginnings(facts, owners, rng)


def _guides(
    facts: dict[str, np.ndarray], owners: IndexArray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Some tokens of things, and where one head of theirs is drawn to: their company, and themselves before."""
    flat, frame = owners.ravel(), np.repeat(np.arange(len(owners)), TOKENS)
    order = np.arange(len(flat))
    found: dict[str, np.ndarray] = {}
    for key, known in (("mate", facts["company"] > 0), ("past", facts["moves"] != IGNORE)):
        tokens = rng.permutation(np.flatnonzero(known))[:GUIDED]
        near = (order[None] < tokens[:, None]) & (flat[None] >= 0)
        same = flat[None] == flat[tokens, None]
        if key == "mate":
            wanted = near & ~same & (facts["label"][None] == facts["company"][tokens, None])
            wanted &= frame[tokens, None] - frame[None] <= 1
        else:
            wanted = near & same & (frame[None] < frame[tokens, None])
        fit = wanted.any(1)
        found |= {key: tokens[fit], f"{key}_wanted": wanted[fit]}
    return found


def _beginnings(
    facts: dict[str, np.ndarray], owners: IndexArray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Some tokens of things, and a head that counts: the share of attention due to each token before them.

    It is drawn to where each appearance of that name so far began, to every appearance alike; what is left for ``<s>``
    then says how many there were.
    """
    flat, frame = owners.ravel(), np.repeat(np.arange(len(owners)), TOKENS)
    label, ordinal = facts["label"], facts["ordinal"]
    again, first = np.flatnonzero(ordinal > 0), np.flatnonzero(ordinal == 0)
    tokens = np.concatenate([rng.permutation(again)[:GUIDED], rng.permutation(first)[: GUIDED // 2]])
    begins = np.zeros(len(flat))
    for track in np.unique(flat[flat >= 0]):
        at = np.flatnonzero((flat == track) & (frame == frame[flat == track].min()))
        begins[at] = 1 / len(at)
    before = np.arange(len(flat))[None] <= tokens[:, None]
    wanted = begins[None] * (before & (label[None] == label[tokens, None]))
    return {"again": tokens, "again_wanted": wanted.astype(np.float32)}


def _choose(shown: Shown, rng: np.random.Generator) -> list[Question]:
    """The question the clip was made for, then others of as many kinds as possible."""
    fit = [question for question in shown.scene.questions if shown.answers(question)]
    chosen = [question for question in fit[:1] if question == shown.scene.question]
    rest = [fit[i] for i in rng.permutation(len(fit)) if fit[i] not in chosen]
    most = {"exists": 3, "often": 2, "known": 1, "order": 3, "moment": 3, "when": 2, "motion": 2}
    yes = [q for q in rest if q.kind == "exists" and q.answer == "yes"]
    no = [q for q in rest if q.kind == "exists" and q.answer == "no"]
    rest = [q for q in rest if q.kind != "exists"] + yes[:2] + no[:2]
    for kind in dict.fromkeys(question.kind for question in rest):
        found = [question for question in rest if question.kind == kind]
        if kind == "often":
            found = [question for question in found if question.answer != "1" or rng.random() < 0.2]
        chosen += found[: most.get(kind, 4)]
    return [chosen[0], *(chosen[1 + i] for i in rng.permutation(len(chosen) - 1))] if chosen else []


def _wanted(
    question: Question, inside: NDArray[np.bool_], shown: Shown, owners: IndexArray
) -> NDArray[np.bool_]:
    """The visual tokens [F * 16] to look at for a question, from the index of the track at each token [F, 16]."""
    tracks = shown.scene.tracks
    if question.kind == "known" or not inside.any():
        return np.zeros(owners.size, bool)
    names = question.caption.split(" and ")
    names = [name.split(" ", 1)[1] for name in names]
    if question.kind in ("order", "needle", "still"):
        names = [question.answer]
    mine = np.array([track.name in names for track in tracks] + [False])
    if question.kind == "often":  # the last appearance says how many there were
        inside = inside & shown.inside((question.spans[-1],))
    if question.kind == "motion":
        inside = inside & (np.cumsum(inside) > 1)
    found: NDArray[np.bool_] = (mine[owners] & inside[:, None]).ravel()
    return found


def _facts(shown: Shown) -> tuple[dict[str, np.ndarray], IndexArray]:
    """What every visual token shows and could know from the frames so far, and its track [F, 16] (-1 background)."""
    tracks, names = shown.scene.tracks, atlas().names
    owners = _owners(shown)
    shows = np.stack([shown.of(track) for track in tracks]) if tracks else np.zeros((0, len(owners)), bool)
    name_of = np.array([1 + names.index(track.name) for track in tracks] + [0])
    of_things = _of_things(shown, shows, name_of)
    column = np.arange(len(owners))[:, None]
    values = {key: value[owners, column] for key, value in of_things.items()}
    gone, brief = _of_the_past(shown, shows, name_of)
    values["gone"] = np.broadcast_to(gone[:, None], owners.shape)
    values["brief"] = np.where(owners >= 0, values.pop("young"), brief[:, None])
    _hide_later_company(values["company"], owners, shows)
    values["restless"] = _restless(shown, owners)
    values["label"] = name_of[owners]
    places = {key: values.pop(key).reshape(-1, 2) for key in ("centre", "shift")}
    return {key: value.reshape(-1).astype(np.int64) for key, value in values.items()} | places, owners


def _owners(shown: Shown) -> IndexArray:
    """The track that every token shows, [F, 16], -1 for background."""
    scene = shown.scene
    number = {id(track): index for index, track in enumerate(scene.tracks)}
    owners = np.full((len(shown.frames), TOKENS), -1, np.int64)
    for f, frame in enumerate(shown.frames.tolist()):
        visible = scene.visible(frame)
        if visible:
            found = tiles(scene.owner(frame)[None], PATCH * MERGE, TOKEN_PIXELS, len(visible))[0]
            owners[f] = np.array([*(number[id(track)] for track in visible), -1])[found]
    return owners


def _of_the_past(
    shown: Shown, shows: NDArray[np.bool_], name_of: IndexArray
) -> tuple[IndexArray, IndexArray]:
    """Per frame the name of what disappeared last (0 if nothing did), and whether it was there for a moment only."""
    count = shows.shape[1]
    gone, brief = np.zeros(count, np.int64), np.full(count, IGNORE)
    last = -1
    for f in range(1, count):
        ended = np.flatnonzero(shows[:, f - 1] & ~shows[:, f])
        last = int(ended[-1]) if len(ended) else last
        if last >= 0:
            gone[f] = name_of[last]
            brief[f] = int(shown.scene.tracks[last].length <= NEEDLE[1])
    return gone, brief


def _of_things(shown: Shown, shows: NDArray[np.bool_], name_of: IndexArray) -> dict[str, np.ndarray]:
    """Facts of every track in every frame, [tracks + 1, F]; `IGNORE` (NaN) where they are unknown and for background."""
    tracks, shape = shown.scene.tracks, (len(shows) + 1, shows.shape[1])
    facts = {key: np.full(shape, IGNORE) for key in ("moves", "ordinal", "company", "before", "young")}
    centre, shift = np.zeros((*shape, 2), np.float32), np.full((*shape, 2), np.nan, np.float32)
    for index, track in enumerate(tracks):
        seen = np.flatnonzero(shows[index])
        if not len(seen):
            continue
        boxes = [track.box(int(shown.frames[f])) for f in seen]
        middles = np.array([[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in boxes], np.float32) / SIZE
        centre[index, seen] = middles
        shift[index, seen[1:]] = middles[1:] - middles[0]
        earlier = [other for other in range(index) if tracks[other].name == track.name and shows[other].any()]
        chain = tuple((tracks[i].start, tracks[i].stop) for i in (*earlier, index))
        known = shown.separate(chain) and len(earlier) < MOST_OFTEN
        facts["ordinal"][index, seen] = len(earlier) if known else IGNORE
        facts["before"][index, seen] = _before(shows[:, : seen[0]], name_of)
        facts["young"][index, seen] = shown.frames[seen] - shown.frames[seen[0]] < NEEDLE[1]
        for at, f in enumerate(seen.tolist()):
            if at and (track.way is None or _distance(boxes[0], boxes[at]) > MOVED):
                facts["moves"][index, f] = STILL if track.way is None else WAYS.index(track.way)
            others = {int(name_of[i]) for i in np.flatnonzero(shows[:, f]) if i != index}
            facts["company"][index, f] = IGNORE if len(others) > 1 else next(iter(others), 0)
    return facts | {"centre": centre, "shift": shift}


def _before(shows: NDArray[np.bool_], name_of: IndexArray) -> int:
    """The name of the track that was seen last, 0 if there was none, `IGNORE` if there were several."""
    past = np.flatnonzero(shows.any(1))
    if not len(past):
        return 0
    ends = np.array([np.flatnonzero(shows[i])[-1] for i in past])
    latest = past[ends == ends.max()]
    return int(name_of[latest[0]]) if len(latest) == 1 else IGNORE


def _hide_later_company(company: IndexArray, owners: IndexArray, shows: NDArray[np.bool_]) -> None:
    """A token sees only what stands before it: its company must do so, in this frame or, both, in the one before."""
    place = np.arange(TOKENS)
    for f in range(len(owners)):
        for index in np.unique(owners[f][owners[f] >= 0]).tolist():
            mates = (owners[f] >= 0) & (owners[f] != index)
            together = f and shows[index, f - 1] and mates.any() and shows[owners[f][mates], f - 1].all()
            if mates.any() and not together:
                company[f, (owners[f] == index) & (place < place[mates].min())] = IGNORE


def _restless(shown: Shown, owners: IndexArray) -> IndexArray:
    """Whether anything in the frame moves, [F, 16]; `IGNORE` at tokens that stand before what would tell."""
    scene, place = shown.scene, np.arange(TOKENS)
    moving = np.array([any(t.way for t in scene.visible(f)) for f in shown.frames.tolist()], np.int64)
    movers = np.array([track.way is not None for track in scene.tracks] + [False])[owners]
    last = np.where(movers.any(1), TOKENS - 1 - movers[:, ::-1].argmax(1), -1)
    told = (place[None] >= last[:, None]) & (movers.any(1) == (moving > 0))[:, None]
    settled = np.where(moving[:, None] > 0, told, place[None] == TOKENS - 1)
    return np.where(settled, moving[:, None], IGNORE)


def _picture_row(
    seed: int, frames: int, ids: dict[str, int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    scene = make_scene(300_000_000 + seed % 90_000_000)
    asked: list[tuple[str, str, str]] = []
    for kind, most in PICTURE_KINDS.items():
        found = list(ask_picture(scene, kind, rng))
        if kind == "count":
            found = [question for question in found if question.answer != "1" or rng.random() < 0.4]
        picked = [found[index] for index in rng.permutation(len(found))[:most]]
        asked += [(f"picture {kind}", question.text, question.answer) for question in picked]
    asked = [asked[i] for i in rng.permutation(len(asked))]
    squares = _of_picture(scene)
    label = squares["token_label"]
    row = _dialogue(asked, [np.zeros(TOKENS, bool) for _ in asked], np.zeros(1, np.int64), 1, ids, rng)
    known = np.where(label > len(atlas().names), 0, label)
    unknown = np.full(TOKENS, IGNORE)
    facts = {key: unknown for key in ("moves", "ordinal", "company", "before", "gone", "brief", "restless")}
    empty = np.zeros((0, TOKENS), bool)
    guides = {key: empty[:, 0].astype(np.int64) for key in ("mate", "past", "again")}
    guides |= {"mate_wanted": empty, "past_wanted": empty, "again_wanted": empty.astype(np.float32)}
    places = {"centre": squares["token_centre"], "shift": np.full((TOKENS, 2), np.nan, np.float32)}
    return row | facts | guides | places | {"label": known, "pixels": scene.pixels[None]}


def _dialogue(
    asked: list[tuple[str, str, str]],
    wanted: list[NDArray[np.bool_]],
    places: IndexArray,
    candidates: int,
    ids: dict[str, int],
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    visual = len(places) * TOKENS
    first = PREFIX + visual + 1  # of the questions
    length = first + QUESTIONS
    tokens = np.full(length, ids[PAD], np.int64)
    segment = np.full(length, -1, np.int64)  # 0 prefix, 1.. questions, -1 unused
    target = np.full(length, IGNORE, np.int64)
    weight = np.zeros(length, np.float32)
    kind_of = np.full(length, -1, np.int64)
    positions = np.zeros((3, length), np.int64)
    tokens[:PREFIX] = [ids[word] for word in (BOS, "user", ":", VISION_START)]
    tokens[PREFIX : first - 1] = ids[VIDEO_PAD]
    tokens[first - 1] = ids[VISION_END]
    segment[:first] = 0
    positions[:, :PREFIX] = np.arange(PREFIX)
    row, column = np.divmod(np.arange(TOKENS), SIDE)
    positions[0, PREFIX : first - 1] = PREFIX + np.repeat(places, TOKENS)
    positions[1, PREFIX : first - 1] = PREFIX + np.tile(row, len(places))
    positions[2, PREFIX : first - 1] = PREFIX + np.tile(column, len(places))
    late = PREFIX + max(candidates, SIDE)
    text = late if rng.random() < 0.5 else PREFIX + SIDE
    positions[:, first - 1] = text
    look, kept = [], []
    end = first
    for number, (kind, question, answer) in enumerate(asked):
        ask = words(f"{question} ASSISTANT:")
        reply = [*answer.split(), EOS]
        size = len(ask) + len(reply) - 1  # the last token is only ever a target
        if end + size > length:
            continue
        start, end = end, end + size
        tokens[start:end] = [ids[word] for word in [*ask, *reply[:-1]]]
        segment[start:end] = number + 1
        asks = text + 1 + np.arange(len(ask))
        decodes = max(late, int(asks[-1]) + 1) + np.arange(len(reply) - 1)
        positions[:, start:end] = np.concatenate([asks, decodes])
        said = slice(start + len(ask) - 1, end)
        target[said] = [ids[word] for word in reply]
        weight[said] = WEIGHTS.get(kind, 1) / len(reply) ** 0.5
        kind_of[said] = ALL_KINDS.index(kind)
        look.append(said.start)
        kept.append(wanted[number])
    causal = np.tri(length, dtype=bool)
    mask = causal & ((segment[:, None] == segment[None]) | (segment[None] == 0)) & (segment[None] >= 0)
    mask |= np.eye(length, dtype=bool)  # a hidden token sees itself, so that its softmax is defined
    return {
        "ids": tokens,
        "positions": positions,
        "mask": mask[None],
        "target": target,
        "weight": weight,
        "kind": kind_of,
        "look": np.array(look, np.int64),
        "wanted": np.array(kept, bool).reshape(len(kept), visual),
    }
