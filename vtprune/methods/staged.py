"""What methods share that thin out visual tokens step by step inside the language model."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from vtprune.errors import InvalidOptionError
from vtprune.method import Method, ModelFacts, Signal, Site, Stage, View, check_keep, resolve_layer
from vtprune.scoring import rounded, together
from vtprune.selection import Selection


@dataclass(frozen=True)
class Schedule:
    """Tokens per stage whose average over all decoder layers is the budget.

    Attributes:
        depth: decoder layers.
        starts: first layer that misses what each stage removes, ascending.
        shares: strength in [0, 1] -> share of the original tokens behind each stage; grows from 0 to 1.
    """

    depth: int
    starts: Sequence[int]
    shares: Callable[[float], Sequence[float]]

    def counts(self, keep: int | float, n: int) -> list[int]:
        """Tokens behind each stage, of `n` original ones: never increasing, at least 1.

        The strength whose average is `keep` is found by bisection; counts are rounded down, then raised by one
        from the first stage on while that brings the average nearer. A budget that is too small to be met, since
        the layers before the first stage see all tokens, leaves 1 token behind every stage.
        """
        target = (keep * n if isinstance(keep, float) else min(keep, n)) * self.depth
        ends = [*self.starts[1:], self.depth]
        spans = [end - start for start, end in zip(self.starts, ends, strict=True)]

        def behind(strength: float) -> list[float]:
            return [min(float(n), max(1.0, share * n)) for share in self.shares(strength)]

        def left(counts: Sequence[float]) -> float:
            used = sum(span * count for span, count in zip(spans, counts, strict=True))
            return target - self.starts[0] * n - used

        low, high = 0.0, 1.0
        if left(behind(high)) >= 0:
            low = high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if left(behind(middle)) >= 0 else (low, middle)
        counts = [math.floor(count + 1e-6) for count in behind(low)]
        for i, span in enumerate(spans):
            missing, most = left(counts), counts[i - 1] if i else n
            counts[i] = min(counts[i], most)
            if counts[i] < most and abs(missing - span) < abs(missing):
                counts[i] += 1
        return counts


def three_counts(
    n: int, average: float, spans: Sequence[int], first: float, second: float
) -> tuple[int, int, int]:
    """Tokens of `n` behind three stages, `average` on average over the layers that follow them.

    The third count follows from the budget. Where it cannot, the second and then the first give way, and among the
    neighbours of the wanted counts those are taken that come nearest.

    Args:
        spans: layers behind each stage; the last one may be 0.
        first, second: wanted counts behind the first two stages.
    """
    one, two, three = spans
    budget = average * sum(spans)
    a0 = min(n, max(1, rounded(first)))
    b0 = min(a0, max(1, rounded(second)))
    if a0 * one + b0 * (two + three) < budget:
        b0 = math.ceil((budget - a0 * one) / (two + three))
        if b0 > a0:
            a0 = b0 = min(n, max(1, math.ceil(average)))
    elif a0 * one + b0 * two + three > budget:
        b0 = min(b0, max(1, math.floor((budget - a0 * one - three) / max(two, 1))))
        if a0 * one + b0 * two + three > budget:
            a0 = min(a0, max(1, math.floor((budget - two - three) / one)))
    best: tuple[float, tuple[int, int, int]] = (math.inf, (1, 1, 1))
    for step in range(9):
        a = min(n, max(1, a0 + (0, -1, 1)[step // 3]))
        b = min(a, max(1, b0 + (0, -1, 1)[step % 3]))
        c = min(b, max(1, rounded((budget - a * one - b * two) / three))) if three else b
        best = min(best, (abs(budget - a * one - b * two - c * three), (a, b, c)), key=lambda x: x[0])
        if (
            best[0] <= max(spans) / 2
        ):  # as near as whole tokens allow, and first of all with the wanted counts
            break
    return best[1]


class StageView(View):
    """A view that knows which of the method's layers decides, for methods whose stages differ.

    Attributes:
        stage: number of the layer in `layers`.
    """

    stage: int = 0


@dataclass(frozen=True, kw_only=True)
class Staged(Method):
    """Base of methods that prune at several decoder layers.

    Attributes:
        keep: visual tokens per image (or share of them) on average over all decoder layers.
        layers: decoder layers that decide, as indices or fractions of the depth.
        counts: instead of an average, tokens (or shares of the original ones) left by each of `layers`.
    """

    behind: ClassVar[bool] = False  # whether tokens leave behind the deciding layer, or at its input

    layers: tuple[int | float, ...] = ()
    counts: tuple[int | float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.counts is not None and len(self.counts) != len(self.layers):
            raise InvalidOptionError(
                f"counts={self.counts} has {len(self.counts)} entries for {len(self.layers)} layers; give one each."
            )
        for count in self.counts or ():
            check_keep(count, "counts")

    def options(self) -> dict[str, object]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in super().options().items()}

    def shares(self, strength: float, stages: int) -> Sequence[float]:
        """Share of the original tokens behind each stage, here r, r^2, r^3 ...: all 0 at strength 0, all 1 at 1."""
        return [strength ** (i + 1) for i in range(stages)]

    @abstractmethod
    def signals(self, layer: int, since: int) -> tuple[Signal, ...]:
        """What the decision of a layer reads; nothing was removed from layer `since` on."""

    def deciding(self, facts: ModelFacts) -> Sequence[int | float]:
        """Layers that decide on this model."""
        return self.layers

    @property
    def budgeted(self) -> bool:
        """Whether a stage has a count to meet; otherwise the count emerges from its decision."""
        return True

    def stages(self, facts: ModelFacts) -> list[Stage]:
        first = 0 if self.behind else 1
        layers = self.deciding(facts)
        # Where a shallow model makes two of the layers one, the later stage counts.
        number = {
            resolve_layer(layer, facts.decoder_layers, "layers", first): i for i, layer in enumerate(layers)
        }
        decide = sorted(layer for layer in number if layer + self.behind < facts.decoder_layers)
        if not decide:
            raise InvalidOptionError(
                f"layers={layers} leaves no layer of {facts.decoder_layers} to prune; give one that another follows."
            )
        stages = [number[layer] for layer in decide]
        starts = [layer + self.behind for layer in decide]
        schedule = Schedule(
            facts.decoder_layers,
            starts,
            lambda strength: [self.shares(strength, len(layers))[stage] for stage in stages],
        )
        # An average is told to the engine for its notes on small pictures; `_decide` turns it into counts.
        budgets = self.counts or [self.keep if self.budgeted else None] * len(layers)
        return [
            Stage(
                Site("decoder", start),
                budgets[stage],
                partial(self._decide, schedule, place, stage),
                self.signals(layer, starts[place - 1] if place else 0),
                must_prune=False,
                positions=self.position_policy(facts),
            )
            for place, (layer, start, stage) in enumerate(zip(decide, starts, stages, strict=True))
        ]

    def _decide(self, schedule: Schedule, place: int, stage: int, view: View) -> Selection:
        """Splits a view by the count that each image's original size asks for."""
        if not self.budgeted:
            return self.decide(part_of(view, range(len(view.layout)), view.k, stage))
        if self.counts is not None:
            wanted = [view.k] * len(view.layout)
        else:
            wanted = [min(view.n, schedule.counts(self.keep, n)[place]) for n in view.n_original]
        parts, images = [], []
        for k in sorted(set(wanted)):
            rows = [g for g, w in enumerate(wanted) if w == k]
            if k == view.n:
                parts.append(Selection.everything(len(rows), k, view.features.device))
            else:
                parts.append(self.decide(part_of(view, rows, k, stage)))
            images.append(rows)
        return together(parts, images)


def part_of(view: View, rows: Sequence[int], k: int, stage: int) -> StageView:
    """The view of some of its images, with another count."""
    rows = list(rows)
    part = StageView(
        features=view.features[rows],
        index=view.index[rows],
        layout=[view.layout[g] for g in rows],
        k=k,
        n_original=[view.n_original[g] for g in rows],
        seeds=lambda: [view.image_seeds[g] for g in rows],
        signals={signal: view[signal][rows] for signal in view.signals},
        sizes=view.sizes[rows],
    )
    part.stage = stage
    return part
