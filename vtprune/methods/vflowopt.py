"""VFlowOpt: calibrated ViT attention, three stages, and recycling of what the first one prunes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from vtprune.errors import InvalidOptionError
from vtprune.method import Method, ModelFacts, Signal, Site, Stage, View, resolve_layer
from vtprune.scoring import by_count, calibrated, recycled, rounded
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class VFlowOpt(Method):
    """Training-free, text-agnostic; one importance map prunes before and twice inside the language model.

        r_j = mean_i A_ij,   K = {q : r_q > t mean_j r_j},   I_i = mean_{q in K} A_qi    (A head-mean ViT attention)
        (R1 L1 + R1 R2 L2 + R1 R2 R3 L3) / L = keep,   L1 + L2 + L3 = L decoder layers

    Stage 1 cuts the grid into a x a cells; the pruned tokens of a cell become sum I v / sum I in the place of the one
    of largest I. These recycled tokens count for R1. Stages 2 and 3 discard. R3 follows from `keep`.

    Source: Yang et al., "VFlowOpt" (ICCV 2025); sihany077/VFlowOpt at 129eeef. Defaults are what the authors' search found
    for LLaVA-OneVision-7B at 25 %: R (.2651, .9833, .8773; R3 is solved anew, .870 at exactly 25 %), t 34.76, a 15.58,
    alpha 0; stages before layers 0, 9 and 18 of 28. Other published results: 10 % R (.1166, 1, .6011), t 39.26, a 17.39; 50 % R (.7233, .7487, .487), t 28.68,
    a 11.76.
    Deviations: (1) queries and means run over the tokens left, so that stages 2 and 3 use a map of the survivors
    (theirs: the first map). (2) If no query exceeds the threshold, the one of largest r votes. (3) If there are not more
    tokens left than cells, nothing is recycled. (4) Where no R3 in (0, 1] meets the budget, R2 and then R1 give way.
    (5) Every tile and frame has its own map and budget; separators are always kept, as theirs are. (6) The patch
    entropy is left out (alpha is 0 in all published results; a method sees no pixels).

    Attributes:
        keep: visual tokens per image (or share of them) on average over all decoder layers.
        r1: None = the authors' share of the budget, 1.0604 keep.
        r2: share of them behind stage 2.
        t: threshold of the query set in units of the mean.
        a: side of a cell in tokens; need not be whole.
        alpha: weight of the patch entropy; only 0 works.
        attention_layer: ViT layer of A, an index or a fraction of the depth.
        layers: decoder layers of stages 2 and 3, indices or fractions.
    """

    key: ClassVar[str] = "vflowopt"

    keep: int | float = 0.25
    r1: float | None = None
    r2: float = 0.9833
    t: float = 34.76
    a: float = 15.58
    alpha: float = 0.0
    attention_layer: int | float = -1
    layers: tuple[int | float, int | float] = (9 / 28, 18 / 28)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, ratio in (("r1", self.r1), ("r2", self.r2)):
            if ratio is not None and not 0 < ratio <= 1:
                raise InvalidOptionError(f"{name}={ratio} is no ratio; give a float in (0, 1].")
        if self.t < 0 or self.a < 1:
            raise InvalidOptionError(f"t={self.t}, a={self.a}: t has to be at least 0, a at least 1 token.")
        if self.alpha:
            raise InvalidOptionError(
                f"alpha={self.alpha} asks for the patch entropy, but methods see no pixels; use alpha=0 as all published "
                "results do."
            )

    def stages(self, facts: ModelFacts) -> list[Stage]:
        inner = {resolve_layer(one, facts.decoder_layers, "layers", first=1) for one in self.layers}
        starts = [0, *sorted(inner)]
        spans = [b - a for a, b in zip(starts, [*starts[1:], facts.decoder_layers], strict=True)]
        spans += [0] * (3 - len(spans))
        layer = resolve_layer(self.attention_layer, facts.encoder_layers, "attention_layer")
        return [
            Stage(
                Site("decoder", start) if start else Site("projector"),
                None,
                partial(self.flow, stage=i, spans=spans),
                (Signal("attention_map", layer),),
                must_prune=False,
                positions=self.position_policy(facts),
            )
            for i, start in enumerate(starts)
        ]

    def counts(self, n: int, spans: Sequence[int]) -> tuple[int, int, int]:
        """Tokens of n behind each stage, which are processed by `spans` layers each."""
        one, two, three = spans
        budget = (self.keep * n if isinstance(self.keep, float) else min(self.keep, n)) * sum(spans)
        r1 = 0.2651 / 0.25 * budget / sum(spans) / n if self.r1 is None else self.r1
        first = min(n, max(1, rounded(r1 * n)))
        second = min(first, max(1, rounded(r1 * self.r2 * n)))
        if first * one + second * (two + three) < budget:
            second = math.ceil((budget - first * one) / (two + three))
            if second > first:
                first = second = min(n, max(1, math.ceil(budget / sum(spans))))
        elif first * one + second * two + three > budget:
            second = min(second, max(1, math.floor((budget - first * one - three) / max(two, 1))))
            if first * one + second * two + three > budget:
                first = min(first, max(1, math.floor((budget - two - three) / one)))
        best: tuple[float, tuple[int, int, int]] = (math.inf, (1, 1, 1))
        for step in range(9):
            a = min(n, max(1, first + (0, -1, 1)[step // 3]))
            b = min(a, max(1, second + (0, -1, 1)[step % 3]))
            c = min(b, max(1, rounded((budget - a * one - b * two) / three))) if three else b
            best = min(best, (abs(budget - a * one - b * two - c * three), (a, b, c)), key=lambda x: x[0])
            if best[0] <= max(spans) / 2:  # as near as whole tokens allow, and first of all with R1 and R2
                break
        return best[1]

    def importance(self, view: View) -> Tensor:
        """I [G, N]."""
        (maps,) = (view[signal] for signal in view.signals)
        p = maps.shape[-1] - view.n
        return calibrated(maps[:, p:, p:].float(), self.t)

    def flow(self, view: View, stage: int, spans: Sequence[int]) -> Selection:
        """Stage 0, 1 or 2."""
        counts = [min(view.n, self.counts(m, spans)[stage]) for m in view.n_original]
        return by_count(view, counts, self.discard if stage else self.decide)

    def discard(self, view: View) -> Selection:
        """The decision of stages 2 and 3."""
        return Selection.topk(self.importance(view), view.k)

    def decide(self, view: View) -> Selection:
        cols = view.index.new_tensor([[one.cols] for one in view.layout])
        cells = (view.index // cols / self.a).long() * view.n + (view.index % cols / self.a).long()
        return recycled(self.importance(view), cells, view.k)
