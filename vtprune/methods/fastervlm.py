"""FasterVLM: [CLS] attention of the last used encoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.method import ModelFacts, Scored, Signal, Site, View, check_choice


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Scored):
    """Training-free, text-agnostic; prunes before the projector.

        s_j = mean_h A_h[CLS, j] in the last ViT layer that reaches the features,   keep = argtopk(s, k)

    Source: Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning" (2024);
    Theia-4869/FasterVLM at f5d5f12. A default budget of a quarter is ours. Dense positions as theirs. On tiled
    models theirs also ranks padding and drops newlines.

    Attributes:
        scorer: "cls", or explicitly "received" (mean attention received) on encoders without [CLS].
    """

    key: ClassVar[str] = "fastervlm"
    authors_positions = "dense"
    substitutes = ({"scorer": "received"},)

    keep: int | float = 0.25
    scorer: Literal["cls", "received"] = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer", self.scorer, ("cls", "received"))

    def site(self, facts: ModelFacts) -> Site:
        return facts.behind_encoder()

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        last = facts.encoder_layers - 1
        return (Signal("cls_attention" if self.scorer == "cls" else "received_attention", last),)

    def scores(self, view: View) -> Tensor:
        (attention,) = (view[signal] for signal in view.signals)
        return attention.mean(1)
