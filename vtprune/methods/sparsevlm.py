"""SparseVLM: attention of text raters inside the language model, pruned tokens recycled as clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune.errors import InvalidOptionError
from vtprune.finite import check_finite
from vtprune.method import Signal, View
from vtprune.methods.staged import Staged
from vtprune.ops import gather_tokens
from vtprune.selecting import density_peaks, widened
from vtprune.selection import Selection, merged, topk

# Tokens of 576 left behind the three stages, by named average; the ends make the curve one from none to all.
SCHEDULES = (
    (0, 0, 0),
    (66, 30, 17),  # 64
    (238, 48, 26),  # 96
    (303, 110, 36),  # 128
    (300, 200, 110),  # 192
    (576, 576, 576),
)


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Staged):
    """Training-free, text-aware; three stages behind decoder layers 2, 6 and 15 of 32.

        m_t = mean_v softmax_t(H_v H_t)_{v, t} of the embeddings,   raters = {t : m_t > mean m}
        s_j = mean over raters t and heads of A^l[t, j],   keep = argtopk(s, k - c)

    The best 30 % (plus one) of the tokens it prunes are clustered into c = floor(their number / 10) + 1 by
    DPC-KNN, and every cluster's mean replaces its centre.

    Source: Zhang et al., "SparseVLM" (ICML 2025); Gumpest/SparseVLMs at 26a5f48 (first version; the paper's
    rank-based count is not in that code). The authors name averages of 192, 128, 96 and 64 of 576 tokens, and fix
    three counts for each; other budgets lie on the straight lines between these, and the whole is scaled so that
    the average over the layers of the model at hand is `keep`, 192 / 576 by default. (Removed behind layers 2, 6
    and 15 the authors' counts average 203, 141, 110 and 79; `counts=` takes them as they are.)

    Deviations: clusters count towards the budget (theirs come on top; c is computed from the tokens that the
    stage removes in all); a cluster sits at its centre, theirs behind the other visual tokens; the density has no
    random tie-breaker; later stages rate the text with the survivors' embeddings, theirs once with all. Positions
    are dense as theirs. Only text behind the picture rates, as there; without any, the first tokens stay. The
    budget is per tile where pictures are tiled (theirs: one for the whole picture, newline tokens included).

    Attributes:
        recycle: share of the pruned tokens that is clustered; 0 discards them all.
    """

    key: ClassVar[str] = "sparsevlm"
    authors_positions = "dense"
    behind: ClassVar[bool] = True

    keep: int | float = 192 / 576
    layers: tuple[int | float, ...] = (2 / 32, 6 / 32, 15 / 32)
    recycle: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != 3:
            raise InvalidOptionError(f"layers={self.layers}: the authors' schedule has three stages.")
        if not 0 <= self.recycle <= 1:
            raise InvalidOptionError(f"recycle={self.recycle} is no share; give a float in [0, 1], e.g. 0.3.")

    def shares(self, strength: float, stages: int) -> Sequence[float]:
        place = strength * (len(SCHEDULES) - 1)
        row = min(int(place), len(SCHEDULES) - 2)
        low, high = SCHEDULES[row], SCHEDULES[row + 1]
        return [(a + (b - a) * (place - row)) / 576 for a, b in zip(low, high, strict=True)]

    def signals(self, layer: int, since: int) -> tuple[Signal, ...]:
        return (
            Signal("prompt_attention", layer),
            Signal("text_features", 0),
            Signal("input_features", 0),
        )

    def decide(self, view: View) -> Selection:
        attention, text, visual = (widened(view[signal]) for signal in view.signals)
        sees = attention.sum((1, 3)) > 0  # [G, T]; rows of zeros are text before the picture, or padding
        logits = (visual @ text.transpose(1, 2)).masked_fill(~sees.unsqueeze(1), float("-inf"))
        share = torch.where(sees.unsqueeze(1), logits.softmax(-1), 0.0).mean(1)
        rater = sees & (share > share.sum(-1, keepdim=True) / sees.sum(-1, keepdim=True))
        rater = torch.where(rater.any(-1, keepdim=True), rater, sees)
        check_finite(attention)
        weight = rater / rater.sum(-1, keepdim=True).clamp(min=1)
        ranked = topk(torch.einsum("gt,gtn->gn", weight.to(attention.dtype), attention.mean(1)), view.n)
        return self._recycled(view, ranked)

    def _recycled(self, view: View, ranked: torch.Tensor) -> Selection:
        n, k = view.n, view.k
        clusters = min((int(self.recycle * (n - k)) + 1) // 10 + 1, k - 1) if self.recycle else 0
        if clusters < 1:
            return Selection.of(ranked[:, :k])
        kept, pruned = ranked[:, : k - clusters], ranked[:, k - clusters :]
        pool = pruned[:, : max(clusters, int(self.recycle * pruned.shape[1]) + 1)].sort(-1).values
        centres, number = density_peaks(widened(gather_tokens(view.features, pool)), clusters)
        centre = pool.gather(1, centres)  # [G, c]
        members = torch.zeros_like(centre).scatter_add(1, number, torch.ones_like(number))
        target = torch.full_like(ranked, -1).scatter(1, kept, kept).scatter(1, pool, centre.gather(1, number))
        weight = torch.ones(ranked.shape, device=ranked.device)
        weight = weight.scatter(1, pool, 1.0 / members.gather(1, number))
        return merged(torch.cat([kept, centre], 1), target, weight)
