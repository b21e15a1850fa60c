"""LLaVA-Scissor: connected components of similar tokens, within frames and then across them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune.errors import InvalidOptionError
from vtprune.finite import check_finite
from vtprune.method import View
from vtprune.methods.clips import Clipwise
from vtprune.methods.components import joined_by, left_by, mean_of, spanning_tree, strongest
from vtprune.methods.emergent import Emergent
from vtprune.selecting import unit, widened
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class LLaVAScissor(Emergent, Clipwise):
    """Training-free, text-agnostic, needs no attention; behind the projector, over all frames of a video at once.

        graph of tokens with an edge where cos > tau;   a connected component is represented by its mean
        once within every frame, then among the representatives of all frames
        every token joins the nearest representative:   y = (representative + sum of joined) / (1 + number of joined)

    Source: Sun et al., "LLaVA-Scissor: Token Compression with Semantic Connected Components for Video LLMs" (2025);
    formulas of HumanMLLM/LLaVA-Scissor at b63354c (no licence, nothing copied). tau = 0.9 as in their README (their
    class: 0.95). That positions are dense is inferred from the models they run on.

    Deviations: (1) Of a component one token stays, in the earliest frame the one nearest to the mean of the component
    there. (2) Every frame keeps a token. A component that is all that is left of several frames has one in each, from
    the parts and joined tokens of its frame and those up to the next of them (the first: those before, too). (3) `keep`
    merges the most similar components first until k tokens per frame are left on average, exactly: the budget replaces
    tau across frames, and limits it within them (theirs has tau alone). (4) Components are exact (theirs: found from
    sampled nodes, and some nodes fall out).

    Without a budget nothing may be like enough to be merged; a warning says so.

    Attributes:
        threshold: tau.
    """

    key: ClassVar[str] = "llava-scissor"
    authors_positions = "dense"

    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.threshold <= 1:
            raise InvalidOptionError(f"threshold={self.threshold} is no cosine; give one in [-1, 1].")

    def decide(self, view: View) -> Selection:
        chosen = super().decide(view)
        if self.keep is None and all(count == view.n for count in chosen.counts):
            warnings.warn(
                f"llava-scissor removed nothing: of {view.n} tokens none are alike above threshold={self.threshold}; "
                "lower it, or give keep.",
                stacklevel=2,
            )
        return chosen

    def choose(self, view: View, total: int) -> Selection:
        x = widened(view.features)
        frames, n, width = x.shape
        check_finite(x)
        least = frames if self.keep is None else total
        nodes = torch.arange(frames * n, device=x.device).view(frames, n)
        weight, pair = spanning_tree(unit(x) @ unit(x).transpose(1, 2))
        pair = nodes[:, :1, None] + pair
        edges = strongest(weight.flatten(), pair.view(-1, 2), self.threshold)[: frames * n - least]
        group = joined_by(edges, frames * n)
        names = sorted(set(group))
        number = {name: i for i, name in enumerate(names)}
        part = torch.tensor([number[name] for name in group], device=x.device)
        share, flat = mean_of(part, len(names), x.dtype), x.view(-1, width)
        means = share @ flat
        near = (unit(means) @ unit(flat).T).masked_fill(share == 0, -torch.inf).argmax(1)
        weight, pair = spanning_tree((unit(means) @ unit(means).T)[None])
        edges = strongest(weight[0], pair[0], -torch.inf if self.keep is not None else self.threshold)
        frame = [name // n for name in names]  # a component is named by its first token
        kept, wholes, keepers = left_by(edges, frame, least)
        whole, time, keeper = (torch.tensor(a, device=x.device) for a in (wholes, frame, keepers))
        centre = mean_of(whole, len(keepers), x.dtype) @ means
        nearest = (unit(flat) @ unit(centre).T).argmax(1)
        own = mean_of(keeper[whole, time], len(kept), x.dtype) @ share
        joins = keeper[nearest, nodes.flatten() // n]
        joined = (joins == torch.arange(len(kept), device=x.device)[:, None]).to(x.dtype)
        rows = (own + joined) / (1 + joined.sum(1, keepdim=True))
        place, order = near[kept].sort()
        counts = [sum(frame[r] == t for r in kept) for t in range(frames)]
        index = tuple(at - t * n for t, at in enumerate(place.split(counts)))
        return Selection(index, mix=rows[order].split(counts), sources=(tuple(range(frames)),) * frames)
