"""DART: a few pivots, and the tokens that duplicate them least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune.errors import InvalidOptionError
from vtprune.finite import check_finite
from vtprune.method import Method, ModelFacts, Signal, Site, View, resolve_layer
from vtprune.ops import gather_tokens
from vtprune.selecting import unit, widened
from vtprune.selection import Selection, topk

RESOLUTION = 10_000  # of a norm relative to the mean one


@dataclass(frozen=True, kw_only=True)
class DART(Method):
    """Training-free; prunes once, at the input of decoder layer K, without any attention weight.

        pivots P = argtop |key of layer K - 1| over all heads (Euclidean)
        for every pivot in turn: the q tokens still free whose hidden state has the smallest cosine to the pivot's
        keep = P and all these

    Source: Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More"
    (EMNLP 2025), the paper's text and re-implementations; the authors' repository was not available. Known from
    them: K = 2, at most 2 % of the tokens as pivots, largest norm of keys, cosine of hidden states. The default
    budget is the 128 of 576 of their tables. Survivors keep their positions.

    Deviations: the norm is Euclidean, since the L1 norm of rotated keys (theirs) changes with the position and so
    with the padding of a batch, and norms closer than 1e-4 of their mean tie; all 8 pivots are visual tokens
    (theirs: 4 of them and 4 of the question, whose hidden states a method is not shown); pivots take turns from
    the largest norm on (theirs: in the order of a set), and q = (k - |P|) / |P| with the remainder going to the
    first ones, so that the budget is met exactly (theirs: q = floor(k / 8), the visual pivots on top: 132 for 128); hidden states are compared as they enter layer K (theirs: behind
    the model's final norm).

    Attributes:
        layer: K, an index >= 1 or a fraction of the depth.
        pivots: number of pivots, never more than the budget.
    """

    key: ClassVar[str] = "dart"

    keep: int | float = 128 / 576
    layer: int | float = 2
    pivots: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.pivots, bool) or not isinstance(self.pivots, int) or self.pivots < 1:
            raise InvalidOptionError(f"pivots={self.pivots!r} must be an int >= 1.")

    def site(self, facts: ModelFacts) -> Site:
        return Site("decoder", resolve_layer(self.layer, facts.decoder_layers, "layer", first=1))

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        layer = resolve_layer(self.layer, facts.decoder_layers, "layer", first=1)
        return (Signal("decoder_keys", layer - 1),)

    def decide(self, view: View) -> Selection:
        (keys,) = (widened(view[signal]) for signal in view.signals)
        norm = keys.square().sum((1, 3)).sqrt()
        check_finite(norm)
        # Models that normalise keys give all tokens the same norm but for rounding.
        norm = (
            norm / norm.mean(-1, keepdim=True).clamp(min=torch.finfo(norm.dtype).tiny) * RESOLUTION
        ).round()
        pivots = topk(norm, min(self.pivots, view.k))
        count = pivots.shape[1]
        states = unit(view.features)
        cosine = gather_tokens(states, pivots) @ states.transpose(1, 2)  # [G, P, N]
        check_finite(cosine)
        taken = torch.zeros_like(cosine[:, 0], dtype=torch.bool).scatter(1, pivots, True)
        order = [pivots]
        quota, extra = divmod(view.k - count, count)
        for p in range(count):
            different = topk(-cosine[:, p].masked_fill(taken, float("inf")), quota + (p < extra))
            taken = taken.scatter(1, different, True)
            order.append(different)
        return Selection.of(torch.cat(order, 1))
