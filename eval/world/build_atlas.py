"""Render the sticker atlas of the picture world from Iconify's emoji packages.

Needed only to rebuild ``data/atlas.png``; the rendered atlas is part of the package. Unpack the npm packages
``@iconify-json/fluent-emoji-flat``, ``@iconify-json/noto`` and ``@iconify-json/twemoji`` and run::

    python -m vtprune.eval.world.build_atlas --icons node_modules/@iconify-json
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image, ImageDraw, ImageFont

STYLES = ("fluent-emoji-flat", "noto", "twemoji")
CELL = 64
COLUMNS = 16
GLYPHS = (
    "ACEFHKLMNPRTUXY34679"  # without the pairs that look alike in 10 pixels (O/0, I/1, S/5, Z/2, B/8, ...)
)

# group -> {word used in questions: icon name}; groups supply the hard negatives
GROUPS: dict[str, dict[str, str]] = {
    "fruit": {
        "apple": "red-apple",
        "banana": "banana",
        "watermelon": "watermelon",
        "strawberry": "strawberry",
        "grapes": "grapes",
        "pineapple": "pineapple",
    },
    "vegetable": {
        "carrot": "carrot",
        "broccoli": "broccoli",
        "eggplant": "eggplant",
        "mushroom": "mushroom",
    },
    "food": {
        "hamburger": "hamburger",
        "pizza": "pizza",
        "doughnut": "doughnut",
        "cake": "birthday-cake",
    },
    "animal": {
        "frog": "frog",
        "panda": "panda",
        "fox": "fox",
        "penguin": "penguin",
        "octopus": "octopus",
        "butterfly": "butterfly",
        "bee": "honeybee",
        "turtle": "turtle",
        "owl": "owl",
    },
    "plant": {
        "cactus": "cactus",
        "sunflower": "sunflower",
        "tulip": "tulip",
        "tree": "evergreen-tree",
    },
    "vehicle": {
        "rocket": "rocket",
        "airplane": "airplane",
        "bus": "bus",
        "bicycle": "bicycle",
        "sailboat": "sailboat",
    },
    "thing": {
        "umbrella": "umbrella",
        "balloon": "balloon",
        "key": "key",
        "scissors": "scissors",
        "guitar": "guitar",
        "trumpet": "trumpet",
        "camera": "camera",
        "clock": "alarm-clock",
        "bell": "bell",
        "crown": "crown",
    },
    "symbol": {
        "star": "star",
        "heart": "red-heart",
        "moon": "crescent-moon",
        "fire": "fire",
        "snowflake": "snowflake",
        "ghost": "ghost",
    },
}

CREDITS = {
    "fluent-emoji-flat": "Fluent Emoji, (c) Microsoft Corporation, MIT Licence, "
    "https://github.com/microsoft/fluentui-emoji",
    "noto": "Noto Emoji, (c) Google LLC, Apache Licence 2.0, https://github.com/googlefonts/noto-emoji",
    "twemoji": "Twemoji, (c) Twitter, Inc and other contributors, CC BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), https://github.com/jdecked/twemoji, "
    "rendered to 64 x 64 pixels",
}


def render_icon(icons: dict[str, Any], name: str, size: int = CELL) -> Image.Image:
    """Render one icon of an Iconify ``icons.json`` as an RGBA picture of ``size`` x ``size`` pixels.

    Raises:
        KeyError: if neither an icon nor an alias has this name.
    """
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
        f"{icon['body']}</svg>"
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    box = picture.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"icon {name!r} renders to nothing")
    picture = picture.crop(box)
    scale = size / max(picture.size)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
    )
    cell = Image.new("RGBA", (size, size))
    cell.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return cell


def render_glyph(character: str, size: int = CELL) -> Image.Image:
    """Render one character of Pillow's built-in font (Aileron, CC0), white, left-aligned in its cell."""
    font = ImageFont.load_default(size * 0.9)
    cell = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).text((1, size * 0.84), character, fill=255, font=font, anchor="ls", stroke_width=2)
    cell.putalpha(mask)
    return cell


def build(icons: Path, out: Path) -> None:
    """Write ``atlas.png``, ``atlas.json`` and ``ATTRIBUTION.md`` into ``out``.

    Args:
        icons: folder that holds the three unpacked npm packages.
        out: folder to write to; made if missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    words = {word: icon for group in GROUPS.values() for word, icon in group.items()}
    cells: list[Image.Image] = []
    versions: dict[str, str] = {}
    for style in STYLES:
        table = json.loads((icons / style / "icons.json").read_text(encoding="utf-8"))
        versions[style] = json.loads((icons / style / "package.json").read_text(encoding="utf-8"))["version"]
        cells += [render_icon(table, icon) for icon in words.values()]
    cells += [render_glyph(character) for character in GLYPHS]
    rows = -(-len(cells) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for index, cell in enumerate(cells):
        atlas.paste(cell, (index % COLUMNS * CELL, index // COLUMNS * CELL))
    atlas.save(out / "atlas.png", optimize=True)
    description = {
        "cell": CELL,
        "columns": COLUMNS,
        "styles": list(STYLES),
        "groups": {group: list(members) for group, members in GROUPS.items()},
        "names": list(words),
        "glyphs": GLYPHS,
    }
    (out / "atlas.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Attribution",
        "",
        "`atlas.png` holds pictures rendered by `build_atlas.py` from three npm packages; cells are in the order",
        "given by `atlas.json` (style by style, then the glyphs).",
        "",
        *[f"- `@iconify-json/{style}` {versions[style]}: {CREDITS[style]}" for style in STYLES],
        "- Letters and digits: Aileron Regular by Sora Sagano (CC0 1.0), as built into Pillow.",
        "",
        "The pictures were cropped to their outlines and scaled to the cell.",
    ]
    (out / "ATTRIBUTION.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Render the sticker atlas of the picture world.")
    parser.add_argument(
        "--icons", type=Path, required=True, help="folder with the unpacked @iconify-json packages"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()
    build(arguments.icons, arguments.out)


if __name__ == "__main__":
    main()
