"""Seeded scenes of the picture world: stickers and a sign on a background, with exact ground truth.

A picture is 96 x 96 pixels; cut into patches of 8 pixels it gives 12 x 12 = 144 visual tokens. Stickers and the sign
are much smaller than the picture and stand in a loose 3 x 3 grid, so most tokens show background only.
"""

from __future__ import annotations

import functools
import json
import zlib
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 96
GRID = 3
CELL = SIZE // GRID
MAX_STICKERS = 4
POSITIONS = (
    "top left",
    "top middle",
    "top right",
    "middle left",
    "center",
    "middle right",
    "bottom left",
    "bottom middle",
    "bottom right",
)
SPLITS = ("train", "val", "test", "final", "unseen_style", "unseen_combination")
SEEDS_PER_SPLIT = 1_000_000_000
UNSEEN_STYLE = "twemoji"
BACKGROUNDS = ("flat", "gradient", "stripes", "smooth", "noise", "checks", "dots", "grain")
UNSEEN_BACKGROUNDS = ("rings", "weave")  # only in test, final and the two unseen_* splits

# How often each name occurs in a scene, with the share of scenes.
_MULTIPLICITIES = (
    ((1,), 0.06),
    ((1, 1), 0.13),
    ((1, 1, 1), 0.18),
    ((1, 1, 1, 1), 0.16),
    ((2,), 0.04),
    ((2, 1), 0.09),
    ((2, 1, 1), 0.09),
    ((2, 2), 0.04),
    ((3,), 0.05),
    ((3, 1), 0.08),
    ((4,), 0.08),
)

Box = tuple[int, int, int, int]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Sticker:
    """One drawn thing.

    Attributes:
        name: word used in questions.
        style: art style.
        position: index into `POSITIONS`.
        box: pixel box (x0, y0, x1, y1) of the part that is drawn.
    """

    name: str
    style: str
    position: int
    box: Box


@dataclass(frozen=True)
class Sign:
    """A plate with two or three characters; fields as in `Sticker`, and the pixel box of each character."""

    text: str
    position: int
    box: Box
    characters: tuple[Box, ...]


@dataclass(frozen=True)
class Scene:
    """A picture with its ground truth.

    Attributes:
        seed: seed it was made from; the ranges of the splits never overlap.
        split: one of `SPLITS`.
        background: kind of background.
        stickers: 1 to 4 stickers.
        sign: the sign, or None.
        pixels: (96, 96, 3) uint8.
        owner: (96, 96) int8, per pixel -1 for background, the index of the sticker, or `MAX_STICKERS` for the sign.
    """

    seed: int
    split: str
    background: str
    stickers: tuple[Sticker, ...]
    sign: Sign | None
    pixels: NDArray[np.uint8]
    owner: NDArray[np.int8]

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image in RGB."""
        return Image.fromarray(self.pixels)

    def count(self, name: str) -> int:
        """Number of stickers of this name."""
        return sum(sticker.name == name for sticker in self.stickers)


class Atlas:
    """The rendered stickers and glyphs shipped with the package.

    Attributes:
        names: words for the stickers.
        styles: art styles.
        groups: group -> names; names of one group resemble each other.
        glyphs: characters that can stand on a sign.
    """

    def __init__(self) -> None:
        data = resources.files(__package__) / "data"
        table: dict[str, Any] = json.loads((data / "atlas.json").read_text(encoding="utf-8"))
        with (data / "atlas.png").open("rb") as file:
            self._sheet = Image.open(file).convert("RGBA")
        self._cell: int = table["cell"]
        self._columns: int = table["columns"]
        self.names: tuple[str, ...] = tuple(table["names"])
        self.styles: tuple[str, ...] = tuple(table["styles"])
        self.groups: dict[str, tuple[str, ...]] = {
            key: tuple(value) for key, value in table["groups"].items()
        }
        self.group_of = {name: group for group, members in self.groups.items() for name in members}
        self.glyphs: str = table["glyphs"]
        self.sticker = functools.lru_cache(maxsize=None)(self._sticker)
        self.glyph = functools.lru_cache(maxsize=None)(self._glyph)

    def _crop(self, index: int) -> Image.Image:
        row, column = divmod(index, self._columns)
        x, y = column * self._cell, row * self._cell
        return self._sheet.crop((x, y, x + self._cell, y + self._cell))

    def _sticker(self, name: str, style: str, side: int) -> tuple[FloatArray, FloatArray]:
        """Colour (h, w, 3) in 0..255 and coverage (h, w, 1) in 0..1, the longer of h and w being ``side``."""
        picture = self._crop(self.styles.index(style) * len(self.names) + self.names.index(name))
        picture = picture.crop(picture.getchannel("A").getbbox())
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        # premultiplied, so that the colour of invisible pixels does not bleed into the edge
        pixels = np.asarray(picture.convert("RGBa").resize(size, Image.Resampling.BOX), dtype=np.float32)
        return pixels[..., :3].copy(), pixels[..., 3:] / 255.0

    def _glyph(self, character: str, height: int) -> FloatArray:
        """Coverage (height, w) in 0..1 of one character."""
        mask = self._crop(len(self.styles) * len(self.names) + self.glyphs.index(character)).getchannel("A")
        box = mask.getbbox()
        if box is None:
            raise ValueError(f"empty glyph {character!r} in the atlas")
        mask = mask.crop((box[0], round(0.15 * self._cell), box[2], round(0.88 * self._cell)))
        size = (max(1, round(mask.width * height / mask.height)), height)
        return np.asarray(mask.resize(size, Image.Resampling.BOX), dtype=np.float32) / 255.0


@functools.cache
def atlas() -> Atlas:
    """The atlas, loaded once."""
    return Atlas()


def unseen_position(name: str, position: int) -> bool:
    """Whether this name is never drawn at this position in training (one position in nine)."""
    return (atlas().names.index(name) * 5 + position) % (GRID * GRID) == 0


def unseen_pair(first: str, second: str) -> bool:
    """Whether these two names are never drawn together in training (about one pair in eight)."""
    return first != second and zlib.crc32("+".join(sorted((first, second))).encode()) % 8 == 0


def seed_range(split: str) -> range:
    """The scene seeds that belong to a split.

    Raises:
        ValueError: if there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    start = SPLITS.index(split) * SEEDS_PER_SPLIT
    return range(start, start + SEEDS_PER_SPLIT)


def make_scene(seed: int) -> Scene:
    """Make the scene of a seed; the seed decides the split (see `seed_range`).

    Raises:
        ValueError: if the seed lies outside every split.
    """
    if not 0 <= seed < len(SPLITS) * SEEDS_PER_SPLIT:
        raise ValueError(f"seed {seed} belongs to no split")
    split = SPLITS[seed // SEEDS_PER_SPLIT]
    rng = np.random.default_rng(seed)
    kinds = BACKGROUNDS if split in ("train", "val") else BACKGROUNDS + UNSEEN_BACKGROUNDS
    background = kinds[rng.integers(len(kinds))]
    canvas = painted_background(background, rng)
    owner = np.full((SIZE, SIZE), -1, dtype=np.int8)
    names, positions = _layout(split, rng)
    stickers = []
    for index, (name, position) in enumerate(zip(names, positions, strict=False)):
        if split == "unseen_style":
            style = UNSEEN_STYLE
        else:
            known = [style for style in atlas().styles if style != UNSEEN_STYLE]
            style = known[rng.integers(len(known))]
        stickers.append(_draw_sticker(canvas, owner, index, name, style, position, rng))
    sign = None
    if rng.random() < 0.5:
        sign = _draw_sign(canvas, owner, positions[len(names)], rng)
    if rng.random() < 0.25:
        canvas += rng.normal(0.0, 6.0, canvas.shape).astype(np.float32)
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(seed, split, background, tuple(stickers), sign, pixels, owner)


def _layout(split: str, rng: np.random.Generator) -> tuple[list[str], list[int]]:
    """Names of the stickers, and a random order of all positions (the first belong to the stickers)."""
    names = atlas().names
    shares = np.array([share for _, share in _MULTIPLICITIES])
    while True:
        counts = _MULTIPLICITIES[rng.choice(len(shares), p=shares / shares.sum())][0]
        chosen = rng.choice(len(names), size=len(counts), replace=False)
        drawn = [names[index] for index, count in zip(chosen, counts, strict=True) for _ in range(count)]
        positions = [int(position) for position in rng.permutation(GRID * GRID)]
        held_out = [unseen_position(name, position) for name, position in zip(drawn, positions, strict=False)]
        pairs = any(unseen_pair(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
        if split == "unseen_combination":
            if any(held_out):
                return drawn, positions
        elif split not in ("train", "val") or not (pairs or any(held_out)):
            return drawn, positions


def _place(width: int, height: int, position: int, rng: np.random.Generator) -> tuple[int, int]:
    """Top left corner of a box near the middle of a grid cell, wholly inside the picture."""
    row, column = divmod(position, GRID)
    x = column * CELL + (CELL - width) / 2 + rng.uniform(-5, 5)
    y = row * CELL + (CELL - height) / 2 + rng.uniform(-5, 5)
    return int(np.clip(x, 0, SIZE - width)), int(np.clip(y, 0, SIZE - height))


def _draw_sticker(
    canvas: FloatArray,
    owner: NDArray[np.int8],
    index: int,
    name: str,
    style: str,
    position: int,
    rng: np.random.Generator,
) -> Sticker:
    colour, cover = atlas().sticker(name, style, int(rng.integers(17, 28)))
    if rng.random() < 0.5:
        colour, cover = colour[:, ::-1], cover[:, ::-1]
    if rng.random() < 0.15:  # partly hidden: one side is cut away
        height, width = cover.shape[:2]
        side, share = rng.integers(4), rng.uniform(0.1, 0.35)
        rows = slice(
            int(share * height) if side == 0 else 0, height - (int(share * height) if side == 1 else 0)
        )
        columns = slice(
            int(share * width) if side == 2 else 0, width - (int(share * width) if side == 3 else 0)
        )
        colour, cover = colour[rows, columns], cover[rows, columns]
    height, width = cover.shape[:2]
    x, y = _place(width, height, position, rng)
    window = np.s_[y : y + height, x : x + width]
    canvas[window] = canvas[window] * (1 - cover) + colour * rng.uniform(0.85, 1.0)
    owner[window][cover[..., 0] > 0.5] = index
    return Sticker(name, style, position, (x, y, x + width, y + height))


def _draw_sign(canvas: FloatArray, owner: NDArray[np.int8], position: int, rng: np.random.Generator) -> Sign:
    glyphs = atlas().glyphs
    text = "".join(glyphs[i] for i in rng.integers(len(glyphs), size=rng.integers(2, 4)))
    masks = [atlas().glyph(character, int(rng.integers(11, 14))) for character in text]
    tallest = max(mask.shape[0] for mask in masks)
    width = sum(mask.shape[1] + 1 for mask in masks) + 5
    height = tallest + 5
    x, y = _place(width, height, position, rng)
    paper, ink = rng.uniform(200, 255, 3), rng.uniform(0, 70, 3)
    if rng.random() < 0.5:
        paper, ink = ink, paper
    canvas[y : y + height, x : x + width] = ink
    canvas[y + 1 : y + height - 1, x + 1 : x + width - 1] = paper
    left = x + 3
    characters = []
    for mask in masks:
        bottom = y + height - 3
        window = np.s_[bottom - mask.shape[0] : bottom, left : left + mask.shape[1]]
        canvas[window] = canvas[window] * (1 - mask[..., None]) + ink * mask[..., None]
        characters.append((left, bottom - mask.shape[0], left + mask.shape[1], bottom))
        left += mask.shape[1] + 1
    owner[y : y + height, x : x + width] = MAX_STICKERS
    return Sign(text, position, (x, y, x + width, y + height), tuple(characters))


def painted_background(kind: str, rng: np.random.Generator) -> FloatArray:
    """A background of this kind, (96, 96, 3) float32 in 0..255."""
    mix: NDArray[Any]
    first, second = rng.uniform(20, 235, (2, 3)).astype(np.float32)
    second = first + (second - first) * np.float32(rng.uniform(0.3, 0.8))
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    if kind == "flat":
        mix = np.zeros((SIZE, SIZE))
    elif kind == "gradient":
        mix = (along - along.min()) / np.ptp(along)
    elif kind == "stripes":
        mix = np.sin(along * rng.uniform(0.2, 0.9)) > 0
    elif kind == "smooth":
        mix = _smooth(rng, int(rng.integers(3, 8)))
    elif kind == "noise":
        mix = rng.random((SIZE, SIZE))
    elif kind == "checks":
        side = int(rng.integers(5, 16))
        mix = (x // side + y // side) % 2
    elif kind == "dots":
        step = float(rng.uniform(6, 14))
        mix = np.hypot(x % step - step / 2, y % step - step / 2) < step * 0.3
    elif kind == "grain":
        mix = 0.6 * _smooth(rng, 6) + 0.25 * _smooth(rng, 24) + 0.15 * rng.random((SIZE, SIZE))
    elif kind == "rings":
        centre = rng.uniform(0, SIZE, 2)
        mix = 0.5 + 0.5 * np.sin(np.hypot(x - centre[0], y - centre[1]) * rng.uniform(0.25, 0.8))
    elif kind == "weave":
        step = float(rng.uniform(0.3, 0.8))
        mix = 0.5 + 0.25 * np.sin(x * step) + 0.25 * np.sin(y * step + along * 0.1)
    else:
        raise ValueError(f"unknown background {kind!r}")
    canvas: FloatArray = first + (second - first) * np.asarray(mix, dtype=np.float32)[..., None]
    return canvas


def _smooth(rng: np.random.Generator, cells: int) -> FloatArray:
    """Smooth noise in 0..1: a coarse random grid, enlarged."""
    coarse = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32) / 255.0
