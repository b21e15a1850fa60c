"""Compares methods with the dense model by time, on the shapes of real models with random weights."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import vtprune
from vtprune.errors import VTPruneError
from vtprune.method import Scored, Signal, Site, View
from vtprune.patch import Patch
from vtprune.selection import Selection, topk

from ..prompts import EvaluationError
from ..settings import parse_method
from .roofline import Peaks
from .shapes import Shape
from .timing import Inputs, Times, time_once, work_and_peak
from .usual import USUAL, eager, usual

ROUNDS = 5
TEXT_TOKENS = 64  # LLaVA-1.5's system prompt, a question and "Answer with a single word or phrase."
RAGGED = "ragged"
VARIATION = 0.25  # ragged counts and prompts differ by up to so much from the mean


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile over the rounds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles by linear interpolation."""
        x = torch.tensor(list(values), dtype=torch.float64)
        low, middle, high = x.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        return cls(middle, low, high)


@dataclass(frozen=True)
class BenchRow:
    """One model shape, method, budget and batch size.

    Speed-ups are of the same round of the same run, dense time / time of the method.

    Attributes:
        shape, what: the model's shape, and what one row of a batch is.
        layers, layers_of_model: decoder layers that were built, and how many the real model has.
        method: "dense", a method, or "NAME, the usual way" (eager attention, attention maps written out).
        keep: tokens per picture or frame.
        batch: rows.
        text_tokens: of a prompt, on average.
        tokens_in, tokens_out: visual tokens over the batch; entering the language model, at its end.
        layer_average: visual tokens over the batch, averaged over decoder layers.
        encoder_ms, prefill_ms, ttft_ms, decode_ms: see :class:`~vtprune.eval.bench.timing.Times`.
        deciding_ms: measuring signals and deciding, wherever it happens.
        encoder_speedup, prefill_speedup, ttft_speedup, decode_speedup: dense / this.
        limit: speed-up of the time to the first token that the removed FLOPs and bytes allow: the least time of all
            operators of the dense model over that of those left, each the larger of FLOPs / FLOP/s and bytes / bandwidth
            as measured in this run. vtprune's own operators are not in it.
        achieved: ttft_speedup / limit.
        deciding_share: deciding_ms / the dense time to the first token.
        flops_left: FLOPs of the model's operators up to the first token, as a share of the dense model's.
        own_flops: vtprune's own FLOPs, as a share of the dense model's.
        peak_mib, peak_ratio: most memory up to the first token above weights and inputs; over the dense model's.
        peaks: FLOP/s and bytes/s of the device in this run.
    """

    shape: str
    what: str
    layers: int
    layers_of_model: int
    method: str
    keep: int | float | None
    batch: int
    text_tokens: int
    tokens_in: int
    tokens_out: int
    layer_average: float
    encoder_ms: Spread | None
    prefill_ms: Spread | None
    ttft_ms: Spread
    decode_ms: Spread | None
    deciding_ms: Spread | None
    encoder_speedup: Spread | None = None
    prefill_speedup: Spread | None = None
    ttft_speedup: Spread | None = None
    decode_speedup: Spread | None = None
    limit: float | None = None
    achieved: float | None = None
    deciding_share: float | None = None
    flops_left: float | None = None
    own_flops: float | None = None
    peak_mib: float = 0.0
    peak_ratio: float | None = None
    peaks: Peaks | None = None


@dataclass(frozen=True, kw_only=True)
class Ragged(Scored):
    """Not a published method: [CLS] attention with a count of its own for every picture, `keep` on average.

    The counts of a batch run evenly from 3/4 to 5/4 of `keep`, which random pictures would not give any method.
    """

    key = RAGGED

    def site(self, facts: vtprune.ModelFacts) -> Site:
        return facts.behind_encoder()

    def needs(self, facts: vtprune.ModelFacts) -> tuple[Signal, ...]:
        return (Signal("cls_attention", facts.encoder_layers - 1),)

    def scores(self, view: View) -> torch.Tensor:
        (attention,) = (view[signal] for signal in view.signals)
        return attention.mean(1)

    def decide(self, view: View) -> Selection:
        ranked = topk(self.scores(view), view.n)
        g = len(ranked)
        steps = [1.0] if g == 1 else [1 - VARIATION + 2 * VARIATION * i / (g - 1) for i in range(g)]
        counts = [round(view.k * step) for step in steps]
        return Selection(tuple(row[:n].sort().values for row, n in zip(ranked, counts, strict=True)))


@dataclass(frozen=True)
class Way:
    """One way to run the model.

    Attributes:
        name: for the row.
        keep: budget.
        method: what to patch with; None leaves the model as it is.
        usual: name of a method of :mod:`~vtprune.eval.bench.usual`.
    """

    name: str
    keep: int | float | None = None
    method: vtprune.Method | None = None
    usual: str | None = None


def plan(methods: Sequence[str], budgets: Sequence[int | float], with_usual: bool) -> list[Way]:
    """Ways to run a model, dense first.

    Args:
        with_usual: whether to add the usual way of methods that have one.

    Raises:
        VTPruneError: unknown method or option.
    """
    ways = [Way("dense")]
    for text in methods:
        name, options = (text, {}) if text == RAGGED else parse_method(text)
        for keep in budgets:
            chosen = {"keep": keep, **options}
            method = Ragged(**chosen) if name == RAGGED else vtprune.methods.create(name, **chosen)
            ways.append(Way(text, keep, method))
            if with_usual and text in USUAL and isinstance(keep, int):
                ways.append(Way(f"{text}, the usual way", keep, usual=text))
    return ways


def gate(device: torch.device) -> str:
    """Runs all kernel checks on the device, in a process of their own.

    Returns:
        Their closing line.

    Raises:
        EvaluationError: one failed, so that no speed may be reported.
    """
    command = [sys.executable, "-m", "vtprune.testing.kernel_checks", device.type]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines() or [result.stderr.strip()]
    if result.returncode:
        failed = [line for line in lines if line.startswith("FAILED")]
        raise EvaluationError(
            f"kernel checks failed, so no speed is reported: {'; '.join(failed)} {lines[-1]}. Run "
            f"`python -m vtprune.testing.kernel_checks {device.type}` to see more."
        )
    return lines[-1]


@torch.no_grad()
def bench(
    shape: Shape,
    model: nn.Module,
    ways: Sequence[Way],
    batch: int,
    peaks: Peaks,
    layers: int,
    rounds: int = ROUNDS,
    text_tokens: int = TEXT_TOKENS,
    on_step: Callable[[str], None] = lambda name: None,
    on_skip: Callable[[str, str], None] = lambda name, reason: None,
) -> list[BenchRow]:
    """Rows of one model shape and batch size; ways take turns within a round, so that a slow minute slows all.

    Args:
        model: built by `shape`, unpatched.
        batch: rows; with more than one, their prompts differ in length.
        rounds: timings per way.
        text_tokens: of a prompt, on average.
        on_step: told of every finished piece of work, ``len(ways) * (1 + rounds)`` in all.
        on_skip: told of ways that cannot run on this model, with the reason.
    """
    text = [text_tokens] * batch
    if batch > 1:
        text = [round(text_tokens * (1 - VARIATION + 2 * VARIATION * i / (batch - 1))) for i in range(batch)]
    inputs = shape.inputs(model, batch, text, 0)
    counted: dict[Way, _Counted] = {}
    for way in ways:
        try:
            counted[way] = _count(model, inputs, way, peaks, shape.tokens * batch)
        except Exception as error:  # noqa: BLE001 - shown to the user as the reason for a missing row
            name = "" if isinstance(error, VTPruneError) else f"{type(error).__name__}: "
            on_skip(way.name, name + str(error))
        on_step(way.name)
    times = {way: Times() for way in counted}
    deciding: dict[Way, list[float]] = {way: [] for way in counted}
    for _ in range(rounds):
        for way in ways:
            if way in counted:
                _round(model, inputs, way, times[way], deciding[way])
            on_step(way.name)
    dense = ways[0]
    return [
        _row(
            shape,
            way,
            batch,
            text_tokens,
            layers,
            peaks,
            counted[way],
            counted[dense],
            times[way],
            times[dense],
            deciding[way],
        )
        for way in counted
    ]


@dataclass(frozen=True)
class _Counted:
    tokens_out: int
    layer_average: float
    seconds: float
    flops: float
    own_flops: float
    peak_mib: float


def _patched(model: nn.Module, way: Way) -> Any:
    return nullcontext() if way.method is None else vtprune.patch(model, way.method)


def _count(model: nn.Module, inputs: Inputs, way: Way, peaks: Peaks, tokens: int) -> _Counted:
    if way.usual is not None:
        with eager(model, way.usual):
            work, peak = work_and_peak(model, inputs, usual(model, way.usual, _whole(way), inputs))
        return _Counted(0, 0.0, work.seconds(peaks), work.flops, 0.0, peak)
    with _patched(model, way) as patch:
        work, peak = work_and_peak(model, inputs)
        left, average = tokens, float(tokens)
        if isinstance(patch, Patch):
            report = patch.report()
            left = sum(report.visual_tokens_out)
            average = sum(report.layer_average_tokens) if report.layers else float(left)
    own = sum(flops for flops, _ in work.own)
    return _Counted(left, average, work.seconds(peaks), work.flops, own, peak)


def _whole(way: Way) -> int:
    assert isinstance(way.keep, int)
    return way.keep


def _round(model: nn.Module, inputs: Inputs, way: Way, times: Times, deciding: list[float]) -> None:
    if way.usual is not None:
        call = usual(model, way.usual, _whole(way), inputs)
        with eager(model, way.usual):
            time_once(model, inputs, times, decode=False, call=call)
        return
    with _patched(model, way) as patch:
        time_once(model, inputs, times, decode=True)
        if isinstance(patch, Patch):
            deciding.append(sum(patch.report().decide_ms.values()))


def _row(
    shape: Shape,
    way: Way,
    batch: int,
    text_tokens: int,
    layers: int,
    peaks: Peaks,
    mine: _Counted,
    dense: _Counted,
    times: Times,
    dense_times: Times,
    deciding: list[float],
) -> BenchRow:
    def speedup(name: str) -> Spread | None:
        pairs = zip(getattr(dense_times, name), getattr(times, name), strict=False)
        ratios = [a / b for a, b in pairs if b > 0]
        return Spread.of(ratios) if ratios else None

    def spread(values: Sequence[float]) -> Spread | None:
        return Spread.of(values) if values else None

    row = BenchRow(
        shape=shape.name,
        what=shape.what,
        layers=layers,
        layers_of_model=shape.layers,
        method=way.name,
        keep=way.keep,
        batch=batch,
        text_tokens=text_tokens,
        tokens_in=shape.tokens * batch,
        tokens_out=mine.tokens_out,
        layer_average=mine.layer_average,
        encoder_ms=spread(times.encoder if way.usual is None else ()),
        prefill_ms=spread([x for x in times.prefill if x and way.usual is None]),
        ttft_ms=Spread.of(times.ttft),
        decode_ms=spread(times.decode),
        deciding_ms=spread(deciding),
        peak_mib=mine.peak_mib,
        peaks=peaks,
    )
    if way.method is None and way.usual is None:
        return row
    total = speedup("ttft")
    assert total is not None
    if way.usual is not None:
        # Its parts are not those of the stock model's call.
        return dataclasses.replace(row, ttft_speedup=total, peak_ratio=mine.peak_mib / dense.peak_mib)
    limit = dense.seconds / mine.seconds
    return dataclasses.replace(
        row,
        encoder_speedup=speedup("encoder"),
        prefill_speedup=speedup("prefill"),
        ttft_speedup=total,
        decode_speedup=speedup("decode"),
        limit=limit,
        achieved=total.median / limit,
        deciding_share=statistics.median(deciding) / statistics.median(dense_times.ttft)
        if deciding
        else None,
        flops_left=mine.flops / dense.flops,
        own_flops=mine.own_flops / dense.flops,
        peak_ratio=mine.peak_mib / dense.peak_mib,
    )
