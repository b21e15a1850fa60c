"""DyCoke: within groups of four frames, the tokens that differ most from another frame of the group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune.method import View
from vtprune.methods.clips import Clipwise, evenly, likeness, shares
from vtprune.selection import Selection

GROUP = 4


@dataclass(frozen=True, kw_only=True)
class DyCoke(Clipwise):
    """Training-free, text-agnostic, needs no attention; behind the projector, in groups of four frames A, B, C, D.

        A stays whole;   B and C keep the tokens with the smallest cosine to the token of A at the same place,
        D those with the smallest cosine to the token of C (as it was before C was pruned)

    Source: Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models" (CVPR 2025), temporal token
    merging of KD-TAO/DyCoke at dd74634, which discards and merges nothing. Their ratio 0.7 of tokens removed
    leaves 1.9 of 4 frames, from which the default budget is. Positions are dense as theirs.

    Their second stage is left out: it chooses in every decoding step which entries of the key-value cache a layer
    reads, and removes none of them.

    Deviations: the count of B, C and D follows from the budget of the video, k F, less the whole frames, in equal
    parts, what is left over going to the earliest (theirs: floor(0.3 N) each); each of them keeps one token at least.
    Where that is too little for whole frames A, which is always so for a picture, these are thinned evenly, again in
    equal parts (theirs leaves pictures alone). C is pruned in the last group, too, and an odd last frame is kept
    (theirs skips the one and loses the other). Output in raster order (theirs by similarity). Ties go to the lower
    index; a token whose place an earlier stage emptied in the other frame counts as least similar.
    """

    key: ClassVar[str] = "dycoke"
    authors_positions = "dense"

    keep: int | float = 1.9 / 4

    def choose(self, view: View, total: int) -> Selection:
        frames, n = view.features.shape[:2]
        whole = list(range(0, frames, GROUP))
        pruned = [t for t in range(frames) if t % GROUP]
        heads = min(total - len(pruned), n * len(whole))
        masks = {
            t: evenly(n, k, view.features.device)
            for t, k in zip(whole, shares(heads, len(whole)), strict=True)
        }
        if pruned:
            cosine, known = likeness(
                view, pruned, [t - 1 if t % GROUP == 3 else t - t % GROUP for t in pruned]
            )
            order = torch.where(known, cosine, -torch.inf).sort(dim=-1, stable=True).indices
            for t, k, first in zip(pruned, shares(total - heads, len(pruned)), order, strict=True):
                masks[t] = torch.zeros_like(known[0]).scatter(0, first[:k], True)
        return Selection.where(torch.stack([masks[t] for t in range(frames)]))
