"""STELLA: a draw of tokens in proportion to how much the prompt singles them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.errors import InvalidOptionError
from vtprune.method import ModelFacts, Scored, Signal, Site, View, resolve_layer
from vtprune.scoring import drawn
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Stella(Scored):
    """Text-aware, random; draws tokens without replacement, weighted by localized importance.

        I_j = mean_{h, q} softmax_j(q . k_j / (sqrt(d) temperature)) over the visual tokens j,   S ~ I without replacement

    Source: Lee et al., "STELLA: Continual Audio-Video Pre-training with Spatio-Temporal Localized Alignment" (ICML 2024);
    G-JWLee/STELLA_code at e90d5b7. Ratio .5 and temperature .4 are theirs.
    Deviations: theirs drops patches while an audio-video encoder is trained, and q, k come from a trained audio-video
    alignment module. Such weights are not to be had for a stock model, so the other modality here is the text: q are the
    prompt's tokens and k the visual ones in a decoder layer, whose attention p gives the same softmax as that of
    log p / temperature. Layer 2 is ours (FastV's). The replay buffer, whose queries zero importances, has no
    meaning at inference and is left out. Without one their code takes the k largest, and draws only once there is one; here
    that is an option. The draw depends on `seed` and the picture, not on the batch.

    Attributes:
        temperature: of the softmax.
        layer: K, the tokens go at its input by the attention of the layer before; an index >= 1 or a fraction.
        draw: whether tokens are drawn; False takes the k largest.
        seed: changes the draw.
    """

    key: ClassVar[str] = "stella"

    keep: int | float = 0.5
    temperature: float = 0.4
    layer: int | float = 2
    draw: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise InvalidOptionError(f"temperature={self.temperature} has to be above 0.")

    def site(self, facts: ModelFacts) -> Site:
        return Site("decoder", resolve_layer(self.layer, facts.decoder_layers, "layer", first=1))

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        return (
            Signal("prompt_attention", resolve_layer(self.layer, facts.decoder_layers, "layer", first=1) - 1),
        )

    def scores(self, view: View) -> Tensor:
        (attention,) = (view[signal].float() for signal in view.signals)  # [G, H, T, N]
        # Rows of zeros fill up shorter prompts; text in front of the picture does not see it either.
        real = attention.sum(-1, keepdim=True) > 0
        sharp = (attention.log() / self.temperature).softmax(-1).where(real, 0)
        return sharp.mean((1, 2))

    def decide(self, view: View) -> Selection:
        importance = self.scores(view)
        return Selection.topk(drawn(importance, view, self.seed) if self.draw else importance, view.k)
