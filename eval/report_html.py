"""The comparison as one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .accuracy import Kept
from .evaluation import Evaluation
from .overlay import overlay
from .plots import curves, label, small_multiples
from .results import ALL, Row
from .settings import CONTROLS, DENSE, Setting
from .tables import budget, by_setting, percent
from .world import Example, score

THUMBNAIL = 216


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
    text = environment.get_template("report.html.j2").render(
        model=evaluation.model,
        row=rows[0],
        splits=[_split(rows, split) for split in splits],
        controls=CONTROLS,
        plots=[
            (title, Markup(curves(main, axis)), alt)
            for title, axis, alt in (
                ("Accuracy against kept tokens", "tokens", "tokens left at the end of the model"),
                ("Accuracy against compute", "flops", "FLOPs of the prefill including the vision encoder"),
                ("Accuracy against layer-average tokens", "average", "visual tokens averaged over layers"),
            )
        ],
        other_plots=[
            (split, Markup(curves([r for r in rows if r.split == split], "tokens"))) for split in splits[1:]
        ],
        kinds=Markup(small_multiples(main)),
        costs=_costs(rows),
        samples=_samples(evaluation, splits[0]),
        sample_budget=_sample_budget(evaluation, splits[0]),
        skipped=[(s.label, s.keep, reason) for s, reason in evaluation.skipped.items()],
        notes=evaluation.notes,
    )
    path.write_text(text, encoding="utf-8")


def _split(rows: Sequence[Row], split: str) -> dict[str, Any]:
    settings = by_setting(rows, split)
    tasks = [task for task in settings[0] if task != ALL]
    return {
        "name": split,
        "n": settings[0][ALL].n,
        "per_task": settings[0][tasks[0]].n if tasks else 0,
        "tasks": tasks,
        "lines": [
            {
                "label": label(s[ALL]),
                "budget": budget(s[ALL]),
                "all": s[ALL],
                "first": number > 0 and label(s[ALL]) != label(settings[number - 1][ALL]),
                "cells": [s[task] for task in tasks],
            }
            for number, s in enumerate(settings)
        ],
    }


def _costs(rows: Sequence[Row]) -> list[tuple[str, str, Row]]:
    chosen = {(label(row), budget(row)): row for row in reversed(rows) if row.task == ALL}
    return [(name, keep, row) for (name, keep), row in reversed(chosen.items())]


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


def _shot(evaluation: Evaluation, split: str, number: int, example: Example, setting: Setting) -> Shot | None:
    outcome = evaluation.outcomes.get((split, setting))
    if outcome is None:
        return None
    kept: Kept | None = outcome.kept.get(number)
    if setting.method == DENSE:
        kept = Kept(1, 1, (0,))
    if kept is None:
        return None
    picture = overlay(
        example.image, kept.rows, kept.cols, kept.index, THUMBNAIL, example.boxes if kept.rows > 1 else ()
    )
    total = kept.rows * kept.cols
    alt = (
        f"The whole picture, for the question: {example.question}"
        if setting.method == DENSE
        else f"The same picture; the {len(kept.index)} of {total} patches kept by {setting.label} are bright, "
        "the others dimmed"
    )
    text = outcome.texts[number]
    return Shot(setting.label, _data_uri(picture), alt, text or "(no answer)", score(text, example.answer))


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
