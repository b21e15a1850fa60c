"""The comparison as a whole: costs of all settings, then accuracy setting by setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import vtprune
from vtprune.errors import VTPruneError

from .accuracy import Batch, Outcome, ask, make_batches
from .parallel import Source, answers
from .prompts import EvaluationError, Prompter
from .results import ALL, Row, command_line, device_name, mean_and_stderr, retained, versions
from .settings import DENSE, Setting
from .speed import ROUNDS, Cost, measure
from .world import Example

SAMPLES_PER_KIND = 2
BATCH_SIZE = 60
TOGETHER = 9  # runs of the model that share a picture's encoding; an interruption loses at most these


class Observer:
    """Told of progress; all methods may be overridden."""

    def start(self, title: str, steps: int) -> None:
        """A phase of so many steps begins."""

    def step(self, steps: int, note: str) -> None:
        """So many steps are done; `note` says what is going on."""

    def rows(self, rows: list[Row], examples: Sequence[Example], outcome: Outcome) -> None:
        """One setting has been evaluated on one split."""

    def skip(self, setting: Setting, reason: str) -> None:
        """A setting cannot run on this model."""


@dataclass
class Evaluation:
    """Results of a comparison.

    Attributes:
        model: its name.
        rows: one per split, setting and task.
        examples: questions per split.
        outcomes: answers per split and setting.
        costs: cost per setting.
        skipped: setting -> reason why it was not run.
        notes: anything a reader of the numbers must know.
    """

    model: str
    rows: list[Row] = field(default_factory=list)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    outcomes: dict[tuple[str, Setting], Outcome] = field(default_factory=dict)
    costs: dict[Setting, Cost] = field(default_factory=dict)
    skipped: dict[Setting, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def samples(self, split: str) -> list[int]:
        """Numbers of the first few examples of every kind: those shown in the report, not picked by hand."""
        return sample_numbers(self.examples[split])


@dataclass(frozen=True)
class Earlier:
    """What an interrupted run has left of one setting on one split.

    Attributes:
        rows: one per task.
        cost: what they say of it.
        outcome: the answers.
    """

    rows: list[Row]
    cost: Cost
    outcome: Outcome


def sample_numbers(examples: Sequence[Example], per_kind: int = SAMPLES_PER_KIND) -> list[int]:
    """Numbers of the first `per_kind` examples of every kind."""
    seen: dict[str, int] = {}
    numbers = []
    for number, example in enumerate(examples):
        seen[example.kind] = seen.get(example.kind, 0) + 1
        if seen[example.kind] <= per_kind:
            numbers.append(number)
    return numbers


def evaluate(
    model: nn.Module,
    processor: Any,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    *,
    name: str = "",
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    rounds: int = ROUNDS,
    observer: Observer | None = None,
    into: Evaluation | None = None,
    jobs: int = 1,
    source: Source | None = None,
    earlier: Mapping[tuple[str, Setting], Earlier] | None = None,
) -> Evaluation:
    """Evaluates settings on questions.

    Costs are measured once, on the first question, and stand in the rows of all splits and tasks.

    Args:
        model: an unpatched model.
        processor: its processor.
        examples: questions of one split or several.
        settings: what to compare; the dense model is added in front if it is missing.
        name: model name for the rows.
        seed: written to the rows.
        batch_size: questions per call of `generate`.
        rounds: timings per setting.
        observer: told of progress and of every finished setting.
        into: filled and returned, so that a caller who interrupts the run has what is done.
        jobs: settings asked at the same time, each in a process of its own; costs are always measured alone.
        source: where these processes load the model from.
        earlier: what an interrupted run has left; these settings are neither measured nor asked again, and the
            observer is not told of their rows.

    Raises:
        EvaluationError: no examples, several jobs without a source, or the dense model itself fails.
        UnsupportedModelError: vtprune does not know the model.
    """
    if not examples:
        raise EvaluationError("there are no questions to ask; raise the limit.")
    if jobs > 1 and source is None:
        raise EvaluationError(f"{jobs} jobs need to know where to load the model from; give a source.")
    earlier = earlier or {}
    vtprune.patch(model, "keep-all").remove()  # an unsupported model is told so before any work
    observer = observer or Observer()
    result = into if into is not None else Evaluation(name)
    settings = list(dict.fromkeys([Setting(DENSE), *settings]))
    prompter = Prompter(model, processor)
    for example in examples:
        result.examples.setdefault(example.split, []).append(example)

    known = {setting: one.cost for (_, setting), one in earlier.items()}
    unknown = [setting for setting in settings if setting not in known]
    observer.start("costs", len(unknown) * (1 + rounds))
    representative = prompter.inputs([examples[0].image], [examples[0].question])
    costs, skipped = measure(
        model, representative, unknown, rounds, lambda setting: observer.step(1, _name(setting))
    )
    result.costs.update({**known, **costs})
    for setting, reason in skipped.items():
        _skip(result, observer, setting, reason)

    provenance = {
        "seed": seed,
        "versions": versions(),
        "device": device_name(str(next(model.parameters()).device)),
        "command": command_line(),
    }
    runnable = [setting for setting in settings if setting in result.costs]
    tasks = [(split, setting) for split in result.examples for setting in runnable]
    missing = [task for task in tasks if task not in earlier]
    observer.start("accuracy", sum(len(result.examples[split]) * setting.runs for split, setting in missing))
    if jobs > 1:
        assert source is not None
        asked = _in_workers(result, missing, source, batch_size, jobs, observer)
    else:
        asked = _here(model, prompter, result, missing, batch_size, observer)
    dense: dict[str, dict[str, float]] = {}
    for split, setting in tasks:
        chosen = result.examples[split]
        before = earlier.get((split, setting))
        outcome = before.outcome if before is not None else next(asked)
        if isinstance(outcome, VTPruneError):
            if setting not in result.skipped:
                _skip(result, observer, setting, str(outcome))
            continue
        result.outcomes[split, setting] = outcome
        scores = _by_task(chosen, outcome)
        if setting.method == DENSE:
            dense[split] = {task: mean_and_stderr(values)[0] for task, values in scores.items()}
        if before is not None:
            result.rows += before.rows
        else:
            cost = result.costs[setting]
            rows = [
                _row(result.model, setting, cost, task, values, dense[split][task], provenance, split)
                for task, values in scores.items()
            ]
            result.rows += rows
            observer.rows(rows, chosen, outcome)
        result.notes += _check(split, setting, outcome, result)
    return result


def _chunks(tasks: Sequence[tuple[str, Setting]], size: int) -> list[tuple[str, list[Setting]]]:
    """Tasks of the same split, at most `size` runs of the model on each question together, in their order."""
    out: list[tuple[str, list[Setting]]] = []
    for split, setting in tasks:
        if out and out[-1][0] == split and sum(s.runs for s in out[-1][1]) + setting.runs <= size:
            out[-1][1].append(setting)
        else:
            out.append((split, [setting]))
    return out


def _here(
    model: nn.Module,
    prompter: Prompter,
    result: Evaluation,
    tasks: Sequence[tuple[str, Setting]],
    batch_size: int,
    observer: Observer,
) -> Iterator[Outcome | VTPruneError]:
    batches: dict[str, list[Batch]] = {}
    for split, settings in _chunks(tasks, TOGETHER):
        chosen = result.examples[split]
        if split not in batches:
            batches = {split: make_batches(prompter, chosen, batch_size)}
        left = {setting: len(chosen) * setting.runs for setting in settings}

        def answered(
            setting: Setting, count: int, left: dict[Setting, int] = left, split: str = split
        ) -> None:
            left[setting] -= count
            observer.step(count, f"{_name(setting)} on {split}")

        yield from ask(model, prompter, chosen, batches[split], settings, sample_numbers(chosen), answered)
        for setting, count in left.items():
            observer.step(
                count, f"{_name(setting)} on {split}"
            )  # questions that a failed setting did not reach


def _in_workers(
    result: Evaluation,
    tasks: Sequence[tuple[str, Setting]],
    source: Source,
    batch_size: int,
    jobs: int,
    observer: Observer,
) -> Iterator[Outcome | VTPruneError]:
    chunks = _chunks(tasks, TOGETHER)
    work = [(split, settings, sample_numbers(result.examples[split])) for split, settings in chunks]
    outcomes = answers(source, result.examples, work, batch_size, jobs, torch.get_num_threads())
    for (split, settings), some in zip(chunks, outcomes, strict=True):
        for setting in settings:
            observer.step(len(result.examples[split]) * setting.runs, f"{_name(setting)} on {split}")
        yield from some


def _name(setting: Setting) -> str:
    return setting.label if setting.keep is None else f"{setting.label} keep={setting.keep}"


def _skip(result: Evaluation, observer: Observer, setting: Setting, reason: str) -> None:
    if setting.method == DENSE:
        raise EvaluationError(f"the unpatched model fails on these questions: {reason}")
    result.skipped[setting] = reason
    observer.skip(setting, reason)


def _by_task(examples: Sequence[Example], outcome: Outcome) -> dict[str, list[float]]:
    tasks: dict[str, list[float]] = {ALL: list(outcome.correct)}
    for example, correct in zip(examples, outcome.correct, strict=True):
        tasks.setdefault(example.kind, []).append(correct)
    return tasks


def _row(
    model: str,
    setting: Setting,
    cost: Cost,
    task: str,
    values: Sequence[float],
    dense: float,
    provenance: dict[str, Any],
    split: str,
) -> Row:
    accuracy, stderr = mean_and_stderr(values)
    return Row(
        model=model,
        method=setting.method,
        options=setting.all_options,
        keep=setting.keep,
        task=task,
        n=len(values),
        accuracy=accuracy,
        stderr=stderr,
        retained=retained(accuracy, dense),
        split=split,
        **dataclasses.asdict(cost),
        **provenance,
    )


def _check(split: str, setting: Setting, outcome: Outcome, result: Evaluation) -> list[str]:
    notes = []
    if outcome.errors:
        reason = next(iter(outcome.errors.values()))
        notes.append(
            f"{_name(setting)} on {split}: {len(outcome.errors)} questions failed and count as wrong; first: {reason}"
        )
    if setting.method == "keep-all":
        dense = result.outcomes[split, Setting(DENSE)].texts
        differ = sum(a != b for a, b in zip(dense, outcome.texts, strict=True))
        notes.append(
            f"control on {split}: keep-all gives the same {len(dense)} answers as the dense model"
            if differ == 0
            else f"CONTROL FAILED on {split}: keep-all differs from the dense model in {differ} of {len(dense)} answers"
        )
    return notes
