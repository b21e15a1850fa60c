"""PruMerge+: PruMerge with evenly spaced tokens beside the outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.methods.prumerge import PruMerge
from vtprune.scoring import rounded


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge whose selected tokens also cover the picture.

        selected = argtopk(a, t)  +  {0, s, 2 s, ..., < N - 1} not among them,   s = floor(floor(N / t) / 3)

    with t outliers; everything else as in :class:`PruMerge`.

    Source: as PruMerge, their method "plus" for inference: about 3 t spaced tokens beside t outliers. s is at
    least 1 (theirs fails when more than a third are outliers).
    A given budget is not the authors': of k - 1 selected tokens, a quarter (at least one) has the largest a, as in
    their mixture; the others are the tokens floor(i M / c), i = 0 .. c - 1, of the M left in raster order.
    """

    key: ClassVar[str] = "prumerge-plus"

    def select(self, order: Tensor, found: int | None, k: int) -> Tensor:
        n = order.shape[1]
        wanted = max(1, k - 1)
        t = max(1, rounded(wanted / 4) if found is None else found)
        best, rest = order[:, :t], order[:, t:].sort(-1).values
        if found is None:
            c = wanted - t
            spaced = torch.arange(c, device=order.device) * rest.shape[1] // max(c, 1)
            return torch.cat([best, rest[:, spaced]], 1)
        step = max(1, n // t // 3)
        on_grid = (rest % step == 0) & (rest < n - 1)  # one image: its count is its own
        return torch.cat([best, rest[on_grid].unsqueeze(0)], 1)
