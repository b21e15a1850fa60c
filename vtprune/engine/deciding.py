"""Asks a stage for its decision: groups equally large images, checks what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtprune.errors import InertPruningError, VTPruneError
from vtprune.layout import TokenLayout
from vtprune.method import WHOLE_IMAGE, Signal, Stage, View, resolve_keep
from vtprune.selection import Selection


@dataclass
class Candidate:
    """The tokens of one image at a site.

    Attributes:
        layout: grid of the image.
        index: [N] int64, ascending indices of the tokens in that grid.
        features: [N, D].
        signal: gives a signal for these tokens, token-first [N, ...].
        seed: gives the checksum of the image's pixels.
        sizes: [N] how many original tokens each stands for; None for one each.
    """

    layout: TokenLayout
    index: Tensor
    features: Tensor
    signal: Callable[[Signal], Tensor]
    seed: Callable[[], int]
    sizes: Tensor | None = None


def decide(stage: Stage, images: Sequence[Candidate]) -> list[Selection]:
    """One selection per image.

    Raises:
        InertPruningError: the budget demanded pruning and nothing was removed.
        VTPruneError: the method returned something that is no selection of these tokens.
    """
    budgets = [
        len(c.index) if stage.keep is None else min(resolve_keep(stage.keep, c.layout.n_tokens), len(c.index))
        for c in images
    ]
    out: list[Selection | None] = [None] * len(images)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (c, k) in enumerate(zip(images, budgets, strict=True)):
        n = len(c.index)
        if n == 0 or (stage.keep is not None and k == n and stage.must_prune):
            out[i] = Selection.everything(1, n, c.index.device)
        else:
            groups.setdefault((n, k), []).append(i)
    for (n, k), members in groups.items():
        batch = [images[i] for i in members]
        view = View(
            features=torch.stack([c.features for c in batch]),
            index=torch.stack([c.index for c in batch]),
            layout=[c.layout for c in batch],
            k=k,
            n_original=[c.layout.n_tokens for c in batch],
            seeds=lambda batch=batch: [c.seed() for c in batch],  # type: ignore[misc]
            signals={s: _signal(s, batch) for s in stage.needs},
            sizes=_sizes(batch),
        )
        with torch.no_grad():
            selection = stage.decide(view)
        _check(selection, stage, len(batch), n)
        for g, i in enumerate(members):
            out[i] = selection.image(g)
    chosen = [s for s in out if s is not None]
    removed = any(len(s.index[0]) < len(c.index) for s, c in zip(chosen, images, strict=True))
    demanded = any(k < len(c.index) for k, c in zip(budgets, images, strict=True))
    if stage.must_prune and demanded and not removed:
        raise InertPruningError(
            f"the method had to prune at {stage.site} (budgets {budgets} of {[len(c.index) for c in images]} tokens) "
            "and removed nothing"
        )
    return chosen


def _sizes(batch: Sequence[Candidate]) -> Tensor | None:
    if all(c.sizes is None for c in batch):
        return None
    return torch.stack(
        [torch.ones(len(c.index), device=c.index.device) if c.sizes is None else c.sizes for c in batch]
    )


def _signal(signal: Signal, batch: Sequence[Candidate]) -> Tensor:
    values = [c.signal(signal) for c in batch]
    if signal.kind in ("prompt_attention", "text_features"):
        rows = nn.utils.rnn.pad_sequence(values, batch_first=True)  # [G, T, H, N] or [G, T, D]
        return rows.transpose(1, 2) if rows.ndim == 4 else rows
    value = torch.stack(values)  # [G, N, ...] unless it has no tokens
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
