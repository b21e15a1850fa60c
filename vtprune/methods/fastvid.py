"""FastVID: segments of like frames, salient tokens in each, dense ones on anchor frames with the rest merged in."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.errors import InvalidOptionError
from vtprune.finite import check_finite
from vtprune.method import ModelFacts, Signal, View, check_choice
from vtprune.methods.clips import Clipwise, shares
from vtprune.ops import gather_tokens
from vtprune.selecting import peak_scores, unit, widened
from vtprune.selection import Selection, topk

NEIGHBOURS = 4


@dataclass(frozen=True, kw_only=True)
class FastVID(Clipwise):
    """Training-free, text-agnostic; at the input of the language model, over all frames of a video at once.

        segments: cut where the cosine of successive frames' mean tokens is < tau, and at the c - 1 lowest
        salient: the k - floor(k d) tokens of every frame with the most attention
        context: a segment of L frames has L floor(k d), on its anchors, every p-th frame counted back from its last;
            rho_i = exp(-mean of the 4 smallest |x_i - x_j|^2 / D),   delta_i = distance to the nearest denser token,
            argtop rho delta among the frame's other tokens
        the other tokens of the segment, and these, join the nearest (cosine) context token y of every such frame:
            y = w y + (1 - w) mean of joined,   w = max(1 / (1 + number of joined), beta)

    Source: Shen et al., "FastVID: Dynamic Density Pruning for Fast Video Large Language Models" (2025);
    LunarShen/FastVID at a40a109, defaults of its LLaVA-OneVision runs. Original positions as theirs.

    Deviations: (1) Attention is that which tokens receive in the last ViT layer that reaches the features (theirs: of
    SigLIP's pooling head, or on Qwen2.5-VL of a frame's mean query), and frames are compared by their mean token as on
    Qwen2.5-VL (LLaVA: by the pooling head). (2) The budget is exact: floor(L floor(k d) / anchors) leaves a rest, which
    goes to the first anchors, and what an anchor has no tokens for goes to the other frames of the segment, whose context
    tokens are then joined likewise. (3) No noise on rho; ties go to the lower index.

    Attributes:
        segments: c; a video of at most c frames has one segment per frame.
        threshold: tau (theirs on Qwen2.5-VL: 0.84).
        context: d, in [0, 1).
        anchors: p.
        beta: least weight of a context token itself, in [0, 1].
        scorer: "received", or explicitly "cls" ([CLS] attention) on encoders that have one.
    """

    key: ClassVar[str] = "fastvid"
    substitutes = ({"scorer": "cls"},)

    keep: int | float = 0.1
    segments: int = 8
    threshold: float = 0.9
    context: float = 0.4
    anchors: int = 4
    beta: float = 0.6
    scorer: Literal["received", "cls"] = "received"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer", self.scorer, ("received", "cls"))
        if self.segments < 1 or self.anchors < 1:
            raise InvalidOptionError(f"segments={self.segments}, anchors={self.anchors}: give ints >= 1.")
        if not 0 <= self.context < 1 or not 0 <= self.beta <= 1:
            raise InvalidOptionError(
                f"context={self.context} must lie in [0, 1), beta={self.beta} in [0, 1]."
            )

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        last = facts.encoder_layers - 1
        return (Signal("cls_attention" if self.scorer == "cls" else "received_attention", last),)

    def choose(self, view: View, total: int) -> Selection:
        x, n = widened(view.features), view.n
        (attention,) = (widened(view[signal]).mean(1) for signal in view.signals)
        check_finite(x)
        dense = int(view.k * self.context)
        order = topk(attention, n)
        salient, rest = order[:, : view.k - dense], order[:, view.k - dense :].sort(-1).values
        candidates, room = gather_tokens(x, rest), rest.shape[1]
        centres = rest.gather(1, topk(peak_scores(candidates, NEIGHBOURS)[0], room)) if dense else rest
        rows = []
        for scene in self.scenes(x.mean(1)):
            part = slice(scene.start, scene.stop)
            tokens = unit(candidates[part]).flatten(0, 1)
            column = (rest[part] + n * torch.arange(len(scene), device=x.device)[:, None]).flatten()
            for t, count in zip(scene, self.contexts(len(scene), dense, room), strict=True):
                kept, order = torch.cat([salient[t], centres[t, :count]]).sort()
                of, own = (tuple(scene), kept + (t - scene.start) * n) if count else ((t,), kept)
                matrix = x.new_zeros(len(kept), len(of) * n).scatter(1, own[:, None], 1)
                if count:
                    near = (tokens @ unit(x[t, centres[t, :count]]).T).argmax(1)
                    joined = torch.zeros_like(matrix)
                    joined[order.argsort()[near - count], column] = 1  # context tokens came last
                    number = joined.sum(1, keepdim=True)
                    weight = (1 / (number + 1)).clamp(min=self.beta)
                    matrix = weight * matrix + (1 - weight) * joined / number.clamp(min=1)
                rows.append((kept, matrix, of))
        index, mix, sources = zip(*rows, strict=True)
        return Selection(index, mix=mix, sources=sources)

    def scenes(self, means: Tensor) -> list[range]:
        """Frames of every segment; means [F, D] of frames."""
        alike = (unit(means[1:]) * unit(means[:-1])).sum(1)
        cuts = {*alike.sort(stable=True).indices[: self.segments - 1].tolist()}
        cuts |= {t for t, cosine in enumerate(alike.tolist()) if cosine < self.threshold}
        edges = [0, *(t + 1 for t in sorted({*cuts, len(means) - 1}))]
        return [range(start, end) for start, end in pairwise(edges)]

    def contexts(self, frames: int, dense: int, room: int) -> list[int]:
        """Context tokens of every frame of a segment, `dense` on average and at most `room`."""
        some = [t for t in range(frames) if (frames - 1 - t) % self.anchors == 0]
        others = [t for t in range(frames) if t not in some]
        counts = [0] * frames
        for t, share in zip(some, shares(dense * frames, len(some)), strict=True):
            counts[t] = min(share, room)
        for t, share in zip(others, shares(dense * frames - sum(counts), len(others)), strict=True):
            counts[t] = share
        return counts
