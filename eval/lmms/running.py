"""Tasks of lmms-eval under several settings, with one loaded model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import vtprune
from vtprune.errors import VTPruneError

from ..prompts import EvaluationError
from ..results import PREDICTIONS, RESULTS, JsonLines, command_line, device_name, versions
from ..settings import DENSE, Setting
from ..speed import ROUNDS, Cost, measure
from .arguments import ModelArguments
from .results import TaskRow, predictions, rows_of, scores
from .tasks import needs_simple

OUTPUT = "lmms-eval"  # folder for what tasks write themselves, such as submissions to a server


@dataclass
class TaskEvaluation:
    """Results of tasks under several settings.

    Attributes:
        model: its name.
        rows: one per setting, task and metric.
        skipped: setting -> reason why it was not run.
        notes: anything a reader of the numbers must know.
    """

    model: str
    rows: list[TaskRow] = field(default_factory=list)
    skipped: dict[Setting, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def main_process() -> bool:
    """Whether this process writes the results, of those that were launched together."""
    return int(os.environ.get("RANK", "0")) == 0


def evaluate_tasks(
    model: nn.Module,
    processor: Any,
    tasks: Sequence[str],
    settings: Sequence[Setting],
    folder: Path,
    index: Any,
    *,
    name: str,
    arguments: ModelArguments,
    limit: int | None = None,
    rounds: int = ROUNDS,
    into: TaskEvaluation | None = None,
    on_setting: Callable[[Setting, int], None] = lambda setting, run: None,
) -> TaskEvaluation:
    """Runs tasks of lmms-eval once per setting and draw, and writes `results.jsonl` and `predictions.jsonl`.

    Costs are measured first, on the first question of the first task.

    Args:
        model: an unpatched model.
        processor: its processor.
        tasks: names of tasks, groups or tags.
        settings: what to compare; the dense model is added in front if it is missing.
        folder: for the results.
        index: from :func:`~vtprune.eval.lmms.tasks.manager`.
        name: model name for the rows.
        arguments: batch size and how to show videos.
        limit: questions per task; None for all.
        rounds: timings per setting.
        into: filled and returned, so that a caller who interrupts the run has what is done.
        on_setting: told before a setting runs, and which draw.

    Raises:
        EvaluationError: a task cannot be loaded, or the dense model itself fails.
        VTPruneError: the model is not supported.
    """
    vtprune.patch(model, "keep-all").remove()  # an unsupported model is told so before any work
    result = into if into is not None else TaskEvaluation(name)
    settings = list(dict.fromkeys([Setting(DENSE), *settings]))
    simple = needs_simple(tasks, index)
    costs, result.skipped = _costs(model, processor, tasks, settings, index, simple, arguments, rounds)
    if Setting(DENSE) not in costs:
        raise EvaluationError(
            f"the unpatched model fails on the first question: {result.skipped[Setting(DENSE)]}"
        )
    from importlib.metadata import version

    provenance = {
        "seed": 0,
        "versions": {**versions(), "lmms_eval": version("lmms-eval")},
        "device": device_name(str(next(model.parameters()).device)),
        "command": command_line(),
    }
    lines, answers = JsonLines(folder / RESULTS), JsonLines(folder / PREDICTIONS)
    dense: dict[tuple[str, str], float] = {}
    for setting in (one for one in settings if one in costs):
        try:
            runs = []
            for run in range(setting.runs):
                on_setting(setting, run)
                runs.append(
                    _run(model, processor, tasks, setting, run, index, simple, arguments, limit, folder)
                )
        except VTPruneError as error:
            if setting.method == DENSE:
                raise EvaluationError(f"the unpatched model fails on these tasks: {error}") from error
            result.skipped[setting] = str(error)
            continue
        done = [one for one in runs if one is not None]
        if not done:  # another process has them
            continue
        if setting.method == DENSE:
            dense = {place: score.value for place, score in scores(done[0]).items()}
            if not dense:
                result.notes.append(
                    f"{', '.join(tasks)}: no metric here is a number; look for files to submit in {folder / OUTPUT}"
                )
        rows = rows_of(name, setting, done, costs[setting], dense, provenance, limit)
        result.rows += rows
        lines.add([row.to_dict() for row in rows])
        answers.add(predictions(done[0], setting))
    return result


def _lm(
    model: nn.Module, processor: Any, setting: Setting, arguments: ModelArguments, simple: bool, run: int = 0
) -> Any:
    from .model import VTPruneChat, VTPruneSimple

    kind = VTPruneSimple if simple else VTPruneChat
    return kind.of(model, processor, setting, arguments, run)


def _run(
    model: nn.Module,
    processor: Any,
    tasks: Sequence[str],
    setting: Setting,
    run: int,
    index: Any,
    simple: bool,
    arguments: ModelArguments,
    limit: int | None,
    folder: Path,
) -> Mapping[str, Any] | None:
    """Results of `simple_evaluate`; None in all processes but the first."""
    lm = _lm(model, processor, setting, arguments, simple, run)
    return _simple_evaluate(lm, tasks, index, arguments.batch_size, limit, folder, setting)


def _simple_evaluate(
    lm: Any,
    tasks: Sequence[str],
    index: Any,
    batch_size: int,
    limit: int | None,
    folder: Path,
    setting: Setting,
) -> Mapping[str, Any] | None:
    from lmms_eval.evaluator import simple_evaluate

    index.task_group_map.clear()  # it counts a task that is loaded again as a second one
    place = folder / OUTPUT / _slug(setting)
    said = argparse.Namespace(  # what tasks read of the command line
        output_path=str(place),
        process_with_media=False,
        reasoning_tags=None,
        agentic_trace_mode="basic",
        log_samples=True,
        model="vtprune",
        model_args=setting.label,
        tasks=",".join(tasks),
        limit=limit,
        batch_size=batch_size,
    )
    if main_process():
        place.mkdir(parents=True, exist_ok=True)
    try:
        found: Mapping[str, Any] | None = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=index,
            batch_size=batch_size,
            limit=limit,
            log_samples=True,
            cli_args=said,
            verbosity="WARNING",
        )
    except VTPruneError:
        raise
    except Exception as error:
        raise EvaluationError(_reason(error, tasks)) from error
    finally:
        for empty in (place, place.parent) if main_process() else ():
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
    return found


def _slug(setting: Setting) -> str:
    text = setting.label + ("" if setting.keep is None else f"-{setting.keep}")
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in text)


def _reason(error: BaseException, tasks: Sequence[str]) -> str:
    """What went wrong inside lmms-eval; its retries hide the cause."""
    attempt = getattr(error, "last_attempt", None)
    cause = attempt.exception() if attempt is not None else None
    first = cause or error
    if isinstance(first, VTPruneError):
        return str(first)
    line = next(iter(str(first).strip().splitlines()), "")
    return (
        f"lmms-eval stopped at {', '.join(tasks)}: {type(first).__name__}: {line}. If data is missing: benchmarks are "
        "loaded from the hub or from HF_HOME, see docs/lmms-eval.md."
    )


def _costs(
    model: nn.Module,
    processor: Any,
    tasks: Sequence[str],
    settings: Sequence[Setting],
    index: Any,
    simple: bool,
    arguments: ModelArguments,
    rounds: int,
) -> tuple[dict[Setting, Cost], dict[Setting, str]]:
    """Of the first question of the first task."""
    from lmms_eval.tasks import get_task_dict

    try:
        index.task_group_map.clear()
        loaded = get_task_dict(list(tasks[:1]), index, "simple" if simple else "chat")
        task = _first(loaded)
        task.build_all_requests(limit=1, rank=0, world_size=1)
        request = task.instances[0]
    except Exception as error:
        raise EvaluationError(_reason(error, tasks[:1])) from error
    lm = _lm(model, processor, Setting(DENSE), arguments, simple)
    lm.task_dict[task.task_name] = task.dataset
    inputs = {key: value for key, value in lm.inputs(request).items() if isinstance(value, Tensor)}
    return measure(model, inputs, settings, rounds)


def _first(loaded: Mapping[Any, Any]) -> Any:
    """The first task of a tree of groups."""
    value = next(iter(loaded.values()))
    if isinstance(value, tuple):
        value = value[1]
    return _first(value) if isinstance(value, Mapping) else value
