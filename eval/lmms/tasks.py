"""Which tasks lmms-eval has, and what to say where it has not."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..prompts import EvaluationError

INSTALL = "pip install 'vtprune[lmms]'"


def installed() -> bool:
    """Whether lmms-eval can be imported."""
    return importlib.util.find_spec("lmms_eval") is not None


def require(what: str) -> None:
    """Raises where lmms-eval is not installed.

    Raises:
        EvaluationError: it is not; says what needed it and how to get it.
    """
    if not installed():
        raise EvaluationError(f"{what}, and lmms-eval is not installed: {INSTALL}")


def closest(name: str, known: Iterable[str]) -> str:
    """The sentence that ends an unknown-name message, out of very many names."""
    near = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else "`lmms-eval --tasks list` lists all."


def manager(include_path: Sequence[Path | str] = ()) -> Any:
    """lmms-eval's index of tasks: its own and those of further folders.

    Raises:
        EvaluationError: lmms-eval is not installed, or a folder does not exist.
    """
    require("tasks of lmms-eval were asked for")
    for folder in include_path:
        if not Path(folder).is_dir():
            raise EvaluationError(f"--include-path {folder} is no folder; give one with YAML files of tasks.")
    importlib.import_module(
        "lmms_eval.models"
    )  # sets lmms-eval's log to warnings; else every file is told of
    from lmms_eval.tasks import TaskManager

    logging.getLogger("datasets").setLevel(logging.ERROR)
    return TaskManager("WARNING", include_path=[str(one) for one in include_path], model_name="vtprune")


def check(names: Sequence[str], index: Any, kinds: Iterable[str] = ()) -> None:
    """Raises for the first name that is no task, group or tag.

    Args:
        names: as typed.
        index: from :func:`manager`.
        kinds: question kinds of vtprune, which a name may have meant as well.

    Raises:
        EvaluationError: no such task; names the nearest.
    """
    kinds = list(kinds)
    for name in names:
        if name in kinds:
            raise EvaluationError(
                f"--task {name} is a question kind of vtprune, and others are tasks of lmms-eval; ask for them in two runs."
            )
        if name not in index.all_tasks:
            raise EvaluationError(
                f"--task {name} is neither a question kind nor a task of lmms-eval. "
                f"{closest(name, [*kinds, *index.all_tasks])} Tasks of your own: --include-path FOLDER."
            )


def needs_simple(names: Sequence[str], index: Any) -> bool:
    """Whether these are log-likelihood tasks, which lmms-eval has for its simple kind of model only.

    Raises:
        EvaluationError: some are and some are not.
    """
    from lmms_eval.utils import load_yaml_config

    kinds: dict[bool, str] = {}
    for name in names:
        entry = index.task_index[name]
        output = ""
        if entry["type"] == "task" and entry["yaml_path"] != -1:
            output = load_yaml_config(entry["yaml_path"], mode="simple").get("output_type", "")
        kinds[output in ("multiple_choice", "loglikelihood")] = name
    if len(kinds) > 1:
        raise EvaluationError(
            f"{kinds[True]} compares likelihoods and {kinds[False]} generates; lmms-eval runs them differently, so ask for "
            "them in two runs."
        )
    return next(iter(kinds), False)
