"""ATP-LLaVA: thresholds inside the language model that depend on the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.errors import InvalidOptionError, VTPruneError
from vtprune.finite import check_finite
from vtprune.method import ModelFacts, Signal, Stage, View, check_choice
from vtprune.methods.staged import Staged, StageView
from vtprune.methods.weights import Trained, located
from vtprune.selecting import min_max, widened
from vtprune.selection import Selection, topk

NEEDED = ("project.weight", "project.bias", "thresholds.weight", "thresholds.bias")


@dataclass(frozen=True, kw_only=True)
class ATPLLaVA(Staged, Trained):
    """Trained; three stages behind decoder layers 4, 14 and 24 of 32.

        s_self,i = mean over heads and visual tokens j of q_j k_i / sqrt(d)
        s_cross,i = mean over heads and prompt tokens t of A[t, i],   s_red = (s_self + s_cross) / 2
        s_sp,i = 1 - lambda R on an even grid that samples the share R of the picture's tokens, 0 elsewhere
        z = W [s_red; s_sp] + b,   theta_r, theta_s = sigmoid(V z + c),   keep = {s_red > theta_r or s_sp > theta_s}

    Source: Ye et al., "ATP-LLaVA" (CVPR 2025); the authors' code was not available, so this follows the
    third-party re-implementation Sneha421/AI6103-ATP-LLaVA at c9a622f: lambda = 3; its layer-adaptive R = .5, .25, .0625; layers.
    Ours: z reads both score vectors (theirs: the means of s_self and s_cross, width 4096; here 32); s_self is what i receives
    (as in their branch atp_integration_fix; c9a622f averages over what i gives) and takes all pairs of visual tokens, seen or not; only text behind the picture asks; [s_red; s_sp]
    has an entry for every token of the picture, zero where it is gone; the grid takes every a-th row and b-th
    column, a = floor(1 / sqrt(R)), b = round(1 / (a R)); at R = .5 its s_sp of -.5 (theirs: at least 0) is below every
    threshold, so the first stage goes by s_red alone. At least the best token stays. `vtprune train` trains W, b, V
    and c with the model frozen (theirs is fine-tuned along); see `vtprune.eval.training.atp_llava` for the loss.

    Attributes:
        keep: with learned thresholds, the mean number of tokens behind the stages that they were trained for (the
            N of the source's loss; each picture has its own); with "quantile", the average over all decoder layers.
        threshold: "learned", or explicitly "quantile" (ours, untrained): the largest of max(s_red stretched to
            [0, 1], s_sp); counts behind the stages fall off as r, r^2, r^3.
        weights: see :class:`Trained`; "{stage}.project.weight" [d, 2 N], "{stage}.project.bias" [d],
            "{stage}.thresholds.weight" [2, d], "{stage}.thresholds.bias" [2] for stages 0, 1, 2.
        rates, strength: R of the stages, and lambda.
    """

    key: ClassVar[str] = "atp-llava"
    behind: ClassVar[bool] = True
    substitutes = ({"threshold": "quantile"},)

    keep: int | float = 144 / 576
    layers: tuple[int | float, ...] = (4 / 32, 14 / 32, 24 / 32)
    threshold: Literal["learned", "quantile"] = "learned"
    rates: tuple[float, ...] = (0.5, 0.25, 0.0625)
    strength: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("threshold", self.threshold, ("learned", "quantile"))
        if len(self.rates) != len(self.layers) or not all(0 < rate <= 1 for rate in self.rates):
            raise InvalidOptionError(f"rates={self.rates}: give one share in (0, 1] per layer.")

    @property
    def parameters(self) -> Sequence[str]:
        return [f"{stage}.{name}" for stage in range(len(self.layers)) for name in NEEDED]

    def signals(self, layer: int, since: int) -> tuple[Signal, ...]:
        return tuple(Signal(kind, layer) for kind in ("decoder_queries", "decoder_keys", "prompt_attention"))

    def stages(self, facts: ModelFacts) -> list[Stage]:
        return Staged.stages(located(self, facts) if self.threshold == "learned" else self, facts)

    @property
    def budgeted(self) -> bool:
        return self.threshold == "quantile"

    def decide(self, view: View) -> Selection:
        stage = view.stage if isinstance(view, StageView) else 0
        queries, keys, attention = (widened(view[signal]) for signal in view.signals)
        s_red = redundancy(queries, keys, attention, torch.ones_like(view.index, dtype=queries.dtype))
        cols = torch.tensor([[layout.cols] for layout in view.layout], device=view.index.device)
        s_sp = self.spatial(stage, view.index, cols).to(s_red)
        check_finite(s_red)
        if self.threshold == "quantile":
            return Selection.topk(torch.maximum(min_max(s_red), s_sp), view.k)
        n = self.tensors[f"{stage}.project.weight"].shape[1] // 2
        if any(n != one for one in view.n_original):
            raise VTPruneError(
                f"these weights are for pictures of {n} tokens, not of {set(view.n_original)}."
            )
        empty = s_red.new_zeros(len(s_red), n)
        whole = [empty.scatter(1, view.index, s) for s in (s_red, s_sp)]
        theta = thresholds({k: t.to(s_red) for k, t in self.tensors.items()}, stage, *whole)
        above = torch.maximum(s_red - theta[:, :1], s_sp - theta[:, 1:])
        best = torch.zeros_like(above, dtype=torch.bool).scatter(1, topk(above, 1), True)
        return Selection.where((above > 0) | best)

    def spatial(self, stage: int, index: Tensor, cols: Tensor) -> Tensor:
        """s_sp of tokens [G, N], from their index and the columns [G, 1] of their pictures."""
        rate = self.rates[stage]
        a = math.floor(1 / math.sqrt(rate))
        b = round(1 / (a * rate))
        sampled = (index // cols % a == 0) & (index % cols % b == 0)
        return sampled.to(torch.float32) * (1 - rate * self.strength)


def redundancy(queries: Tensor, keys: Tensor, attention: Tensor, alive: Tensor) -> Tensor:
    """s_red [G, N] from queries [G, H, N, d], keys [G, H_kv, N, d], attention [G, H, T, N] and which tokens are left."""
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    query = (queries * (alive / alive.sum(-1, keepdim=True))[:, None, :, None]).sum(2)
    s_self = torch.einsum("ghd,ghnd->gn", query, keys) / keys.shape[1] / math.sqrt(keys.shape[-1])
    # Rows of zeros are text before the picture, or padding.
    asking = (attention.sum((1, 3)) > 0).sum(-1, keepdim=True).clamp(min=1)
    return (s_self + attention.mean(1).sum(1) / asking) / 2


def thresholds(tensors: Mapping[str, Tensor], stage: int, s_red: Tensor, s_sp: Tensor) -> Tensor:
    """theta_r and theta_s [G, 2] from the scores [G, N] of all tokens of the picture."""
    w, b, v, c = (tensors[f"{stage}.{name}"] for name in NEEDED)
    return torch.sigmoid((torch.cat([s_red, s_sp], 1) @ w.T + b) @ v.T + c)
