"""Times the parts of one question on a model, patched or not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.integrations import integrate
from vtprune.integrations.base import Integration

from ..prompts import generate
from ..speed import LiveMemory
from .roofline import Work

Inputs = Mapping[str, Tensor]
DECODE_TOKENS = 9


@dataclass
class Times:
    """Milliseconds, one entry per round.

    Attributes:
        encoder: of the vision encoder with its projector, signals measured in it included; summed over its calls.
        prefill: of the language model over the prompt, with what is decided at its input and inside it.
        ttft: of the whole call up to the first token, processor and tokenizer excluded.
        decode: per further token.
    """

    encoder: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


class Clock:
    """Reads of the clock: wall time on CPU, events of the current stream on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._cuda = device, device.type == "cuda"

    def mark(self) -> Any:
        """A point in time."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks; waits for the second on CUDA."""
        if not self._cuda:
            return 1e3 * float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end))

    def wall_ms(self, call: Callable[[], object]) -> float:
        """Milliseconds of a call with an idle device before and behind it."""
        if self._cuda:
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        if self._cuda:
            torch.cuda.synchronize(self.device)
        return 1e3 * (time.perf_counter() - start)


@contextmanager
def parts(integration: Integration, clock: Clock) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """Marks around the encoder and the language model of every call inside; hooks are removed at the end."""
    spans: dict[str, list[tuple[Any, Any]]] = {"encoder": [], "prefill": []}
    open_: dict[str, Any] = {}

    def begin(name: str) -> Callable[..., None]:
        def hook(*args: object) -> None:
            open_[name] = clock.mark()

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(*args: object) -> None:
            spans[name].append((open_[name], clock.mark()))

        return hook

    tower = integration.towers[0]
    with ExitStack() as stack:

        def hooks(module: nn.Module, name: str, last: nn.Module) -> None:
            # In front of a patch's hooks, so that what they do counts.
            stack.callback(module.register_forward_pre_hook(begin(name), prepend=True).remove)
            stack.callback(last.register_forward_hook(end(name)).remove)

        hooks(tower.entry, "encoder", tower.module if tower.projector is None else tower.projector)
        if integration.decoder is not None:
            hooks(integration.decoder.module, "prefill", integration.decoder.module)
        yield spans


def first_token(model: nn.Module, inputs: Inputs) -> None:
    """The call whose time is the time to the first token; an encoder alone runs once."""
    if "input_ids" in inputs:
        generate(model, dict(inputs), 1, forced=True)
    else:
        model(**inputs)


@torch.no_grad()
def time_once(
    model: nn.Module, inputs: Inputs, times: Times, decode: bool, call: Callable[[], object] | None = None
) -> None:
    """Adds one round to `times`, behind an untimed call in the first one.

    Args:
        decode: whether to time further tokens too.
        call: what leads to the first token, if not :func:`first_token`.
    """
    clock = Clock(next(model.parameters()).device)
    once = call or (lambda: first_token(model, inputs))
    if not times.ttft:
        once()
    with parts(integrate(model), clock) as spans:
        times.ttft.append(clock.wall_ms(once))
    for name, found in spans.items():
        getattr(times, name).append(sum(clock.ms(a, b) for a, b in found))
    if decode and "input_ids" in inputs:
        with parts(integrate(model), clock) as spans:
            generate(model, dict(inputs), DECODE_TOKENS, forced=True)
        ends = [end for _, end in spans["prefill"]]  # of the language model, once per token
        times.decode.append(clock.ms(ends[0], ends[-1]) / (len(ends) - 1))


@torch.no_grad()
def work_and_peak(
    model: nn.Module, inputs: Inputs, call: Callable[[], object] | None = None
) -> tuple[Work, float]:
    """Work up to the first token, and the most MiB above weights and inputs (see :class:`~vtprune.eval.speed.Cost`).

    Args:
        call: as for :func:`time_once`.
    """
    once = call or (lambda: first_token(model, inputs))
    work = Work()
    if next(model.parameters()).is_cuda:
        once()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once()
        peak = torch.cuda.max_memory_allocated() - before
        with work:
            once()
        return work, peak / 2**20
    memory = LiveMemory([*model.parameters(), *model.buffers(), *inputs.values()])
    with memory, work:
        once()
    return work, memory.peak / 2**20
