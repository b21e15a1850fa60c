"""Training batches of the picture world, made on the fly from the seeds of the train split."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .models import PAD, PATCH, SIDE, tokenizer, vocabulary
from .questions import with_article
from .scenes import GRID, MAX_STICKERS, SIZE, Scene, atlas, make_scene

IGNORE = -100
MIN_PIXELS = 10  # of the 64 in a patch that must belong to a thing for the patch to count as showing it
SIGN_LENGTH = 3


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
        lambda name: with_article(name),
        lambda name: f"a picture of {with_article(name)}",
        lambda name: f"is there {with_article(name)}?",
        lambda name: f"how many {name} stickers are there?",
        lambda name: f"at which place is the {name}?",
    )
    form = forms[rng.integers(len(forms))]
    return [form(name) for name in atlas().names]


class VisionBatches(IterableDataset[dict[str, Tensor]]):
    """Endless batches for the picture model.

    Each batch holds, with B pictures of N = 144 patches:
        pixels (B, 96, 96, 3) uint8; present (B, names) float; label (B, N) 0 background, 1.. names, last the sign;
        centre (B, N, 2) of the patch's sticker or sign in 0..1; number (B, N) of stickers of that name less one, and
        cell (B, N) of the loose 3 x 3 grid, both `IGNORE` elsewhere; string (B, N, 3) characters of the sign,
        `IGNORE` elsewhere; caption (B, length) and names (names, length) token ids.
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
    return {
        "present": present,
        "label": label,
        "centre": centre,
        "number": number,
        "cell": cell,
        "string": string,
    }


def loader(dataset: IterableDataset[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Batches made ahead of time by one other process."""
    return iter(DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=8))


def _middle(box: tuple[int, int, int, int]) -> tuple[float, float]:
    return (box[0] + box[2]) / (2 * SIZE), (box[1] + box[3]) / (2 * SIZE)


class _Encoder:
    """Turns texts into token ids with ``<s>`` and ``</s>``, padded on the right to the longest."""

    def __init__(self) -> None:
        self._tokenizer = tokenizer(end=True, padding_side="right")

    def __call__(self, texts: list[str]) -> Tensor:
        ids: Tensor = self._tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        return ids


PAD_ID = vocabulary()[PAD]
CELLS = GRID * GRID
