"""What methods for video share: they decide about all frames of a video together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.finite import check_finite
from vtprune.layout import TokenLayout
from vtprune.method import Method, ModelFacts, Site, View
from vtprune.methods.staged import part_of
from vtprune.ops import gather_tokens
from vtprune.scoring import together
from vtprune.selecting import unit
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Clipwise(Method):
    """Base of methods that spend the budgets of all frames of a video together.

    A video of F frames with a budget of k tokens each keeps exactly k F tokens, and every frame at least one of them:
    the engine removes no frame altogether. A picture, and every tile of one, is a video of one frame. A method is shown
    frames with equally many tokens at a time; where an earlier stage left them different counts, those with the same
    count are a video of their own, so that "the frame before" is the one before among them, and merge alone.
    """

    def site(self, facts: ModelFacts) -> Site:
        return Site("projector") if "projector" in facts.sites else facts.behind_encoder()

    @abstractmethod
    def choose(self, view: View, total: int) -> Selection:
        """The decision about the frames of one video, in their order, of which `total` tokens stay."""

    def decide(self, view: View) -> Selection:
        found = clips(view.layout)
        parts = [self.choose(part_of(view, members, view.k, 0), view.k * len(members)) for members in found]
        return together(parts, found)


def clips(layout: Sequence[TokenLayout]) -> list[list[int]]:
    """Numbers of the frames of every video, in the order of time; a video that is there twice (beams) is two."""
    found: list[list[int]] = []
    open_clips: dict[tuple[str, int, int], list[int]] = {}
    for g, one in enumerate(layout):
        key = (one.modality, one.image, one.tile)
        clip = open_clips.get(key)
        if clip is None or one.time <= layout[clip[-1]].time:
            clip = open_clips[key] = []
            found.append(clip)
        clip.append(g)
    return found


def likeness(view: View, frames: Sequence[int], others: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosine of every token of `frames` to the token at the same place of the picture in `others`.

    Returns:
        [len(frames), N], and whether there is such a token, [len(frames), N] bool (an earlier stage may have removed it).
    """
    x, index, places = unit(view.features), view.index, max(view.n_original)
    check_finite(x)
    at = index[list(others)]
    there = torch.zeros(len(at), places, dtype=torch.bool, device=at.device).scatter(1, at, True)
    grid = x.new_zeros(len(at), places, x.shape[-1]).scatter(
        1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x[list(others)]
    )
    here = index[list(frames)]
    return (gather_tokens(grid, here) * x[list(frames)]).sum(-1), there.gather(1, here)


def evenly(n: int, k: int, device: torch.device) -> Tensor:
    """[n] bool with k entries true, as the control `stride` chooses them."""
    i = torch.arange(k, device=device)
    return torch.zeros(n, dtype=torch.bool, device=device).scatter(0, ((2 * i + 1) * n) // (2 * k), True)


def shares(total: int, parts: int) -> list[int]:
    """Equal parts of a number, what is left over going to the first ones; none of zero parts."""
    return [total // parts + (i < total % parts) for i in range(parts)]
