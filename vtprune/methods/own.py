"""VTPrune: diverse tokens, weighted by what the encoder itself attends to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.errors import InvalidOptionError
from vtprune.method import ModelFacts, Scored, Signal, Site, View, check_choice, resolve_layer
from vtprune.selecting import farthest_first, merged_into_closest
from vtprune.selection import Selection
from vtprune.space import Range, Space


@dataclass(frozen=True, kw_only=True)
class VTPrune(Scored):
    """Training-free, text-agnostic; our own default, with and without [CLS].

        c_j, r_j = mean over layers l >= first_layer and heads of A^l_h[CLS, j], and of the attention that j receives
        a_j = c_j / mean c + r_j / mean r       (r alone without [CLS])
        first = argmax_j a_j^theta;   next = argmax_{j not in S} a_j^theta min_{s in S} (1 - cos(x_j, x_s))

    A dropped token joins the survivor of largest cosine c with weight beta max(c, 0) against the survivor's 1,
    normalised. Importance alone keeps many tokens of one salient thing, diversity alone spends tokens on every shade
    of background; their product wants both. [CLS] knows things, what all tokens look at knows text and edges. Positions
    stay original.

    Source: ours. Farthest-first is DivPrune's, the ensemble over layers VTC-CLS's. All options and the feature
    (projector output rather than keys) were chosen on split `val` of the picture world with the reference LLaVA, on 300
    to 700 questions per kind at 16, 32 and 48 of 144 tokens. Against [CLS] attention of the upper half alone
    (`scorer="cls", first_layer=0.5, theta=0.5`) that gave +0.6, +0.4 and +0.2 points there; rollout in the place of a
    did the same for more memory; beta from 0 to 1 moves less than 0.3 points.

    Attributes:
        theta: exponent of the importance; 0 is pure diversity.
        beta: weight of merged tokens; 0 discards them.
        first_layer: index or fraction of the depth from which attention counts.
        scorer: "both", "cls" (cheapest: one row of attention per layer), "received", or "auto": both where the encoder
            has [CLS], else received attention.
    """

    key: ClassVar[str] = "vtprune"
    search_space: ClassVar[Mapping[str, Space]] = {"theta": Range(0.0, 2.0), "beta": Range(0.0, 1.0)}

    theta: float = 1.0
    beta: float = 0.4
    first_layer: int | float = 0
    scorer: Literal["auto", "both", "cls", "received"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer", self.scorer, ("auto", "both", "cls", "received"))
        for name in ("theta", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidOptionError(f"{name}={getattr(self, name)} must be a number >= 0.")

    def site(self, facts: ModelFacts) -> Site:
        return Site("projector") if "projector" in facts.sites else facts.behind_encoder()

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        kinds: list[Literal["cls_attention", "received_attention"]] = []
        if self.scorer in ("both", "cls") or (self.scorer == "auto" and "cls_attention" not in facts.missing):
            kinds.append("cls_attention")
        if self.scorer != "cls":
            kinds.append("received_attention")
        depth = facts.encoder_layers
        first = resolve_layer(self.first_layer, depth, "first_layer")
        return tuple(Signal(kind, layer) for kind in kinds for layer in range(first, depth))

    def scores(self, view: View) -> Tensor:
        total = torch.zeros(view.features.shape[:2], device=view.features.device)
        for kind in ("cls_attention", "received_attention"):
            layers = [view[signal].float().mean(1) for signal in view.signals if signal.kind == kind]
            if layers:
                share = torch.stack(layers).mean(0).clamp(min=0)
                total = total + share / share.mean(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
        return total

    def decide(self, view: View) -> Selection:
        vectors = normalize(view.features.float(), dim=-1)
        kept = farthest_first(self.scores(view) ** self.theta, 1 - vectors @ vectors.transpose(1, 2), view.k)
        return merged_into_closest(view.features, kept, self.beta)
