"""VTPrune: diverse tokens, weighted by what the encoder itself attends to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.errors import InvalidOptionError
from vtprune.method import Method, ModelFacts, Signal, Site, View, check_choice, resolve_layer
from vtprune.selection import Selection, check_finite, merged
from vtprune.space import Range, Space


@dataclass(frozen=True, kw_only=True)
class VTPrune(Method):
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

    def importance(self, view: View) -> Tensor:
        """a [G, N]."""
        total = torch.zeros(view.features.shape[:2], device=view.features.device)
        for kind in ("cls_attention", "received_attention"):
            layers = [view[signal].float().mean(1) for signal in view.signals if signal.kind == kind]
            if layers:
                share = torch.stack(layers).mean(0).clamp(min=0)
                total = total + share / share.mean(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
        return total

    def decide(self, view: View) -> Selection:
        unit = normalize(view.features.float(), dim=-1)
        similarity = unit @ unit.transpose(1, 2)  # [G, N, N]
        kept = weighted_farthest_first(self.importance(view) ** self.theta, 1 - similarity, view.k)
        if self.beta == 0 or view.k == view.n:
            return Selection.of(kept)
        closest, slot = similarity.gather(2, kept[:, None].expand(-1, view.n, -1)).max(-1)
        target = kept.gather(1, slot).scatter(1, kept, kept)
        weight = (self.beta * closest.clamp(min=0)).scatter(1, kept, 1.0)
        total = torch.zeros_like(weight).scatter_add(1, target, weight)
        return merged(kept, target, weight / total.gather(1, target))


def weighted_farthest_first(weight: Tensor, distance: Tensor, k: int) -> Tensor:
    """Greedy choice of k tokens by weight times distance to the nearest chosen one; [G, k], in order of choice.

    Args:
        weight: [G, N] non-negative.
        distance: [G, N, N].
    """
    check_finite(weight)
    check_finite(distance)
    image = torch.arange(len(weight), device=weight.device)
    chosen = weight.argmax(-1)
    order = [chosen]
    nearest = torch.full_like(weight, float("inf"))
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, distance[image, chosen].clamp(min=0))
        nearest[image, chosen] = float("-inf")
        chosen = (weight * nearest).where(nearest >= 0, nearest).argmax(-1)
        order.append(chosen)
    return torch.stack(order, 1)
