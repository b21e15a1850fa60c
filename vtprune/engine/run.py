"""One forward pass of the language model, as the engine follows it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtprune.engine.prompt import Memo, PromptImage
from vtprune.engine.sequence import TokenSequence
from vtprune.method import Signal
from vtprune.report import Report


@dataclass
class Run:
    """One forward pass of the language model.

    Attributes:
        tokens: its tokens and slots.
        images: visual tokens of this pass; empty in decoding.
        ready: the masks that the whole model prepared for its language model, by kind of layer.
        memo: decisions to repeat instead of deciding again.
        report: None when the pass holds no visual tokens.
        captured: (layer, "q" | "k") -> projected queries or keys, unrotated; last-token queries where these suffice.
        carried: signal -> (id of a prompt image -> its value [N, ...] on the image's full grid), measured before a removal.
        heads: decoder layer -> [B, H] bool, heads that speak in it and in the layers up to the next such layer.
        head_outputs: decoder layer -> [B, H] sum of the absolute entries of every head's output.
        embeds: [B, L, D] embeddings at the input of the language model, before anything is removed.
        placeholders: [B, L] bool on the host, where pictures and the separators in and between them stand; None without pictures.
        fired: numbers of the stages that decided.
    """

    tokens: TokenSequence
    images: list[PromptImage] = field(default_factory=list)
    ready: dict[str, Tensor] = field(default_factory=dict)
    memo: Memo | None = None
    report: Report | None = None
    captured: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    carried: dict[Signal, dict[int, Tensor]] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    head_outputs: dict[int, Tensor] = field(default_factory=dict)
    embeds: Tensor | None = None
    placeholders: Tensor | None = None
    fired: set[int] = field(default_factory=set)

    def text_columns(self, row: int) -> Tensor:
        """[T] columns of a row's new text tokens: everything that is no placeholder (so no separator) and no padding."""
        tokens = self.tokens
        text = torch.ones(tokens.length, dtype=torch.bool)
        if tokens.host_valid is not None:
            text &= tokens.host_valid[row]
        if self.placeholders is not None:
            text &= ~self.placeholders[row]
        return text.nonzero()[:, 0].to(tokens.device, non_blocking=True)
