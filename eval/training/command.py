"""The command `vtprune train`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

import vtprune
from vtprune.method import Method
from vtprune.methods.weights import SUFFIX, Trained

from ..progress import bars
from ..prompts import EvaluationError
from ..settings import CONTROLS, parse_method
from .loop import BATCH_SIZE, PER_KIND, STEPS, Step, train

Load = Callable[[argparse.Namespace], tuple[Any, Any, str]]

TITLE = "train the learned parameters of a method for a model and a budget"
DESCRIPTION = """\
Trains what a method has learned parameters for: thresholds of atp-llava and as-vit, the selector of ucofia. The model stays
as it is; the parameters go to a small file. No labels are needed: the model is shown synthetic pictures with questions, once
as it is and once with its visual tokens fading out, and what it answers without pruning is what it is to answer with it.

The file is used with --method NAME:weights=FILE, or found by itself in the folder vtprune/ beside the model's checkpoint,
named NAME-TOKENS.safetensors.
"""
EPILOG = """\
examples:
  vtprune train atp-llava --keep 40                                 the shipped reference model, a few minutes on a CPU
  vtprune train as-vit --model DIR --keep 192 --output DIR/vtprune/as-vit-192.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser, keep: Callable[[str], int | float], load: Load) -> None:
    """Declares the options of the command.

    Args:
        parser: of the subcommand.
        keep: reads a budget.
        load: gives model, processor and name from the shared options.
    """
    parser.add_argument("method", metavar="METHOD[:OPTION=VALUE,...]", help="atp-llava, as-vit or ucofia")
    parser.add_argument(
        "--keep",
        type=keep,
        required=True,
        metavar="N",
        help="budget: int = tokens per picture, float = ratio",
    )
    parser.add_argument(
        "--output", type=Path, help=f"file to write (default METHOD-N{SUFFIX} in the current folder)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps (default {STEPS})")
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, help=f"questions per step (default {BATCH_SIZE})"
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=PER_KIND,
        help=f"training questions of each kind (default {PER_KIND})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of parameters, questions and noise (default 0)")
    parser.set_defaults(run=lambda arguments: run(arguments, load))


def command_of(arguments: argparse.Namespace) -> str:
    """The command that trains the same again, without folders of this machine."""
    words = ["vtprune", "train", arguments.method]
    if arguments.model is not None:
        words += [
            "--model",
            Path(arguments.model).name if Path(arguments.model).exists() else arguments.model,
        ]
    words += ["--keep", str(arguments.keep), "--steps", str(arguments.steps)]
    words += ["--batch-size", str(arguments.batch_size), "--questions", str(arguments.questions)]
    return shlex.join([*words, "--seed", str(arguments.seed)])


def trainable(text: str, keep: int | float) -> Method:
    """The method that METHOD and --keep name.

    Raises:
        EvaluationError: it has nothing to train.
        VTPruneError: unknown method or option.
    """
    name, options = parse_method(text)
    known = sorted(key for key, cls in vtprune.methods.REGISTRY.items() if issubclass(cls, Trained))
    if name not in known or name in CONTROLS:
        raise EvaluationError(f"{name!r} has nothing to train; trained methods: {', '.join(known)}.")
    for option in ("keep", "weights"):
        if option in options:
            raise EvaluationError(f"give the budget with --keep and the file with --output, not {option}=.")
    return vtprune.methods.create(name, keep=keep, **options)


def run(arguments: argparse.Namespace, load: Load) -> int:
    """Runs the command; returns the exit code."""
    method = trainable(arguments.method, arguments.keep)
    output: Path = arguments.output or Path(f"{method.key}-{arguments.keep}{SUFFIX}")
    if output.suffix != SUFFIX:
        raise EvaluationError(f"--output {output} must end in {SUFFIX}.")
    model, processor, name = load(arguments)
    console = Console()
    with bars(Console(stderr=True)) as progress:
        task = progress.add_task(f"{method.key} keep={arguments.keep}", total=arguments.steps, note="")

        def on_step(step: Step) -> None:
            note = f"loss {step.loss:.3f}, {step.kept:.1f} tokens"
            progress.update(task, completed=step.number, note=note)
            if step.agreement is not None:
                progress.console.print(
                    f"step {step.number}: {100 * step.agreement:.1f} % of the validation questions answered as by the dense model, "
                    f"{step.kept:.1f} tokens in the last batch",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )

        result = train(
            model,
            processor,
            method,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            per_kind=arguments.questions,
            seed=arguments.seed,
            command=command_of(arguments),
            on_step=on_step,
        )
    result.write(output)
    console.print(
        f"{name}: {100 * result.agreement:.1f} % of the validation questions as the dense model with {result.kept:.1f} tokens "
        f"(asked for: {result.metadata['keep']} of {result.metadata['tokens']}); weights in {output}: "
        f"vtprune eval --method {method.key}:weights={output} --keep {arguments.keep}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0
