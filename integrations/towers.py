"""The two kinds of vision encoders that most models have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtprune import ops
from vtprune.errors import UnsupportedCallError, VTPruneError
from vtprune.integrations.base import (
    Attended,
    AttentionTap,
    Call,
    Encoding,
    FeatureCall,
    Packing,
    Rows,
    VisionTower,
)
from vtprune.layout import TokenLayout
from vtprune.method import WHOLE_IMAGE, Signal

ATTENTION = ("cls_attention", "received_attention", "attention_map")
WHOLE = "tokens of this encoder cannot be removed inside it; its integration must not offer such a site"


def frame_layouts(grid: tuple[int, int], n: int, call: FeatureCall | None) -> list[TokenLayout]:
    """Layouts of n equally large images, or of the frames of videos where the call says that they are such."""
    if call is None or call.modality != "video":
        return [TokenLayout(*grid, image=i) for i in range(n)]
    # The argument's name depends on model and version: pixel_values or pixel_values_videos, [videos, frames, ...].
    frames = next(v for k, v in call.arguments.items() if k.startswith("pixel_values")).shape[1]
    return [TokenLayout(*grid, "video", i // frames, i % frames) for i in range(n)]


def resample(x: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Values [I, H W, ...] of a grid on a coarser grid: means of blocks, bilinear where sizes do not divide."""
    if old == new:
        return x
    planes = x.flatten(2).transpose(1, 2).unflatten(-1, old).float()
    if old[0] % new[0] or old[1] % new[1]:
        planes = nn.functional.interpolate(planes, new, mode="bilinear")
    else:
        planes = nn.functional.avg_pool2d(planes, (old[0] // new[0], old[1] // new[1]))
    return planes.flatten(2).transpose(1, 2).reshape(len(x), new[0] * new[1], *x.shape[2:]).to(x.dtype)


def cut(images: Tensor, rows: int, cols: int) -> Tensor:
    """Images [I, C, H, W] as rows x cols equal rectangles in raster order, [I, rows cols, C, P]."""
    parts = images.unflatten(3, (cols, -1)).unflatten(2, (rows, -1))  # [I, C, rows, h, cols, w]
    tokens: Tensor = parts.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)
    return tokens


def block_map(maps: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Attention maps [I, P + N, P + N] between coarser tokens: means over the queries, sums over the keys of a token."""
    ratio = (old[0] * old[1]) / (new[0] * new[1])
    tokens = resample(maps[:, prefix:], old, new)  # rows
    maps = torch.cat([maps[:, :prefix], tokens], 1).transpose(1, 2)
    tokens = resample(maps[:, prefix:], old, new) * ratio
    return torch.cat([maps[:, :prefix], tokens], 1).transpose(1, 2)


def whole_image(signal: Signal, seen: Attended) -> Tensor:
    """[I, H, d] query, key or value of the class token."""
    source = {"cls_query": seen.q, "cls_key": seen.k, "cls_value": seen.v}[signal.kind]
    assert source is not None
    return source[:, :, 0]


def weighed(seen: Attended, prefix: int, sizes: Sequence[Tensor]) -> Attended:
    """Queries and keys one entry longer, so that their product adds the logarithm of every key's token size."""
    bias = rectangle([s.log().unsqueeze(-1) for s in sizes])[0]  # [I, K, 1]
    bias = (
        nn.functional.pad(bias, (0, 0, prefix, 0))
        .to(seen.k.dtype)[:, None]
        .expand(-1, seen.k.shape[1], -1, -1)
    )
    q = torch.cat([seen.q, torch.ones_like(seen.q[..., :1])], -1)
    return replace(seen, q=q, k=torch.cat([seen.k, bias / seen.scale], -1))


def per_token(signal: Signal, seen: Attended) -> Tensor:
    """[I, L, ...] signals that need no other token."""
    if signal.kind == "encoder_keys":
        return seen.k.mean(1)
    if signal.kind == "encoder_key_heads":
        return seen.k.transpose(1, 2)
    if signal.kind == "encoder_values":
        assert seen.v is not None
        return seen.v.transpose(1, 2)
    assert signal.kind == "head_output_norms", signal.kind
    assert seen.mixed is not None
    norms: Tensor = torch.linalg.vector_norm(seen.mixed.float(), dim=-1)
    return norms


def rectangle(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stacks per-image rows [K_i, D] into [I, K_max, D] and a bool mask of real rows (None if all are)."""
    counts = [len(r) for r in rows]
    if len(set(counts)) == 1:
        return torch.stack(list(rows)), None
    out = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    steps = torch.arange(out.shape[1], device=out.device)
    return out, steps < torch.tensor(counts).to(out.device, non_blocking=True).unsqueeze(1)


class BatchedViT(VisionTower):
    """Encoders that work on [images, prefix + tokens, D], such as CLIP, SigLIP, DINO and timm's.

    Args:
        module, layers, used_layers, projector, restores, has_cls: see :class:`VisionTower`.
        prefix: class and register tokens in front, never pruned.
        projector_prefix: how many of them the projector sees.
        grid: (height, width) of the pixels -> (rows, cols) of tokens.
        patch: (height, width) of a patch in pixels; None where patches are no plain cut, so that `pixels` is not offered.
        tap: layer index -> AttentionTap.
        additive_mask: whether layers want a float mask (eager attention) rather than a bool mask.
        mask_argument: "positional" if the mask is the layer's second argument, else its keyword.
        accepts_ragged: gives the reason why images of one batch cannot keep different counts between layers, or None.
        pools: gives the reason why padding behind the last layer would reach a pooled output, or None.
        tokens: (patch grid, call) -> grid of the tokens that the model makes of it, where they differ.
        pack: (call, layouts) -> how the prompt shows the images.
        visible: keyword arguments of `module` -> [I, patches] bool, False for padding patches, or None.
        tables: name of the layers' keyword argument that holds rotary tables of the patches (see `prefix`): [N, D] or,
            per head, [H, N, D], or a tuple of such.
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
        patch: tuple[int, int] | None,
        tap: Callable[[int], AttentionTap],
        additive_mask: Callable[[], bool],
        mask_argument: str = "positional",
        accepts_ragged: Callable[[], str | None] = lambda: None,
        pools: Callable[[], str | None] = lambda: None,
        tokens: Callable[[tuple[int, int], FeatureCall | None], tuple[int, int]] = lambda grid, call: grid,
        pack: Callable[[FeatureCall, Sequence[TokenLayout]], Packing | None] | None = None,
        visible: Callable[[Mapping[str, Any]], Tensor | None] = lambda kwargs: None,
        tables: str | None = None,
        entry: nn.Module | None = None,
        refuses: Mapping[str, str] | None = None,
    ) -> None:
        self.module, self.layers, self.used_layers = module, layers, used_layers
        self.entry, self.refuses = entry or module, refuses or {}
        self.projector, self.restores, self.has_cls = projector, restores, has_cls
        self.prefix, self.projector_prefix = prefix, projector_prefix
        self._grid, self._patch, self._tap, self._additive = grid, patch, tap, additive_mask
        self._mask_argument, self._accepts_ragged, self._pools = mask_argument, accepts_ragged, pools
        self._tokens, self._pack, self._visible, self._tables = tokens, pack, visible, tables

    def open(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], call: FeatureCall | None) -> Encoding:
        pixels: Tensor = args[0] if args else kwargs["pixel_values"]
        patches = self._grid(*pixels.shape[-2:])
        layouts = frame_layouts(self._tokens(patches, call), len(pixels), call)
        packing = self._pack(call, layouts) if self._pack is not None and call is not None else None
        packing = None if packing is None else packing.to(pixels.device)
        encoding = Encoding(self, layouts, lambda: list(pixels), pixels.device, packing)
        encoding.extra.update(patches=patches, valid=self._visible(kwargs))
        return encoding

    def tap(self, layer: int) -> AttentionTap:
        return self._tap(layer)

    def measure(
        self,
        encoding: Encoding,
        signal: Signal,
        seen: Attended,
    ) -> Rows:
        p, valid = self.prefix, encoding.extra.get("valid")
        if valid is None and not encoding.proportional and seen.kwargs.get(self._mask_argument) is not None:
            raise UnsupportedCallError(
                f"the {type(self.module).__name__} was called with an {self._mask_argument}, which measured signals "
                "would ignore; leave it out, or use a method that reads no attention"
            )
        if signal.kind in WHOLE_IMAGE:
            return whole_image(signal, seen)
        if encoding.proportional and encoding.sizes is not None and signal.kind in ATTENTION:
            seen = weighed(seen, p, encoding.sizes)
        grid = encoding.layouts[0]
        if signal.kind == "attention_map":
            maps = ops.attention_rows(seen.q, seen.k, seen.scale, valid).mean(1)
            old = encoding.extra["patches"]
            if (grid.rows, grid.cols) != old:
                maps = block_map(maps, p, old, (grid.rows, grid.cols))
            counts = encoding.counts
            if all(p + n == maps.shape[1] for n in counts):
                return maps
            return [m[: p + n, : p + n] for m, n in zip(maps, counts, strict=True)]
        if signal.kind == "cls_attention":
            values = ops.attention_rows(seen.q[:, :, :1], seen.k, seen.scale, valid)[:, :, 0, p:].transpose(
                1, 2
            )
        elif signal.kind == "received_attention":
            values = ops.received_attention(seen.q, seen.k, seen.scale, valid)[:, :, p:].transpose(1, 2)
        else:
            values = per_token(signal, seen)[:, p:]
        # Models that make one token of several patches do so behind their last layer: all patches are here.
        if (grid.rows, grid.cols) != encoding.extra["patches"]:
            values = resample(values, encoding.extra["patches"], (grid.rows, grid.cols))
        return self._rows(encoding, values)

    def pixels(self, encoding: Encoding) -> list[Tensor]:
        assert self._patch is not None
        (high, wide), (rows, cols), grid = self._patch, encoding.extra["patches"], encoding.layouts[0]
        if rows % grid.rows or cols % grid.cols:
            raise UnsupportedCallError(
                f"{rows}x{cols} patches are resized to {grid.rows}x{grid.cols} tokens, which show no pixels of their own; "
                "use a method that does not read patch_pixels"
            )
        images = torch.stack(list(encoding.pictures()))
        # Some encoders pad the last patches with zeros, others leave an incomplete one out.
        missing = [max(0, cols * wide - images.shape[3]), max(0, rows * high - images.shape[2])]
        images = nn.functional.pad(images, (0, missing[0], 0, missing[1]))[..., : rows * high, : cols * wide]
        return list(cut(images, grid.rows, grid.cols))

    def _rows(self, encoding: Encoding, x: Tensor) -> Rows:
        counts = encoding.counts
        if all(n == x.shape[1] for n in counts):
            return x
        return [row[:n] for row, n in zip(x, counts, strict=True)]

    def read(self, encoding: Encoding, hidden: Tensor, at_projector: bool) -> Rows:
        p = self.projector_prefix if at_projector else self.prefix
        return self._rows(encoding, hidden[:, p:])

    def reduce(
        self, encoding: Encoding, hidden: Tensor, rows: Sequence[Tensor], at_projector: bool
    ) -> Tensor:
        p = self.projector_prefix if at_projector else self.prefix
        tokens, valid = rectangle(rows)
        if valid is not None and not (at_projector and self.restores):
            reason = self._pools() or (None if at_projector else self._accepts_ragged())
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
        if self._tables is not None and encoding.kept:
            kwargs = {**kwargs, self._tables: self._gathered(encoding, kwargs.get(self._tables))}
        positional = self._mask_argument == "positional" and len(args) > 1
        name = "attention_mask" if self._mask_argument == "positional" else self._mask_argument
        if (args[1] if positional else kwargs.get(name)) is not None:
            raise UnsupportedCallError(
                f"the {type(self.module).__name__} was called with a {name} of its own, which does not fit pruned tokens; "
                "leave it out, or prune behind the encoder"
            )
        valid: Tensor | None = encoding.extra.get("valid")
        sizes = encoding.sizes if encoding.proportional else None
        if valid is None and sizes is None:
            return args, kwargs
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        length = hidden.shape[1]
        mask: Tensor
        if valid is None:
            mask = torch.ones(len(hidden), 1, length, length, dtype=torch.bool, device=hidden.device)
        else:
            mask = valid[:, None, None, :].expand(-1, 1, length, -1)
        if self._additive() or sizes is not None:
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(
                ~mask, torch.finfo(hidden.dtype).min
            )
        if sizes is not None:
            bias = rectangle([size.log().unsqueeze(-1) for size in sizes])[0][..., 0]
            mask[..., self.prefix :] += bias[:, None, None].to(mask.dtype)
        if positional:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, name: mask}

    def _gathered(self, encoding: Encoding, tables: Any) -> Any:
        """Rotary tables [N, D] or [H, N, D] of the full grid, or a tuple of such, for the surviving patches.

        [I, 1, K, D] or [I, H, K, D].
        """
        if tables is None:
            return None
        if isinstance(tables, tuple):
            return tuple(self._gathered(encoding, t) for t in tables)
        rows = tables.movedim(-2, 0)
        gathered = rectangle([rows[alive] for alive in encoding.alive])[0]  # [I, K, D] or [I, K, H, D]
        return gathered.unsqueeze(1) if tables.ndim == 2 else gathered.transpose(1, 2)

    def restore(self, encoding: Encoding, projected: Tensor) -> Tensor:
        p, n = self.projector_prefix, encoding.layouts[0].n_tokens
        full = projected.new_zeros(len(projected), p + n, projected.shape[-1])
        full[:, :p] = projected[:, :p]
        image = torch.cat([torch.full_like(alive, i) for i, alive in enumerate(encoding.alive)])
        rows = torch.cat(list(self._rows(encoding, projected[:, p:])))
        return full.index_put((image, torch.cat(encoding.alive) + p), rows)


class PackedViT(VisionTower):
    """Encoders that pack all images into one [patches, D] sequence and merge `unit` patches into a token.

    Patches of one token are neighbours; tokens may stand in another order than the language model sees them
    (window attention), which `order` undoes.

    Args:
        module, layers, projector: see :class:`VisionTower`.
        unit: patches per token.
        channels: of a pixel.
        order: grid_thw [images, 3] -> index [tokens] of the language-model token at every packed position.
        tap: layer index -> AttentionTap.
        side_outputs: see :class:`VisionTower`.
    """

    has_cls = False
    restores = True

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[nn.Module],
        projector: nn.Module,
        unit: int,
        channels: int,
        order: Callable[[Tensor], Tensor],
        tap: Callable[[int], AttentionTap],
        side_outputs: Sequence[nn.Module] = (),
    ) -> None:
        self.module, self.entry, self.layers, self.projector = module, module, layers, projector
        self.used_layers, self.side_outputs = len(layers), side_outputs
        self.unit, self.channels = unit, channels
        self._order, self._tap = order, tap

    def open(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], call: FeatureCall | None) -> Encoding:
        pixels: Tensor = args[0] if args else kwargs["hidden_states"]
        grid: Tensor = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        side = int(self.unit**0.5)
        layouts = []
        for image, (t, h, w) in enumerate(grid.tolist()):
            # The grid alone does not tell a picture from a video of one frame.
            modality = call.modality if call is not None else "video" if t > 1 else "image"
            layouts += [TokenLayout(h // side, w // side, modality, image, time) for time in range(t)]
        sizes = [layout.n_tokens * self.unit for layout in layouts]
        encoding = Encoding(self, layouts, lambda: pixels.split(sizes), pixels.device)
        order = self._order(grid).to(pixels.device, non_blocking=True)
        encoding.extra.update(order=order, full_order=order, rows=None)
        return encoding

    def tap(self, layer: int) -> AttentionTap:
        return self._tap(layer)

    def measure(
        self,
        encoding: Encoding,
        signal: Signal,
        seen: Attended,
    ) -> Rows:
        if signal.kind == "attention_map":
            return self._maps(encoding, seen)
        if signal.kind == "received_attention":
            per_patch = torch.empty(*seen.q.shape[1:3], device=seen.q.device)  # [H, L]
            for index in self._segments(encoding, seen.kwargs["cu_seqlens"]):
                q, k = (x[0][:, index].transpose(0, 1) for x in (seen.q, seen.k))
                received = ops.received_attention(q, k, seen.scale)
                per_patch[:, index] = received.transpose(0, 1)
            per_patch = per_patch.transpose(0, 1)
        else:
            per_patch = per_token(signal, seen)[0]
        # A token is the mean of its patches.
        return self._in_order(encoding, per_patch.unflatten(0, (-1, self.unit)).mean(1))

    def pixels(self, encoding: Encoding) -> list[Tensor]:
        # Patches come as [C T h w], in the order of the tokens; windows are made later.
        shape = (-1, self.unit, self.channels, encoding.pictures()[0].shape[1] // self.channels)
        return [p.reshape(shape).transpose(1, 2).flatten(2) for p in encoding.pictures()]

    def _lengths(self, encoding: Encoding, borders: Tensor) -> list[int]:
        """Patches of every segment of attention; read from the device once per tensor, not in every layer."""
        known: dict[int, tuple[Tensor, list[int]]] = encoding.extra.setdefault("lengths", {})
        if id(borders) not in known:
            known[id(borders)] = borders, borders.diff().tolist()
        return known[id(borders)][1]

    def _segments(self, encoding: Encoding, borders: Tensor) -> list[Tensor]:
        """Patches [S, n] of all segments of attention that have n, for every n."""
        known: dict[int, tuple[Tensor, list[Tensor]]] = encoding.extra.setdefault("segments", {})
        if id(borders) not in known:
            groups: dict[int, list[int]] = {}
            start = 0
            for n in self._lengths(encoding, borders):
                groups.setdefault(n, []).append(start)
                start += n
            index = [
                (torch.tensor(starts).unsqueeze(1) + torch.arange(n)).to(encoding.device, non_blocking=True)
                for n, starts in groups.items()
            ]
            known[id(borders)] = borders, index
        return known[id(borders)][1]

    def _maps(self, encoding: Encoding, seen: Attended) -> list[Tensor]:
        """[K, K] attention between the tokens of every image; zero across windows."""
        lengths = self._lengths(encoding, seen.kwargs["cu_seqlens"])
        parts = zip(seen.q.split(lengths, 2), seen.k.split(lengths, 2), strict=True)
        blocks = [ops.attention_rows(a, b, seen.scale).mean(1)[0] for a, b in parts]
        # A token's query is the mean of its patches' rows, what it receives the sum of their columns.
        u = self.unit
        blocks = [b.unflatten(0, (-1, u)).mean(1).unflatten(1, (-1, u)).sum(2) for b in blocks]
        index = encoding.extra["order"].argsort()
        whole = torch.block_diag(*blocks)[index][:, index]
        out, start = [], 0
        for n in encoding.counts:
            out.append(whole[start : start + n, start : start + n])
            start += n
        return out

    def _in_order(self, encoding: Encoding, packed: Tensor) -> Rows:
        order: Tensor = encoding.extra["order"]
        rows, counts = packed[order.argsort()], encoding.counts
        if len(set(counts)) == 1:
            return rows.view(len(counts), -1, *rows.shape[1:])
        return list(rows.split(counts))

    def read(self, encoding: Encoding, hidden: Tensor, at_projector: bool) -> Rows:
        return self._in_order(encoding, hidden.reshape(len(hidden) // self.unit, -1))

    def reduce(
        self, encoding: Encoding, hidden: Tensor, rows: Sequence[Tensor], at_projector: bool
    ) -> Tensor:
        offsets = [0]
        for layout in encoding.layouts:
            offsets.append(offsets[-1] + layout.n_tokens)
        ids = torch.cat([alive + start for alive, start in zip(encoding.alive, offsets, strict=False)])
        order: Tensor = encoding.extra["order"]
        # Ascending places of those that stay; their number is known, so that nothing waits for the device.
        stays = torch.isin(order, ids).to(torch.uint8)
        places = stays.sort(descending=True, stable=True).indices[: len(ids)]
        kept_order = order[places]
        old_rows = encoding.extra["rows"]
        index = (places.unsqueeze(1) * self.unit + torch.arange(self.unit, device=order.device)).flatten()
        encoding.extra.update(order=kept_order, rows=index if old_rows is None else old_rows[index])
        tokens = torch.cat(list(rows))[torch.searchsorted(ids, kept_order)]
        return tokens.reshape(len(tokens) * self.unit, -1)

    def adapt(self, encoding: Encoding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        rows: Tensor | None = encoding.extra["rows"]
        if rows is None:
            return args, kwargs
        # Layers are given the same tables and the same few tensors of borders, over and over.
        done: dict[tuple[int, int], tuple[Tensor, Tensor]] = encoding.extra.setdefault("adapted", {})

        def adapted(given: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
            key = id(given), encoding.fired
            if key not in done:
                done[key] = given, change(given)
            return done[key][1]

        def moved(borders: Tensor) -> Tensor:
            alive = torch.zeros(n_patches + 1, dtype=torch.int64, device=rows.device)
            alive[rows + 1] = 1
            here = alive.cumsum(0)[borders.long()].to(borders.dtype)
            # A window may have lost all its tokens (their number is data). `max_seqlen` stays a valid upper bound.
            left: Tensor = torch.unique_consecutive(here)
            return left

        tables = kwargs["position_embeddings"]
        n_patches = len(tables[0])
        return args, {
            **kwargs,
            "position_embeddings": tuple(adapted(t, lambda t: t[rows]) for t in tables),
            "cu_seqlens": adapted(kwargs["cu_seqlens"], moved),
        }

    def restore(self, encoding: Encoding, projected: Tensor) -> Tensor:
        full_order: Tensor = encoding.extra["full_order"]
        full = projected.new_zeros(len(full_order), projected.shape[-1])
        return full.index_put((encoding.extra["order"],), projected)[full_order]


class PackedGrid(VisionTower):
    """Encoders that pack all images into one [1, patches, D] sequence in raster order, such as Pixtral.

    Several patches become a token behind the encoder, so that tokens cannot be removed in it; signals can be read.

    Args:
        module, layers: see :class:`VisionTower`.
        patch: pixels along one side of a patch.
        merge: patches along one side of a token.
        tap: layer index -> AttentionTap.
    """

    has_cls = False
    restores = True
    projector = None

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[nn.Module],
        patch: int,
        merge: int,
        tap: Callable[[int], AttentionTap],
    ) -> None:
        self.module, self.entry, self.layers, self.used_layers = module, module, layers, len(layers)
        self.patch, self.merge, self._tap = patch, merge, tap

    def open(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], call: FeatureCall | None) -> Encoding:
        pixels: Tensor = args[0] if args else kwargs["pixel_values"]
        sizes = kwargs.get("image_sizes")
        sizes = [tuple(pixels.shape[-2:])] * len(pixels) if sizes is None else torch.as_tensor(sizes).tolist()
        patches = [(int(h) // self.patch, int(w) // self.patch) for h, w in sizes]
        layouts = [TokenLayout(h // self.merge, w // self.merge, image=i) for i, (h, w) in enumerate(patches)]
        crops = [p[:, :h, :w] for p, (h, w) in zip(pixels, sizes, strict=True)]
        encoding = Encoding(self, layouts, lambda: crops, pixels.device)
        encoding.extra["patches"] = patches
        return encoding

    def tap(self, layer: int) -> AttentionTap:
        return self._tap(layer)

    def measure(
        self,
        encoding: Encoding,
        signal: Signal,
        seen: Attended,
    ) -> Rows:
        patches: list[tuple[int, int]] = encoding.extra["patches"]
        lengths = [h * w for h, w in patches]
        out = []
        for grid, layout, a, b in zip(
            patches, encoding.layouts, seen.q.split(lengths, 2), seen.k.split(lengths, 2), strict=True
        ):
            new = (layout.rows, layout.cols)
            if signal.kind == "attention_map":
                out.append(block_map(ops.attention_rows(a, b, seen.scale).mean(1), 0, grid, new)[0])
                continue
            part = Attended(a, b, None, None, seen.scale, seen.kwargs)
            received = signal.kind == "received_attention"
            values = (
                ops.received_attention(a, b, seen.scale).transpose(1, 2)
                if received
                else per_token(signal, part)
            )
            out.append(resample(values, grid, new)[0])
        return out

    def pixels(self, encoding: Encoding) -> list[Tensor]:
        side = self.patch * self.merge
        return [
            cut(p[None, :, : grid.rows * side, : grid.cols * side], grid.rows, grid.cols)[0]
            for p, grid in zip(encoding.pictures(), encoding.layouts, strict=True)
        ]

    def read(self, encoding: Encoding, hidden: Tensor, at_projector: bool) -> list[Tensor]:
        raise VTPruneError(WHOLE)

    def reduce(
        self, encoding: Encoding, hidden: Tensor, rows: Sequence[Tensor], at_projector: bool
    ) -> Tensor:
        raise VTPruneError(WHOLE)

    def adapt(self, encoding: Encoding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        raise VTPruneError(WHOLE)

    def restore(self, encoding: Encoding, projected: Tensor) -> Tensor:
        raise VTPruneError(WHOLE)
