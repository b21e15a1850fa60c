"""ATP-LLaVA: thresholds inside the language model that depend on the picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.errors import InvalidOptionError, UnsupportedMethodError, VTPruneError
from vtprune.method import ModelFacts, Signal, Stage, View, check_choice
from vtprune.methods.staged import Staged, StageView
from vtprune.selecting import min_max, widened
from vtprune.selection import Selection, check_finite, topk

NEEDED = ("project.weight", "project.bias", "thresholds.weight", "thresholds.bias")


@dataclass(frozen=True, kw_only=True)
class ATPLLaVA(Staged):
    """Trained; three stages behind decoder layers 4, 14 and 24 of 32.

        s_self,i = mean over heads and visual tokens j of q_j k_i / sqrt(d)
        s_cross,i = mean over heads and prompt tokens t of A[t, i],   s_red = (s_self + s_cross) / 2
        s_sp,i = 1 - lambda R on an even grid that samples the share R of the picture's tokens, 0 elsewhere
        z = W [s_red; s_sp] + b,   theta_r, theta_s = sigmoid(V z + c),   keep = {s_red > theta_r or s_sp > theta_s}

    Source: Ye et al., "ATP-LLaVA" (CVPR 2025); the authors' code was not available, so this follows the
    third-party re-implementation Sneha421/AI6103-ATP-LLaVA at c9a622f: lambda = 3; R = .5, .25, .0625; layers.
    Ours: s_self takes all pairs of visual tokens, seen or not; only text behind the picture asks; [s_red; s_sp]
    has an entry for every token of the picture, zero where it is gone; the grid takes every a-th row and b-th
    column, a = floor(1 / sqrt(R)), b = round(1 / (a R)). At least the best token stays.

    Weights have to be trained with the language model: soft mask max(sigmoid(10 (s_red - theta_r)),
    sigmoid(10 (s_sp - theta_s))), loss L_ntp + .05 sum_l l kept_l / N + .2 |mean kept - 144|.

    Without weights, `threshold="quantile"` (ours, untrained) ranks max(s_red stretched to [0, 1], s_sp) and meets
    an average budget; counts behind the stages fall off as r, r^2, r^3.

    Attributes:
        keep: average budget of "quantile"; with learned thresholds the count emerges and this is not read.
        weights: path of, or mapping with "{stage}.project.weight" [d, 2 N], "{stage}.project.bias" [d],
            "{stage}.thresholds.weight" [2, d], "{stage}.thresholds.bias" [2] for stages 0, 1, 2.
        rates, strength: R of the stages, and lambda.
    """

    key: ClassVar[str] = "atp-llava"
    behind: ClassVar[bool] = True
    substitutes = ({"threshold": "quantile"},)

    keep: int | float = 144 / 576
    layers: tuple[int | float, ...] = (4 / 32, 14 / 32, 24 / 32)
    threshold: Literal["learned", "quantile"] = "learned"
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = field(default=None, hash=False)
    rates: tuple[float, ...] = (0.5, 0.25, 0.0625)
    strength: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("threshold", self.threshold, ("learned", "quantile"))
        if len(self.rates) != len(self.layers) or not all(0 < rate <= 1 for rate in self.rates):
            raise InvalidOptionError(f"rates={self.rates}: give one share in (0, 1] per layer.")
        if isinstance(self.weights, (str, os.PathLike)):
            state = torch.load(self.weights, map_location="cpu", weights_only=True)
            object.__setattr__(self, "weights", state)
        if self.weights is None:
            return
        assert isinstance(self.weights, Mapping)
        names = [f"{stage}.{name}" for stage in range(len(self.layers)) for name in NEEDED]
        missing = [name for name in names if name not in self.weights]
        if missing:
            raise InvalidOptionError(f"weights lack {', '.join(missing)}.")

    def options(self) -> dict[str, object]:
        return {**super().options(), "weights": None if self.weights is None else "given"}

    def signals(self, layer: int, since: int) -> tuple[Signal, ...]:
        return tuple(Signal(kind, layer) for kind in ("decoder_queries", "decoder_keys", "prompt_attention"))

    def stages(self, facts: ModelFacts) -> list[Stage]:
        if self.threshold == "learned" and self.weights is None:
            raise UnsupportedMethodError(
                "its thresholds are learned and it has no weights: give weights=PATH from a training run as its "
                "docstring describes, or threshold='quantile', an untrained ranking of the same scores."
            )
        return super().stages(facts)

    @property
    def budgeted(self) -> bool:
        return self.threshold == "quantile"

    def decide(self, view: View) -> Selection:
        stage = view.stage if isinstance(view, StageView) else 0
        redundancy = self._redundancy(view)
        spatial = self._spatial(stage, view).to(redundancy)
        check_finite(redundancy)
        if self.threshold == "quantile":
            return Selection.topk(torch.maximum(min_max(redundancy), spatial), view.k)
        assert isinstance(self.weights, Mapping)
        w, b, v, c = (self.weights[f"{stage}.{name}"].to(redundancy) for name in NEEDED)
        if any(2 * n != w.shape[1] for n in view.n_original):
            raise VTPruneError(
                f"these weights are for pictures of {w.shape[1] // 2} tokens, not of {set(view.n_original)}."
            )
        empty = redundancy.new_zeros(len(redundancy), w.shape[1] // 2)
        whole = torch.cat([empty.scatter(1, view.index, s) for s in (redundancy, spatial)], 1)
        theta = torch.sigmoid((whole @ w.T + b) @ v.T + c)  # [G, 2]
        above = torch.maximum(redundancy - theta[:, :1], spatial - theta[:, 1:])
        best = torch.zeros_like(above, dtype=torch.bool).scatter(1, topk(above, 1), True)
        return Selection.where((above > 0) | best)

    def _redundancy(self, view: View) -> Tensor:
        queries, keys, attention = (widened(view[signal]) for signal in view.signals)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        logits = torch.einsum("ghd,ghnd->ghn", queries.mean(2), keys) / math.sqrt(keys.shape[-1])
        # Rows of zeros are text before the picture, or padding.
        asking = (attention.sum((1, 3)) > 0).sum(-1, keepdim=True).clamp(min=1)
        return (logits.mean(1) + attention.mean(1).sum(1) / asking) / 2

    def _spatial(self, stage: int, view: View) -> Tensor:
        rate = self.rates[stage]
        rows = math.floor(1 / math.sqrt(rate))
        cols = round(1 / (rows * rate))
        width = torch.tensor([[layout.cols] for layout in view.layout], device=view.index.device)
        sampled = (view.index // width % rows == 0) & (view.index % width % cols == 0)
        return sampled.to(torch.float32) * (1 - rate * self.strength)
