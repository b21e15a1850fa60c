"""Training batches of the picture world, made on the fly from the seeds of the train split."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .models import BOS, EOS, IMAGE, PAD, PATCH, SIDE, tokenizer, vocabulary
from .questions import KINDS, Question, ask, with_article
from .scenes import GRID, MAX_STICKERS, SIZE, Scene, atlas, make_scene

IGNORE = -100
MIN_PIXELS = 10  # of the 64 in a patch that must belong to a thing for the patch to count as showing it
SIGN_LENGTH = 3
ROW = 272  # tokens in a row of dialogue
PER_SCENE = {"where": 1, "exists": 2, "count": 2, "relation": 3, "text": 1, "locate": 2}  # at most, per row
WEIGHTS = {"where": 1.0, "exists": 1.0, "count": 2.0, "relation": 1.5, "text": 3.0, "locate": 1.0}
PAD_ID = vocabulary()[PAD]
CELLS = GRID * GRID


def patch_owners(scene: Scene) -> np.ndarray:
    """The thing each patch shows: (144,) int, -1 background, index of a sticker, or `MAX_STICKERS` for the sign."""
    tiles = scene.owner.reshape(SIDE, PATCH, SIDE, PATCH).transpose(0, 2, 1, 3).reshape(SIDE * SIDE, -1)
    shares = np.stack([(tiles == index).sum(1) for index in range(MAX_STICKERS + 1)], 1)
    return np.where(shares.max(1) >= MIN_PIXELS, shares.argmax(1), -1)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence that names what is in the picture, in random order."""
    names = list(dict.fromkeys(sticker.name for sticker in scene.stickers))
    parts = []
    for index in rng.permutation(len(names)):
        number = scene.count(names[index])
        parts.append(with_article(names[index]) if number == 1 else f"{number} {names[index]} stickers")
    if scene.sign is not None:
        parts.append("a sign")
    text = " and ".join(parts)
    return f"a picture of {text}" if rng.random() < 0.5 else text


def name_texts(rng: np.random.Generator) -> list[str]:
    """One short text or question for every name, all of the same random form."""
    forms = (
        "{one}",
        "a picture of {one}",
        "is there {one}?",
        "how many {name} stickers are there?",
        "at which place is the {name}?",
    )
    form = forms[rng.integers(len(forms))]
    return [form.format(name=name, one=with_article(name)) for name in atlas().names]


class VisionBatches(IterableDataset[dict[str, Tensor]]):
    """Endless batches for the picture model.

    Each batch holds, with B pictures of N = 144 patches:
        pixels (B, 96, 96, 3) uint8; present (B, names) float; label (B, N) 0 background, 1.. names, last the sign;
        centre (B, N, 2) of the patch's sticker or sign in 0..1; number (B, N) of stickers of that name less one, and
        cell (B, N) of the loose 3 x 3 grid, both `IGNORE` elsewhere; string (B, N, 3) characters of the sign and
        glyph (B, N) the one nearest to the patch, both `IGNORE` elsewhere; caption (B, length) and names (names, length) token ids.
    """

    def __init__(self, first_seed: int, batch_size: int) -> None:
        self.first_seed = first_seed
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        torch.set_num_threads(1)
        encode = _Encoder()
        seed = self.first_seed
        while True:
            rng = np.random.default_rng((seed, 1))
            scenes = [make_scene(seed + index) for index in range(self.batch_size)]
            seed += self.batch_size
            yield {
                "pixels": torch.from_numpy(np.stack([scene.pixels for scene in scenes])),
                **{key: torch.from_numpy(value) for key, value in vision_targets(scenes).items()},
                "caption": encode([caption(scene, rng) for scene in scenes]),
                "names": encode(name_texts(rng)),
            }


def vision_targets(scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Dense targets of a batch of scenes; see `VisionBatches`."""
    names, glyphs = atlas().names, atlas().glyphs
    shape = (len(scenes), SIDE * SIDE)
    present = np.zeros((len(scenes), len(names)), np.float32)
    label = np.zeros(shape, np.int64)
    centre = np.zeros((*shape, 2), np.float32)
    number = np.full(shape, IGNORE, np.int64)
    cell = np.full(shape, IGNORE, np.int64)
    string = np.full((*shape, SIGN_LENGTH), IGNORE, np.int64)
    glyph = np.full(shape, IGNORE, np.int64)
    middles = (np.arange(SIDE * SIDE) % SIDE + 0.5) * PATCH
    for row, scene in enumerate(scenes):
        owners = patch_owners(scene)
        for index, sticker in enumerate(scene.stickers):
            mine = owners == index
            present[row, names.index(sticker.name)] = 1
            label[row, mine] = 1 + names.index(sticker.name)
            number[row, mine] = scene.count(sticker.name) - 1
            cell[row, mine] = sticker.position
            centre[row, mine] = _middle(sticker.box)
        if scene.sign is not None:
            mine = owners == MAX_STICKERS
            label[row, mine] = 1 + len(names)
            cell[row, mine] = scene.sign.position
            centre[row, mine] = _middle(scene.sign.box)
            ids = [1 + glyphs.index(character) for character in scene.sign.text]
            string[row, mine] = ids + [0] * (SIGN_LENGTH - len(ids))
            offsets = [np.abs(middles - (box[0] + box[2]) / 2) for box in scene.sign.characters]
            glyph[row, mine] = np.array(ids)[np.argmin(offsets, axis=0)[mine]] - 1
    return {
        "present": present,
        "label": label,
        "centre": centre,
        "number": number,
        "cell": cell,
        "string": string,
        "glyph": glyph,
    }


def loader(dataset: IterableDataset[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Batches made ahead of time by one other process."""
    return iter(DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=8))


def _middle(box: tuple[int, int, int, int]) -> tuple[float, float]:
    return (box[0] + box[2]) / (2 * SIZE), (box[1] + box[3]) / (2 * SIZE)


class DialogueBatches(IterableDataset[dict[str, Tensor]]):
    """Endless batches for the language model: many questions about one picture in one row.

    A row is the prefix ``<s> user: <image> x 144`` followed by questions with their answers. Each question sees the
    prefix and itself only, and its positions go on from the prefix, so to the model it is the only question.

    In most rows the picture's tokens are cropped to a rectangle that still shows every sticker and the sign, as
    unpadding does in models that take pictures of many shapes; the tokens outside are hidden and the positions
    close up.

    Each batch holds what `VisionBatches` holds without the texts, and with T tokens in a row:
        ids (B, T); positions (B, T); mask (B, 1, T, T) bool, True where a query (row) sees a key (column);
        target (B, T) the next token where it belongs to an answer, else `IGNORE`; weight (B, T) float;
        kind (B, T) index into `KINDS` where there is a target, else -1.
    """

    def __init__(self, first_seed: int, batch_size: int, crop_share: float = 0.75) -> None:
        self.first_seed = first_seed
        self.batch_size = batch_size
        self.crop_share = crop_share

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        torch.set_num_threads(1)
        ids = vocabulary()
        seed = self.first_seed
        while True:
            rng = np.random.default_rng((seed, 2))
            scenes = [make_scene(seed + index) for index in range(self.batch_size)]
            seed += self.batch_size
            rows = [dialogue(scene, ids, rng, self.crop_share) for scene in scenes]
            yield {
                "pixels": torch.from_numpy(np.stack([scene.pixels for scene in scenes])),
                **{key: torch.from_numpy(value) for key, value in vision_targets(scenes).items()},
                **{key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]},
            }


def dialogue(
    scene: Scene, ids: dict[str, int], rng: np.random.Generator, crop_share: float
) -> dict[str, np.ndarray]:
    """One row of `DialogueBatches`, without the batch dimension."""
    prefix = [ids[word] for word in (BOS, "user", ":")]
    tokens = np.full(ROW, ids[PAD], np.int64)
    segment = np.full(ROW, -1, np.int64)  # 0 prefix, 1.. questions, -1 unused
    target = np.full(ROW, IGNORE, np.int64)
    weight = np.zeros(ROW, np.float32)
    kind_of = np.full(ROW, -1, np.int64)
    positions = np.zeros(ROW, np.int64)
    images = slice(len(prefix), len(prefix) + SIDE * SIDE)
    tokens[: len(prefix)] = prefix
    tokens[images] = ids[IMAGE]
    segment[: images.stop] = 0
    if rng.random() < crop_share:
        segment[images][~crop(patch_owners(scene), rng)] = -1
    seen = segment[: images.stop] == 0
    positions[: images.stop] = np.maximum(np.cumsum(seen) - 1, 0)
    length = int(seen.sum())
    end = images.stop
    chosen = _choose(scene, rng)
    for number, index in enumerate(rng.permutation(len(chosen))):
        question = chosen[index]
        ask = words(f"{question.text} ASSISTANT:")
        reply = question.answer.split()
        row = [ids[word] for word in [*ask, *reply, EOS]]
        if end + len(row) - 1 > ROW:
            continue
        first = end + len(ask) - 1
        end += len(row) - 1  # the last token is only ever a target
        tokens[end - len(row) + 1 : end] = row[:-1]
        segment[end - len(row) + 1 : end] = number + 1
        positions[end - len(row) + 1 : end] = np.arange(length, length + len(row) - 1)
        target[first:end] = row[len(ask) :]
        weight[first:end] = WEIGHTS[question.kind] / len(row[len(ask) :]) ** 0.5
        kind_of[first:end] = KINDS.index(question.kind)
    causal = np.tri(ROW, dtype=bool)
    mask = causal & ((segment[:, None] == segment[None]) | (segment[None] == 0)) & (segment[None] >= 0)
    mask |= np.eye(ROW, dtype=bool)  # a hidden token sees itself, so that its softmax is defined
    return {
        "ids": tokens,
        "positions": positions,
        "mask": mask[None],
        "target": target,
        "weight": weight,
        "kind": kind_of,
    }


def crop(owners: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random rectangle of the grid that shows every thing: (144,) bool.

    In half of the cases it holds all patches of every thing; in the others it may cut through things, as the edge of
    a photograph does, and holds at least one patch of each.
    """
    inside = np.zeros((SIDE, SIDE), bool)
    things = [np.flatnonzero(owners == thing) for thing in np.unique(owners[owners >= 0])]
    if not things:
        return ~inside.ravel()
    if rng.random() < 0.5:
        needed = np.concatenate(things)
    else:
        needed = np.array([rng.choice(patches) for patches in things])
    rows, columns = needed // SIDE, needed % SIDE
    top, left = rng.integers(rows.min() + 1), rng.integers(columns.min() + 1)
    bottom, right = rng.integers(rows.max(), SIDE) + 1, rng.integers(columns.max(), SIDE) + 1
    inside[top:bottom, left:right] = True
    return inside.ravel()


def words(text: str) -> list[str]:
    """The words of a text as the tokenizer splits it."""
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def _choose(scene: Scene, rng: np.random.Generator) -> list[Question]:
    chosen: list[Question] = []
    for kind, most in PER_SCENE.items():
        found = list(ask(scene, kind, rng))
        if kind == "count":
            found = [question for question in found if question.answer != "1" or rng.random() < 0.4]
        chosen += [found[index] for index in rng.permutation(len(found))[:most]]
    return chosen


class _Encoder:
    """Turns texts into token ids with ``<s>`` and ``</s>``, padded on the right to the longest."""

    def __init__(self) -> None:
        self._tokenizer = tokenizer(end=True, padding_side="right")

    def __call__(self, texts: list[str]) -> Tensor:
        ids: Tensor = self._tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        return ids
