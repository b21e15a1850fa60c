"""PruMerge: tokens whose [CLS] attention is an outlier, with their neighbours merged in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.method import ModelFacts, Signal, Site, View, check_choice
from vtprune.methods.emergent import Emergent
from vtprune.ops import gather_tokens
from vtprune.scoring import outliers, together
from vtprune.selection import Selection, topk

NEIGHBOURS = 32


@dataclass(frozen=True, kw_only=True)
class PruMerge(Emergent):
    """Training-free, text-agnostic; adaptive count, attention-weighted merging, one token for the rest.

        a = softmax(q_CLS [k_CLS; k]^T / sqrt(D)) without head split, in the last ViT layer
        selected S = argtopk(a, #{j : a_j > Q3 + 1.5 (Q3 - Q1)})
        y_i = x_i + sum_{j in NN(i)} a_j x_j  for i in S,   rest token = sum_{j not in S} a_j x_j

    NN(i) are the 32 other tokens, selected ones too, of largest key cosine to i. Coefficients are not renormalised.

    Source: Shang et al., "LLaVA-PruMerge" (ICCV 2025); 42Shawn/LLaVA-PruMerge at 097c041. Like theirs, the
    attention is of the ViT's last layer although the features may come from the one before.
    Deviations: (1) The rest token stands at the place of the pruned token of largest a, since every token has a place here.
    (2) Output is in raster order (theirs: by attention, the rest token last). (3) At least one token is selected. (4) The
    count is per image (theirs: of the whole batch), and exact (theirs: one less for some N, by rounding). They count positions densely, as does `positions="auto"`.

    Attributes:
        keep: None (authors) = the count emerges, outliers + rest token; else k - 1 selected tokens + rest token
            (the rest token counts; none if k = 1).
        scorer: "cls", or explicitly "received" (ours: head-mean of the mean attention received) on encoders without
            [CLS].
    """

    key: ClassVar[str] = "prumerge"
    authors_positions = "dense"
    substitutes = ({"scorer": "received"},)

    scorer: Literal["cls", "received"] = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer", self.scorer, ("cls", "received"))

    def site(self, facts: ModelFacts) -> Site:
        return facts.behind_encoder()

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        last = max(facts.signals.get("encoder_key_heads", {facts.encoder_layers - 1}))
        kinds = ("cls_query", "cls_key") if self.scorer == "cls" else ("received_attention",)
        return tuple(Signal(kind, last) for kind in (*kinds, "encoder_key_heads"))

    def attention(self, view: View) -> tuple[Tensor, Tensor]:
        """Scores [G, N] and unit keys [G, N, H d] with all heads side by side."""
        *given, heads = (view[signal].float() for signal in view.signals)
        keys = heads.transpose(1, 2).flatten(2)
        if self.scorer == "received":
            return given[0].mean(1), normalize(keys, dim=-1)
        query, own = (x.flatten(1).unsqueeze(1) for x in given)
        logits = query @ torch.cat([own, keys], 1).transpose(1, 2) * keys.shape[-1] ** -0.5
        return logits.softmax(-1)[:, 0, 1:], normalize(keys, dim=-1)

    def select(self, order: Tensor, found: int | None, k: int) -> Tensor:
        """[G, c] selected tokens from all tokens by falling score; `found` outliers, or for the budget k."""
        return order[:, : max(1, k - 1 if found is None else found)]

    def decide(self, view: View) -> Selection:
        scores, keys = self.attention(view)
        order = topk(scores, view.n)
        if self.keep is not None:
            return reduce(scores, keys, self.select(order, None, view.k), view.k > 1)
        found = outliers(scores).tolist()
        return together(
            [
                reduce(scores[g : g + 1], keys[g : g + 1], self.select(order[g : g + 1], c, view.k), True)
                for g, c in enumerate(found)
            ]
        )


def reduce(scores: Tensor, keys: Tensor, selected: Tensor, rest: bool) -> Selection:
    """Adds its neighbours to every selected token [G, c] and, if wanted, the rest token."""
    images, n = scores.shape
    own = torch.zeros(*selected.shape, n, device=scores.device).scatter(2, selected.unsqueeze(-1), 1.0)
    cosine = gather_tokens(keys, selected) @ keys.transpose(1, 2)  # [G, c, N]
    near = topk(cosine.masked_fill(own > 0, float("-inf")), min(NEIGHBOURS, n - 1))
    mix = own + torch.zeros_like(own).scatter(2, near, scores.unsqueeze(1).expand_as(own).gather(2, near))
    pruned = own.sum(1) == 0
    if rest and selected.shape[1] < n:
        place = scores.masked_fill(~pruned, float("-inf")).argmax(-1, keepdim=True)
        selected = torch.cat([selected, place], 1)
        mix = torch.cat([mix, (scores * pruned).unsqueeze(1)], 1)
    index, order = selected.sort(-1)
    mix = mix[torch.arange(images, device=mix.device).unsqueeze(1), order]
    return Selection(tuple(index.unbind(0)), mix=tuple(mix.unbind(0)))
