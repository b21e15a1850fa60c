"""The command `vtprune bench`."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vtprune.errors import did_you_mean

from ..progress import bars
from ..prompts import EvaluationError
from ..results import JsonLines, command_line, device_name, versions
from .alone import KernelRow, kernels_alone
from .plot import draw
from .profiling import Share, shares
from .roofline import measure_peaks
from .run import RAGGED, ROUNDS, TEXT_TOKENS, BenchRow, Way, bench, gate, plan
from .shapes import SHAPES, fitting_layers

TITLE = "measure what pruning saves in time and memory, on real models' shapes"
DESCRIPTION = f"""\
Times the dense model and methods on the shapes of real models with random weights: no weights are needed, and nothing is
said about accuracy. Beside every speed-up of the time to the first token stands its limit, the speed-up that the removed
FLOPs and bytes allow on this device, and the share of it that was achieved.

It first runs the checks of the Triton kernels on the device (on a CPU in Triton's interpreter) and stops if one fails.

The method {RAGGED!r} is for batches: it keeps a different number of tokens of every picture, `--keep` on average.
"""
EPILOG = """\
examples:
  vtprune bench                                          a 1.1 B LLaVA shape, 576 to 64 tokens
  vtprune bench --shape llava-1.5-7b --shape llava-onevision-7b --device cuda --dtype bfloat16 --batch 1 --batch 8
  vtprune bench --kernels                                the kernels alone
"""
DEFAULT_SHAPE = "llava-1.5-1b"
DEFAULT_METHODS = ("stride", "vtc-cls", "visionzip", "divprune", "fastv", "vtprune")


def add_arguments(parser: argparse.ArgumentParser, keep: Callable[[str], int | float]) -> None:
    """Adds the arguments of the command.

    Args:
        keep: reads a budget.
    """
    parser.add_argument(
        "--shape",
        action="append",
        choices=tuple(SHAPES),
        help=f"repeatable; default {DEFAULT_SHAPE}",
    )
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME[:OPTION=VALUE,...]",
        help=f"repeatable; default: {', '.join(DEFAULT_METHODS)}; {RAGGED!r} for counts that differ within a batch",
    )
    parser.add_argument(
        "--keep",
        action="append",
        type=keep,
        metavar="N",
        help="tokens per picture or frame, or a ratio; repeatable; default: a ninth",
    )
    parser.add_argument("--batch", action="append", type=int, metavar="N", help="rows; repeatable; default 1")
    parser.add_argument(
        "--layers", type=int, help="decoder layers (default: the real number, or as many as fit the memory)"
    )
    parser.add_argument(
        "--text",
        type=int,
        default=TEXT_TOKENS,
        help=f"text tokens per prompt, on average (default {TEXT_TOKENS})",
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"timings of everything (default {ROUNDS})"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto (default): float32 on CPU, bfloat16 elsewhere",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch chooses)")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="the kernels alone: time and share of the copy bandwidth; with --shape, models as well",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="where the time of one call goes, by operator, instead of speed-ups",
    )
    parser.add_argument(
        "--no-usual", action="store_true", help="leave out the methods done the usual way, by eager attention"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("vtprune-bench"),
        help="folder for bench-DEVICE-DTYPE-torchVERSION.jsonl and a plot; rows are added to a file that is there",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    batches = arguments.batch or [1]
    numbers = [arguments.rounds, arguments.text, arguments.threads, arguments.layers, *batches]
    if any(number is not None and number < 1 for number in numbers):
        raise EvaluationError("--batch, --text, --rounds, --threads and --layers must be at least 1.")
    plan(arguments.method or DEFAULT_METHODS, arguments.keep or [1.0], with_usual=False)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EvaluationError(f"--device {arguments.device}: torch sees no CUDA device.")
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = auto if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    console = Console() if Console().is_terminal else Console(width=190)
    started = time.perf_counter()
    console.print(gate(device), highlight=False)
    peaks = measure_peaks(device, dtype)
    console.print(
        f"{device_name(arguments.device)}: {peaks.flops / 1e12:.3f} TFLOP/s in {_name(dtype)}, "
        f"{peaks.bandwidth / 1e9:.1f} GB/s of copies",
        highlight=False,
    )
    file = JsonLines(_file(arguments, dtype))
    about = {
        "device": device_name(arguments.device),
        "driver": _driver() if device.type == "cuda" else None,
        "dtype": _name(dtype),
        "versions": versions(),
        "command": command_line(),
    }
    rows: list[BenchRow] = []
    if arguments.kernels:
        kernels = list(kernels_alone(device, dtype, peaks))
        file.add(
            [
                {"kind": "kernel", **dataclasses.asdict(row), "peaks": dataclasses.asdict(peaks), **about}
                for row in kernels
            ]
        )
        console.print(_kernel_table(kernels))
    if arguments.shape or not arguments.kernels:
        for name in arguments.shape or [DEFAULT_SHAPE]:
            rows += _shape(arguments, name, device, dtype, peaks, batches, file, about, console)
    if rows:
        picture = file.path.with_suffix(".svg")
        picture.write_text(draw(file.path), encoding="utf-8")
    console.print(
        f"finished after {time.perf_counter() - started:.0f} s; rows added to {file.path}",
        markup=False,
        highlight=False,
    )
    return 0


def _shape(
    arguments: argparse.Namespace,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    peaks: Any,
    batches: Sequence[int],
    file: JsonLines,
    about: dict[str, Any],
    console: Console,
) -> list[BenchRow]:
    shape = SHAPES[name]
    layers = arguments.layers
    if layers is None and not shape.encoder_only:
        free = _free_bytes(device)
        layers = fitting_layers(shape, dtype, int(0.8 * free))
        if layers is None:
            raise EvaluationError(
                f"{name} does not fit the {free / 2**30:.0f} GiB that are free, not even with few layers; choose another "
                f"--shape. {did_you_mean('llava-1.5-1b', SHAPES)}"
            )
    per_picture = shape.grid[1] * shape.grid[2]
    ways = plan(
        arguments.method or DEFAULT_METHODS,
        arguments.keep or [max(1, round(per_picture / 9))],
        not arguments.no_usual and shape.classes[0] == "LlavaConfig",
    )
    model = shape.build(device, dtype, layers)
    if arguments.profile:
        for batch in batches:
            inputs = shape.inputs(model, batch, [arguments.text] * batch, 0)
            for way in ways:
                if way.usual is None:
                    console.print(_profile_table(way, batch, *shares(model, inputs, way.method)))
        return []
    rows: list[BenchRow] = []
    with bars(Console(stderr=True)) as progress:
        for batch in batches:
            total = len(ways) * (1 + arguments.rounds)
            task = progress.add_task(f"{name}, batch {batch}", total=total, note="")

            def on_step(note: str, task: Any = task) -> None:
                progress.update(task, advance=1, note=note)

            def on_skip(way: str, reason: str) -> None:
                progress.console.print(f"skipped {way}: {reason}", markup=False, style="yellow")

            found = bench(
                shape,
                model,
                ways,
                batch,
                peaks,
                layers or 0,
                arguments.rounds,
                arguments.text,
                on_step=on_step,
                on_skip=on_skip,
            )
            file.add([{"kind": "model", **dataclasses.asdict(row), **about} for row in found])
            console.print(_table(found))
            rows += found
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _file(arguments: argparse.Namespace, dtype: torch.dtype) -> Path:
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", device_name(arguments.device).split(",")[0].lower()).strip("-")
    version = torch.__version__.partition("+")[0]
    return folder / f"bench-{name}-{_name(dtype)}-torch{version}.jsonl"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _driver() -> str | None:
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (
        subprocess.run(command, check=False, capture_output=True, text=True, timeout=30).stdout.strip()
        or None
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if found:
            return 1024 * int(found.group(1))
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _table(rows: Sequence[BenchRow]) -> Table:
    first = rows[0]
    layers = "" if not first.layers else f", {first.layers} of {first.layers_of_model} decoder layers"
    table = Table(
        title=f"{first.shape}{layers}, batch {first.batch} ({first.what}); speed-ups over dense, medians [20 %, 80 %]"
    )
    for name in (
        "method",
        "keep",
        "tokens",
        "TTFT ms",
        "speed-up",
        "limit",
        "achieved",
        "encoder",
        "prefill",
        "decode",
    ):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    table.add_column("deciding", justify="right")
    table.add_column("peak MiB", justify="right")

    def times(value: Any) -> str:
        return "" if value is None else f"{value.median:.2f}"

    for row in rows:
        speedup, deciding = row.ttft_speedup, row.deciding_ms
        table.add_row(
            row.method,
            "" if row.keep is None else f"{row.keep:g}",
            f"{row.tokens_in} → {row.tokens_out}" if row.tokens_out else "",
            f"{row.ttft_ms.median:.1f}",
            "" if speedup is None else f"{speedup.median:.2f} [{speedup.p20:.2f}, {speedup.p80:.2f}]",
            "" if row.limit is None else f"{row.limit:.2f}",
            "" if row.achieved is None else f"{100 * row.achieved:.0f} %",
            times(row.encoder_speedup),
            times(row.prefill_speedup),
            times(row.decode_speedup),
            ""
            if deciding is None or row.deciding_share is None
            else f"{deciding.median:.1f} ms, {100 * row.deciding_share:.1f} %",
            f"{row.peak_mib:.0f}" + ("" if row.peak_ratio is None else f" ({row.peak_ratio:.2f})"),
        )
    return table


def _profile_table(way: Way, batch: int, found: Sequence[Share], deciding: float) -> Table:
    budget = "" if way.keep is None else f", keep {way.keep:g}"
    table = Table(
        title=f"{way.name}{budget}, batch {batch}: {deciding:.1f} ms of measuring and deciding (under the profiler)"
    )
    table.add_column("operator")
    for name in ("calls", "ms", "share"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(one.name, str(one.calls), f"{one.ms:.1f}", f"{100 * one.share:.1f} %")
    return table


def _kernel_table(rows: Sequence[KernelRow]) -> Table:
    table = Table(title="Kernels alone")
    for name in ("operation", "input", "backend", "dtype"):
        table.add_column(name)
    for name in ("ms", "MiB", "of the copy bandwidth"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.operation,
            row.shape,
            row.backend,
            row.dtype,
            f"{row.ms:.3f}",
            "" if row.mib is None else f"{row.mib:.1f}",
            "" if row.share is None else f"{100 * row.share:.0f} %",
        )
    return table
