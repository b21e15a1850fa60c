"""The command `vtprune frames`: scores and chooses frames of a clip, as JSON and as a picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from vtprune.combining import split_options

from .prompts import EvaluationError

if TYPE_CHECKING:
    from vtprune.video.clip import Clip, FrameSelection

TITLE = "score and choose frames of a video"
DESCRIPTION = """\
Reads candidate frames of a clip, scores them and chooses some. Writes the scores, times and choice as JSON, and a picture:
the scores over time above, the frames below, chosen ones framed.
"""
EPILOG = """\
examples:
  vtprune frames clip.mp4 --select keyscore --caption "a dog jumps over a fence" --keep 8
  vtprune frames clip.mp4 --select stacfp                      as many as there are clusters
  vtprune frames clip.mp4 --select uniform --keep 16 --fps 2
"""
CANDIDATES = 64
SIDE = 224  # pixels of a candidate's longer side
SHOWN = 48  # frames in the picture
COLUMNS = 8
CHOSEN, SCORE = "#D55E00", "#0072B2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("video", type=Path, help="any video file")
    parser.add_argument(
        "--select",
        default="keyscore",
        metavar="NAME[:OPTION=VALUE,...]",
        help="frame selector (default keyscore); an unknown name lists them",
    )
    parser.add_argument(
        "--keep", type=int, metavar="N", help="frames to keep (default: the selector's own number)"
    )
    parser.add_argument(
        "--caption", action="append", default=[], help="what the clip shows; repeatable; read by keyscore"
    )
    parser.add_argument("--question", help="what is asked about the clip; read in the place of a caption")
    parser.add_argument(
        "--candidates",
        type=int,
        default=CANDIDATES,
        help=f"frames to choose from, evenly spaced (default {CANDIDATES})",
    )
    parser.add_argument("--fps", type=float, help="candidates per second instead of --candidates")
    parser.add_argument(
        "--embedder", type=Path, help="folder of a CLIPModel checkpoint (default: the shipped reference CLIP)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("frames.json"), help="JSON to write (default frames.json)"
    )
    parser.add_argument("--sheet", type=Path, help="picture to write (default: the JSON's name with .png)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from vtprune.video.answering import read_all
    from vtprune.video.clip import Clip
    from vtprune.video.embedding import CLIPEmbedder
    from vtprune.video.reading import read_frames
    from vtprune.video.selection import create_selector

    name, options = split_options(arguments.select)
    selector = create_selector(name, **options)
    if arguments.fps is None and arguments.candidates < 1:
        raise EvaluationError(f"--candidates {arguments.candidates}: give 1 or more.")
    if arguments.fps is not None and not arguments.fps > 0:
        raise EvaluationError(f"--fps {arguments.fps}: give a number above 0.")
    sheet: Path = arguments.sheet or arguments.output.with_suffix(".png")
    if sheet == arguments.output:
        raise EvaluationError(f"--output and --sheet are both {sheet}; give two names.")
    rate: dict[str, Any] = (
        {"count": arguments.candidates} if arguments.fps is None else {"fps": arguments.fps}
    )
    reader = read_frames(arguments.video, max_side=SIDE, **rate)
    frames, info = read_all(reader), reader.info
    notes = list(reader.damage)
    clip = Clip(
        times=np.array([frame.time for frame in frames]),
        frames=np.stack([frame.image for frame in frames]),
        duration=info.duration,
        captions=arguments.caption,
        question=arguments.question,
        embedder=CLIPEmbedder(arguments.embedder),
    )
    selection = selector.select(clip, arguments.keep)
    notes += selection.notes
    record = {
        "video": str(arguments.video),
        "duration": info.duration,
        "backend": info.backend,
        "selector": {"name": name, **dataclasses.asdict(selector)},  # type: ignore[call-overload]
        "captions": list(clip.captions),
        "question": clip.question,
        "candidates": [
            {"time": float(t), "score": None if selection.scores is None else float(selection.scores[i])}
            for i, t in enumerate(clip.times)
        ],
        "chosen": selection.indices.tolist(),
        "times": clip.times[selection.indices].tolist(),
        "tokens": None if selection.tokens is None else selection.tokens.tolist(),
        "notes": notes,
    }
    arguments.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(clip, selection, sheet, title=f"{arguments.video.name}: {arguments.select}")
    console = Console(width=140)
    console.print(
        f"{len(selection.indices)} of {clip.n} frames: {', '.join(clock(t) for t in record['times'])}",
        markup=False,
        highlight=False,
    )
    for note in notes:
        console.print(note, markup=False, highlight=False, style="yellow")
    console.print(f"scores in {arguments.output}, picture in {sheet}", markup=False, highlight=False)
    return 0


def clock(seconds: float) -> str:
    """Seconds as 0:07.5 or 1:02:03.0."""
    minutes, rest = divmod(round(float(seconds), 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def shown(n: int, chosen: Sequence[int], most: int = SHOWN) -> list[int]:
    """Which of n frames a picture of at most so many shows: the chosen ones, and others evenly between them."""
    if n <= most:
        return list(range(n))
    others = [i for i in range(n) if i not in set(chosen)]
    free = max(0, most - len(chosen))
    step = len(others) / free if free else 1.0
    return sorted([*chosen, *(others[int((i + 0.5) * step)] for i in range(free))])


def draw(clip: Clip, selection: FrameSelection, path: Path, title: str) -> None:
    """Writes the contact sheet: scores over time, and the frames with their times, chosen ones framed."""
    from matplotlib.figure import Figure

    chosen = selection.indices.tolist()
    frames = shown(clip.n, chosen)
    rows = -(-len(frames) // COLUMNS)
    aspect = clip.frames.shape[1] / clip.frames.shape[2]
    width = 1.6
    figure = Figure(figsize=(COLUMNS * width, 2.4 + rows * (width * aspect + 0.3)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.2, rows * (width * aspect + 0.3)])
    top, below = parts
    axes = top.subplots()
    for i in chosen:
        axes.axvline(clip.times[i], color=CHOSEN, linewidth=1.5, alpha=0.8)
    if selection.scores is not None:
        axes.plot(clip.times, selection.scores, color=SCORE, marker=".", linewidth=1)
        axes.set_ylabel("score")
    else:
        axes.set_yticks([])
    axes.set_xlim(0, max(clip.duration, float(clip.times[-1])) or 1)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    asked = "; ".join(clip.captions) or clip.question or ""
    axes.set_title(title + (f' — "{asked}"' if asked else ""), fontsize=11, loc="left")
    grid = below.subplots(rows, COLUMNS, squeeze=False)
    for ax in grid.flat:
        ax.set_axis_off()
    for ax, i in zip(grid.flat, frames, strict=False):
        ax.imshow(clip.frames[i])
        ax.set_axis_on()
        ax.set_xticks([])
        ax.set_yticks([])
        kept = i in chosen
        for spine in ax.spines.values():
            spine.set_color(CHOSEN if kept else "#cccccc")
            spine.set_linewidth(4 if kept else 0.8)
        score = "" if selection.scores is None else f"  {selection.scores[i]:.2f}"
        ax.set_title(
            f"{clock(clip.times[i])}{score}",
            fontsize=8,
            color=CHOSEN if kept else "black",
            fontweight="bold" if kept else None,
        )
    figure.savefig(path, dpi=100)
