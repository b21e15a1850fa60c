"""CDPruner: a determinantal point process over visual tokens, conditioned on the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.finite import check_finite
from vtprune.method import Method, ModelFacts, Signal, Site, View, check_choice
from vtprune.ops import dpp_map
from vtprune.selecting import min_max, unit
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class CDPruner(Method):
    """Training-free; diverse and, given the prompt, relevant tokens at the input of the language model.

        S = cosine Gram matrix of the projected features
        rho = (r - min r + 1e-6) / (max r - min r) of the relevance r,   K = diag(rho) S diag(rho)
        keep = greedy MAP of the determinantal point process K

    Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
    MLLMs" (NeurIPS 2025); Theia-4869/CDPruner at 9541616.

    Deviation, not the authors' method: they take r = -mean_t cos(CLIP patch embedding, CLIP text embedding of the
    instruction). The CLIP text tower is no part of a vision-language model, so r comes from the embeddings that
    enter the language model: `relevance="prompt"` is r_i = mean_t cos(visual token i, text token t). Their minus
    corrects an inverted alignment that is known of CLIP alone; "prompt-inverted" has it. t runs over the
    whole prompt, system text and template included (theirs: 77-token pieces of the question). What is theirs is the point
    process, `relevance="none"` (rho = 1), with a diagonal of exactly 1 (theirs: but for rounding). The minimum and maximum are per image
    (theirs: over the batch). Ties, and tokens that the chosen ones span, go by the
    lowest index. On tiled models theirs also ranks padding and drops newlines. The default budget is the 64 of 576 of their
    tables; dense positions as theirs.

    Attributes:
        relevance: "prompt", "prompt-inverted" or "none".
    """

    key: ClassVar[str] = "cdpruner"
    authors_positions = "dense"
    substitutes = ({"relevance": "none"},)

    keep: int | float = 64 / 576
    relevance: Literal["prompt", "prompt-inverted", "none"] = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("relevance", self.relevance, ("prompt", "prompt-inverted", "none"))

    def site(self, facts: ModelFacts) -> Site:
        return Site("projector") if "projector" in facts.sites else facts.behind_encoder()

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        return () if self.relevance == "none" else (Signal("text_features", 0),)

    def decide(self, view: View) -> Selection:
        visual = unit(view.features)
        itself = torch.eye(view.n, dtype=torch.bool, device=visual.device)
        # Exactly 1, or rounding would decide between tokens that are equally far from nothing.
        kernel = (visual @ visual.transpose(1, 2)).masked_fill(itself, 1.0)
        for signal in view.signals:
            text = unit(view[signal])
            rho = self._relevance(visual, text)
            kernel = rho.unsqueeze(2) * kernel * rho.unsqueeze(1)
        check_finite(kernel)
        return Selection.of(dpp_map(kernel, view.k))

    def _relevance(self, visual: Tensor, text: Tensor) -> Tensor:
        count = (text != 0).any(-1).sum(-1, keepdim=True)  # padding is zero
        score = (visual @ text.transpose(1, 2)).sum(-1) / count.clamp(min=1)
        score = score if self.relevance == "prompt" else -score
        span = score.amax(-1, keepdim=True) - score.amin(-1, keepdim=True)
        return torch.where(span > 0, min_max(score) + 1e-6 / torch.where(span > 0, span, 1.0), 1.0)
