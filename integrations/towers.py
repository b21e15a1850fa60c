"""The two kinds of vision encoders that most models have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune import ops
from vtprune.errors import UnsupportedCallError
from vtprune.integrations.base import AttentionTap, Call, Encoding, VisionTower
from vtprune.layout import TokenLayout
from vtprune.method import Signal


def rectangle(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stacks per-image rows [K_i, D] into [I, K_max, D] and a bool mask of real rows (None if all are)."""
    counts = [len(r) for r in rows]
    if len(set(counts)) == 1:
        return torch.stack(list(rows)), None
    out = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    steps = torch.arange(out.shape[1], device=out.device)
    return out, steps < torch.tensor(counts, device=out.device).unsqueeze(1)


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
