"""Silences attention heads of a language model: what they put out is zeroed before the attention mixes its heads.

Every other part of the attention is computed as before, so that this saves neither time nor memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.encoder import REPLACED
from vtprune.engine.journal import Bound, Journal
from vtprune.engine.run import Run
from vtprune.errors import InertPruningError, UnsupportedCallError, VTPruneError
from vtprune.integrations.base import Decoder
from vtprune.method import HeadStage, HeadView
from vtprune.selection import HeadSelection

SILENCED = "attention heads are silenced, not removed: stock attention computes them all, which saves no time or memory"


class HeadEngine(Bound):
    """Hooks of one patch on the output projections of a language model's attention.

    Heads are decided on in the first pass that holds visual tokens; all later passes with its cache keep to that.

    Args:
        decoder: the language model.
        stages: in the order of their layers.
    """

    def __init__(self, decoder: Decoder, stages: Sequence[HeadStage]) -> None:
        self.decoder = decoder
        self.stages = {stage.layer: stage for stage in stages}
        self.read = {signal.layer for stage in stages for signal in stage.needs}
        self.first = min(self.stages, default=len(decoder.layers))

    def attach(self, journal: Journal, current: Callable[[], Run | None]) -> None:
        """Registers all hooks."""
        for layer in range(len(self.decoder.layers)):
            if layer >= self.first or layer in self.read:
                attention = self.decoder.attention(layer)
                journal.pre_hook(self.decoder.output(attention), self._hook(layer, attention, current))

    def check(self) -> None:
        """Raises UnsupportedCallError if gradient checkpointing would compute attention again, with all heads."""
        layer: Any = self.decoder.layers[0]
        if self.stages and layer.training and getattr(layer, "gradient_checkpointing", False):
            raise UnsupportedCallError(
                "heads cannot be silenced under gradient checkpointing, which computes attention again in the backward pass; "
                "call gradient_checkpointing_disable(), or use heads=1.0"
            )

    def missing(self, run: Run) -> list[str]:
        """Decisions that were due in a pass and not taken."""
        return [f"heads of decoder[{layer}]" for layer in self.stages if layer not in run.heads]

    def _hook(self, layer: int, attention: Any, current: Callable[[], Run | None]) -> Callable[..., Any]:
        border = max((start for start in self.stages if start <= layer), default=-1)

        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            run = current()
            if run is None:
                return None
            heads = args[0].unflatten(-1, (-1, attention.head_dim))  # [B, L, H, d]
            if layer == border and border not in run.heads:
                if not run.images:
                    raise InertPruningError(f"a cache lacks the heads of decoder[{layer}]. {REPLACED}")
                run.heads[border] = self._decide(run, border, heads)
            alive = run.heads.get(border)
            if alive is not None:
                heads = heads.masked_fill(~alive[:, None, :, None].to(heads.device), 0)
            if layer in self.read and run.images:
                size = heads.detach().abs().sum(-1, dtype=torch.float32)  # [B, L, H]
                valid = run.tokens.now.valid
                run.head_outputs[layer] = (
                    size if valid is None else size * valid.unsqueeze(-1).to(size.device)
                ).sum(1)
            return None if alive is None else ((heads.flatten(-2), *args[1:]), kwargs)

        return hook

    def _decide(self, run: Run, layer: int, heads: Tensor) -> Tensor:
        """[B, H] bool, which heads of which rows speak on; rows without pictures lose none."""
        if run.memo is not None and layer in run.memo.heads:
            return run.memo.heads[layer]
        stage = self.stages[layer]
        earlier = [start for start in run.heads if start < layer]
        alive = heads.new_ones(heads.shape[0::2], dtype=torch.bool)
        if earlier:
            alive &= run.heads[max(earlier)].to(heads.device)
        rows = sorted({image.row for image in run.images})
        with torch.no_grad():
            view = HeadView(
                alive[rows], {s: run.head_outputs[s.layer].to(heads.device)[rows] for s in stage.needs}
            )
            chosen = stage.decide(view)
        if not isinstance(chosen, HeadSelection) or chosen.keep.shape != view.alive.shape:
            raise VTPruneError(
                f"the decision about heads at decoder[{layer}] is no HeadSelection of shape {list(view.alive.shape)}"
            )
        after = alive.clone()
        after[rows] &= chosen.keep
        if not bool(after.any(-1).all()):
            raise VTPruneError(f"the decision about heads at decoder[{layer}] leaves a sample without any")
        if run.memo is not None:
            run.memo.heads[layer] = after
        return after
