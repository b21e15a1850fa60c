"""ACT: attention with its sinks damped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.errors import InvalidOptionError
from vtprune.method import ModelFacts, Scored, Signal, Site, View, check_choice, resolve_layer
from vtprune.scoring import desink


@dataclass(frozen=True, kw_only=True)
class ACT(Scored):
    """Training-free, text-agnostic; keeps the tokens that [CLS] attends to once attention sinks are calibrated.

        a = sum over heads h of desink(A_h[CLS, .]) / H
        desink: tokens above `threshold` are sinks; a sink keeps beta of its attention, the freed mass goes to the others in
        proportion to theirs

    Source: Yu et al., "Unveiling and Harnessing Hidden Attention Sinks" (ICML 2024); GATECH-EIC/ACT at a267af7, whose
    threshold 0.1 and beta 0.4 are the defaults. Theirs calibrates language-model attention in searched heads and prunes
    nothing; applying it head by head to one row of the ViT's attention, and the default budget, are ours. There is no
    first-token sink to spare, since [CLS] is no candidate, and it takes no part of the freed mass (theirs: the first token does). A sink still ranks by what it keeps.

    Attributes:
        threshold: attention above which a token is a sink.
        beta: share of its attention that a sink keeps, in [0, 1].
        layer: ViT layer, an index or a fraction of the depth.
        scorer: "cls", or explicitly "received" (mean attention received) on encoders without [CLS].
    """

    key: ClassVar[str] = "act"
    substitutes = ({"scorer": "received"},)

    keep: int | float = 0.5
    threshold: float = 0.1
    beta: float = 0.4
    layer: int | float = -1
    scorer: Literal["cls", "received"] = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer", self.scorer, ("cls", "received"))
        if not 0 <= self.beta <= 1 or self.threshold <= 0:
            raise InvalidOptionError(
                f"threshold={self.threshold}, beta={self.beta}: give a threshold above 0 and a beta in [0, 1]."
            )

    def site(self, facts: ModelFacts) -> Site:
        return facts.behind_encoder()

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        layer = resolve_layer(self.layer, facts.encoder_layers, "layer")
        return (Signal("cls_attention" if self.scorer == "cls" else "received_attention", layer),)

    def scores(self, view: View) -> Tensor:
        (attention,) = (view[signal] for signal in view.signals)
        return desink(attention.float(), self.threshold, self.beta).mean(1)
