"""`vtprune eval --suite video`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from torch import nn

from ..parallel import Source
from ..progress import Bars, bars
from ..prompts import EvaluationError
from ..results import COMPARISONS, RESULTS, JsonLines, output_folder
from ..world import reference_dir
from ..world.video import KINDS, SPLITS, VideoExample, examples
from .answers import Asker
from .settings import plan
from .suite import ROUNDS, RUN, VideoEvaluation, evaluate, finish
from .tables import comparison_table, markdown, tables

CANDIDATES = 120
SPLIT = "test"
LIMIT = 15
BATCH_SIZE = 20
MOST_JOBS = 4
TABLE = "table.md"

Load = Callable[[argparse.Namespace], tuple[nn.Module, Any, str]]


def run(arguments: argparse.Namespace, load: Load, console: Console, progress_console: Console) -> int:
    """Runs the suite as the arguments of `vtprune eval` say.

    Args:
        arguments: see :mod:`vtprune.eval.cli`.
        load: model, processor and name from them.
        console: for the tables.
        progress_console: for progress.

    Returns:
        0, or 130 when interrupted.

    Raises:
        EvaluationError: an argument that does not fit.
    """
    started = time.perf_counter()
    questions = _questions(arguments)
    settings = plan(arguments.select, arguments.frames, arguments.method, arguments.keep, CANDIDATES)
    path, name = arguments.model, arguments.model
    if path is None:
        path, name = str(reference_dir("qwen2-vl")), "vtprune reference Qwen2-VL"
    model, processor, _ = load(argparse.Namespace(**{**vars(arguments), "model": path}))
    asker = Asker(model, processor, CANDIDATES, arguments.batch_size or BATCH_SIZE)
    jobs = arguments.jobs or (
        min(MOST_JOBS, os.cpu_count() or 1) if arguments.device == "cpu" and arguments.threads is None else 1
    )
    folder = arguments.output if arguments.resume else output_folder(arguments.output, arguments.overwrite)
    (folder / RESULTS).unlink(missing_ok=True)
    if not arguments.resume:
        (folder / RUN).unlink(missing_ok=True)
    counts = ", ".join(
        f"{sum(e.split == split for e in questions)} on {split}"
        for split in dict.fromkeys(e.split for e in questions)
    )
    _say(
        console,
        f"{name}: {len(settings)} settings, questions: {counts}, seed {arguments.seed}, {CANDIDATES} candidate frames; "
        f"results in {folder}/",
    )
    result = VideoEvaluation(name)
    interrupted = False
    with bars(progress_console) as progress:
        try:
            evaluate(
                asker,
                questions,
                settings,
                folder,
                name=name,
                seed=arguments.seed,
                rounds=ROUNDS,
                jobs=jobs,
                source=Source(path, arguments.device, arguments.dtype),
                resume=arguments.resume,
                observer=Bars(progress),
                into=result,
            )
        except KeyboardInterrupt:
            interrupted = True
    if interrupted and result.outcomes:
        finish(result, asker, arguments.seed)
        result.notes.append("interrupted: only some of the questions were asked")
    if result.rows:
        JsonLines(folder / RESULTS).add([row.to_dict() for row in result.rows])
        splits = list(dict.fromkeys(row.split for row in result.rows))
        for split in splits:
            for table in tables(result.rows, split):
                console.print(table)
        (folder / TABLE).write_text(
            "\n\n".join(markdown(result.rows, split) for split in splits) + "\n", encoding="utf-8"
        )
        (folder / COMPARISONS).unlink(missing_ok=True)
        if result.comparisons:
            console.print(comparison_table(result.comparisons))
            JsonLines(folder / COMPARISONS).add([one.to_dict() for one in result.comparisons])
        for note in dict.fromkeys(result.notes):
            _say(console, note)
    for line in dict.fromkeys(f"not run: {s.name}: {reason}" for s, reason in result.skipped.items()):
        _say(console, line)
    _say(
        console,
        f"{'interrupted' if interrupted else 'finished'} after {time.perf_counter() - started:.0f} s; "
        + (f"rows in {folder / RESULTS}, tables in {folder / TABLE}" if result.rows else "no rows yet"),
    )
    return 130 if interrupted else 0


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _questions(arguments: argparse.Namespace) -> list[VideoExample]:
    kinds: Sequence[str] = list(dict.fromkeys(arguments.task)) if arguments.task else KINDS
    splits = list(dict.fromkeys(arguments.split or [SPLIT]))
    for given, known, option in ((kinds, KINDS, "--task"), (splits, SPLITS, "--split")):
        for one in given:
            if one not in known:
                raise EvaluationError(f"{option} {one} is not of the video suite; it has {', '.join(known)}.")
    limit = LIMIT if arguments.limit is None else arguments.limit
    try:
        return [
            example
            for split in splits
            for example in examples(split, limit * len(kinds), kinds, arguments.seed, CANDIDATES)
        ]
    except ValueError as error:
        raise EvaluationError(f"{error}. Change --seed or --limit.") from error
