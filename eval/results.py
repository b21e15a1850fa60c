"""Result rows: their numbers, where they came from, and the file they are written to."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vtprune

from .prompts import EvaluationError

RESULTS, PREDICTIONS, COMPARISONS = "results.jsonl", "predictions.jsonl", "comparisons.jsonl"
REPORT = "report.html"
ALL = "all"  # the task that stands for all question kinds together


@dataclass(frozen=True)
class Row:
    """One model, method, budget and task on one split: a line of `results.jsonl`.

    Attributes:
        model: folder or hub id.
        method: method or control ("dense", "no-image", "downsample").
        options: options of the method other than `keep`; `seeds` where several draws were averaged.
        keep: the budget asked for, None where there is none.
        task: question kind, or "all".
        n: number of questions.
        accuracy: share of right answers in [0, 1].
        stderr: standard error of it over questions, None for a single question.
        retained: accuracy / accuracy of the dense model, None where that is 0.
        visual_tokens_in, ..., peak_mib: see :class:`~vtprune.eval.speed.Cost`.
        seed: which held-out scenes.
        versions: of python, torch, transformers and vtprune.
        device: what it ran on.
        command: the command line.
        split: which part of the picture world.
    """

    model: str
    method: str
    options: dict[str, Any]
    keep: int | float | None
    task: str
    n: int
    accuracy: float
    stderr: float | None
    retained: float | None
    visual_tokens_in: int
    visual_tokens_out: int
    layer_average_tokens: float
    kv_bytes: int
    flops: int
    ttft_ms: float
    decode_ms_per_token: float
    peak_mib: float
    seed: int
    versions: dict[str, Any]
    device: str
    command: str
    split: str

    def to_dict(self) -> dict[str, Any]:
        """All values under their names, ready for JSON."""
        return dataclasses.asdict(self)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error sqrt(sum (x - mean)^2 / (n (n - 1))).

    With several draws per question `values` are the questions' means, so questions and not draws are the sample.

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no answers to average")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n * (n - 1)))


def retained(accuracy: float, dense: float) -> float | None:
    """Accuracy relative to the dense model's, None where that is 0."""
    return accuracy / dense if dense else None


def versions() -> dict[str, Any]:
    """Versions of everything that decides a result; commit and dirty flag of vtprune where it is a checkout."""
    import transformers

    commit, dirty = _checkout(Path(vtprune.__file__).resolve())
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vtprune": vtprune.__version__,
        "vtprune_commit": commit,
        "vtprune_dirty": dirty,
    }


def _checkout(file: Path) -> tuple[str | None, bool | None]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", file.name
        )  # an installed copy may lie in a checkout of something else
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def device_name(device: str) -> str:
    """Model of the CPU with its number of cores, or of the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def command_line() -> str:
    """The command as it was typed, without the folder of the program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def output_folder(wanted: Path, overwrite: bool) -> Path:
    """A folder for results: the wanted one if it is free, else a numbered sibling (`name-2`, `name-3`, ...).

    Args:
        wanted: where results should go.
        overwrite: take the wanted one anyway, and delete an earlier evaluation's files in it.

    Raises:
        EvaluationError: the path is a file, or cannot be created.
    """
    folder = wanted
    number = 2
    while not overwrite and folder.exists() and (folder.is_file() or any(folder.iterdir())):
        folder = wanted.with_name(f"{wanted.name}-{number}")
        number += 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(
            f"cannot create the output folder {folder}: {error.strerror}. Choose another --output."
        ) from error
    for name in (RESULTS, PREDICTIONS, COMPARISONS, REPORT):
        (folder / name).unlink(missing_ok=True)
    return folder


class JsonLines:
    """A file to which records are added one by one; what is written stays written if the run is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends records as lines."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
