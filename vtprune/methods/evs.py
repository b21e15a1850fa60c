"""EVS: the tokens of a video that differ most from the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune.method import View
from vtprune.methods.clips import Clipwise, evenly, likeness
from vtprune.selection import Selection

NEW = 255.0  # theirs for all tokens of the first frame


@dataclass(frozen=True, kw_only=True)
class EVS(Clipwise):
    """Training-free, text-agnostic, needs no attention; behind the projector, over all frames of a video at once.

        d[t, p] = 1 - cos(x[t, p], x[t - 1, p])  at the same place p;   d[0, p] = 255
        keep = the k F largest d of the video's F frames

    Source: "Efficient Video Sampling" (arXiv 2510.14624), known to us from its abstract, and vLLM's `evs.py`, whose formula
    this is (the paper compares pixels). The default is the pruning rate of 0.7 that Nemotron Nano 12B v2 VL ships
    with. vLLM renumbers positions densely but for M-RoPE, as does `positions="auto"`.

    Deviations: every later frame keeps its most different token at least (theirs may lose all of a frame); where the
    budget is too small for the whole first frame, which is always so for a picture, that frame is thinned evenly to
    what the others leave (theirs exceeds the budget, and leaves pictures alone); a token whose place an earlier stage
    emptied in the frame before counts as new (255). Ties go to the earlier token.
    """

    key: ClassVar[str] = "evs"
    authors_positions = "dense"

    keep: int | float = 0.3

    def choose(self, view: View, total: int) -> Selection:
        later, n = len(view.features) - 1, view.n
        first = evenly(n, min(n, total - later), view.features.device)
        if not later:
            return Selection.where(first[None])
        cosine, known = likeness(view, range(1, later + 1), range(later))
        change = torch.where(known, 1 - cosine, NEW)
        change = change.scatter(1, change.argmax(-1, keepdim=True), float("inf"))
        order = change.flatten().sort(descending=True, stable=True).indices
        kept = torch.zeros_like(change, dtype=torch.bool).flatten()
        kept[order[: total - min(n, total - later)]] = True
        return Selection.where(torch.cat([first[None], kept.view(later, n)]))
