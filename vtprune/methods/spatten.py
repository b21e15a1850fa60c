"""SpAtten: cascade pruning of tokens by the attention they receive, and of heads by what they put out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from vtprune.errors import InvalidOptionError
from vtprune.method import HeadStage, HeadView, ModelFacts, Signal, View
from vtprune.methods.staged import Schedule, Staged
from vtprune.selecting import widened
from vtprune.selection import HeadSelection, Selection


@dataclass(frozen=True, kw_only=True)
class SpAtten(Staged):
    """Training-free; at every decoder layer behind the first 15 %, some more visual tokens go for good.

        s_j = sum over layers, heads and queries i of A[i, j],   keep = argtopk(s, k_l),   k_l = N (1 - p_l)
        s_h = sum over layers of |E_h|_1, E_h the head's output,   speak = argtopk(s_h, h_l),   h_l = H (1 - p_l)
        p_l = p_start .. p_end in equal steps, p_start + p_end = 2 p_avg

    Heads are silenced, not removed: their outputs count as zero from layer l on, in prefill and in all decoding steps,
    as if they were gone. Stock attention still computes them, so that `heads` buys no speed, only the accuracy of the
    method; that is why it is off by default (theirs: 1.1 times fewer heads on average, `heads=0.91`).

    Source: Wang, Zhang and Han, "SpAtten" (HPCA 2021); notes on the paper for the accumulated score and for
    the first 15 % and 30 % of the layers, in which no token and no head leaves; mit-han-lab/spatten at a0f1388 for ties, which go
    to the lower index (its cache variant for language models sums raw logits per layer and head, and keeps recent tokens). Ours: p_start = 0 while p_end fits into 1, p_end = 1 from there on; counts are rounded
    down, then up by one where that brings the average nearer; ratios are relative to the original tokens; an average of
    half of them by default. Survivors keep their positions.

    What differs: nothing is accumulated over generated tokens, what the prompt decided stays. Text is never pruned, and
    samples without pictures lose no heads. Local value pruning and progressive quantisation spare the hardware's memory
    traffic (rows of V, low bits of K that need not be fetched); on stock kernels they would only add work.

    Attributes:
        layers: deciding layers; () takes every layer behind `first`.
        first: share of the layers that all tokens pass.
        heads: share of the heads that speak, on average over all decoder layers.
        first_heads: share of the layers in which all heads speak.
    """

    key: ClassVar[str] = "spatten"

    keep: int | float = 0.5
    first: float = 0.15
    heads: float = 1.0
    first_heads: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, share in (("first", self.first), ("first_heads", self.first_heads)):
            if not 0 <= share < 1:
                raise InvalidOptionError(f"{name}={share} is no share of the layers; give a float in [0, 1).")
        if not 0 < self.heads <= 1:
            raise InvalidOptionError(f"heads={self.heads} is no share of the heads; give a float in (0, 1].")

    def deciding(self, facts: ModelFacts) -> Sequence[int | float]:
        depth = facts.decoder_layers
        return self.layers or tuple(range(max(1, math.ceil(self.first * depth)), max(2, depth)))

    def shares(self, strength: float, stages: int) -> Sequence[float]:
        start = max(0.0, 1 - 2 * strength)
        end = min(1.0, 2 - 2 * strength)
        steps = max(1, stages - 1)
        return [1 - start - (end - start) * i / steps for i in range(stages)]

    def signals(self, layer: int, since: int) -> tuple[Signal, ...]:
        return tuple(Signal("decoder_received", read) for read in range(layer))

    def decide(self, view: View) -> Selection:
        return Selection.topk(torch.stack([widened(view[s]).sum(1) for s in view.signals]).sum(0), view.k)

    def head_stages(self, facts: ModelFacts) -> list[HeadStage]:
        if self.heads == 1:
            return []
        depth = facts.decoder_layers
        starts = range(max(1, math.ceil(self.first_heads * depth)), depth)
        if not starts:
            raise InvalidOptionError(
                f"first_heads={self.first_heads} leaves no layer of {depth} to prune heads in."
            )
        schedule = Schedule(depth, starts, partial(self.shares, stages=len(starts)))
        return [
            HeadStage(
                layer,
                partial(self.decide_heads, schedule, place),
                tuple(Signal("decoder_head_outputs", read) for read in range(layer)),
            )
            for place, layer in enumerate(starts)
        ]

    def decide_heads(self, schedule: Schedule, place: int, view: HeadView) -> HeadSelection:
        scores = torch.stack([view[signal] for signal in view.signals]).sum(0)
        return HeadSelection.topk(scores, schedule.counts(float(self.heads), view.n)[place], view.alive)
