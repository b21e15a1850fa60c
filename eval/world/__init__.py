"""The picture world: seeded scenes with exact ground truth, questions about them, and small trained models.

It measures one thing: how accuracy falls as visual tokens are removed, method against method, under one protocol.
It says nothing about the accuracy of a method on a large model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .questions import KINDS, Question, answers, ask
from .scenes import SPLITS, Box, Scene, make_scene, seed_range

__all__ = ["KINDS", "SPLITS", "Example", "examples", "reference_dir", "score"]

_SEEDS_PER_STREAM = 100_000


@dataclass(frozen=True)
class Example:
    """One question about one picture.

    Attributes:
        image: RGB picture of 96 x 96 pixels.
        question: the question in plain English.
        answer: the right answer, lower case; the characters of a sign are separated by spaces.
        kind: one of `KINDS`.
        scene_seed: seed of the scene; no two splits share one.
        split: one of `SPLITS`.
        boxes: pixel boxes (x0, y0, x1, y1) that hold the answer; none where the answer is "no".
    """

    image: Image.Image
    question: str
    answer: str
    kind: str
    scene_seed: int
    split: str
    boxes: tuple[Box, ...]


def examples(split: str, n_per_kind: int, seed: int = 0) -> list[Example]:
    """Questions of a split, the same number of every kind, each about a scene of its own.

    Within a kind, answers are balanced where they are few (yes/no, numbers, directions, places).

    Args:
        split: one of `SPLITS`.
        n_per_kind: number of questions of each of `KINDS`.
        seed: selects another, disjoint set of scenes (0 to 1,000).

    Returns:
        ``len(KINDS) * n_per_kind`` examples; kinds take turns. The same arguments always give the same examples,
        and a smaller ``n_per_kind`` gives the first examples of a larger one.

    Raises:
        ValueError: if there is no such split, or a number is out of range.
    """
    if not 0 <= seed <= 1000:
        raise ValueError(f"seed must be between 0 and 1000, got {seed}")
    if n_per_kind < 0:
        raise ValueError(f"n_per_kind must not be negative, got {n_per_kind}")
    streams = [_stream(split, kind, n_per_kind, seed) for kind in KINDS]
    return [example for turn in zip(*streams, strict=True) for example in turn]


def _stream(split: str, kind: str, count: int, seed: int) -> list[Example]:
    start = seed_range(split).start + (seed * len(KINDS) + KINDS.index(kind)) * _SEEDS_PER_STREAM
    wanted = answers(kind)
    found: list[Example] = []
    order: list[str] = []
    for scene_seed in range(start, start + _SEEDS_PER_STREAM):
        if len(found) == count:
            return found
        rng = np.random.default_rng((scene_seed, KINDS.index(kind)))
        if wanted is not None and not order:
            order = [wanted[i] for i in np.random.default_rng((start, len(found))).permutation(len(wanted))]
        scene = make_scene(scene_seed)
        for question in ask(scene, kind, rng):
            if wanted is None or question.answer == order[0]:
                found.append(_example(scene, question))
                order = order[1:]
                break
    if len(found) == count:
        return found
    raise ValueError(f"split {split!r} has only {len(found)} scenes for kind {kind!r}; asked for {count}")


def _example(scene: Scene, question: Question) -> Example:
    return Example(
        scene.image, question.text, question.answer, question.kind, scene.seed, scene.split, question.boxes
    )


def reference_dir(name: str = "llava") -> Path:
    """Folder of a shipped checkpoint, for ``from_pretrained``.

    Args:
        name: ``"llava"``, ``"clip"`` or ``"qwen2-vl"`` (for video).

    Raises:
        FileNotFoundError: if the package holds no checkpoint of this name.
    """
    shelf = Path(__file__).resolve().parent.parent / "reference"
    folder = shelf / name
    if not (folder / "config.json").is_file():
        shipped = sorted(path.parent.name for path in shelf.glob("*/config.json"))
        raise FileNotFoundError(
            f"no reference checkpoint {name!r} in {shelf}; shipped are {', '.join(map(repr, shipped))}"
        )
    return folder


def score(prediction: str, answer: str) -> bool:
    """Whether a prediction equals the answer, apart from case, punctuation and spacing."""
    return _normalise(prediction) == _normalise(answer)


def _normalise(text: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9 ]", " ", text.lower()).split())
