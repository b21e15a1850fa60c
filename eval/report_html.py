"""The comparison as one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vtprune import methods
from vtprune.methods import files

from .accuracy import Kept
from .evaluation import Evaluation
from .overlay import overlay
from .paired import paired
from .plots import curves, label, small_multiples
from .results import ALL, Row
from .settings import CONTROLS, DENSE, NO_IMAGE, Setting
from .tables import by_setting, percent
from .world import Example, score

THUMBNAIL, OPENING = 216, 288  # pixels
GRID = (235, 235, 235)
SIGNIFICANT = 0.05
UNINFORMED = ("keep-all", "random", "stride")  # baselines among the registered methods


@dataclass(frozen=True)
class Shot:
    """One picture of a sample, under one setting.

    Attributes:
        title: the setting.
        image: data URI.
        alt: what the picture shows, in words.
        answer: the model's answer.
        right: whether it is right.
    """

    title: str
    image: str
    alt: str
    answer: str
    right: bool


@dataclass(frozen=True)
class Sample:
    """One example with its pictures, the dense one first."""

    question: str
    answer: str
    kind: str
    shots: list[Shot]


def write_report(path: Path, evaluation: Evaluation) -> None:
    """Writes the report of what has been evaluated so far.

    Args:
        path: the file.
        evaluation: with at least one row.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("vtprune.eval", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    rows = evaluation.rows
    splits = list(dict.fromkeys(row.split for row in rows))
    main = [row for row in rows if row.split == splits[0]]
    findings = _findings(evaluation, splits[0])
    text = environment.get_template("report.html.j2").render(
        model=evaluation.model,
        row=rows[0],
        dense=rows[0],
        blind=next((r for r in main if r.method == NO_IMAGE and r.task == ALL), None),
        n_methods=len({label(r) for r in main if _is_method(r)}),
        findings=findings,
        opening=_opening(evaluation, splits[0], findings),
        splits=[_split(rows, split) for split in splits],
        plots=[
            (title, Markup(curves(main, axis)), alt)
            for title, axis, alt in (
                ("Accuracy against kept tokens", "tokens", "tokens left at the end of the model"),
                ("Accuracy against computing", "flops", "FLOPs of the prefill including the vision encoder"),
                ("Accuracy against layer-average tokens", "average", "visual tokens averaged over layers"),
            )
        ],
        other_plots={
            split: Markup(curves([r for r in rows if r.split == split], "tokens")) for split in splits[1:]
        },
        kinds=Markup(small_multiples(main)),
        kinds_explained=_kinds(evaluation.examples[splits[0]]),
        costs=_groups([{ALL: row} for row in main if row.task == ALL], ()),
        samples=_samples(evaluation, splits[0]),
        sample_budget=_sample_budget(evaluation, splits[0]),
        skipped=[(s.label, s.keep, reason) for s, reason in evaluation.skipped.items()],
        explained=_explained(rows),
        notes=evaluation.notes,
    )
    path.write_text(text, encoding="utf-8")


def _is_method(row: Row) -> bool:
    return row.method not in (*CONTROLS, *UNINFORMED)


def _split(rows: Sequence[Row], split: str) -> dict[str, Any]:
    settings = by_setting(rows, split)
    tasks = [task for task in settings[0] if task != ALL]
    return {
        "name": split,
        "n": settings[0][ALL].n,
        "per_task": settings[0][tasks[0]].n if tasks else 0,
        "tasks": tasks,
        "groups": _groups(settings, tasks),
    }


def _groups(settings: Sequence[Mapping[str, Row]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Settings of the same budget together, the best first; those without a budget in front, as they ran."""
    dense = settings[0][ALL]
    groups: dict[str, list[Mapping[str, Row]]] = {}
    for setting in settings:
        groups.setdefault(_title(setting[ALL], dense), []).append(setting)
    out = []
    for title, some in groups.items():
        if some[0][ALL].keep is not None:
            some = sorted(some, key=lambda setting: -setting[ALL].accuracy)
        methods = [setting[ALL].accuracy for setting in some if _is_method(setting[ALL])]
        out.append(
            {
                "title": title,
                "lines": [
                    {
                        "label": label(s[ALL]),
                        "all": s[ALL],
                        "baseline": not _is_method(s[ALL]),
                        "best": len(methods) > 1 and _is_method(s[ALL]) and s[ALL].accuracy == max(methods),
                        "cells": [s[task] for task in tasks],
                    }
                    for s in some
                ],
            }
        )
    return out


def _title(row: Row, dense: Row) -> str:
    """The budget of a row, for people."""
    if row.keep is None:
        return "Own number of tokens" if _is_method(row) else "Controls: no token removed"
    if isinstance(row.keep, int):
        return f"{row.keep} of {dense.visual_tokens_in} tokens"
    return f"{100 * row.keep:.3g} % of the tokens"


def _findings(evaluation: Evaluation, split: str) -> list[dict[str, Any]]:
    """Per budget the best method, and the others that these questions cannot tell from it."""
    rows = [row for row in evaluation.rows if row.split == split and row.task == ALL]
    scores = {
        (setting.label, setting.keep): outcome.correct
        for (where, setting), outcome in evaluation.outcomes.items()
        if where == split
    }
    out = []
    for keep in dict.fromkeys(row.keep for row in rows if row.keep is not None and _is_method(row)):
        ranked = sorted((r for r in rows if r.keep == keep and _is_method(r)), key=lambda row: -row.accuracy)
        best, *rivals = ranked
        own = scores.get((label(best), keep))
        theirs = {label(row): scores.get((label(row), keep)) for row in rivals}
        out.append(
            {
                "title": f"With {_title(best, rows[0])}",
                "best": label(best),
                "row": best,
                "random": next((r for r in rows if r.keep == keep and r.method == "random"), None),
                "rivals": len(rivals),
                "level": [
                    name
                    for name, other in theirs.items()
                    if own is not None and other is not None and paired(own, other).p >= SIGNIFICANT
                ],
            }
        )
    return out


def _kinds(examples: Sequence[Example]) -> list[tuple[str, str, str]]:
    """Every kind of question with its first example."""
    first = {example.kind: example for example in reversed(examples)}
    return [
        (kind, first[kind].question, first[kind].answer) for kind in dict.fromkeys(e.kind for e in examples)
    ]


def _explained(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What every row's method does, in the words of its class."""
    out = []
    for name in dict.fromkeys(row.method for row in rows):
        if name in CONTROLS:
            what = CONTROLS[name] + "."
        elif name in methods.REGISTRY:
            doc = (methods.REGISTRY[name].__doc__ or "").strip()
            what = " ".join(doc.partition("\n\n")[0].split())
        elif files.names_file(name):
            what = "Options that `vtprune search` found."
        else:
            what = "A combination: who scores, then what is done with the scores."
        out.append((name, what[:1].upper() + what[1:]))
    return out


def _opening(evaluation: Evaluation, split: str, findings: Sequence[Mapping[str, Any]]) -> Sample | None:
    """The first sample at the smallest budget that its best method and the unpruned model both answer rightly."""
    chosen = min(findings, key=lambda one: one["row"].visual_tokens_out, default=None)
    best = [
        setting
        for where, setting in evaluation.outcomes
        if where == split and chosen and (setting.label, setting.keep) == (chosen["best"], chosen["row"].keep)
    ]
    for number in evaluation.samples(split) if best else ():
        example = evaluation.examples[split][number]
        kept = evaluation.outcomes[split, best[0]].kept.get(number)
        whole = _shot(evaluation, split, number, example, Setting(DENSE), opening=True)
        part = _shot(evaluation, split, number, example, best[0], opening=True)
        if kept is None or whole is None or part is None or not (whole.right and part.right):
            continue
        total = kept.rows * kept.cols
        whole = replace(
            whole, title=f"Unpruned: all {total} pieces", image=_data_uri(_squared(example.image, kept))
        )
        part = replace(part, title=f"Pruned by {part.title}: {len(kept.index)} of {total} pieces")
        return Sample(example.question, example.answer, example.kind, [whole, part])
    return None


def _sample_budget(evaluation: Evaluation, split: str) -> int | float | None:
    """The middle one of the budgets that were run."""
    budgets = [s.keep for sp, s in evaluation.outcomes if sp == split and s.keep is not None]
    ordered = sorted(set(budgets))
    return ordered[len(ordered) // 2] if ordered else None


def _samples(evaluation: Evaluation, split: str) -> list[Sample]:
    budget = _sample_budget(evaluation, split)
    settings = [
        s
        for sp, s in evaluation.outcomes
        if sp == split and (s.method == DENSE or (s.keep is not None and s.keep == budget))
    ]
    samples = []
    for number in evaluation.samples(split):
        example = evaluation.examples[split][number]
        shots = [
            shot
            for setting in settings
            if (shot := _shot(evaluation, split, number, example, setting)) is not None
        ]
        samples.append(Sample(example.question, example.answer, example.kind, shots))
    return samples


def _shot(
    evaluation: Evaluation, split: str, number: int, example: Example, setting: Setting, opening: bool = False
) -> Shot | None:
    outcome = evaluation.outcomes.get((split, setting))
    if outcome is None:
        return None
    kept: Kept | None = outcome.kept.get(number)
    if setting.method == DENSE:
        kept = Kept(1, 1, (0,))
    if kept is None:
        return None
    side = OPENING if opening else THUMBNAIL
    boxes = () if opening or kept.rows == 1 else example.boxes
    picture = overlay(example.image, kept.rows, kept.cols, kept.index, side, boxes)
    total = kept.rows * kept.cols
    alt = (
        f"The whole picture, for the question: {example.question}"
        if setting.method == DENSE
        else f"The same picture; the {len(kept.index)} of {total} patches kept by {setting.label} are bright, "
        "the others dimmed"
    )
    text = outcome.texts[number]
    return Shot(setting.label, _data_uri(picture), alt, text or "(no answer)", score(text, example.answer))


def _squared(picture: Image.Image, kept: Kept) -> Image.Image:
    """A picture with the lines between its tokens."""
    scale = OPENING / max(picture.size)
    width, height = (max(1, round(n * scale)) for n in picture.size)
    canvas = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for col in range(1, kept.cols):
        draw.line((col * width // kept.cols, 0, col * width // kept.cols, height), fill=GRID)
    for row in range(1, kept.rows):
        draw.line((0, row * height // kept.rows, width, row * height // kept.rows), fill=GRID)
    return canvas


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
