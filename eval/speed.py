"""What a setting costs: tokens, bytes, FLOPs and time of one representative question at batch size 1."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune.patch import Patch
from vtprune.report import Report

from .accuracy import adapt
from .prompts import generate
from .settings import Setting
from .shrink import Inputs

ROUNDS = 5
DECODE_TOKENS = 17


class Applicable(Protocol):
    """A way to run a model, such as :class:`~vtprune.eval.settings.Setting`; hashable."""

    def applied(self, model: nn.Module, run: int = 0) -> AbstractContextManager[Patch | None]:
        """Runs the model this way inside the context; gives the patch where there is one."""


S = TypeVar("S", bound=Applicable)


@dataclass(frozen=True)
class Cost:
    """Cost of one question, a single row.

    Attributes:
        visual_tokens_in: tokens the vision encoder makes of the picture.
        visual_tokens_out: those left at the end of the model.
        layer_average_tokens: visual tokens averaged over decoder layers, which shows pruning late for what it is.
        kv_bytes: key-value cache behind the prompt.
        flops: of the prefill with the vision encoder, as torch.utils.flop_counter counts them: matrix products,
            convolutions and attention (in full, causal or not), 2 per multiply-add. What a method computes in order
            to decide is included as far as it is such a product; sorting and softmax are not.
        ttft_ms: time to first token with the vision encoder, without the processor; median over rounds.
        decode_ms_per_token: time per further token of a forced-length answer; median over rounds.
        peak_mib: on CUDA, the most memory allocated during the prefill above what was allocated before; on CPU, the
            largest sum of live tensors created during the prefill, without weights, inputs and what an operator
            allocates for itself (the process' resident memory would show the allocator's history instead).
    """

    visual_tokens_in: int
    visual_tokens_out: int
    layer_average_tokens: float
    kv_bytes: int
    flops: int
    ttft_ms: float
    decode_ms_per_token: float
    peak_mib: float


@torch.no_grad()
def measure(
    model: nn.Module,
    inputs: Inputs | Callable[[S], Inputs],
    settings: Sequence[S],
    rounds: int = ROUNDS,
    on_step: Callable[[S], None] = lambda setting: None,
) -> tuple[dict[S, Cost], dict[S, str]]:
    """Costs of all settings on the same question.

    Settings take turns within each round, so that a slower minute of the machine slows all of them. Every timing
    follows an untimed call under the same setting.

    Args:
        model: an unpatched model.
        inputs: one row, or what gives a setting its row where that is not the same for all.
        settings: what to measure; the first draw stands for several.
        rounds: timings per setting, of which the median is reported.
        on_step: told of every finished piece of work, ``len(settings) * (1 + rounds)`` in all.

    Returns:
        Costs, and for settings that cannot run on this model the reason.
    """
    counted: dict[S, tuple[Report, int, float]] = {}
    skipped: dict[S, str] = {}
    for setting in settings:
        try:
            counted[setting] = _count(model, inputs, setting)
        except Exception as error:  # noqa: BLE001 - shown to the user as the reason for a missing row
            prefix = "" if isinstance(error, vtprune.VTPruneError) else f"{type(error).__name__}: "
            skipped[setting] = prefix + str(error)
        on_step(setting)
    first: dict[S, list[float]] = {setting: [] for setting in counted}
    rest: dict[S, list[float]] = {setting: [] for setting in counted}
    for _ in range(rounds):
        for setting in settings:
            if setting in counted:
                with setting.applied(model):
                    x = _given(model, inputs, setting)
                    _timed(model, x, 1)
                    first[setting].append(_timed(model, x, 1))
                    rest[setting].append(_timed(model, x, DECODE_TOKENS))
            on_step(setting)
    costs = {}
    for setting, (report, flops, peak) in counted.items():
        ttft = statistics.median(first[setting])
        decode = statistics.median(b - a for a, b in zip(first[setting], rest[setting], strict=True))
        costs[setting] = Cost(
            visual_tokens_in=report.visual_tokens_in[0],
            visual_tokens_out=report.visual_tokens_out[0],
            layer_average_tokens=report.layer_average_tokens[0],
            kv_bytes=report.kv_bytes,
            flops=flops,
            ttft_ms=1e3 * ttft,
            decode_ms_per_token=1e3 * decode / (DECODE_TOKENS - 1),
            peak_mib=peak,
        )
    return costs, skipped


def uncounted() -> dict[Any, Any]:
    """FLOP formulas for attention kernels: torch 2.11 does not count the one for CPU, nor fewer key heads than query heads."""
    aten = torch.ops.aten
    kernels = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    )

    def formula(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        batch, heads, rows, width = query
        return int(2 * batch * heads * rows * key[2] * (width + value[3]))

    return dict.fromkeys(kernels, formula)


def _given(model: nn.Module, inputs: Inputs | Callable[[S], Inputs], setting: S) -> Inputs:
    own = inputs(setting) if callable(inputs) else inputs
    return adapt(model, setting, own) if isinstance(setting, Setting) else own


def _count(model: nn.Module, inputs: Inputs | Callable[[S], Inputs], setting: S) -> tuple[Report, int, float]:
    """Report, FLOPs and peak MiB of a prefill."""
    with setting.applied(model) as patch:
        x = _given(model, inputs, setting)
        generate(model, x, 1)
        report = patch.report() if patch is not None else None
        flops = FlopCounterMode(display=False, custom_mapping=uncounted())
        if torch.cuda.is_available() and x["input_ids"].is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            generate(model, x, 1)
            peak = torch.cuda.max_memory_allocated() - before
            with flops:
                generate(model, x, 1)
        else:
            memory = LiveMemory([*model.parameters(), *model.buffers(), *x.values()])
            with memory, flops:
                generate(model, x, 1)
            peak = memory.peak
        if report is None:
            # Nothing is patched; the control that removes nothing tells the same numbers.
            with vtprune.patch(model, "keep-all") as everything:
                generate(model, x, 1)
                report = everything.report()
    return report, flops.get_total_flops(), peak / 2**20


def _timed(model: nn.Module, inputs: Inputs, new_tokens: int) -> float:
    """Seconds of one generation of exactly so many tokens."""
    cuda = inputs["input_ids"].is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    generate(model, inputs, new_tokens, forced=True)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


class LiveMemory(TorchDispatchMode):
    """Adds up the storages of tensors that are alive while it is active.

    Args:
        given: tensors that do not count, such as weights.

    Attributes:
        peak: most bytes alive at once.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._given = [StorageWeakRef(t.untyped_storage()) for t in given]
        self._known = {ref.cdata for ref in self._given}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in self._known:
                    self._live[ref.cdata] = (ref, storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out
