"""PyramidDrop: fewer and fewer visual tokens towards deeper layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.method import Signal, View
from vtprune.methods.staged import Staged
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Staged):
    """Training-free (also usable in training), text-aware; prunes at the input of layers 8, 16 and 24 of 32.

        s_j = mean_h softmax(q_h k_h / sqrt(d))[last prompt token, j] with that layer's own projections,
        keep = argtopk(s, k_i),   k_i = r^i N behind stage i = 1, 2, 3

    Source: Xing et al., "PyramidDrop" (CVPR 2025); Cooperx521/PyramidDrop at 6444f30. The authors' r is 0.5, that
    is .5, .25 and .125 of the tokens: on average 0.46875, the default `keep`. Another budget means another r, such
    that the average over the model's layers meets it; `counts=` takes any other schedule. Positions are dense as
    theirs; counts are rounded towards the average, theirs down. The budget is per tile where pictures are tiled (theirs:
    one for the whole picture, newline tokens included).
    """

    key: ClassVar[str] = "pyramiddrop"
    authors_positions = "dense"

    keep: int | float = 0.46875
    layers: tuple[int | float, ...] = (8 / 32, 16 / 32, 24 / 32)

    def signals(self, layer: int, since: int) -> tuple[Signal, ...]:
        return (Signal("text_attention", layer),)

    def decide(self, view: View) -> Selection:
        (attention,) = (view[signal] for signal in view.signals)
        return Selection.topk(attention.mean(1), view.k)
