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
from vtprune.methods.components import joined_by, root, spanning_tree, strongest
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

    Deviations: (1) The engine merges within a frame only. Of a component that spans frames one token stays, the one nearest
    to the mean of its frame's component, in the earliest frame; y has that mean as the representative and the joined
    tokens of its own frame, and tokens of other frames that join it are discarded. (2) Every frame keeps a token.
    (3) `keep` merges the most similar components first until k tokens per frame are left on average, exactly: the
    budget replaces tau across frames, and limits it within them (theirs has tau alone). (4) Components are exact
    (theirs: found from sampled nodes, and some nodes fall out).

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
        member = (part == torch.arange(len(names), device=x.device)[:, None]).to(x.dtype)  # [R, F N]
        share = member / member.sum(1, keepdim=True)
        flat = x.view(-1, width)
        means = share @ flat
        near = (unit(means) @ unit(flat).T).masked_fill(member == 0, -torch.inf).argmax(1)
        weight, pair = spanning_tree((unit(means) @ unit(means).T)[None])
        edges = strongest(weight[0], pair[0], -torch.inf if self.keep is not None else self.threshold)
        frame = [name // n for name in names]  # a component is named by its first token
        left = [frame.count(t) for t in range(frames)]
        component, stays, alive = list(range(len(names))), set(range(len(names))), len(names)
        first = list(component)  # the survivor of a component that may still go
        for a, b in edges:
            if alive == least:
                break
            one, other = sorted((root(component, a), root(component, b)))
            early, late = sorted((first[one], first[other]))
            gone = late if left[frame[late]] > 1 else early
            if left[frame[gone]] > 1:
                stays.remove(gone)
                left[frame[gone]] -= 1
                alive -= 1
            first[one] = early if gone == late else late
            component[other] = one
        whole = torch.tensor([root(component, r) for r in component], device=x.device)
        ids = whole.unique()
        centre = torch.stack([means[whole == c].mean(0) for c in ids])
        nearest = ids[(unit(flat) @ unit(centre).T).argmax(1)].view(frames, n)
        index, mix = [], []
        for t in range(frames):
            mine = torch.tensor([r for r in stays if frame[r] == t], device=x.device)
            mine = mine[near[mine].argsort()]
            index.append(near[mine] - t * n)
            joined = (nearest[t] == whole[mine][:, None]).to(x.dtype)
            own = share[mine][:, nodes[t]]
            mix.append((own + joined) / (1 + joined.sum(1, keepdim=True)))
        return Selection(tuple(index), mix=tuple(mix))
