"""Run files: a model, tasks of lmms-eval, methods and budgets in a small YAML file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vtprune.errors import did_you_mean
from vtprune.method import check_keep

from ..prompts import EvaluationError
from ..settings import parse_method

FOLDER = Path(__file__).resolve().parent / "runs"


@dataclass(frozen=True)
class Run:
    """What a run file says.

    Attributes:
        tasks: names of lmms-eval.
        methods: as `--method` takes them.
        keep: budgets, as `--keep` takes them; a method may have its own behind a colon.
        model: folder or hub id; None for the shipped reference model.
        device: None for the CPU.
        dtype: see :func:`~vtprune.eval.prompts.load_model`; None for "auto".
        limit: questions per task; None for all.
        batch_size: questions per call of the model.
        frames: frames of a video.
        video_as: "video" or "pictures".
        include_path: folders with further tasks.
        about: what the file reproduces, and how its protocol differs from the papers'.
    """

    tasks: list[str]
    methods: list[str]
    keep: list[int | float]
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    limit: int | None = None
    batch_size: int = 8
    frames: int = 32
    video_as: str = "video"
    include_path: list[str] = field(default_factory=list)
    about: str = ""


def shipped() -> list[str]:
    """Names of the run files that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> Run:
    """A shipped run file by name, or any YAML file like them.

    Raises:
        EvaluationError: no such file, or it does not say what it must.
        VTPruneError: a method or budget in it cannot be.
    """
    path = FOLDER / f"{name}.yaml" if name in shipped() else Path(name)
    if not path.is_file():
        raise EvaluationError(f"there is no run file {name!r}. {did_you_mean(name, shipped())}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise EvaluationError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    known = [f.name for f in dataclasses.fields(Run)]
    if not isinstance(found, dict):
        raise EvaluationError(f"{path} must hold names and values: {', '.join(known)}.")
    for key in found:
        if key not in known:
            raise EvaluationError(f"{path} has {key!r}. {did_you_mean(str(key), known)}")
    for key in ("tasks", "methods", "keep"):
        values = found.get(key)
        if not isinstance(values, list) or (key == "tasks" and not values):
            raise EvaluationError(f"{path} must have a list of {key}.")
    run = Run(**found)
    for key, kind in (("tasks", str), ("methods", str), ("include_path", str)):
        _all_of(path, key, getattr(run, key), kind)
    for key in ("batch_size", "frames", "limit"):
        value = getattr(run, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise EvaluationError(f"{path}: {key} must be a whole number of at least 1, got {value!r}.")
    for method in run.methods:
        parse_method(method)
    for budget in run.keep:
        check_keep(budget)
    return run


def _all_of(path: Path, key: str, values: Any, kind: type) -> None:
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise EvaluationError(f"{path}: {key} must be a list of {kind.__name__}, got {values!r}.")
