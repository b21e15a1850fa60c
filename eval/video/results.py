"""Rows of the video suite: what the answers to all questions under one setting come to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..paired import Paired, paired
from ..results import ALL, Row, mean_and_stderr, retained
from ..speed import Cost
from ..world.video import VideoExample
from .answers import Said
from .settings import VideoSetting

NEEDS_VISION = "needs vision"  # the task that stands for all kinds that cannot be answered without the video
CHECKED = ("needle", "moment")  # kinds for which the choice of frames decides


@dataclass(frozen=True, kw_only=True)
class VideoRow(Row):
    """A line of `results.jsonl` of the video suite: a picture row and what concerns frames.

    `options` and `keep` are those of the token method; `task` is a question kind, "all" or "needs vision".

    Attributes:
        select: the frame selector, "all" for every candidate.
        select_options: its options; `seeds` where several draws were averaged, `captions` and `relevance` as asked for.
        frames: frames that the model sees, None for every candidate.
        candidates: frames there are to choose from.
        select_ms: time of the selection with everything it computes, decoding not counted; median over clips, None for
            "all".
        recall: share of the spans that hold the answer of which a frame was chosen, mean over the questions that have any.
        tau, rho: Kendall's and Spearman's correlation of the selector's scores with the relevant moments, mean over the
            questions for which they are defined; None where the selector has no scores.
        random_tau, random_rho: the same of random scores on the same questions.
    """

    select: str
    select_options: dict[str, Any]
    frames: int | None
    candidates: int
    select_ms: float | None
    recall: float | None
    tau: float | None
    rho: float | None
    random_tau: float | None
    random_rho: float | None


def read_line(line: str) -> VideoRow:
    """The row of a line of `results.jsonl`."""
    return VideoRow(**json.loads(line))


@dataclass(frozen=True)
class FrameComparison:
    """One selector against another at the same number of frames: a line of `comparisons.jsonl`.

    Attributes:
        split, frames, task: what is compared; task "needle + moment" is both kinds together.
        select, other: labels of a and b.
        result: `select` minus `other`.
    """

    split: str
    frames: int
    task: str
    select: str
    other: str
    result: Paired

    def to_dict(self) -> dict[str, Any]:
        """All values under their names, ready for JSON."""
        flat = dataclasses.asdict(self)
        return {**{k: v for k, v in flat.items() if k != "result"}, **flat["result"]}


def tasks_of(examples: Sequence[VideoExample]) -> dict[str, list[int]]:
    """Numbers of the questions of "all", of "needs vision" where that is not all, and of every kind."""
    tasks = {ALL: list(range(len(examples)))}
    seeing = [number for number, example in enumerate(examples) if example.needs_vision]
    if 0 < len(seeing) < len(examples):
        tasks[NEEDS_VISION] = seeing
    for number, example in enumerate(examples):
        tasks.setdefault(example.kind, []).append(number)
    return tasks


def select_options(setting: VideoSetting) -> dict[str, Any]:
    """Options of a setting's selection as they are written to the results."""
    selection = setting.selection
    options: dict[str, Any] = dict(selection.options)
    if selection.draws:
        options["seeds"] = list(selection.draws)
    if selection.captions:
        options["captions"] = True
    if selection.relevance is not None:
        options["relevance"] = selection.relevance
    return options


def rows_of(
    model: str,
    split: str,
    examples: Sequence[VideoExample],
    setting: VideoSetting,
    said: Sequence[Said],
    dense: Sequence[Said],
    cost: Cost,
    select_ms: float | None,
    candidates: int,
    provenance: Mapping[str, Any],
) -> list[VideoRow]:
    """One row per task.

    Args:
        model: its name.
        split: of the questions.
        examples: the questions.
        setting: how the model was run.
        said: its answers.
        dense: those of the dense model.
        cost: of the setting.
        select_ms: see :class:`VideoRow`.
        candidates: frames to choose from.
        provenance: seed, versions, device and command.
    """
    rows = []
    for task, numbers in tasks_of(examples).items():
        mine = [said[n] for n in numbers]
        accuracy, stderr = mean_and_stderr([one.correct for one in mine])
        reference, _ = mean_and_stderr([dense[n].correct for n in numbers])
        rows.append(
            VideoRow(
                model=model,
                method=setting.method,
                options=setting.tokens.all_options,
                keep=setting.tokens.keep,
                task=task,
                n=len(numbers),
                accuracy=accuracy,
                stderr=stderr,
                retained=retained(accuracy, reference),
                split=split,
                select=setting.selection.name,
                select_options=select_options(setting),
                frames=setting.selection.frames,
                candidates=candidates,
                select_ms=select_ms,
                recall=_mean(mine, lambda one: one.recall),
                tau=_mean(mine, lambda one: one.tau),
                rho=_mean(mine, lambda one: one.rho),
                random_tau=_mean(mine, lambda one: one.random_tau),
                random_rho=_mean(mine, lambda one: one.random_rho),
                **dataclasses.asdict(cost),
                **provenance,
            )
        )
    return rows


def _mean(said: Sequence[Said], value: Callable[[Said], float | None]) -> float | None:
    known = [one for one in map(value, said) if one is not None]
    return sum(known) / len(known) if known else None


def compare_frames(
    split: str,
    examples: Sequence[VideoExample],
    outcomes: Mapping[VideoSetting, Sequence[Said]],
    baseline: str = "uniform",
) -> list[FrameComparison]:
    """Every selector minus the baseline at the same number of frames, with all tokens of the frames.

    Args:
        split: of the questions.
        examples: the questions.
        outcomes: answers under every setting.
        baseline: name of a selector; without it nothing is compared.

    Returns:
        For every selector: "needle + moment" and both of them, and all questions, as far as they were asked.
    """
    whole = {
        s: said
        for s, said in outcomes.items()
        if not s.blank and s.tokens.method == "dense" and s.selection.frames
    }
    tasks: dict[str, list[int]] = {}
    known = tasks_of(examples)
    checked = [kind for kind in CHECKED if kind in known]
    if len(checked) > 1:
        tasks[" + ".join(checked)] = [n for kind in checked for n in known[kind]]
    tasks |= {kind: known[kind] for kind in (*checked, ALL)}
    out = []
    for base, theirs in whole.items():
        if base.selection.name != baseline:
            continue
        for setting, mine in whole.items():
            if setting == base or setting.selection.frames != base.selection.frames:
                continue
            for task, numbers in tasks.items():
                result = paired([mine[n].correct for n in numbers], [theirs[n].correct for n in numbers])
                frames = base.selection.frames or 0
                out.append(
                    FrameComparison(
                        split, frames, task, setting.selection.label, base.selection.label, result
                    )
                )
    return out
