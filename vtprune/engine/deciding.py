"""Asks a stage for its decision: groups equally large images, checks what comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtprune.errors import InertPruningError, VTPruneError
from vtprune.finite import Check, deferred
from vtprune.integrations.base import Rows
from vtprune.layout import TokenLayout
from vtprune.method import WHOLE_IMAGE, Signal, Stage, View, resolve_keep
from vtprune.selection import Selection


class Candidates(ABC):
    """The tokens of several images at a site.

    Attributes:
        layouts: grid of every image.
        counts: tokens of every image at the site (host integers).
        checks: where checks of scores go that the device has not answered yet.
    """

    layouts: Sequence[TokenLayout]
    counts: Sequence[int]
    checks: list[Check]

    @abstractmethod
    def index(self, images: Sequence[int]) -> Tensor:
        """[G, N] ascending indices of the tokens of equally large images in their grids."""

    @abstractmethod
    def features(self, images: Sequence[int]) -> Tensor:
        """[G, N, D] of equally large images."""

    @abstractmethod
    def signal(self, signal: Signal, images: Sequence[int]) -> Rows:
        """A signal of equally large images, token-first unless it has no tokens."""

    @abstractmethod
    def seed(self, image: int) -> int:
        """Checksum of an image's pixels."""

    def sizes(self, images: Sequence[int]) -> Tensor | None:
        """[G, N] how many original tokens each stands for; None for one each."""
        return None


@dataclass(frozen=True)
class Decision:
    """What a stage decided for some of the images, all with the same number of tokens.

    Attributes:
        images: their numbers.
        selection: of their tokens, in the same order.
    """

    images: Sequence[int]
    selection: Selection


def decide(stage: Stage, candidates: Candidates) -> list[Decision]:
    """Every image belongs to one decision.

    Raises:
        InertPruningError: the budget demanded pruning and nothing was removed.
        VTPruneError: the method returned something that is no selection of these tokens.
    """
    counts, layouts = candidates.counts, candidates.layouts
    budgets = [
        n if stage.keep is None else min(resolve_keep(stage.keep, layout.n_tokens), n)
        for n, layout in zip(counts, layouts, strict=True)
    ]
    groups: dict[tuple[int, int], list[int]] = {}
    for i, key in enumerate(zip(counts, budgets, strict=True)):
        groups.setdefault(key, []).append(i)
    decisions = []
    for (n, k), images in groups.items():
        index = candidates.index(images)
        if n == 0 or (stage.keep is not None and k == n and stage.must_prune):
            decisions.append(Decision(images, Selection.everything(len(images), n, index.device)))
            continue
        view = View(
            features=candidates.features(images),
            index=index,
            layout=[layouts[i] for i in images],
            k=k,
            n_original=[layouts[i].n_tokens for i in images],
            seeds=lambda images=images: [candidates.seed(i) for i in images],  # type: ignore[misc]
            signals={s: _signal(s, candidates.signal(s, images)) for s in stage.needs},
            sizes=candidates.sizes(images),
        )
        with torch.no_grad(), deferred() as checks:
            selection = stage.decide(view)
        candidates.checks += checks
        _check(selection, stage, len(images), n)
        decisions.append(Decision(images, selection))
    removed = any(kept < counts[d.images[0]] for d in decisions for kept in d.selection.counts)
    demanded = any(k < n for k, n in zip(budgets, counts, strict=True))
    if stage.must_prune and demanded and not removed:
        raise InertPruningError(
            f"the method had to prune at {stage.site} (budgets {budgets} of {list(counts)} tokens) and removed nothing"
        )
    return decisions


def _signal(signal: Signal, values: Rows) -> Tensor:
    if signal.kind in ("prompt_attention", "text_features"):
        rows = nn.utils.rnn.pad_sequence(list(values), batch_first=True)  # [G, T, H, N] or [G, T, D]
        return rows.transpose(1, 2) if rows.ndim == 4 else rows
    # [G, N, ...] unless it has no tokens
    value = values if isinstance(values, Tensor) else torch.stack(list(values))
    plain = (*WHOLE_IMAGE, "attention_map", "encoder_keys", "input_features", "patch_pixels")
    has_heads = value.ndim > 2 and signal.kind not in plain
    return value.transpose(1, 2) if has_heads else value


def _check(selection: object, stage: Stage, n_images: int, n_tokens: int) -> None:
    if not isinstance(selection, Selection):
        raise VTPruneError(
            f"the decision at {stage.site} is a {type(selection).__name__}, expected a Selection"
        )
    if len(selection.index) != n_images:
        raise VTPruneError(
            f"the decision at {stage.site} covers {len(selection.index)} images, {n_images} were asked for"
        )
    for index in selection.index:
        if len(index) == 0 or len(index) > n_tokens:
            raise VTPruneError(f"the decision at {stage.site} keeps {len(index)} of {n_tokens} tokens")
        # Elsewhere than on CPU this would wait for the device; Selection's constructors sort anyway.
        if index.device.type == "cpu" and (
            int(index[0]) < 0 or int(index[-1]) >= n_tokens or not bool((index.diff() > 0).all())
        ):
            raise VTPruneError(
                f"the decision at {stage.site} is not an ascending list of tokens 0 to {n_tokens - 1}: "
                f"{index.tolist()}; build it with Selection.of, .topk or .where"
            )
