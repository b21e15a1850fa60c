"""FastV: attention of the last prompt token inside the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.method import ModelFacts, Scored, Signal, Site, View, resolve_layer


@dataclass(frozen=True, kw_only=True)
class FastV(Scored):
    """Training-free, text-aware; prunes once, at the input of decoder layer K.

        s_j = mean_h A^{K-1}_h[last prompt token, j],   keep = argtopk(s, k)

    Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (ECCV 2024); pkunlp-icler/FastV at
    d165972. Defaults are those of their experiments: K = 2, half of the tokens. Survivors keep their positions, as in their
    in-place code path. They switch the model to eager attention; here one query row is computed beside
    whatever attention the model uses. With several images, or tiles of one,
    each has its own budget (theirs: one for the whole span, newline tokens included).

    Attributes:
        layer: K, an index >= 1 or a fraction of the depth.
    """

    key: ClassVar[str] = "fastv"

    keep: int | float = 0.5
    layer: int | float = 2

    def site(self, facts: ModelFacts) -> Site:
        return Site("decoder", resolve_layer(self.layer, facts.decoder_layers, "layer", first=1))

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        return (
            Signal("text_attention", resolve_layer(self.layer, facts.decoder_layers, "layer", first=1) - 1),
        )

    def scores(self, view: View) -> Tensor:
        (attention,) = (view[signal] for signal in view.signals)
        return attention.mean(1)
