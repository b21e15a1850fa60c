"""HoloV: every part of the picture gets a share of the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.errors import InvalidOptionError
from vtprune.finite import check_finite
from vtprune.method import ModelFacts, Site, View
from vtprune.methods.fastervlm import FasterVLM
from vtprune.selecting import of_everyone, widened
from vtprune.selection import Selection

EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class HoloV(FasterVLM):
    """Training-free, text-agnostic; behind the projector. The sequence is cut into P runs of tokens ("crops").

        in a crop of n tokens, C their cosines with a zero diagonal:  m_i = sum_j C_ij / (n - 1),
        v_i = sum_j (C_ij - m_i)^2 / (n - 1),   a_i = 10^3 mean_h A_h[CLS, i],
        t_i = a_i + 0.09 v_i (mean |a| / mean |v|),   w = crop's mean t / sum of them over crops
        quota = floor(k w), what is left one by one to the largest w;   keep = the quota of largest a in every crop

    Source: Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context
    Retention" (NeurIPS 2025); obananas/HoloV at 1d2e65e. P = 16 and 64 of 576 tokens are what their LLaVA code has
    (Qwen2.5-VL: P = floor(1024 / 576 N / k); `crops=None` does so everywhere). [CLS] attention of the last
    layer that reaches the features.

    Deviations: what a crop cannot use goes round by round to the largest w with room (theirs is filled up with
    zero vectors); output in raster order (theirs by attention within a crop); a crop of one token scores a, like
    all others (theirs a / 10^3); the budget is per tile where pictures are tiled (theirs: one for the whole picture, without
    newlines). Dense positions as theirs.

    Attributes:
        crops: P; the first N mod P crops have one token more.
        scorer: "cls", or explicitly "received" (mean attention received) on encoders without [CLS].
    """

    key: ClassVar[str] = "holov"

    keep: int | float = 64 / 576
    crops: int | None = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops is not None and (isinstance(self.crops, bool) or self.crops < 1):
            raise InvalidOptionError(f"crops={self.crops} must be an int >= 1, or None.")

    def site(self, facts: ModelFacts) -> Site:
        return Site("projector") if "projector" in facts.sites else facts.behind_encoder()

    def decide(self, view: View) -> Selection:
        (attention,) = (widened(view[signal]).mean(1) for signal in view.signals)
        check_finite(attention)
        n, k = view.n, view.k
        parts = min(n, max(1, 1024 * n // (576 * k)) if self.crops is None else self.crops)
        longest = -(-n // parts)
        crop, place = torch.arange(parts)[:, None], torch.arange(longest)
        size = n // parts + (crop < n % parts)
        there = (place < size).to(attention.device)  # [P, S]
        token = (crop * (n // parts) + crop.clamp(max=n % parts) + place).clamp(max=n - 1).to(there.device)
        weight = self._weights(widened(view.features)[:, token], 1e3 * attention[:, token], there)
        quota = _quotas(weight, k, there.sum(1), longest)
        ranked = attention[:, token].masked_fill(~there, float("-inf"))
        rank = ranked.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        chosen = (rank < quota.unsqueeze(-1)) & there
        return Selection.of(of_everyone(chosen[:, there], k))

    def _weights(self, features: Tensor, attention: Tensor, there: Tensor) -> Tensor:
        """Shares [G, P] of the crops with features [G, P, S, D] and attention [G, P, S]."""
        size = there.sum(1).to(attention.dtype)
        unit = features / (features.norm(dim=-1, keepdim=True) + EPSILON)
        pair = there.unsqueeze(2) & there.unsqueeze(1)
        itself = torch.eye(there.shape[1], dtype=torch.bool, device=there.device)
        cosine = (unit @ unit.transpose(2, 3)) * (pair & ~itself)
        others = (size - 1).clamp(min=1)[:, None]
        mean = cosine.sum(-1) / others
        variance = ((cosine - mean.unsqueeze(-1)).square() * pair).sum(-1) / others * there
        attention = attention * there
        scale = attention.abs().sum(-1) / size / (variance.sum(-1) / size + EPSILON)
        score = (attention + 0.09 * variance * scale.unsqueeze(-1)).sum(-1) / size
        check_finite(score)
        share: Tensor = score / (score.sum(-1, keepdim=True) + EPSILON)
        return share


def _quotas(weight: Tensor, k: int, size: Tensor, longest: int) -> Tensor:
    """Tokens per crop [G, P], `k` in all and at most `size` [P], which is at most `longest`."""
    order = weight.sort(dim=-1, descending=True, stable=True).indices
    rank = order.argsort(-1)
    quota = (weight * k).floor().long()
    quota = torch.minimum(quota + (rank < k - quota.sum(-1, keepdim=True)), size)
    for _ in range(longest):
        room = (size - quota > 0).gather(1, order)
        turn = (room.long().cumsum(-1) * room).gather(1, rank)
        short = k - quota.sum(-1, keepdim=True)
        quota = quota + ((turn > 0) & (turn <= short))
    return quota
