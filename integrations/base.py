"""What an integration has to say about a model, and the vision encoders most of them share.

An integration knows where tokens are. It does not know any method, and it moves tokens only through
`Selection` values handed to it by the engine.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtprune import ops
from vtprune.errors import UnsupportedCallError
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
            self._seeds = [
                zlib.crc32(p.detach().float().cpu().contiguous().numpy().tobytes()) for p in self._pixels()
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


def rectangle(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stacks per-image rows [K_i, D] into [I, K_max, D] and a bool mask of real rows (None if all are)."""
    counts = [len(r) for r in rows]
    if len(set(counts)) == 1:
        return torch.stack(list(rows)), None
    out = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    steps = torch.arange(out.shape[1], device=out.device)
    return out, steps < torch.tensor(counts, device=out.device).unsqueeze(1)


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


class BatchedViT(VisionTower):
    """Encoders that work on [images, prefix + tokens, D], such as CLIP, SigLIP, DINO and timm's.

    Args:
        module, layers, used_layers, projector, restores, has_cls: see :class:`VisionTower`.
        prefix: class and register tokens in front, never pruned.
        projector_prefix: how many of them the projector sees.
        grid: (height, width) of the pixels -> (rows, cols) of tokens.
        tap: layer index -> AttentionTap.
        additive_mask: whether layers want a float mask (eager attention) rather than a bool mask.
        mask_argument: "positional" if the mask is the layer's second argument, else its keyword.
        accepts_ragged: gives the reason why images of one batch cannot keep different counts, or None.
        entry, refuses: see :class:`VisionTower`.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[nn.Module],
        used_layers: int,
        projector: nn.Module | None,
        restores: bool,
        has_cls: bool,
        prefix: int,
        projector_prefix: int,
        grid: Callable[[int, int], tuple[int, int]],
        tap: Callable[[int], AttentionTap],
        additive_mask: Callable[[], bool],
        mask_argument: str = "positional",
        accepts_ragged: Callable[[], str | None] = lambda: None,
        entry: nn.Module | None = None,
        refuses: Mapping[str, str] | None = None,
    ) -> None:
        self.module, self.layers, self.used_layers = module, layers, used_layers
        self.entry, self.refuses = entry or module, refuses or {}
        self.projector, self.restores, self.has_cls = projector, restores, has_cls
        self.prefix, self.projector_prefix = prefix, projector_prefix
        self._grid, self._tap, self._additive = grid, tap, additive_mask
        self._mask_argument, self._accepts_ragged = mask_argument, accepts_ragged

    def open(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Encoding:
        pixels: Tensor = args[0] if args else kwargs["pixel_values"]
        rows, cols = self._grid(*pixels.shape[-2:])
        layouts = [TokenLayout(rows, cols, image=i) for i in range(len(pixels))]
        return Encoding(layouts, lambda: list(pixels), pixels.device)

    def tap(self, layer: int) -> AttentionTap:
        return self._tap(layer)

    def measure(
        self,
        encoding: Encoding,
        signal: Signal,
        q: Tensor,
        k: Tensor,
        scale: float,
        kwargs: Mapping[str, Any],
    ) -> list[Tensor]:
        p, valid = self.prefix, encoding.extra.get("valid")
        if signal.kind == "encoder_keys":
            return self._rows(encoding, k[:, :, p:].mean(1))
        if signal.kind == "cls_attention":
            attention = ops.attention_rows(q[:, :, :1], k, scale, valid)[:, :, 0]
        else:
            attention = ops.received_attention(q, k, scale, valid)
        return self._rows(encoding, attention[:, :, p:].transpose(1, 2))

    def _rows(self, encoding: Encoding, x: Tensor) -> list[Tensor]:
        return [row[:n] for row, n in zip(x, encoding.counts, strict=True)]

    def read(self, encoding: Encoding, hidden: Tensor, at_projector: bool) -> list[Tensor]:
        p = self.projector_prefix if at_projector else self.prefix
        return self._rows(encoding, hidden[:, p:])

    def reduce(
        self, encoding: Encoding, hidden: Tensor, rows: Sequence[Tensor], at_projector: bool
    ) -> Tensor:
        p = self.projector_prefix if at_projector else self.prefix
        tokens, valid = rectangle(rows)
        if valid is not None and not (at_projector and self.restores):
            reason = self._accepts_ragged()
            if reason:
                raise UnsupportedCallError(
                    f"images of this batch keep different numbers of tokens ({[len(r) for r in rows]}) in the encoder, "
                    f"but {reason}. Use a method with a fixed count, or batch size 1."
                )
            valid = torch.cat([valid.new_ones(len(valid), p), valid], 1)
        if not at_projector:
            encoding.extra["valid"] = valid
        return torch.cat([hidden[:, :p], tokens], 1) if p else tokens

    def adapt(self, encoding: Encoding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        positional = self._mask_argument == "positional" and len(args) > 1
        name = "attention_mask" if self._mask_argument == "positional" else self._mask_argument
        if (args[1] if positional else kwargs.get(name)) is not None:
            raise UnsupportedCallError(
                f"the {type(self.module).__name__} was called with a {name} of its own, which does not fit pruned tokens; "
                "leave it out, or prune behind the encoder"
            )
        valid: Tensor | None = encoding.extra.get("valid")
        if valid is None:
            return args, kwargs
        mask: Tensor = valid[:, None, None, :].expand(-1, 1, valid.shape[1], -1)
        if self._additive():
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(
                ~mask, torch.finfo(hidden.dtype).min
            )
        if positional:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, name: mask}

    def restore(self, encoding: Encoding, projected: Tensor) -> Tensor:
        n = encoding.layouts[0].n_tokens
        full = projected.new_zeros(len(projected), n, projected.shape[-1])
        image = torch.cat([torch.full_like(alive, i) for i, alive in enumerate(encoding.alive)])
        return full.index_put((image, torch.cat(encoding.alive)), torch.cat(self._rows(encoding, projected)))


class PackedViT(VisionTower):
    """Encoders that pack all images into one [patches, D] sequence and merge `unit` patches into a token.

    Patches of one token are neighbours; tokens may stand in another order than the language model sees them
    (window attention), which `order` undoes.

    Args:
        module, layers, projector: see :class:`VisionTower`.
        unit: patches per token.
        order: grid_thw [images, 3] -> index [tokens] of the language-model token at every packed position.
        tap: layer index -> AttentionTap.
    """

    has_cls = False
    restores = True

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[nn.Module],
        projector: nn.Module,
        unit: int,
        order: Callable[[Tensor], Tensor],
        tap: Callable[[int], AttentionTap],
    ) -> None:
        self.module, self.entry, self.layers, self.projector = module, module, layers, projector
        self.used_layers = len(layers)
        self.unit = unit
        self._order, self._tap = order, tap

    def open(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Encoding:
        pixels: Tensor = args[0] if args else kwargs["hidden_states"]
        grid: Tensor = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        side = int(self.unit**0.5)
        layouts = []
        for image, (t, h, w) in enumerate(grid.tolist()):
            modality = "video" if t > 1 else "image"
            layouts += [TokenLayout(h // side, w // side, modality, image, time) for time in range(t)]
        sizes = [layout.n_tokens * self.unit for layout in layouts]
        encoding = Encoding(layouts, lambda: pixels.split(sizes), pixels.device)
        order = self._order(grid).to(pixels.device)
        encoding.extra.update(order=order, full_order=order, rows=None)
        return encoding

    def tap(self, layer: int) -> AttentionTap:
        return self._tap(layer)

    def measure(
        self,
        encoding: Encoding,
        signal: Signal,
        q: Tensor,
        k: Tensor,
        scale: float,
        kwargs: Mapping[str, Any],
    ) -> list[Tensor]:
        if signal.kind == "encoder_keys":
            per_patch = k[0].mean(0)  # [patches, d]
        else:
            lengths = kwargs["cu_seqlens"].diff().tolist()
            parts = zip(q.split(lengths, 2), k.split(lengths, 2), strict=True)
            per_patch = torch.cat([ops.received_attention(a, b, scale) for a, b in parts], -1)[0].transpose(
                0, 1
            )
        # A token is the mean of its patches.
        return self._in_order(encoding, per_patch.unflatten(0, (-1, self.unit)).mean(1))

    def _in_order(self, encoding: Encoding, packed: Tensor) -> list[Tensor]:
        order: Tensor = encoding.extra["order"]
        return list(packed[order.argsort()].split(encoding.counts))

    def read(self, encoding: Encoding, hidden: Tensor, at_projector: bool) -> list[Tensor]:
        return self._in_order(encoding, hidden.reshape(len(hidden) // self.unit, -1))

    def reduce(
        self, encoding: Encoding, hidden: Tensor, rows: Sequence[Tensor], at_projector: bool
    ) -> Tensor:
        offsets = [0]
        for layout in encoding.layouts:
            offsets.append(offsets[-1] + layout.n_tokens)
        ids = torch.cat([alive + start for alive, start in zip(encoding.alive, offsets, strict=False)])
        order: Tensor = encoding.extra["order"]
        stays = torch.isin(order, ids)
        kept_order = order[stays]
        old_rows = encoding.extra["rows"]
        patch_stays = stays.repeat_interleave(self.unit)
        index = patch_stays.nonzero()[:, 0]
        encoding.extra.update(order=kept_order, rows=index if old_rows is None else old_rows[index])
        tokens = torch.cat(list(rows))[torch.searchsorted(ids, kept_order)]
        return tokens.reshape(len(tokens) * self.unit, -1)

    def adapt(self, encoding: Encoding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        rows: Tensor | None = encoding.extra["rows"]
        if rows is None:
            return args, kwargs
        kwargs = dict(kwargs)
        tables = kwargs["position_embeddings"]
        n_patches = len(tables[0])
        kwargs["position_embeddings"] = tuple(t[rows] for t in tables)
        alive = torch.zeros(n_patches + 1, dtype=torch.int64, device=rows.device)
        alive[rows + 1] = 1
        borders = alive.cumsum(0)[kwargs["cu_seqlens"].long()].to(kwargs["cu_seqlens"].dtype)
        # A window may have lost all its tokens. `max_seqlen`, where given, stays a valid upper bound.
        kwargs["cu_seqlens"] = torch.unique_consecutive(borders)
        return args, kwargs

    def restore(self, encoding: Encoding, projected: Tensor) -> Tensor:
        full_order: Tensor = encoding.extra["full_order"]
        full = projected.new_zeros(len(full_order), projected.shape[-1])
        return full.index_put((encoding.extra["order"],), projected)[full_order]


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
