"""Questions about a scene, answered from the scene's data and never from its picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .scenes import MAX_STICKERS, POSITIONS, Box, Scene, Sticker, atlas

KINDS = ("where", "exists", "count", "relation", "text", "locate")
RELATIONS = ("left", "right", "above", "below")


@dataclass(frozen=True)
class Question:
    """A question about one scene.

    Attributes:
        kind: one of `KINDS`.
        text: the question.
        answer: the answer, lower case; characters of a sign are separated by spaces.
        boxes: pixel boxes (x0, y0, x1, y1) that hold the answer; none where the answer is "no".
    """

    kind: str
    text: str
    answer: str
    boxes: tuple[Box, ...]


def answers(kind: str) -> tuple[str, ...] | None:
    """The answers over which a kind is balanced, or None where the scenes balance it by themselves."""
    return {
        "exists": ("yes", "no"),
        "count": tuple(str(number + 1) for number in range(MAX_STICKERS)),
        "relation": RELATIONS,
        "locate": POSITIONS,
    }.get(kind)


def with_article(name: str) -> str:
    """The name with "a" or "an"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Iterator[Question]:
    """Every question of a kind that the scene can answer, in random order.

    For ``exists``, as many names that are absent as names that are present; half of the absent ones come from the
    group of a present one.

    Raises:
        ValueError: if there is no such kind.
    """
    stickers = [scene.stickers[i] for i in rng.permutation(len(scene.stickers))]
    single = [sticker for sticker in stickers if scene.count(sticker.name) == 1]
    if kind == "where":
        for sticker in stickers:
            yield Question(
                kind, f"what is at the {POSITIONS[sticker.position]}?", sticker.name, (sticker.box,)
            )
    elif kind == "exists":
        yield from _exists(scene, rng)
    elif kind == "count":
        for name in dict.fromkeys(sticker.name for sticker in stickers):
            boxes = tuple(sticker.box for sticker in stickers if sticker.name == name)
            yield Question(kind, f"how many {name} stickers are there?", str(len(boxes)), boxes)
    elif kind == "relation":
        for first in single:
            for second in single:
                relation = relation_between(first, second)
                if relation is not None:
                    text = f"where is the {first.name} relative to the {second.name}?"
                    yield Question(kind, text, relation, (first.box, second.box))
    elif kind == "text":
        if scene.sign is not None:
            answer = " ".join(scene.sign.text.lower())
            yield Question(kind, "what does the sign say?", answer, (scene.sign.box,))
    elif kind == "locate":
        for sticker in single:
            text = f"at which place is the {sticker.name}?"
            yield Question(kind, text, POSITIONS[sticker.position], (sticker.box,))
    else:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")


def relation_between(first: Sticker, second: Sticker) -> str | None:
    """Where ``first`` is as seen from ``second``, or None where that is unclear (the same place, or a diagonal)."""
    if first == second:
        return None
    dx = first.box[0] + first.box[2] - second.box[0] - second.box[2]
    dy = first.box[1] + first.box[3] - second.box[1] - second.box[3]
    if abs(dx) > 1.5 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > 1.5 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _exists(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    present = list(dict.fromkeys(sticker.name for sticker in scene.stickers))
    for name in present:
        boxes = tuple(sticker.box for sticker in scene.stickers if sticker.name == name)
        yield Question("exists", f"is there {with_article(name)}?", "yes", boxes)
    absent = [name for name in atlas().names if name not in present]
    groups = {atlas().group_of[name] for name in present}
    near = [name for name in absent if atlas().group_of[name] in groups]
    chosen: list[str] = []
    while len(chosen) < len(present):
        pool = near if rng.random() < 0.5 else absent
        name = pool[rng.integers(len(pool))]
        if name not in chosen:
            chosen.append(name)
            yield Question("exists", f"is there {with_article(name)}?", "no", ())
