"""The method gallery of the documentation, made from the registry.

python -m vtprune.eval.gallery docs

writes the part of `methods.md` between its two markers, one picture per method, and `gallery/kept.json` with the tokens
that the pictures show. Formulas, options and sources come from the classes' docstrings, measured rows from
`eval/results/`. A test compares all of it with the code.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vtprune
from vtprune.errors import InvalidOptionError
from vtprune.method import Method
from vtprune.planning import Support
from vtprune.testing.matrix import cells
from vtprune.testing.zoo import ENCODERS, LVLMS

from .markdown import read_rows
from .overlay import overlay
from .prompts import Prompter, load_model
from .results import ALL
from .tables import percent
from .video.inputs import VideoPrompter
from .world import examples, reference_dir
from .world import video as video_world

BEGIN, END = "<!-- gallery: python -m vtprune.eval.gallery docs -->", "<!-- /gallery -->"
FOLDER, KEPT = "gallery", "gallery/kept.json"
SPLIT, NUMBER = "test", 9  # a picture with four things and a sign
BUDGET = 32  # of 144 tokens
CLIP, FRAMES, FRAME_BUDGET = 1, 12, 4  # two frames make 16 tokens
VIDEO = ("dycoke", "evs", "fastvid", "llava-scissor")
SIDE, FRAME_SIDE, GAP, COLOURS = 264, 132, 6, 128
RESULTS = Path(__file__).resolve().parent / "results"
SOURCE = "../vtprune/methods/"


@dataclass(frozen=True)
class Scene:
    """What a method is shown.

    Attributes:
        pictures: what is drawn: one picture, or the first of every two frames of a clip.
        rows, cols: token grid of each.
        question: what the model is asked.
        answer: the right answer.
    """

    pictures: list[Image.Image]
    rows: int
    cols: int
    question: str
    answer: str


@cache
def _loaded(name: str) -> tuple[Any, Any]:
    return load_model(str(reference_dir(name)), "cpu", "auto")


@cache
def _shown(video: bool) -> tuple[Any, dict[str, Any], Scene]:
    """A model, its inputs, and the scene they show."""
    if not video:
        model, processor = _loaded("llava")
        example = examples(SPLIT, NUMBER)[NUMBER]
        inputs = Prompter(model, processor).inputs([example.image], [example.question])
        return model, inputs, Scene([example.image], 12, 12, example.question, example.answer)
    model, processor = _loaded("qwen2-vl")
    clip = video_world.examples(SPLIT, CLIP + 1)[CLIP]
    places = np.linspace(0, clip.scene.length - 1, FRAMES).round().astype(int).tolist()
    frames = np.stack([clip.scene.frame(place) for place in places])
    inputs = VideoPrompter(model, processor).inputs([frames], [places], [clip.question], clip.scene.length)
    pictures = [Image.fromarray(frame) for frame in frames[::2]]
    return model, inputs, Scene(pictures, 4, 4, clip.question, clip.answer)


@torch.no_grad()
def kept(key: str) -> list[list[int]]:
    """The tokens that a method leaves of the gallery's scene, per picture, as indices into its grid.

    Args:
        key: a registered method that acts in inference.
    """
    video = key in VIDEO
    model, inputs, scene = _shown(video)
    with vtprune.patch(model, key, keep=FRAME_BUDGET if video else BUDGET) as patch:
        model(**inputs)
        report = patch.report()
    return [report.grid(time=time)[2] for time in range(len(scene.pictures))]


def draw(key: str, tokens: Sequence[Sequence[int]]) -> Image.Image:
    """The scene with these tokens bright and the others dimmed, in a palette of `COLOURS` colours."""
    scene = _shown(key in VIDEO)[2]
    side = SIDE if len(scene.pictures) == 1 else FRAME_SIDE
    panels = [
        overlay(picture, scene.rows, scene.cols, some, side)
        for picture, some in zip(scene.pictures, tokens, strict=True)
    ]
    canvas = Image.new("RGB", (len(panels) * (side + GAP) - GAP, side), "white")
    for number, panel in enumerate(panels):
        canvas.paste(panel, (number * (side + GAP), 0))
    return canvas.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def drawn_methods() -> list[str]:
    """Keys of all methods that have a picture: those that act in inference."""
    return [key for key in vtprune.list_methods() if not vtprune.methods.method_class(key).training_only]


def paragraphs(cls: type) -> list[str]:
    """The docstring's paragraphs up to `Attributes:`; formulas keep their indentation."""
    text = inspect.getdoc(cls) or ""
    return text.partition("\nAttributes:")[0].strip("\n").split("\n\n")


def formula(cls: type) -> str:
    """The indented lines of the docstring."""
    found = [p for p in paragraphs(cls) if p.startswith("    ")]
    return "\n\n".join("\n".join(line[4:] for line in p.splitlines()) for p in found)


def prose(text: str) -> str:
    """A docstring's text on one line, with its cross-references as code."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", " ".join(text.split()))


def attributes(cls: type[Method]) -> dict[str, str]:
    """Option -> what the docstrings of a method's classes say of it, the nearest class first."""
    out: dict[str, str] = {}
    for one in cls.__mro__:
        if not (isinstance(one, type) and issubclass(one, Method)):
            continue
        part = inspect.cleandoc(one.__doc__ or "").partition("\nAttributes:\n")[2]
        for names, text in re.findall(
            r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", part, re.MULTILINE | re.DOTALL
        ):
            for name in names.split(", "):
                out.setdefault(name, prose(text))
    return out


def options(cls: type[Method]) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of every option."""
    told = attributes(cls)
    for field in sorted(dataclasses.fields(cls), key=lambda f: (f.name == "positions", f.name != "keep")):
        given = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = "must be given" if given is dataclasses.MISSING else f"`{given!r}`"
        yield field.name, default, told.get(field.name, "")


def sites(key: str) -> str:
    """Where a method acts on the gallery's model."""
    model = _shown(key in VIDEO)[0]
    cls = vtprune.methods.method_class(key)
    with vtprune.patch(model, key, keep=FRAME_BUDGET if key in VIDEO else BUDGET) as patch:
        if cls.training_only:
            return f"decoder layers {_layers([layer for b in patch.bypasses for layer in b.layers])}, in training only"
        found: dict[str, list[int]] = {}
        for stage in patch.stages:
            found.setdefault(stage.site.kind, []).extend(
                [stage.site.layer] if stage.site.layer is not None else []
            )
    names = {"vit": "in front of ViT layers", "decoder": "in front of decoder layers"}
    names |= {"encoder": "behind the encoder", "projector": "at the input of the language model"}
    return ", ".join(f"{names[kind]} {_layers(layers)}".strip() for kind, layers in found.items())


def _layers(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def support(key: str) -> str:
    """On how many tested classes of models a method runs."""
    parts = []
    for title, zoo in (("vision-language models", LVLMS), ("encoders alone", ENCODERS)):
        found: list[Support] = [cells(name)[key] for name in zoo]
        part = f"{sum(s.works for s in found)} of {len(found)} {title}"
        substitutes: dict[str, int] = {}
        for one in found:
            if one.works and one.options:
                with_ = ", ".join(f"{name}={value}" for name, value in one.options.items())
                substitutes[with_] = substitutes.get(with_, 0) + 1
        if substitutes:
            part += " (" + ", ".join(f"{n} with `{with_}`" for with_, n in substitutes.items()) + ")"
        parts.append(part)
    return "; ".join(parts)


def measured(key: str) -> str:
    """A Markdown table of what was measured of a method with its defaults; empty if nothing was."""
    if key in VIDEO:
        return _measured_on_video(key)
    rows = [row for row in read_rows(RESULTS / "methods.jsonl") if row.task == ALL]
    dense = rows[0]
    mine = [row for row in rows if row.method == key and not {*row.options} - {"seeds"}]
    if not mine:
        return ""
    lines = [
        "| budget | accuracy, % | of dense, % | layer average | FLOPs |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {'–' if row.keep is None else f'{row.keep} of 144'} | {percent(row.accuracy, row.stderr)} | {percent(row.retained)} "  # noqa: RUF001
        f"| {row.layer_average_tokens:.0f} | {row.flops / dense.flops:.2f} |"
        for row in mine
    ]
    return "\n".join(lines)


def _measured_on_video(key: str) -> str:
    lines = (RESULTS / "video.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[Mapping[str, Any]] = [json.loads(line) for line in lines]
    mine = [row for row in rows if row["method"] == key and row["task"] == ALL]
    out = ["| frames | budget | accuracy, % | of dense, % |", "|---|---|--:|--:|"]
    out += [
        f"| {row['frames']}, `{row['select']}` | {100 * row['keep']:g} % | {percent(row['accuracy'], row['stderr'])} "
        f"| {percent(row['retained'])} |"
        for row in mine
    ]
    return "\n".join(out)


def entry(key: str, tokens: Sequence[Sequence[int]] | None) -> str:
    """A method's part of the gallery; with the tokens of its picture, if it has one."""
    cls = vtprune.methods.method_class(key)
    source_file = Path(inspect.getfile(cls)).name
    found = paragraphs(cls)
    source = next((p for p in found if p.startswith("Source:")), "")
    lines = [f"### `{key}`", "", prose(found[0]), ""]
    if tokens is not None:
        scene = _shown(key in VIDEO)[2]
        total = scene.rows * scene.cols * len(scene.pictures)
        lines += [
            f"![What {key} keeps of {'a clip' if key in VIDEO else 'a picture'}]({FOLDER}/{key}.png)",
            "",
        ]
        lines += [f"*{sum(map(len, tokens))} of {total} tokens left at the end of the model*", ""]
    if formula(cls):
        lines += ["```text", formula(cls), "```", ""]
    facts = [f"**Where** (on the model of the picture): {sites(key)}. **Runs on** {support(key)}."]
    if source:
        facts.append(f"**Source**: {prose(source.removeprefix('Source:'))}")
    facts.append(f"All deviations and definitions: [{source_file}]({SOURCE}{source_file}).")
    lines += [line for fact in facts for line in (fact, "")]
    if measured(key):
        lines += [measured(key), ""]
    lines += ["| option | default | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | {default} | {_cell(told)} |" for name, default, told in options(cls)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def gallery(found: Mapping[str, Sequence[Sequence[int]]]) -> str:
    """The generated part of `methods.md`, without its markers.

    Args:
        found: what every method keeps, as from :func:`kept`.
    """
    picture, clip = _shown(False)[2], _shown(True)[2]
    head = (
        f"Pictures: {BUDGET} of 144 tokens of one picture of the picture world (split `{SPLIT}`), kept by the shipped "
        f"LLaVA that was asked “{picture.question}”. Video methods: {FRAME_BUDGET} of 16 tokens per frame on average, of "
        f"every second of {FRAMES} frames, kept by the shipped Qwen2-VL that was asked “{clip.question}”. Bright pieces "
        "are left at the end of the model, dimmed ones are not; that some are merged into others does not show. Methods with "
        "several stages meet the budget on the average of the layers, so few are left at the end."
    )
    index = " · ".join(f"[`{key}`](#{key})" for key in vtprune.list_methods())
    return "\n\n".join([head, index, *(entry(key, found.get(key)) for key in vtprune.list_methods())])


def between(page: str, inside: str) -> str:
    """A page with its generated part replaced.

    Raises:
        InvalidOptionError: the page has no markers.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise InvalidOptionError(f"the page has no part between {BEGIN!r} and {END!r}; add both lines.")
    return f"{head}{BEGIN}\n{inside}\n{END}{tail}"


def main(folder: Path) -> None:
    """Writes page, pictures and `kept.json` into a folder that holds `methods.md`."""
    (folder / FOLDER).mkdir(exist_ok=True)
    for old in (folder / FOLDER).glob("*.png"):
        old.unlink()
    found = {key: kept(key) for key in drawn_methods()}
    for key, tokens in found.items():
        draw(key, tokens).save(folder / FOLDER / f"{key}.png", optimize=True)
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(tokens)}" for key, tokens in found.items())
    (folder / KEPT).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    page = folder / "methods.md"
    page.write_text(between(page.read_text(encoding="utf-8"), gallery(found)), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
