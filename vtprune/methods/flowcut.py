"""FlowCut: [CLS] attention, value similarity and value norm, accumulated over ViT layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.method import Method, ModelFacts, Signal, SignalKind, Site, Stage, View, resolve_keep
from vtprune.scoring import by_count
from vtprune.selection import Selection

KINDS: tuple[SignalKind, ...] = ("cls_attention", "encoder_values", "cls_value")


@dataclass(frozen=True, kw_only=True)
class FlowCut(Method):
    """Training-free, text-agnostic; prunes behind every second ViT layer, faster where attention is concentrated.

        c = mean_h A_h[CLS, .],   g = mean_h softmax(v_CLS [v_CLS; v]^T) of head h,   v' = head-mean value
        s = (c / sum c + g / sum g) ||v'||_1,   S <- S / 2 + s / 2  (S = s in the first layer)

    With m layers to go (m even), n tokens and the target k, round((n - k) / sqrt(m) (1 - (H(c / sum c) / log n)^2))
    tokens of smallest S go, never more than n - k; with m = 0 all that are over the target.

    Source: Tong et al., "FlowCut" (NeurIPS 2025); TungChintao/FlowCut at a2ecd24. Default target: theirs, 128. Layers
    count up to the one in front of the last whose output is used, as theirs (CLIP-L/14: cuts behind layers 1, 3, .. 21;
    layer 22 sees the survivors only).
    Deviations: (1) scores of earlier layers are normalised over the tokens that are still there (theirs: over those
    of that time; the engine narrows signals to survivors), which matters only behind the first cut. (2) Counts
    differ between images (theirs: the batch's largest cut). (3) For LLaVA-NeXT they give each
    tile half the target and cut to the target behind layer 1 of the language model by the same kind of score; that second
    cut is left out (composing with `fastv` comes nearest). (4) An encoder of one layer is cut behind it. Survivors keep their positions with `positions="original"`; "auto" counts
    densely, as do the authors.

    Attributes:
        keep: the target.
    """

    key: ClassVar[str] = "flowcut"
    authors_positions = "dense"

    keep: int | float = 128

    def stages(self, facts: ModelFacts) -> list[Stage]:
        last = max(0, facts.encoder_layers - 2)
        return [
            Stage(
                Site("vit", layer + 1) if layer + 1 < facts.encoder_layers else facts.behind_encoder(),
                None if left else self.keep,
                partial(self.cut, left=left),
                tuple(Signal(kind, i) for i in range(layer + 1) for kind in KINDS),
                must_prune=not left,
                positions=self.position_policy(facts),
            )
            for layer in range(last + 1)
            if not (left := last - layer) % 2
        ]

    def cut(self, view: View, left: int) -> Selection:
        """The decision with `left` layers to go."""
        n = view.n
        counts = [min(n, resolve_keep(self.keep, one)) for one in view.n_original]
        if left:
            cls = view[view.signals[-3]].float().mean(1)
            entropy = torch.special.entr(cls / cls.sum(-1, keepdim=True)).sum(-1).tolist()
            counts = [
                k if k == n else max(k, n - round((n - k) / left**0.5 * (1 - (h / math.log(n)) ** 2)))
                for k, h in zip(counts, entropy, strict=True)
            ]
        return by_count(view, counts, self.decide)

    def decide(self, view: View) -> Selection:
        signals = [view[signal].float() for signal in view.signals]
        layers = zip(signals[::3], signals[1::3], signals[2::3], strict=True)
        return Selection.topk(accumulated([flow(*layer) for layer in layers]), view.k)


def flow(attention: Tensor, values: Tensor, own: Tensor) -> Tensor:
    """[G, N] score of one layer from [CLS] attention [G, H, N], values [G, H, N, d] and that of [CLS] [G, H, d]."""
    keys = torch.cat([own.unsqueeze(2), values], 2)
    similar = (own.unsqueeze(2) @ keys.transpose(2, 3)).softmax(-1)[:, :, 0, 1:].mean(1)
    c = attention.mean(1)
    relation = c / c.sum(-1, keepdim=True) + similar / similar.sum(-1, keepdim=True)
    return relation * values.mean(1).abs().sum(-1)


def accumulated(scores: Sequence[Tensor]) -> Tensor:
    """Moving average with weight one half."""
    total = scores[0]
    for score in scores[1:]:
        total = total / 2 + score / 2
    return total
