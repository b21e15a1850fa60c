"""SpAtten: cascade token pruning by the attention that tokens receive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vtprune.errors import InvalidOptionError
from vtprune.method import ModelFacts, Signal, View
from vtprune.methods.staged import Staged
from vtprune.selecting import widened
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class SpAtten(Staged):
    """Training-free; at every decoder layer behind the first 15 %, some more visual tokens go for good.

        s_j = sum over layers, heads and queries i of A[i, j],   keep = argtopk(s, k_l),   k_l = N (1 - p_l)
        p_l = p_start .. p_end in equal steps, p_start + p_end = 2 p_avg

    Source: Wang, Zhang and Han, "SpAtten" (HPCA 2021); notes on the paper, and mit-han-lab/spatten at a0f1388 for
    the accumulated score. Known from them: no token leaves in the first 15 % of the layers, ties go to the lower
    index. Ours: p_start = 0 while p_end fits into 1, p_end = 1 from there on; ratios are relative to the original
    tokens; an average of half of them by default. Survivors keep their positions.

    What is missing: scores are summed over the layers since the last removal only, which is one layer from the
    second stage on (theirs: over all layers, and over generated tokens). Text is never pruned. Head pruning, local
    value pruning and progressive quantisation are no removal of tokens, so no stage can express them; their gain is
    the hardware's.

    Attributes:
        layers: deciding layers; () takes every layer behind `first`.
        first: share of the layers that all tokens pass.
    """

    key: ClassVar[str] = "spatten"

    keep: int | float = 0.5
    first: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first < 1:
            raise InvalidOptionError(f"first={self.first} is no share of the layers; give a float in [0, 1).")

    def deciding(self, facts: ModelFacts) -> Sequence[int | float]:
        depth = facts.decoder_layers
        return self.layers or tuple(range(max(1, math.ceil(self.first * depth)), max(2, depth)))

    def shares(self, strength: float, stages: int) -> Sequence[float]:
        start = max(0.0, 1 - 2 * strength)
        end = min(1.0, 2 - 2 * strength)
        steps = max(1, stages - 1)
        return [1 - start - (end - start) * i / steps for i in range(stages)]

    def signals(self, layer: int, since: int) -> tuple[Signal, ...]:
        return tuple(Signal("decoder_received", read) for read in range(since, layer))

    def decide(self, view: View) -> Selection:
        scores = sum(widened(view[signal]).sum(1) for signal in view.signals)
        assert not isinstance(scores, int)
        return Selection.topk(scores, view.k)
