"""Where the time of one pruned call goes, by operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import vtprune

from .timing import Inputs, first_token


@dataclass(frozen=True)
class Share:
    """One operator (on CUDA: one kernel's operator) in a call up to the first token.

    Attributes:
        name: of the operator; "everything else" for those left out of a table.
        calls: how often it ran.
        ms: time in it alone, without operators that it calls.
        share: of all operators' time.
    """

    name: str
    calls: int
    ms: float
    share: float


@torch.no_grad()
def shares(
    model: nn.Module, inputs: Inputs, method: vtprune.Method | None, top: int = 10
) -> tuple[list[Share], float]:
    """The costliest operators of one call, and the milliseconds that the report says went into deciding.

    Args:
        model: unpatched.
        method: what to patch with; None for the dense model.
        top: how many operators to tell apart.
    """
    cuda = next(model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    deciding = 0.0
    if method is None:
        first_token(model, inputs)
        with profile(activities=activities) as recorded:
            first_token(model, inputs)
    else:
        with vtprune.patch(model, method) as patch:
            first_token(model, inputs)
            with profile(activities=activities) as recorded:
                first_token(model, inputs)
            deciding = sum(patch.report().decide_ms.values())
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = sorted(((getattr(e, field), e.key, e.count) for e in recorded.key_averages()), reverse=True)
    total = sum(us for us, _, _ in found)
    table = [Share(name, calls, us / 1e3, us / total) for us, name, calls in found[:top]]
    rest = found[top:]
    table.append(
        Share(
            "everything else",
            sum(calls for _, _, calls in rest),
            sum(us for us, _, _ in rest) / 1e3,
            sum(us for us, _, _ in rest) / total,
        )
    )
    return table, deciding
