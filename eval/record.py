"""What an evaluation leaves in its folder, and how an interrupted one is taken up again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .accuracy import Kept, Outcome
from .evaluation import Earlier
from .prompts import EvaluationError
from .results import PREDICTIONS, RESULTS, JsonLines, Row, versions
from .settings import Setting
from .speed import Cost
from .world import Example

Key = tuple[str, str, str]  # split, method with budget, options


def predictions(row: Row, examples: Sequence[Example], outcome: Outcome) -> list[dict[str, Any]]:
    """One record per question of a setting.

    Args:
        row: any of the setting's rows.
        examples: the questions.
        outcome: their answers.
    """
    return [
        {
            "split": row.split,
            "method": row.method,
            "options": row.options,
            "keep": row.keep,
            "task": example.kind,
            "scene_seed": example.scene_seed,
            "question": example.question,
            "answer": example.answer,
            "prediction": outcome.texts[number],
            "correct": outcome.correct[number],
            "error": outcome.errors.get(number),
            "kept": dataclasses.asdict(outcome.kept[number]) if number in outcome.kept else None,
        }
        for number, example in enumerate(examples)
    ]


def take_up(
    folder: Path,
    model: str,
    seed: int,
    settings: Sequence[Setting],
    examples: Mapping[str, Sequence[Example]],
) -> dict[tuple[str, Setting], Earlier]:
    """What is complete in a folder; what is not is deleted from its files.

    Args:
        folder: of the interrupted run.
        model, seed: of this run.
        settings: of this run; finished ones that are not among them are dropped.
        examples: questions of this run, per split.

    Raises:
        EvaluationError: there is nothing to go on with, or it was another model, other versions or other questions.
    """
    rows, answers = _lines(folder / RESULTS), _lines(folder / PREDICTIONS)
    if not rows:
        raise EvaluationError(f"there is no interrupted evaluation in {folder}; leave --resume out.")
    now = {"model": model, "seed": seed, "versions": versions()}
    for name, value in now.items():
        for row in rows:
            if row[name] != value:
                raise EvaluationError(
                    f"the evaluation in {folder} was run with {name} {row[name]}, this one has {value}; start a new one."
                )
    by_row, by_answer = _grouped(rows), _grouped(answers)
    wanted = {
        _key(split, one.method, one.keep, one.all_options): (split, one)
        for split in examples
        for one in settings
    }
    out: dict[tuple[str, Setting], Earlier] = {}
    for key, (split, setting) in wanted.items():
        chosen, given = examples[split], by_answer.get(key, [])
        if key not in by_row or len(given) < len(chosen):
            continue
        if [(g["scene_seed"], g["question"]) for g in given] != [(e.scene_seed, e.question) for e in chosen]:
            raise EvaluationError(
                f"the evaluation in {folder} asked other questions on {split}; start a new one."
            )
        mine = [Row(**row) for row in by_row[key]]
        cost = Cost(**{f.name: getattr(mine[0], f.name) for f in dataclasses.fields(Cost)})
        out[split, setting] = Earlier(mine, cost, _outcome(given))
    for name in (RESULTS, PREDICTIONS):
        (folder / name).unlink(missing_ok=True)
    results, kept = JsonLines(folder / RESULTS), JsonLines(folder / PREDICTIONS)
    for (split, _), one in out.items():
        results.add([row.to_dict() for row in one.rows])
        kept.add(predictions(one.rows[0], examples[split], one.outcome))
    return out


def _outcome(given: Sequence[Mapping[str, Any]]) -> Outcome:
    return Outcome(
        correct=[g["correct"] for g in given],
        texts=[g["prediction"] for g in given],
        kept={
            number: Kept(g["kept"]["rows"], g["kept"]["cols"], tuple(g["kept"]["index"]))
            for number, g in enumerate(given)
            if g["kept"]
        },
        errors={number: g["error"] for number, g in enumerate(given) if g["error"]},
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return out


def _key(split: str, method: str, keep: int | float | None, options: Mapping[str, Any]) -> Key:
    return split, f"{method} {keep!r}", json.dumps(options, sort_keys=True)


def _grouped(records: Sequence[dict[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    groups: dict[Key, list[dict[str, Any]]] = {}
    for one in records:
        key = _key(one["split"], one["method"], one["keep"], one["options"])
        groups.setdefault(key, []).append(one)
    return groups
