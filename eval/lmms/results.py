"""Rows of tasks of lmms-eval: our one results format, with what lmms-eval says beside it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..plots import label
from ..results import Row, mean_and_stderr, retained
from ..settings import Setting
from ..speed import Cost
from .tally import Tally, total

BESIDE_METRICS = (
    "doc_id",
    "doc",
    "target",
    "arguments",
    "resps",
    "filtered_resps",
    "token_counts",
    "doc_hash",
    "input_media",
)


@dataclass(frozen=True, kw_only=True)
class TaskRow(Row):
    """A line of `results.jsonl` of tasks of lmms-eval: one metric of one task, or group of tasks.

    `accuracy` and `stderr` are the metric's value and standard error in its own unit: mostly a share in [0, 1], but points
    for MME and percent for some. `visual_tokens_in` and the other costs are of the first question alone, as in every row; the
    means are over all that were asked.

    Attributes:
        metric: its name in lmms-eval, with the filter behind a comma where it has one.
        higher_is_better: None where the task does not say.
        task_version: of the task in lmms-eval.
        limit: questions per task that were asked; None for all.
        mean_tokens_in: visual tokens of a question.
        mean_tokens_llm: those that enter the language model.
        mean_tokens_out: those left at the end.
        mean_layer_average: averaged over the layers of the language model.
    """

    metric: str
    higher_is_better: bool | None
    task_version: str
    limit: int | None
    mean_tokens_in: float
    mean_tokens_llm: float
    mean_tokens_out: float
    mean_layer_average: float

    @property
    def where(self) -> tuple[str, str]:
        """Task and metric."""
        return self.task, self.metric


def read_line(line: str) -> TaskRow:
    """The row of a line of `results.jsonl`."""
    return TaskRow(**json.loads(line))


@dataclass(frozen=True)
class Score:
    """One metric of one task under one draw.

    Attributes:
        value: in the metric's unit.
        stderr: as lmms-eval has it; None where it has none.
        per_question: document -> value, where it is one number per question and their mean is the metric.
    """

    value: float
    stderr: float | None
    per_question: dict[Any, float]


def scores(results: Mapping[str, Any]) -> dict[tuple[str, str], Score]:
    """Every numeric metric of every task and group in the results of `simple_evaluate`."""
    out: dict[tuple[str, str], Score] = {}
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            if "," not in key or "_stderr" in key or isinstance(value, bool):
                continue
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            metric, _, filtered = key.partition(",")
            error = values.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, (int, float)) and not isinstance(error, bool) and math.isfinite(error)
            name = metric if filtered == "none" else key
            samples = _samples(results, task)
            numbers = {
                (one["task"], one["doc_id"]): float(one[metric])
                for one in samples
                if isinstance(one.get(metric), (int, float)) and not isinstance(one.get(metric), bool)
            }
            whole = len(numbers) == len(samples) > 0 and math.isclose(
                math.fsum(numbers.values()) / len(numbers), value, abs_tol=1e-9
            )
            out[task, name] = Score(float(value), float(error) if known else None, numbers if whole else {})
    return out


def _samples(results: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """Samples of a task, or of all tasks of a group, in the order of the documents."""
    parts = _members(results, task)
    found = [{**one, "task": part} for part in parts for one in results.get("samples", {}).get(part, [])]
    return sorted(found, key=lambda one: (parts.index(one["task"]), one["doc_id"]))


def _members(results: Mapping[str, Any], task: str) -> list[str]:
    if task in results.get("samples", {}):
        return [task]
    inner = results.get("group_subtasks", {}).get(task, [])
    return [part for one in inner for part in _members(results, one)]


def tallies(results: Mapping[str, Any]) -> dict[str, Tally]:
    """Visual tokens per task and group."""
    names = {task for task, _ in scores(results)}
    return {task: total(_samples(results, task)) for task in names}


def predictions(results: Mapping[str, Any], setting: Setting) -> list[dict[str, Any]]:
    """One record per question: what was asked, answered and counted."""
    out = []
    for task in results.get("samples", {}):
        for one in _samples(results, task):
            counts = one.get("token_counts") or [None]
            out.append(
                {
                    "split": _split(results, task),
                    "method": setting.method,
                    "options": setting.all_options,
                    "keep": setting.keep,
                    "task": task,
                    "doc_id": one["doc_id"],
                    "question": next((a for a in one.get("arguments", []) if isinstance(a, str)), None),
                    "answer": one["target"],
                    "prediction": one["filtered_resps"][0] if one["filtered_resps"] else None,
                    "metrics": {k: v for k, v in one.items() if k not in (*BESIDE_METRICS, "task")},
                    "tokens": counts[0],
                }
            )
    # Some tasks give numbers of NumPy and the like.
    plain: list[dict[str, Any]] = json.loads(json.dumps(out, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def rows_of(
    model: str,
    setting: Setting,
    runs: Sequence[Mapping[str, Any]],
    cost: Cost,
    dense: Mapping[tuple[str, str], float],
    provenance: Mapping[str, Any],
    limit: int | None = None,
) -> list[TaskRow]:
    """One row per task and metric.

    With several draws the value is their mean; its standard error is over questions of their means over the draws,
    None where the metric is not a mean over questions.

    Args:
        model: its name.
        setting: how it was run.
        runs: results of `simple_evaluate`, one per draw.
        cost: of the setting.
        dense: value of the dense model per task and metric; empty for the dense model itself.
        provenance: seed, versions, device and command.
        limit: questions per task; None for all.
    """
    found = [scores(run) for run in runs]
    counted = tallies(runs[0])
    rows = []
    for (task, metric), first in found[0].items():
        each = [one[task, metric] for one in found if (task, metric) in one]
        value = math.fsum(one.value for one in each) / len(each)
        tally = counted[task]
        base = dense.get((task, metric), value)
        higher = runs[0].get("higher_is_better", {}).get(task, {})
        rows.append(
            TaskRow(
                model=model,
                method=setting.method,
                options=setting.all_options,
                keep=setting.keep,
                task=task,
                n=len(_samples(runs[0], task)),
                accuracy=value,
                stderr=first.stderr if len(each) == 1 else _drawn(each),
                retained=retained(value, base),
                split=_split(runs[0], task),
                metric=metric,
                higher_is_better=higher.get(metric.partition(",")[0]) if isinstance(higher, dict) else None,
                task_version=str(runs[0].get("versions", {}).get(task, "")),
                limit=limit,
                mean_tokens_in=tally.mean("visual_tokens"),
                mean_tokens_llm=tally.mean("visual_tokens_llm"),
                mean_tokens_out=tally.mean("visual_tokens_out"),
                mean_layer_average=tally.mean("layer_average_tokens"),
                **dataclasses.asdict(cost),
                **provenance,
            )
        )
    return rows


def _drawn(each: Sequence[Score]) -> float | None:
    if not all(one.per_question for one in each):
        return None
    means = [math.fsum(one.per_question[doc] for one in each) / len(each) for doc in each[0].per_question]
    return mean_and_stderr(means)[1]


def _split(results: Mapping[str, Any], task: str) -> str:
    parts = _members(results, task)
    config = results.get("configs", {}).get(parts[0] if parts else task, {})
    return str(config.get("test_split") or config.get("validation_split") or "")


def number(value: float) -> str:
    """Four significant digits, without an exponent."""
    return f"{value:.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows: Sequence[TaskRow], limited: bool) -> Table:
    """All metrics under all settings, task by task.

    Args:
        rows: of one model.
        limited: whether only some of the questions were asked, which the title says.
    """
    out = Table(
        title=f"Tasks of lmms-eval on {rows[0].model}, values in the unit of each metric"
        + (" (--limit: not comparable with published figures)" if limited else "")
    )
    for name in ("task", "metric", "method"):
        out.add_column(name, no_wrap=True)
    for name in ("keep", "tokens", "layer average", "n", "value", "± stderr", "retained"):
        out.add_column(name, justify="right", no_wrap=True)
    before: tuple[str, str] | None = None
    for place in dict.fromkeys(row.where for row in rows):
        for row in (one for one in rows if one.where == place):
            first = before != place
            if first and before is not None:
                out.add_section()
            before = place
            out.add_row(
                row.task if first else "",
                row.metric if first else "",
                label(row),
                "–" if row.keep is None else str(row.keep),  # noqa: RUF001 - a dash as tables have it
                f"{number(row.mean_tokens_in)} → {number(row.mean_tokens_llm)}",
                number(row.mean_layer_average),
                str(row.n),
                number(row.accuracy),
                "–" if row.stderr is None else number(row.stderr),  # noqa: RUF001
                "–" if row.retained is None else f"{100 * row.retained:.1f}",  # noqa: RUF001
            )
    return out
