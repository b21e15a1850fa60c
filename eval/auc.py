"""Insertion and deletion: how well a ranking of visual tokens finds those that the answer rests on.

Insertion gives the model only the best share p of the tokens, deletion takes them away. A good ranking brings the
probability of the model's own answer up early (large area under the insertion curve) and down early (small area under
the deletion curve). No labels are read. Curves have 11 points over the share of tokens by default (SMDL: one per region, over
the share of the area).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import vtprune
from vtprune.errors import InvalidOptionError, VTPruneError
from vtprune.layout import TokenLayout
from vtprune.method import Method, ModelFacts, Site, Stage, View
from vtprune.report import ImageReport
from vtprune.selection import Selection

from .shrink import Inputs

POINTS = 11
# Which tokens are best, by how many: image number -> indices of its best k tokens.
Best = Callable[[int, int], Tensor]


class Curves(NamedTuple):
    """Probabilities of the dense answer's first token, and areas under them, for every row of a batch.

    Attributes:
        insertion: [B, P] float32 when only the best share p of every image's tokens is there.
        deletion: [B, P] when the best share p is gone.
        insertion_auc: [B] area under `insertion` over p in [0, 1] by the trapezoid rule; larger is better.
        deletion_auc: [B] likewise; smaller is better.
    """

    insertion: Tensor
    deletion: Tensor
    insertion_auc: Tensor
    deletion_auc: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Scripted(Method):
    """Keeps given tokens at the input of the language model, which is where they are physically removed.

    Attributes:
        kept: image -> ascending indices of the tokens that stay, at least one.
    """

    key: ClassVar[str] = "scripted"

    keep: int | float = 1.0
    kept: Mapping[TokenLayout, Tensor] = field(default_factory=dict)

    def stages(self, facts: ModelFacts) -> list[Stage]:
        return [
            Stage(
                Site("projector"),
                None,
                self.decide,
                must_prune=False,
                positions=self.position_policy(facts),
            )
        ]

    def decide(self, view: View) -> Selection:
        return Selection(tuple(self.kept[layout].to(view.index.device) for layout in view.layout))

    def options(self) -> dict[str, object]:
        return {"kept": {str(layout): len(index) for layout, index in self.kept.items()}}


@torch.no_grad()
def insertion_deletion(
    model: nn.Module,
    inputs: Inputs,
    order: Tensor | Sequence[Tensor] | Method,
    points: int = POINTS,
) -> Curves:
    """Insertion and deletion curves of a ranking, and their areas.

    For a share p of an image's n tokens, insertion keeps the best max(1, [p n]) and deletion removes the best
    min(n - 1, [p n]), rounded half up: one token always stays, since no budget of vtprune is smaller. Tokens are removed
    at the input of the language model and survivors keep their positions. p takes `points` equally spaced values
    from 0 to 1. The target is the token of largest probability behind the prompt of the unpruned model.

    Source: the metrics of RISE (Petsiuk et al., BMVC 2018), as used by SMDL-Attribution; there pixels are blurred or
    blackened, here tokens are really gone.

    Args:
        model: an unpatched vision-language model.
        inputs: a batch with at least one image (or video) in all, padded on either side.
        order: indices of every image's tokens, best first: [images, n] or one [n] per image (tile, frame), in the
            order of `Report.images`; or a method, which is asked for its k tokens for every k (their sets need not be
            nested; those left behind its last site count).
        points: values of p, at least 2.

    Returns:
        Curves, on CPU.

    Raises:
        InvalidOptionError: `order` does not rank the tokens of these images, or too few points.
        VTPruneError: the method or the model cannot be run, or the method keeps all tokens where it must not.
    """
    if points < 2:
        raise InvalidOptionError(f"points={points} makes no curve; give at least 2.")
    images = _images(model, inputs, "keep-all")
    layouts = [image.layout for image in images]
    if not images or len(set(layouts)) != len(layouts):
        raise VTPruneError("this batch has no images, or images that cannot be told apart")
    best = _sets(model, inputs, order) if isinstance(order, Method) else _ranking(order, layouts)
    dense = _probabilities(model, inputs)
    target = dense.argmax(-1, keepdim=True)

    def probability(kept: Sequence[Tensor]) -> Tensor:
        if all(len(index) == layout.n_tokens for index, layout in zip(kept, layouts, strict=True)):
            return dense.gather(1, target)[:, 0]
        script = Scripted(kept=dict(zip(layouts, kept, strict=True)), positions="original")
        with vtprune.patch(model, script):
            return _probabilities(model, inputs).gather(1, target)[:, 0]

    shares = torch.linspace(0, 1, points, dtype=torch.float64)
    insertion, deletion = [], []
    for share in shares.tolist():
        counts = [math.floor(share * layout.n_tokens + 0.5) for layout in layouts]
        insertion.append(probability([best(i, max(1, count)) for i, count in enumerate(counts)]))
        gone = [min(count, layout.n_tokens - 1) for count, layout in zip(counts, layouts, strict=True)]
        deletion.append(
            probability(
                [
                    _rest(best(i, count) if count else None, layout.n_tokens)
                    for i, (count, layout) in enumerate(zip(gone, layouts, strict=True))
                ]
            )
        )
    curves = [torch.stack(curve, 1).cpu() for curve in (insertion, deletion)]
    areas = [torch.trapezoid(curve.double(), shares).float() for curve in curves]
    return Curves(curves[0], curves[1], areas[0], areas[1])


def _rest(index: Tensor | None, n: int) -> Tensor:
    """Ascending indices of the tokens that are not in `index`."""
    stays = torch.ones(n, dtype=torch.bool)
    if index is not None:
        stays[index] = False
    if not bool(stays.any()):
        raise VTPruneError(
            f"the method kept all {n} tokens of an image, so none can be taken away for deletion"
        )
    return stays.nonzero()[:, 0]


def _images(model: nn.Module, inputs: Inputs, method: str | Method) -> list[ImageReport]:
    """What a method leaves of every image of a batch."""
    with vtprune.patch(model, method) as patch:
        _probabilities(model, inputs)
        return patch.report().images


def _ranking(order: Tensor | Sequence[Tensor], layouts: Sequence[TokenLayout]) -> Best:
    if len(order) != len(layouts):
        raise InvalidOptionError(
            f"{len(order)} rankings were given for {len(layouts)} images (tiles, frames); give one for each."
        )
    ranks = [torch.as_tensor(rank).cpu() for rank in order]
    for number, (rank, layout) in enumerate(zip(ranks, layouts, strict=True)):
        if rank.ndim != 1 or sorted(rank.tolist()) != list(range(layout.n_tokens)):
            raise InvalidOptionError(
                f"the ranking of image {number} must hold every index from 0 to {layout.n_tokens - 1} once."
            )
    return lambda image, k: ranks[image][:k].sort().values


def _sets(model: nn.Module, inputs: Inputs, method: Method) -> Best:
    known: dict[int, list[ImageReport]] = {}

    def best(image: int, k: int) -> Tensor:
        if k not in known:
            known[k] = _images(model, inputs, dataclasses.replace(method, keep=k))
        kept = list(known[k][image].kept.values())
        return kept[-1].cpu() if kept else torch.arange(known[k][image].tokens_in)

    return best


def _probabilities(model: nn.Module, inputs: Inputs) -> Tensor:
    """[B, V] float32: distribution of the first token of the answer."""
    mask = inputs.get("attention_mask")
    caller: Any = model
    if mask is None or bool(mask[:, -1].all()):
        logits: Tensor = caller(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    else:
        full: Tensor = caller(**inputs, use_cache=False).logits
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
        logits = full[torch.arange(len(full), device=full.device), last.to(full.device)]
    return logits.float().softmax(-1)
