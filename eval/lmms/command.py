"""`vtprune eval` with tasks of lmms-eval, `vtprune export-tasks` and `vtprune published`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from ..prompts import EvaluationError
from ..results import PREDICTIONS, RESULTS, output_folder
from ..settings import Setting, parse_method, plan_settings
from ..world import KINDS, SPLITS, reference_dir
from ..world import video as video_world
from . import published, runs
from .arguments import ModelArguments
from .export import export_tasks
from .results import table
from .running import TaskEvaluation, evaluate_tasks, main_process
from .tasks import check, installed, manager, require

BATCH_SIZE = 8
FRAMES = 32
EXPORT_TITLE = "write the built-in picture questions as tasks of lmms-eval"
EXPORT_DESCRIPTION = """\
Writes the questions that `vtprune eval` asks about synthetic pictures into a folder, as tasks that lmms-eval runs offline: a YAML
file per question kind, a group of all of them, and parquet files with the pictures.
"""
EXPORT_EPILOG = """\
example:
  vtprune export-tasks tasks/ --limit 20
  lmms-eval --model vtprune --model_args pretrained=DIR,method=vtc-cls,keep=32 --tasks vtprune_pictures \\
    --include_path tasks/ --batch_size 16 --output_path out/ --log_samples
  vtprune eval --task vtprune_pictures --include-path tasks/ --method vtc-cls --keep 32
"""
PUBLISHED_TITLE = "put results on real benchmarks beside the published figures"
PUBLISHED_DESCRIPTION = """\
Shows what papers report for token pruning on LLaVA-1.5-7B and LLaVA-OneVision-7B, with the source of each figure. With a results.jsonl of
`vtprune eval --task ...` it puts your figures beside them: the difference, and where the protocols differ.
"""
PUBLISHED_EPILOG = """\
examples:
  vtprune published --method fastv --tokens 64
  vtprune published vtprune-eval/results.jsonl
"""

Load = Callable[[argparse.Namespace], tuple[nn.Module, Any, str]]


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds to `vtprune eval` what concerns tasks of lmms-eval."""
    parser.add_argument(
        "--include-path",
        action="append",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="tasks of lmms-eval: folder with further tasks, such as those of `vtprune export-tasks`; repeatable",
    )
    parser.add_argument(
        "--run",
        dest="run_file",
        metavar="NAME",
        help=f"tasks of lmms-eval: a ready-made run ({', '.join(runs.shipped())}) or a YAML file like them; options "
        "given beside it replace what it says",
    )


def wanted(arguments: argparse.Namespace) -> bool:
    """Whether a `vtprune eval` is about tasks of lmms-eval.

    A task that is a question kind is the suite's; commas between names are taken apart.
    """
    if arguments.task:
        arguments.task = [name for text in arguments.task for name in text.split(",") if name]
    return arguments.run_file is not None or any(name not in _kinds() for name in arguments.task or ())


def _kinds() -> list[str]:
    return list(dict.fromkeys((*KINDS, *video_world.KINDS)))


def run(arguments: argparse.Namespace, load: Load, console: Console) -> int:
    """Runs tasks of lmms-eval as the arguments of `vtprune eval` say.

    Args:
        arguments: see :mod:`vtprune.eval.cli`.
        load: model, processor and name from them.
        console: for the table.

    Returns:
        0, or 130 when interrupted.

    Raises:
        EvaluationError: an argument that does not fit, or lmms-eval or its data is missing.
    """
    started = time.perf_counter()
    plan = _plan(arguments)
    if not installed():
        unknown = next((name for name in plan.tasks if name not in _kinds()), plan.tasks[0])
        near = difflib.get_close_matches(unknown, _kinds(), n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        require(f"{unknown!r} is no question kind{hint}, so it must be a task of lmms-eval")
    for method in plan.methods:
        parse_method(method)
    index = manager(plan.include_path)
    check(plan.tasks, index, _kinds())
    path = plan.model or str(reference_dir("llava"))
    asked = {"model": plan.model, "device": _device(plan.device or "cpu"), "dtype": plan.dtype or "auto"}
    model, processor, name = load(argparse.Namespace(**{**vars(arguments), **asked}))
    settings = plan_settings(plan.methods or ["keep-all"], plan.keep or None, _tokens(model))
    folder = arguments.output
    if main_process():
        folder = output_folder(arguments.output, arguments.overwrite)
        _say(
            console,
            f"{name}: {len(settings)} settings on {', '.join(plan.tasks)}, batch size {plan.batch_size}; results in "
            f"{folder}/",
        )
        if plan.about:
            _say(console, plan.about)
    result, interrupted = TaskEvaluation(name), False

    def announce(setting: Setting, draw: int) -> None:
        if main_process():
            keep = "" if setting.keep is None else f" keep={setting.keep}"
            _say(console, f"{setting.label}{keep}{f', draw {draw + 1}' if setting.runs > 1 else ''} ...")

    try:
        evaluate_tasks(
            model,
            processor,
            plan.tasks,
            settings,
            folder,
            index,
            name=name,
            arguments=ModelArguments(
                path, batch_size=plan.batch_size, max_num_frames=plan.frames, video_as=plan.video_as
            ),
            limit=plan.limit,
            into=result,
            on_setting=announce,
        )
    except KeyboardInterrupt:
        interrupted = True
    if not main_process():
        return 0
    if result.rows:
        console.print(table(result.rows, plan.limit is not None))
    for note in result.notes:
        _say(console, note)
    for setting, reason in result.skipped.items():
        keep = "" if setting.keep is None else f" keep={setting.keep}"
        _say(console, f"not run: {setting.label}{keep}: {reason}")
    _say(
        console,
        f"{'interrupted' if interrupted else 'finished'} after {time.perf_counter() - started:.0f} s; "
        + (f"rows in {folder / RESULTS}, answers in {folder / PREDICTIONS}" if result.rows else "no rows"),
    )
    return 130 if interrupted else 0


def _plan(arguments: argparse.Namespace) -> runs.Run:
    """The run file, with what the command line says instead; anything of the built-in suites is refused."""
    for option, given in (
        ("--suite", arguments.suite != "pictures"),
        ("--select", arguments.select),
        ("--split", arguments.split),
        ("--seed", arguments.seed),
        ("--jobs", arguments.jobs is not None),
        ("--resume", arguments.resume),
        ("--compare", arguments.compare is not None),
    ):
        if given:
            raise EvaluationError(
                f"{option} is of the built-in questions, and {', '.join(arguments.task or [arguments.run_file])} is of "
                "lmms-eval; leave it out."
                + (" Several processes: see docs/lmms-eval.md." if option == "--jobs" else "")
            )
    base = (
        runs.read(arguments.run_file)
        if arguments.run_file is not None
        else runs.Run(tasks=list(arguments.task), methods=[], keep=[], batch_size=BATCH_SIZE, frames=FRAMES)
    )
    frames = arguments.frames or []
    if len(frames) > 1 or any(not isinstance(one, int) for one in frames):
        raise EvaluationError("--frames with tasks of lmms-eval is one whole number: frames of every video.")
    said = getattr(arguments, "said", ())
    changes = {
        "tasks": arguments.task,
        "methods": arguments.method,
        "keep": arguments.keep,
        "limit": arguments.limit,
        "batch_size": arguments.batch_size,
        "model": arguments.model,
        "frames": frames[0] if frames else None,
        **{name: getattr(arguments, name) for name in ("device", "dtype") if name in said},
    }
    given = {name: value for name, value in changes.items() if value is not None}
    include = [*base.include_path, *map(str, arguments.include_path)]
    return dataclasses.replace(base, **given, include_path=include)


def _device(name: str) -> str:
    """Of this process: with several on one machine each has a GPU of its own."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if several and name == "cuda" else name


def _tokens(model: nn.Module) -> list[int]:
    """Visual tokens of a picture where the encoder makes the same number of every picture; else unlike numbers.

    Default budgets are then ratios.
    """
    vision: Any = getattr(model.config, "vision_config", None)
    image, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    fixed = getattr(model.config, "model_type", "") == "llava"
    if fixed and isinstance(image, int) and isinstance(patch, int):
        return [(image // patch) ** 2]
    return [1, 2]


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def add_commands(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `vtprune export-tasks` and `vtprune published`."""
    for name, title, description, epilog, add in (
        ("export-tasks", EXPORT_TITLE, EXPORT_DESCRIPTION, EXPORT_EPILOG, _add_export),
        ("published", PUBLISHED_TITLE, PUBLISHED_DESCRIPTION, PUBLISHED_EPILOG, _add_published),
    ):
        add(
            add_parser(
                name,
                help=title,
                description=description,
                epilog=epilog,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where to write; made if needed")
    parser.add_argument(
        "--split",
        action="append",
        choices=SPLITS,
        help="part of the picture world; repeatable (default test)",
    )
    parser.add_argument("--limit", type=int, default=90, help="questions per kind (default 90)")
    parser.add_argument("--seed", type=int, default=0, help="which held-out scenes, 0 to 1000 (default 0)")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    groups = export_tasks(arguments.folder, arguments.split or ["test"], arguments.limit, arguments.seed)
    print(f"{', '.join(groups)} in {arguments.folder}/; try:")
    print(
        f"  vtprune eval --task {groups[0]} --include-path {arguments.folder} --method vtc-cls --keep 32 --threads 1"
    )
    return 0


def _add_published(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        type=Path,
        nargs="?",
        help="results.jsonl of `vtprune eval --task ...`, or results.json of lmms-eval",
    )
    parser.add_argument(
        "--model",
        choices=published.models(),
        help="published figures of this model (default: that of the results)",
    )
    parser.add_argument("--method", action="append", help="only this method's figures; repeatable")
    parser.add_argument("--tokens", action="append", metavar="N", help="only this budget; repeatable")
    parser.set_defaults(run=_published)


def _published(arguments: argparse.Namespace) -> int:
    console = Console()
    wide = console if console.is_terminal else Console(width=160)
    figures = published.load()
    if arguments.results is None:
        model = arguments.model or published.models()[0]
        chosen = published.choose(figures, model, arguments.method, arguments.tokens)
        for one in published.figures_tables(chosen):
            wide.print(one)
        _notes(wide, published.figures_notes(figures, chosen))
        return 0
    outcomes = published.read_outcomes(arguments.results)
    model = arguments.model or published.model_of(outcomes, arguments.results)
    compared = published.compare(figures, outcomes, model, arguments.method, arguments.tokens)
    if not compared.lines:
        raise EvaluationError(
            f"{arguments.results} has nothing that was published for {model}: {compared.reason()}"
        )
    wide.print(published.comparison_table(compared))
    _notes(wide, compared.notes)
    return 0


def _notes(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        _say(console, note)
