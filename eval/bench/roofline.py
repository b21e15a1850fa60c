"""What a forward pass has to compute and to move, and how long that takes at best: the limit that pruning is held to."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from ..speed import uncounted

# Read by index: only the rows taken are moved, not the table.
LOOKUPS = ("embedding", "index", "index_select", "gather", "index_put", "index_put_")
STOCK = ("transformers.", "timm.")
OWN, NOT_OWN = "vtprune.", "vtprune.eval."
WARM_UP_S, MEASURE_S = 0.3, 0.7


@dataclass(frozen=True)
class Peaks:
    """What the device reached in this run.

    Attributes:
        flops: FLOP/s of a large square matrix product in the dtype.
        bandwidth: bytes/s, read and written, of a copy well past the caches.
    """

    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for one operator: computing and moving overlap."""
        return max(flops / self.flops, moved / self.bandwidth)


class Work(TorchDispatchMode):
    """Adds up FLOPs and bytes of all operators, those of vtprune's own code apart.

    An operator belongs to vtprune if the innermost frame of a model library or of vtprune on the stack is vtprune's.

    Attributes:
        model: (FLOPs, bytes) of every operator of the model.
        own: the same of vtprune's: measuring signals, deciding, gathering.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model: list[tuple[float, float]] = []
        self.own: list[tuple[float, float]] = []
        self._formulas = {**flop_registry, **{op: shape_wrapper(f) for op, f in uncounted().items()}}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        formula = self._formulas.get(func._overloadpacket)
        flops = float(formula(*args, **kwargs, out_val=out)) if formula is not None else 0.0
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func._overloadpacket._qualified_op_name.partition("::")[2] in LOOKUPS:
            moved = 2 * sum(map(_bytes, results)) + sum(map(_bytes, given[1:]))
        else:
            moved = sum(map(_bytes, results)) + sum(map(_bytes, given))
        (self.own if _is_own() else self.model).append((flops, float(moved)))
        return out

    def seconds(self, peaks: Peaks) -> float:
        """The least time for the model's operators one after the other."""
        return sum(peaks.seconds(flops, moved) for flops, moved in self.model)

    @property
    def flops(self) -> float:
        """FLOPs of the model's operators."""
        return sum(flops for flops, _ in self.model)

    @property
    def moved(self) -> float:
        """Bytes of the model's operators."""
        return sum(moved for _, moved in self.model)


def _bytes(x: Tensor) -> int:
    # An expanded tensor is read once; a slice of a large one is not the large one.
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _is_own() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(STOCK):
            return False
        if name.startswith(OWN) and not name.startswith(NOT_OWN):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Measures matrix products and copies on a device.

    Matrices have 4,096 rows on CUDA and 2,048 on CPU, copies 1 GiB and 256 MiB.
    """
    cuda = device.type == "cuda"
    side = 4096 if cuda else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    seconds = repeated(lambda: torch.mm(a, b, out=product), device)
    size = 2**30 if cuda else 2**28
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Peaks(2 * side**3 / seconds, size / repeated(lambda: target.copy_(source), device))


def repeated(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the median over repetitions for about 0.7 s after a warm-up; at least 5 repetitions."""
    cuda = device.type == "cuda"
    begin = time.perf_counter()
    warm = 0
    while warm < 2 or time.perf_counter() - begin < WARM_UP_S:
        call()
        warm += 1
        if cuda:
            torch.cuda.synchronize(device)
    once = (time.perf_counter() - begin) / warm
    n = max(5, min(1000, int(MEASURE_S / once)))
    if cuda:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        for event in events[:-1]:
            event.record()
            call()
        events[-1].record()
        torch.cuda.synchronize(device)
        times = [1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    else:
        marks = [time.perf_counter()]
        for _ in range(n):
            call()
            marks.append(time.perf_counter())
        times = [b - a for a, b in itertools.pairwise(marks)]
    return float(sorted(times)[n // 2])
