"""Looks at the video world: a contact sheet of clips, what a guesser can score without video, and the speed.

``python -m vtprune.eval.world.video sheet --output sheet.png``
``python -m vtprune.eval.world.video floor``
``python -m vtprune.eval.world.video speed``
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..scenes import SIZE
from . import KINDS, SPLITS, VideoExample, examples, files

PER_ROW = 12
MARGIN, LINE = 4, 14
SPEED_CLIPS = 5  # of each kind


def contact_sheet(items: list[VideoExample], per_row: int = PER_ROW) -> Image.Image:
    """One row per example: frames with their time, framed in green where they hold the answer.

    Half of a row shows relevant frames, the rest is spread over the clip.
    """
    height = SIZE + 2 * MARGIN + 2 * LINE
    sheet = Image.new("RGB", (per_row * (SIZE + 2 * MARGIN), height * len(items)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, item in enumerate(items):
        top = row * height
        seconds = f"{item.scene.length} frames, {item.scene.duration:.1f} s"
        draw.text((MARGIN, top + 1), f"{item.kind}: {item.question} -> {item.answer}   [{seconds}]", "black")
        for column, frame in enumerate(_frames(item, per_row)):
            left = column * (SIZE + 2 * MARGIN)
            at = frame / item.scene.fps
            if item.relevance([at])[0]:
                box = (
                    left + 1,
                    top + LINE + 1,
                    left + SIZE + 2 * MARGIN - 2,
                    top + LINE + SIZE + 2 * MARGIN - 2,
                )
                draw.rectangle(box, fill=(0, 170, 0))
            picture = Image.fromarray(item.scene.frame(frame))
            sheet.paste(picture, (left + MARGIN, top + LINE + MARGIN))
            draw.text((left + MARGIN, top + LINE + SIZE + 2 * MARGIN), f"{at:.2f} s", "black")
    return sheet


def _frames(item: VideoExample, count: int) -> list[int]:
    inside = [frame for start, stop in item.asked.spans for frame in range(start, stop)]
    chosen = {inside[i] for i in np.linspace(0, len(inside) - 1, min(count // 2, len(inside))).astype(int)}
    spread = np.linspace(0, item.scene.length - 1, count - len(chosen)).astype(int)
    return sorted(chosen | {int(frame) for frame in spread})


def floors(items: list[VideoExample]) -> dict[str, dict[str, float]]:
    """For every kind, in percent: the share of the most frequent answer, and the prior of its questions."""
    table = {}
    for kind in dict.fromkeys(item.kind for item in items):
        mine = [item for item in items if item.kind == kind]
        most = collections.Counter(item.answer for item in mine).most_common(1)[0][1]
        priors = sum(item.prior for item in mine)
        table[kind] = {"most frequent": 100 * most / len(mine), "prior": 100 * priors / len(mine)}
    return table


def speeds(codec: str) -> dict[str, dict[str, float]]:
    """For every kind: frames of a clip, clips and frames per second rendered and encoded, and bytes per frame."""
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            items = examples("val", SPEED_CLIPS, [kind])
            examples("val", 1, [kind])[0].path(folder, codec)  # loads the atlas and the encoder
            frames = sum(item.scene.length for item in items)
            start = time.perf_counter()
            for item in items:
                for _ in item.scene.frames():
                    pass
            drawn = time.perf_counter()
            sizes = [item.scene.write(Path(folder) / "clip.mp4", codec).stat().st_size for item in items]
            done = time.perf_counter()
            table[kind] = {
                "frames per clip": frames / len(items),
                "frames/s drawn": frames / (drawn - start),
                "frames/s drawn and encoded": frames / (done - drawn),
                "clips/s drawn and encoded": len(items) / (done - drawn),
                "bytes per frame": sum(sizes) / frames,
            }
    return table


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet", help="a picture with one clip of every kind")
    sheet.add_argument("--output", type=Path, required=True)
    sheet.add_argument("--seed", type=int, default=0)
    floor = commands.add_parser("floor", help="one JSON line per kind")
    floor.add_argument("--limit", type=int, default=960 * len(KINDS), help="number of questions")
    for part in (sheet, floor):
        part.add_argument("--split", choices=[split for split in SPLITS if split != "final"], default="val")
    speed = commands.add_parser("speed", help="one JSON line per kind, with one thread")
    speed.add_argument("--codec", choices=files.CODECS, default=files.CODEC)
    arguments = parser.parse_args()
    if arguments.command == "sheet":
        contact_sheet(examples(arguments.split, len(KINDS), seed=arguments.seed)).save(arguments.output)
        return
    if arguments.command == "floor":
        table = floors(examples(arguments.split, arguments.limit))
    else:
        table = speeds(arguments.codec)
    for kind, row in table.items():
        print(json.dumps({"kind": kind} | {key: round(value, 1) for key, value in row.items()}))


if __name__ == "__main__":
    main()
