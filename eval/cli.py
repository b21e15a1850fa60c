"""The command `vtprune`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import vtprune
from vtprune.errors import VTPruneError
from vtprune.methods import files

from . import frames, search, video_qa
from .accuracy import Outcome
from .bench import command as benchmark
from .evaluation import BATCH_SIZE, Earlier, Evaluation, evaluate
from .lmms import command as lmms
from .paired import Comparison, compare
from .parallel import Source
from .progress import Bars, bars
from .prompts import EvaluationError, Prompter, load_model
from .record import predictions, take_up
from .report_html import write_report
from .results import COMPARISONS, PREDICTIONS, REPORT, RESULTS, JsonLines, Row, output_folder
from .settings import CONTROLS, DEFAULT_METHODS, EVERY, Setting, parse_method, plan_settings
from .show import open_picture, show
from .tables import accuracy_table, comparison_table, cost_table
from .training import command as training
from .video import command as video_suite
from .world import KINDS, SPLITS, Example, examples, reference_dir
from .world import video as video_world

MAIN_SPLIT, SIDE_SPLIT = "test", "unseen_style"
OWN = "vtprune"
LIMIT = 90
SIDE_SHARE = 3  # the side split asks a third of the questions
PICTURES, VIDEO = "pictures", "video"

ABOUT = """\
A vision-language model reads a picture as hundreds of pieces, its visual tokens. A method keeps some and removes the
rest, so that answers cost less. This command shows what a method keeps, measures how many answers stay right and what
they cost, and finds a method's options. All of it runs on a small model that comes with vtprune, or on yours (--model).

To prune a model in Python:  vtprune.patch(model, "vtprune", keep=64)
"""
EXAMPLES = """\
start here:
  vtprune eval --limit 10                        compare a few methods on 10 questions of every kind, about a minute
  vtprune methods                                which methods there are, and their options
  vtprune show cat.png "what is in the picture?" --method vtc-cls --keep 16 --output kept.png

more:
  vtprune eval                                   the same with 90 questions of every kind, some minutes
  vtprune eval --model llava-hf/llava-1.5-7b-hf --device cuda --keep 192 --keep 64
  vtprune eval --suite video                     frame selectors and token methods on clips, a few minutes
  vtprune search --method vtc-cls --keep 32 --range first_layer=0.0:0.9 --output found.json

`vtprune COMMAND --help` explains a command.
"""
EVAL = """\
Asks a model questions about held-out synthetic pictures, once for every method and budget, and writes results.jsonl,
predictions.jsonl and report.html. With --suite video the questions are about clips, and frames are chosen before
tokens; it writes table.md instead of the report.
"""
EVAL_EXAMPLES = """\
The folder of the results has report.html (open it in a browser; it explains itself), results.jsonl (a line per method,
budget and kind of question, with costs and versions), predictions.jsonl (every answer) and comparisons.jsonl (differences).

examples:
  vtprune eval --method vtc-cls --keep 32        one method, 32 tokens per picture
  vtprune eval --method fastv:layer=3 --method fastv:layer=5 --keep 0.25 --compare "fastv layer=3"
  vtprune eval --method all --jobs 2 --output runs/all
  vtprune eval --suite video --select keyscore --select quota --frames 12 --limit 50
  vtprune eval --task gqa --task pope --model llava-hf/llava-1.5-7b-hf --device cuda --keep 64     tasks of lmms-eval
"""
SHOW_EXAMPLES = """\
examples:
  vtprune show cat.png "what is in the picture?" --method vtc-cls --keep 16 --output kept.png
  vtprune show cat.png "is there a dog?" --model llava-hf/llava-1.5-7b-hf --method fastv --keep 0.1
"""
SEARCH = """\
Finds options of a method that suit your model and your budget. No labels are needed: it shows the model a few pictures
with questions, once as it is and once per trial with pruning, and looks for the options with which pruning changes the
model's state at the end of the prompt the least (mean cosine similarity, 1 = not at all).

What is tried: the ranges that a method declares itself, and those that you give with --range and --choice. Every other
option stays as it is, and is listed. `vtprune methods` shows the options of all methods.

The best options are written to a small file, which is used in place of a method's name:
  vtprune eval --method found.json             vtprune.patch(model, "found.json")

Finished trials are kept beside it (found.trials.sqlite): if the search is cut off, the same command continues it.
"""
SEARCH_EXAMPLES = """\
examples:
  one option, a float between two bounds (a fraction of the depth):
    vtprune search --method vtc-cls --keep 32 --range first_layer=0.0:0.9 --output found.json
  a whole number; the decoder layers before `layer` hold all tokens, so the method gets a smaller budget of its own:
    vtprune search --method fastv:keep=8 --keep 48 --range layer=1:4
  two methods one after the other; their options are called 0.... and 1....:
    vtprune search --method vtc-cls:keep=48 --method fastv:keep=16 --keep 40 --range 0.first_layer=0.0:0.9 --range 1.layer=1:7
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program name; None for those of the process.

    Returns:
        Exit code: 0, 2 for errors the user can mend, 130 when interrupted.
    """
    given = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(given or ["--help"])
    try:
        code: int = arguments.run(arguments)
        return code
    except (VTPruneError, OSError) as error:
        print("vtprune: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vtprune: interrupted", file=sys.stderr)
        return 130


def _keep(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no budget; give an int (tokens per picture) or a ratio such as 0.25"
        ) from None


class _Said(argparse.Action):
    """Stores a value and that it was said, since a default must not replace what a run file says."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.said = {*getattr(namespace, "said", ()), self.dest}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vtprune",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vtprune {vtprune.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", help="checkpoint folder or hub id (default: a shipped reference model)")
    model.add_argument("--device", default="cpu", action=_Said, help="cpu (default), cuda, cuda:1, ...")
    model.add_argument(
        "--dtype",
        default="auto",
        action=_Said,
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto (default): float32 on CPU, the checkpoint's own elsewhere",
    )

    model.add_argument("--threads", type=int, help="CPU threads (default: what torch chooses)")

    one = commands.add_parser(
        "eval",
        parents=[model],
        help="compare methods by accuracy, tokens, FLOPs and time",
        description=EVAL,
        epilog=EVAL_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument(
        "--suite", choices=(PICTURES, VIDEO), default=PICTURES, help=f"what is shown (default {PICTURES})"
    )
    one.add_argument(
        "--select",
        action="append",
        metavar="NAME[:OPTION=VALUE,...]",
        help="suite video: frame selector, or 'all' for every candidate frame; repeatable. Besides its own options: "
        "captions=True gives it the clip's caption, relevance=chat or relevance=embedder says whom quota "
        "asks. Default: all",
    )
    one.add_argument(
        "--frames",
        action="append",
        type=_keep,
        metavar="N",
        help="suite video: frames to keep, int = number, float = share of the candidates; repeatable; default: 0.1, 0.05",
    )
    one.add_argument(
        "--method",
        action="append",
        metavar="NAME[:OPTION=VALUE,...]",
        help=f"method or control ({', '.join(CONTROLS)}); repeatable; 'all': every "
        f"registered one; default: {', '.join(DEFAULT_METHODS)} and the controls. The dense model always runs",
    )
    one.add_argument(
        "--keep",
        action="append",
        type=_keep,
        metavar="N",
        help="budget: int = tokens per picture, float = ratio; repeatable; default: 1/3, 2/9 and 1/9 of the tokens",
    )
    one.add_argument(
        "--task",
        action="append",
        metavar="NAME",
        help="question kind of the suite "
        f"({', '.join(KINDS)}; suite video: {', '.join(video_world.KINDS)}; default: all), or a task of lmms-eval, such as "
        "gqa, where that is installed; repeatable",
    )
    lmms.add_eval_arguments(one)
    one.add_argument(
        "--split",
        action="append",
        choices=list(dict.fromkeys((*SPLITS, *video_world.SPLITS))),
        help=f"part of the world; repeatable; default: {MAIN_SPLIT}, and for pictures {SIDE_SPLIT} with a third of the "
        "questions",
    )
    one.add_argument(
        "--limit", type=int, help=f"questions per kind (default {LIMIT}; suite video: {video_suite.LIMIT})"
    )
    one.add_argument("--seed", type=int, default=0, help="which held-out scenes, 0 to 1000 (default 0)")
    one.add_argument(
        "--batch-size",
        type=int,
        help=f"default {BATCH_SIZE}; suite video: {video_suite.BATCH_SIZE}, fewer where a question has many frames",
    )
    one.add_argument(
        "--output",
        type=Path,
        default=Path("vtprune-eval"),
        help="folder for the results (default vtprune-eval/; if it is in use, vtprune-eval-2/ and so on)",
    )
    one.add_argument("--overwrite", action="store_true", help="replace earlier results in the output folder")
    one.add_argument(
        "--resume",
        action="store_true",
        help="go on with the interrupted evaluation in the output folder; the rest of the command must be the same",
    )
    one.add_argument(
        "--jobs",
        type=int,
        help="processes that ask at the same time and share the threads (default 1; suite video: one per core, at most "
        f"{video_suite.MOST_JOBS}); costs are always measured alone",
    )
    one.add_argument(
        "--compare",
        metavar="NAME",
        help="method that is compared with every other one at the same budget, question by question (default: "
        f"{OWN}, else the first --method)",
    )
    one.set_defaults(run=_eval)

    two = commands.add_parser(
        "show",
        parents=[model],
        help="draw what a method keeps of one picture",
        description="Draws the tokens that a method keeps of a picture, and answers a question with and without it.",
        epilog=SHOW_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    two.add_argument("image", type=Path, help="any picture file")
    two.add_argument("question", help="what to ask about it")
    two.add_argument("--method", default="vtc-cls", metavar="NAME[:OPTION=VALUE,...]", help="default vtc-cls")
    two.add_argument("--keep", type=_keep, default=0.25, help="budget: int or ratio (default 0.25)")
    two.add_argument("--output", type=Path, default=Path("kept.png"), help="PNG to write (default kept.png)")
    two.set_defaults(run=_show)

    _add_search(commands.add_parser, model)
    training.add_arguments(
        commands.add_parser(
            "train",
            parents=[model],
            help=training.TITLE,
            description=training.DESCRIPTION,
            epilog=training.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ),
        _keep,
        _load,
    )

    frames.add_arguments(
        commands.add_parser(
            "frames",
            help=frames.TITLE,
            description=frames.DESCRIPTION,
            epilog=frames.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    video_qa.add_arguments(
        commands.add_parser(
            "video-qa",
            parents=[model],
            help=video_qa.TITLE,
            description=video_qa.DESCRIPTION,
            epilog=video_qa.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ),
        _keep,
    )
    benchmark.add_arguments(
        commands.add_parser(
            "bench",
            help=benchmark.TITLE,
            description=benchmark.DESCRIPTION,
            epilog=benchmark.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ),
        _keep,
    )
    lmms.add_commands(commands.add_parser)
    commands.add_parser(
        "methods",
        help="list pruning methods and their options",
        description="Lists the methods: what each does, and its options with their defaults. An option is given as "
        "NAME:OPTION=VALUE, for example --method fastv:layer=3. docs/methods.md shows what every method keeps of a picture.",
    ).set_defaults(run=_methods)
    three = commands.add_parser(
        "models",
        help="list supported model families",
        description="Lists the model families that can be patched, with the classes of transformers or timm.",
    )
    three.add_argument(
        "--matrix", action="store_true", help="print which method runs on which model, as Markdown tables"
    )
    three.add_argument(
        "--summary", action="store_true", help="print how many methods run on each model, as a Markdown table"
    )
    three.set_defaults(run=_models)
    return parser


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=140)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any, str]:
    from transformers.utils import logging

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise EvaluationError(f"--threads {arguments.threads} is no number of threads; give 1 or more.")
        torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.model is None:
        path, name = str(reference_dir("llava")), "vtprune reference LLaVA"
    else:
        path = name = arguments.model
    model, processor = load_model(path, arguments.device, arguments.dtype)
    return model, processor, name


class _Terminal(Bars):
    """Shows progress and writes rows and predictions as they come."""

    def __init__(self, progress: Progress, folder: Path) -> None:
        super().__init__(progress)
        self.results, self.predictions = JsonLines(folder / RESULTS), JsonLines(folder / PREDICTIONS)

    def rows(self, rows: list[Row], examples: Sequence[Example], outcome: Outcome) -> None:
        self.results.add([row.to_dict() for row in rows])
        self.predictions.add(predictions(rows[0], examples, outcome))

    def skip(self, setting: Setting, reason: str) -> None:
        keep = "" if setting.keep is None else f" keep={setting.keep}"
        self.progress.console.print(f"skipped {setting.label}{keep}: {reason}", markup=False, style="yellow")


def _eval(arguments: argparse.Namespace) -> int:
    numbers = (arguments.limit, arguments.batch_size, arguments.jobs)
    if any(number is not None and number < 1 for number in numbers):
        raise EvaluationError("--limit, --batch-size and --jobs must be at least 1.")
    if arguments.resume and arguments.overwrite:
        raise EvaluationError("--resume keeps what --overwrite deletes; give one of them.")
    if lmms.wanted(arguments):
        return lmms.run(arguments, _load, _console())
    if arguments.include_path:
        raise EvaluationError("--include-path is of tasks of lmms-eval; add --task NAME.")
    if arguments.suite == VIDEO:
        if arguments.compare is not None:
            raise EvaluationError(
                "--compare is of the picture suite; the video suite compares every selector with uniform by itself."
            )
        return video_suite.run(arguments, _load, _console(), _console(stderr=True))
    if arguments.select or arguments.frames:
        raise EvaluationError("--select and --frames are of the video suite; add --suite video.")
    arguments.limit = LIMIT if arguments.limit is None else arguments.limit
    arguments.batch_size = BATCH_SIZE if arguments.batch_size is None else arguments.batch_size
    arguments.jobs = 1 if arguments.jobs is None else arguments.jobs
    for method in arguments.method or ():
        if method != EVERY:
            parse_method(method)
    started = time.perf_counter()
    console, progress_console = _console(), _console(stderr=True)
    model, processor, name = _load(arguments)
    questions = _questions(arguments)
    prompter = Prompter(model, processor)
    few = questions[:3]
    tokens = prompter.tokens(prompter.inputs([e.image for e in few], [e.question for e in few]))
    settings = plan_settings(arguments.method, arguments.keep, tokens)
    earlier: dict[tuple[str, Setting], Earlier] = {}
    if arguments.resume:
        folder = arguments.output
        by_split: dict[str, list[Example]] = {}
        for one in questions:
            by_split.setdefault(one.split, []).append(one)
        earlier = take_up(folder, name, arguments.seed, settings, by_split)
    else:
        folder = output_folder(arguments.output, arguments.overwrite)
    counts = ", ".join(
        f"{sum(e.split == split for e in questions)} on {split}"
        for split in dict.fromkeys(e.split for e in questions)
    )
    console.print(
        f"{name}: {len(settings)} settings, questions: {counts}, seed {arguments.seed}, batch size "
        f"{arguments.batch_size}; results in {folder}/",
        markup=False,
        highlight=False,
    )
    busy = _busy()
    if busy:
        console.print(busy, style="yellow", markup=False, highlight=False)
    result = Evaluation(name, notes=[busy] if busy else [])
    if earlier:
        result.notes.append(f"resumed: {len(earlier)} settings, and their times, are of an earlier run")
    interrupted = False
    with bars(progress_console) as progress:
        try:
            evaluate(
                model,
                processor,
                questions,
                settings,
                name=name,
                seed=arguments.seed,
                batch_size=arguments.batch_size,
                observer=_Terminal(progress, folder),
                into=result,
                jobs=arguments.jobs,
                source=Source(
                    arguments.model or str(reference_dir("llava")), arguments.device, arguments.dtype
                ),
                earlier=earlier,
            )
        except KeyboardInterrupt:
            interrupted = True
    if result.rows:
        for split in dict.fromkeys(row.split for row in result.rows):
            console.print(accuracy_table(result.rows, split))
        console.print(cost_table(result.rows))
        compared = _compared(arguments, settings, result)
        if compared:
            console.print(comparison_table(compared))
            (folder / COMPARISONS).unlink(missing_ok=True)
            JsonLines(folder / COMPARISONS).add([one.to_dict() for one in compared])
        for note in result.notes:
            console.print(note, markup=False, highlight=False)
        for line in dict.fromkeys(f"not run: {s.label}: {reason}" for s, reason in result.skipped.items()):
            console.print(line, markup=False, highlight=False)
        write_report(folder / REPORT, result)
    console.print(
        f"{'interrupted' if interrupted else 'finished'} after {time.perf_counter() - started:.0f} s; "
        + (f"rows in {folder / RESULTS}, report in {folder / REPORT}" if result.rows else "no rows yet"),
        markup=False,
        highlight=False,
    )
    return 130 if interrupted else 0


def _compared(
    arguments: argparse.Namespace, settings: Sequence[Setting], result: Evaluation
) -> list[Comparison]:
    wanted = arguments.compare
    if wanted is None:
        done = {s.label for _, s in result.outcomes if s.method not in CONTROLS and s.keep is not None}
        if not done:
            return []
        wanted = OWN if OWN in done else next(s.label for s in settings if s.label in done)
    return compare(result, wanted)


def _busy() -> str:
    """A warning if others use the processor: torch's threads then wait for each other most of the time."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load < cores / 2:
        return ""
    return (
        f"WARNING: this machine was busy at the start (load {load:.1f} on {cores} cores), so times are not reliable; "
        "--threads 1 makes a run on a busy machine much faster."
    )


def _questions(arguments: argparse.Namespace) -> list[Example]:
    wanted = arguments.split or [MAIN_SPLIT, SIDE_SPLIT]
    kinds = arguments.task or KINDS
    for given, known, option in ((kinds, KINDS, "--task"), (wanted, SPLITS, "--split")):
        for one in given:
            if one not in known:
                raise EvaluationError(
                    f"{option} {one} is not of the picture suite; it has {', '.join(known)}."
                )
    out = []
    for split in dict.fromkeys(wanted):
        limit = arguments.limit
        if arguments.split is None and split == SIDE_SPLIT:
            limit = max(1, limit // SIDE_SHARE)
        try:
            asked = examples(split, limit, arguments.seed)
        except ValueError as error:
            raise EvaluationError(f"{error}. Change --seed or --limit.") from error
        out += [e for e in asked if e.kind in kinds]
    return out


def _show(arguments: argparse.Namespace) -> int:
    method, options = parse_method(arguments.method)
    image = open_picture(arguments.image)
    model, processor, _ = _load(arguments)
    keep = options.pop("keep", arguments.keep)
    setting = Setting(method, keep, tuple(options.items()))
    drawing, text = show(model, processor, image, arguments.question, setting)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    drawing.save(arguments.output, format="PNG")
    print(text)
    print(f"\ndrawn in {arguments.output}")
    return 0


def _add_search(add_parser: Callable[..., argparse.ArgumentParser], model: argparse.ArgumentParser) -> None:
    four = add_parser(
        "search",
        parents=[model],
        help="find the options of a method that suit a model and a budget, without labels",
        description=SEARCH,
        epilog=SEARCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    four.add_argument(
        "--method",
        action="append",
        required=True,
        metavar="NAME[:OPTION=VALUE,...]",
        help="method to search; options given here are fixed; repeatable: several are applied one after the other",
    )
    four.add_argument(
        "--keep",
        type=_keep,
        required=True,
        metavar="N",
        help="budget: visual tokens per picture (int) or their share (float), averaged over the layers of the language "
        "model; also the `keep` of every method that has none of its own. Trials more than 1 %% above it do not count",
    )
    four.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="OPTION=LOW:HIGH",
        help="numbers to try, bounds included: whole numbers if both are, else floats; LOW:HIGH:log for options that "
        "span orders of magnitude; repeatable",
    )
    four.add_argument(
        "--choice",
        action="append",
        default=[],
        metavar="OPTION=A,B,...",
        help="values to try; repeatable",
    )
    four.add_argument(
        "--samples",
        type=int,
        default=search.SAMPLES,
        help=f"questions about synthetic pictures, of the validation split (default {search.SAMPLES})",
    )
    four.add_argument(
        "--trials",
        type=int,
        default=search.TRIALS,
        help=f"sets of options to try in all (default {search.TRIALS})",
    )
    four.add_argument("--seed", type=int, default=0, help="which samples, and which proposals (default 0)")
    four.add_argument(
        "--sampler",
        choices=search.SAMPLERS,
        default="tpe",
        help="what proposes options: tpe (default), or gp, a Gaussian process, which needs scipy",
    )
    four.add_argument(
        "--batch-size",
        type=int,
        default=search.BATCH_SIZE,
        help=f"samples per call of the model (default {search.BATCH_SIZE})",
    )
    four.add_argument(
        "--output",
        type=Path,
        default=Path("vtprune-search.json"),
        help="file for the result, ending in .json (default vtprune-search.json)",
    )
    four.add_argument(
        "--overwrite",
        action="store_true",
        help="start over: forget earlier trials and results of this output",
    )
    four.set_defaults(run=_search)


def _search(arguments: argparse.Namespace) -> int:
    search.sampler_maker(arguments.sampler)
    output: Path = arguments.output
    if not files.names_file(str(output)):
        raise EvaluationError(f"--output {output} must end in .json, so that it can stand for a method.")
    chosen: list[vtprune.Method] = []
    fixed: list[list[str]] = []
    for text in arguments.method:
        name, options = parse_method(text)
        if name in CONTROLS or files.names_file(name):
            raise EvaluationError(f"{name!r} has no options to search; give a method (`vtprune methods`).")
        chosen.append(vtprune.methods.create(name, **{"keep": arguments.keep, **options}))
        fixed.append(list(options))
    given = [search.parse_space(text, "range") for text in arguments.range]
    given += [search.parse_space(text, "choice") for text in arguments.choice]
    for option, _ in given:
        if [name for name, _ in given].count(option) > 1:
            raise EvaluationError(f"{option} has two ranges or choices; give one.")
    spaces = search.check_spaces(chosen, {**search.declared_spaces(chosen, fixed), **dict(given)})
    storage = output.with_suffix(".trials.sqlite")
    if arguments.overwrite:
        storage.unlink(missing_ok=True)
    elif output.exists() and not storage.exists():
        raise EvaluationError(
            f"{output} exists and is not of this search; choose another --output, or --overwrite."
        )
    console, started = _console(), time.perf_counter()
    model, processor, name = _load(arguments)
    console.print(
        f"{name}: searching {', '.join(f'{option} in {space}' for option, space in spaces.items())}",
        markup=False,
        highlight=False,
    )
    alone = {
        option: value
        for option, value in search.left_alone(chosen, spaces).items()
        if option not in [search.option_name(chosen, i, o) for i, some in enumerate(fixed) for o in some]
    }
    if alone:
        console.print(
            f"left as they are, for want of a range: {', '.join(f'{o}={v}' for o, v in alone.items())}",
            markup=False,
            highlight=False,
        )
    try:
        with bars(_console(stderr=True)) as progress:
            task = progress.add_task("trials", total=arguments.trials, note="")

            def on_trial(number: int, trial: search.Trial, best: search.Trial | None) -> None:
                note = "none within the budget yet" if best is None else f"best {best.objective:.5f}"
                progress.update(task, completed=number, note=note)

            result = search.search(
                model,
                processor,
                chosen,
                arguments.keep,
                spaces,
                arguments.samples,
                arguments.trials,
                seed=arguments.seed,
                sampler=arguments.sampler,
                batch_size=arguments.batch_size,
                storage=storage,
                name=name,
                on_trial=on_trial,
            )
            progress.update(task, completed=len(result.trials), note=f"best {result.best.objective:.5f}")
    except KeyboardInterrupt:
        console.print(
            f"interrupted after {time.perf_counter() - started:.0f} s; trials are in {storage}, the same command continues",
            markup=False,
            highlight=False,
        )
        return 130
    result.write(output)
    table = Table("", "mean cosine", "layer average", "options")
    for title, trial, methods in (
        ("as given", result.baseline, chosen),
        ("best found", result.best, result.methods),
    ):
        shown = [
            f"{search.option_name(methods, i, f.name)}={getattr(m, f.name)}"
            for i, m in enumerate(methods)
            for f in dataclasses.fields(m)
            if search.option_name(methods, i, f.name) in spaces
        ]
        table.add_row(title, f"{trial.objective:.5f}", f"{trial.layer_average:.1f}", ", ".join(shown))
    console.print(table)
    for note in result.notes:
        console.print(note, markup=False, highlight=False)
    console.print(
        f"finished after {time.perf_counter() - started:.0f} s, {len(result.trials)} trials on "
        f"{result.record['samples']} samples; options in {output}: vtprune eval --method {output}",
        markup=False,
        highlight=False,
    )
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    table = Table("method", "what it does", "options and defaults")
    for key in vtprune.list_methods():
        cls = vtprune.methods.method_class(key)
        options = [
            f"{f.name}" if f.default is dataclasses.MISSING else f"{f.name}={f.default}"
            for f in dataclasses.fields(cls)
        ]
        table.add_row(key, _first_sentence(cls.__doc__ or ""), ", ".join(options))
    _console().print(table)
    return 0


def _first_sentence(doc: str) -> str:
    return " ".join(doc.strip().split("\n\n")[0].split())


def _models(arguments: argparse.Namespace) -> int:
    if arguments.matrix or arguments.summary:
        from vtprune.testing.matrix import markdown, summary

        print(markdown() if arguments.matrix else summary())
        return 0
    table = Table("family", "model", "classes", "library", "kind")
    for model in vtprune.list_models():
        table.add_row(model.name, model.title, "\n".join(model.classes), model.library, model.kind)
    _console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
