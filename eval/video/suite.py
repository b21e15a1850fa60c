"""The comparison as a whole: costs of all settings, then the answers to all questions, a few questions at a time."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vtprune
from vtprune.errors import VTPruneError

from ..evaluation import Observer
from ..parallel import Source
from ..prompts import EvaluationError
from ..results import PREDICTIONS, JsonLines, command_line, device_name, versions
from ..speed import Cost, measure
from ..world.video import VideoExample
from .answers import Asker, Said, answers
from .choosing import selection_seconds
from .results import FrameComparison, VideoRow, compare_frames, rows_of, select_options
from .settings import ALL_FRAMES, Selection, VideoSetting

ROUNDS = 3
TIMED_CLIPS = 3
PART = 18  # questions asked together; an interruption loses at most these, per job
RUN = "run.json"


@dataclass
class VideoEvaluation:
    """Results of a comparison.

    Attributes:
        model: its name.
        examples: questions per split that have been asked.
        outcomes: answers per split and setting, in the order of the questions.
        costs: cost per setting.
        select_ms: time per setting, see :class:`~vtprune.eval.video.results.VideoRow`.
        rows: one per split, setting and task.
        comparisons: selectors against uniform.
        skipped: setting -> reason why it was not run.
        notes: anything a reader of the numbers must know.
    """

    model: str
    examples: dict[str, list[VideoExample]] = field(default_factory=dict)
    outcomes: dict[str, dict[VideoSetting, list[Said]]] = field(default_factory=dict)
    costs: dict[VideoSetting, Cost] = field(default_factory=dict)
    select_ms: dict[VideoSetting, float | None] = field(default_factory=dict)
    rows: list[VideoRow] = field(default_factory=list)
    comparisons: list[FrameComparison] = field(default_factory=list)
    skipped: dict[VideoSetting, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def evaluate(
    asker: Asker,
    examples: Sequence[VideoExample],
    settings: Sequence[VideoSetting],
    folder: Path,
    *,
    name: str,
    seed: int = 0,
    rounds: int = ROUNDS,
    jobs: int = 1,
    source: Source | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    into: VideoEvaluation | None = None,
) -> VideoEvaluation:
    """Evaluates settings on questions, and writes `predictions.jsonl` as the answers come.

    Args:
        asker: with the model.
        examples: questions of one split or several.
        settings: what to compare; the dense model is added in front if it is missing.
        folder: for `predictions.jsonl`, and `run.json` with what must be the same to go on.
        name: model name for the rows.
        seed: written to the rows.
        rounds: timings per setting.
        jobs: processes that answer at the same time; costs are always measured alone.
        source: where they load the model from.
        resume: take over the answers in the folder.
        observer: told of progress.
        into: filled and returned, so that a caller who interrupts the run can :func:`finish` what is done.

    Raises:
        EvaluationError: no questions, several jobs without a source, nothing to go on with, or the dense model fails.
        VTPruneError: the model is not supported.
    """
    if not examples:
        raise EvaluationError("there are no questions to ask; raise the limit.")
    if jobs > 1 and source is None:
        raise EvaluationError(f"{jobs} jobs need to know where to load the model from; give a source.")
    vtprune.patch(asker.model, "keep-all").remove()  # an unsupported model is told so before any work
    observer = observer or Observer()
    result = into if into is not None else VideoEvaluation(name)
    settings = list(dict.fromkeys([VideoSetting(), *settings]))
    run = {"model": name, "seed": seed, "candidates": asker.candidates, "versions": versions()}
    earlier = _earlier(folder, run) if resume else {}
    (folder / RUN).write_text(json.dumps(run) + "\n", encoding="utf-8")

    _measure(asker, examples[0], settings, rounds, result, observer)
    _time_selections(asker, examples, settings, result, observer)
    runnable = [setting for setting in settings if setting in result.costs]

    by_split: dict[str, list[VideoExample]] = {}
    for example in examples:
        by_split.setdefault(example.split, []).append(example)
    parts = [group[at : at + PART] for group in by_split.values() for at in range(0, len(group), PART)]
    done = {i: _taken(part, runnable, earlier) for i, part in enumerate(parts)}
    todo = [part for i, part in enumerate(parts) if done[i] is None]
    lines = JsonLines(folder / PREDICTIONS)
    (folder / PREDICTIONS).unlink(missing_ok=True)
    for i, part in enumerate(parts):
        taken = done[i]
        if taken is not None:
            _keep(result, part, runnable, taken, lines)
    if earlier:
        result.notes.append(f"resumed: {len(parts) - len(todo)} of {len(parts)} parts are of an earlier run")
    observer.start("answers", sum(len(part) for part in todo) * len(runnable))
    given = answers(asker, source, todo, runnable, jobs, lambda count: _step(observer, count))
    for part, found in zip(todo, given, strict=True):
        _keep(result, part, runnable, found, lines)
    finish(result, asker, seed)
    return result


def _step(observer: Observer, count: int) -> None:
    observer.step(count, "")


def _measure(
    asker: Asker,
    example: VideoExample,
    settings: Sequence[VideoSetting],
    rounds: int,
    result: VideoEvaluation,
    observer: Observer,
) -> None:
    """Costs depend on the token method and the number of frames, not on which frames: evenly spaced ones stand for all."""
    chooser = asker.chooser(example)

    def alike(setting: VideoSetting) -> VideoSetting:
        frames = setting.selection.frames
        return VideoSetting(
            setting.tokens, Selection() if frames is None else Selection("uniform", (), frames)
        )

    wanted = list(dict.fromkeys(alike(setting) for setting in settings))
    observer.start("costs", len(wanted) * (1 + rounds))
    costs, skipped = measure(
        asker.model,
        lambda setting: asker.inputs([chooser], setting),
        wanted,
        rounds,
        lambda setting: observer.step(1, setting.name),
    )
    for setting in settings:
        like = alike(setting)
        if like in costs:
            result.costs[setting] = costs[like]
        else:
            result.skipped[setting] = skipped[like]
            if setting == VideoSetting():
                raise EvaluationError(f"the unpatched model fails on these questions: {skipped[like]}")


def _time_selections(
    asker: Asker,
    examples: Sequence[VideoExample],
    settings: Sequence[VideoSetting],
    result: VideoEvaluation,
    observer: Observer,
) -> None:
    """Times of every selector with its first number of frames; on clips of different kinds."""
    first: dict[str, Selection] = {}
    for setting in settings:
        if setting.selection.name != ALL_FRAMES and setting in result.costs:
            first.setdefault(setting.selection.label, setting.selection)
    chosen = examples[:TIMED_CLIPS]
    observer.start("selectors", len(first) * len(chosen))
    times: dict[str, list[float]] = {label: [] for label in first}
    failed: dict[str, str] = {}
    for number, example in enumerate(chosen):
        clip = asker.chooser(example)
        for label, selection in first.items():
            try:
                if number == 0:  # loads what is loaded when it is first needed
                    selection_seconds(clip.fresh(), selection)
                times[label].append(1e3 * selection_seconds(clip.fresh(), selection))
            except VTPruneError as error:
                failed[label] = str(error)
            observer.step(1, label)
    for setting in list(result.costs):
        label = setting.selection.label
        if label in failed:
            del result.costs[setting]
            result.skipped[setting] = failed[label]
        else:
            result.select_ms[setting] = statistics.median(times[label]) if label in times else None


def _keep(
    result: VideoEvaluation,
    part: Sequence[VideoExample],
    settings: Sequence[VideoSetting],
    found: Sequence[Sequence[Said]],
    lines: JsonLines,
) -> None:
    split = part[0].split
    result.examples.setdefault(split, []).extend(part)
    outcomes = result.outcomes.setdefault(split, {})
    for setting, said in zip(settings, found, strict=True):
        outcomes.setdefault(setting, []).extend(said)
    lines.add(
        [
            _record(example, setting, one)
            for setting, said in zip(settings, found, strict=True)
            for example, one in zip(part, said, strict=True)
        ]
    )


def _record(example: VideoExample, setting: VideoSetting, said: Said) -> dict[str, Any]:
    values = {k: v for k, v in dataclasses.asdict(said).items() if k != "text"}
    return {
        "split": example.split,
        "setting": setting.name,
        "select": setting.selection.name,
        "select_options": select_options(setting),
        "frames": setting.selection.frames,
        "method": setting.method,
        "options": setting.tokens.all_options,
        "keep": setting.tokens.keep,
        "task": example.kind,
        "needs_vision": example.needs_vision,
        "clip_seed": example.scene.seed,
        "question": example.question,
        "answer": example.answer,
        "relevant": example.relevant,
        "prediction": said.text,
        **values,
    }


Key = tuple[str, int, str, str]  # split, clip, question, setting


def _earlier(folder: Path, run: Mapping[str, Any]) -> dict[Key, Said]:
    """Answers that an interrupted run has left."""
    path = folder / RUN
    if not path.exists():
        raise EvaluationError(f"there is no interrupted evaluation in {folder}; leave --resume out.")
    before = json.loads(path.read_text(encoding="utf-8"))
    for key, value in run.items():
        if before.get(key) != value:
            raise EvaluationError(
                f"the evaluation in {folder} was run with {key} {before.get(key)}, this one has {value}; start a new one."
            )
    found: dict[Key, Said] = {}
    answered = folder / PREDICTIONS
    for line in answered.read_text(encoding="utf-8").splitlines() if answered.exists() else []:
        try:
            one = json.loads(line)
        except json.JSONDecodeError:
            break  # it was cut off
        names = [f.name for f in dataclasses.fields(Said) if f.name not in ("text", "times", "notes")]
        said = Said(
            text=one["prediction"],
            times=tuple(one["times"]),
            notes=tuple(one["notes"]),
            **{name: one[name] for name in names},
        )
        found[one["split"], one["clip_seed"], one["question"], one["setting"]] = said
    return found


def _taken(
    part: Sequence[VideoExample], settings: Sequence[VideoSetting], earlier: Mapping[Key, Said]
) -> list[list[Said]] | None:
    """Earlier answers to a part, None unless they are all there."""
    keys = [[(e.split, e.scene.seed, e.question, s.name) for e in part] for s in settings]
    if not all(key in earlier for line in keys for key in line):
        return None
    return [[earlier[key] for key in line] for line in keys]


def finish(result: VideoEvaluation, asker: Asker, seed: int) -> None:
    """Rows, comparisons and notes from the answers that are there."""
    provenance = {
        "seed": seed,
        "versions": versions(),
        "device": device_name(str(asker.prompter.device)),
        "command": command_line(),
    }
    result.rows.clear()
    result.comparisons.clear()
    for split, outcomes in result.outcomes.items():
        chosen, dense = result.examples[split], outcomes[VideoSetting()]
        for setting, said in outcomes.items():
            cost, select_ms = result.costs[setting], result.select_ms[setting]
            result.rows += rows_of(
                result.model,
                split,
                chosen,
                setting,
                said,
                dense,
                cost,
                select_ms,
                asker.candidates,
                provenance,
            )
            result.notes += _check(split, setting, said, outcomes)
        result.comparisons += compare_frames(split, chosen, outcomes)


def _check(
    split: str, setting: VideoSetting, said: Sequence[Said], outcomes: Mapping[VideoSetting, Sequence[Said]]
) -> list[str]:
    notes = [f"{setting.selection.label}: {note}" for one in said[:1] for note in one.notes]
    errors = [one.error for one in said if one.error is not None]
    if errors:
        notes.append(
            f"{setting.name} on {split}: {len(errors)} questions failed and count as wrong; first: {errors[0]}"
        )
    plain = dataclasses.replace(setting, tokens=VideoSetting().tokens)
    if setting.tokens.method == "keep-all" and plain in outcomes:
        differ = sum(a.text != b.text for a, b in zip(said, outcomes[plain], strict=True))
        notes.append(
            f"control on {split}: keep-all gives the same {len(said)} answers as the unpatched model ({plain.name})"
            if differ == 0
            else f"CONTROL FAILED on {split}: keep-all differs from the unpatched model ({plain.name}) in {differ} of "
            f"{len(said)} answers"
        )
    return notes
