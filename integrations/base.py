"""What an integration has to say about a model.

An integration knows where tokens are. It does not know any method, and it moves tokens only through
`Selection` values handed to it by the engine.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vtprune.layout import TokenLayout
from vtprune.method import ModelFacts, Signal
from vtprune.report import Stopwatch
from vtprune.selection import Selection

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Encoding:
    """One run of a vision encoder: which tokens of which images are alive, and what was measured.

    Images are still images or single frames of a video; lists run over them.

    Attributes:
        layouts: grid of every image.
        alive: int64 tensors, ascending indices of surviving tokens in the image's full grid.
        kept: site -> `alive` behind it.
        watches: site -> time spent measuring and deciding.
        fired: number of decisions taken so far.
        signals: token-first tensors [N_i, ...] per image with the alive indices they were measured on.
        extra: whatever the vision tower needs to remember between its layers.
    """

    def __init__(
        self, layouts: Sequence[TokenLayout], pixels: Callable[[], Sequence[Tensor]], device: torch.device
    ):
        self.layouts = list(layouts)
        self.alive = [torch.arange(layout.n_tokens, device=device) for layout in layouts]
        self.signals: dict[Signal, tuple[list[Tensor], list[Tensor]]] = {}
        self.extra: dict[str, Any] = {}
        self.kept: dict[str, list[Tensor]] = {}
        self.watches: dict[str, Stopwatch] = {}
        self.fired = 0
        self._pixels: Callable[[], Sequence[Tensor]] | None = pixels
        self._seeds: list[int] = []

    @property
    def counts(self) -> list[int]:
        """Surviving tokens per image."""
        return [len(a) for a in self.alive]

    def seeds(self) -> list[int]:
        """A checksum of every image's pixels (copies them to the host once)."""
        if self._pixels is not None:
            # Rounded, so that image backends that differ in the last bit give the same number.
            self._seeds = [
                zlib.crc32(np.rint(p.detach().float().cpu().numpy() * 128).astype(np.int16).tobytes())
                for p in self._pixels()
            ]
            self._pixels = None
        return self._seeds

    def record(self, signal: Signal, values: list[Tensor]) -> None:
        """Stores a measured signal, token-first [N_i, ...] per image, for the tokens alive now."""
        self.signals[signal] = (values, self.alive)

    def signal(self, signal: Signal, image: int) -> Tensor:
        """A signal for the tokens of one image that are alive now, [K_i, ...]."""
        values, alive = self.signals[signal]
        now = self.alive[image]
        if len(now) == len(alive[image]):
            return values[image]
        return values[image][torch.searchsorted(alive[image], now)]

    def apply(self, selections: Sequence[Selection]) -> None:
        """Narrows `alive` by one selection per image."""
        self.alive = [a[s.index[0]] for a, s in zip(self.alive, selections, strict=True)]


@dataclass
class AttentionTap:
    """Reads queries and keys out of a stock attention module without changing it.

    Attributes:
        module: the attention module.
        projections: its submodules whose outputs hold q and k.
        heads: (outputs of `projections`, keyword arguments of `module`) -> q, k as [B, H, L, d].
        scale: factor on the logits.
    """

    module: nn.Module
    projections: tuple[nn.Module, ...]
    heads: Callable[[Sequence[Tensor], Mapping[str, Any]], tuple[Tensor, Tensor]]
    scale: float


class VisionTower(ABC):
    """Where the tokens are in a vision encoder.

    Attributes:
        module: the encoder.
        entry: module that receives the pixels, once per run.
        layers: its transformer layers.
        used_layers: number of layers whose output reaches the features.
        projector: module between encoder and language model (for an encoder alone: its final norm).
        restores: whether pruned features must be put back to full length behind the projector, because the
            model compares their number with its placeholders.
        has_cls: whether token 0 is a class token.
        refuses: methods of `module` that cannot work on pruned tokens -> reason.
    """

    module: nn.Module
    entry: nn.Module
    layers: Sequence[nn.Module]
    used_layers: int
    projector: nn.Module | None
    restores: bool
    has_cls: bool
    refuses: Mapping[str, str] = {}

    @abstractmethod
    def open(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Encoding:
        """Describes the images of an encoder call from the arguments of `module`."""

    @abstractmethod
    def tap(self, layer: int) -> AttentionTap:
        """Where queries and keys of a layer can be read."""

    @abstractmethod
    def measure(
        self,
        encoding: Encoding,
        signal: Signal,
        q: Tensor,
        k: Tensor,
        scale: float,
        kwargs: Mapping[str, Any],
    ) -> list[Tensor]:
        """Computes a signal from a layer's q and k; token-first per image."""

    @abstractmethod
    def read(self, encoding: Encoding, hidden: Tensor, at_projector: bool) -> list[Tensor]:
        """Features [K_i, D] of the alive tokens of every image."""

    @abstractmethod
    def reduce(
        self, encoding: Encoding, hidden: Tensor, rows: Sequence[Tensor], at_projector: bool
    ) -> Tensor:
        """Hidden states holding only `rows` ([K_i, D] per image, already selected)."""

    @abstractmethod
    def adapt(self, encoding: Encoding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Arguments of a layer behind the first removal: masks, rotary tables, segment borders."""

    @abstractmethod
    def restore(self, encoding: Encoding, projected: Tensor) -> Tensor:
        """Projected features at full length again, zeros where tokens were removed."""


@dataclass
class Decoder:
    """Where the tokens are in a language model of the transformers library.

    Attributes:
        module: the decoder stack; receives `inputs_embeds`, calls `layers`.
        layers: decoder layers.
        attention: layer index -> its attention module.
        projections: attention module -> (module that outputs q, module that outputs k), unrotated [B, L, *].
        rotate: (attention module, x [B, H, R, d], cos, sin at these rows) -> rotated x.
        causal_mask: (config, hidden [B, M, D], valid [B, L] or None, cache, layer) -> mask a layer expects.
        rotary: (hidden, position_ids) -> position embeddings.
        reads_positions: whether attention now infers packed sequences from gaps in the position ids.
        mrope: whether position ids have several rows.
    """

    module: nn.Module
    layers: Sequence[nn.Module]
    attention: Callable[[int], nn.Module]
    projections: Callable[[nn.Module], tuple[nn.Module, nn.Module]]
    rotate: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    causal_mask: Callable[[Tensor, Tensor | None, Any, int], Any]
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    reads_positions: Callable[[], bool]
    mrope: bool = False


@dataclass
class Integration:
    """One model, seen through the places the engine needs.

    Attributes:
        facts: what methods may know.
        tower: its vision encoder.
        decoder: its language model; None for an encoder alone.
        base: the module that merges features into embeddings; receives `input_ids`.
        placeholders: modality -> id of its placeholder token.
    """

    facts: ModelFacts
    tower: VisionTower
    decoder: Decoder | None = None
    base: nn.Module | None = None
    placeholders: Mapping[str, int] = field(default_factory=dict)
