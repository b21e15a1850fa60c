"""What a pruned stock model must answer, for every family, by hiding instead of removing.

Nothing here is shared with the library. A :class:`Judge` lets the stock code of `transformers` run one row at a
time, without padding and without a cache, on a copy of the model that was built from its configuration and
weights alone (so it carries no hooks). Embeddings, positions, masks, DeepStack and heads are therefore stock. The
judge changes what a decoder layer is given in three places only: columns that are gone are closed in the
explicit mask that eager attention gets, rotary tables are recomputed for renumbered positions, and features that
the caller merged replace those of a column. A token that nobody attends to is as good as removed; the self tests
prove that by cutting it out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Row = Mapping[str, Any]
Removed = Mapping[int, Collection[int]]
"""Decoder layer -> prompt columns that are gone from this layer on; 0 is before the language model."""
Merged = Iterable[tuple[int, int, Tensor | Mapping[int, float]]]
"""(layer, column, value): the vector that this column enters the layer with; 0 is `inputs_embeds`. A mapping
column -> weight is the weighted sum of what these columns would have entered it with."""
Positions = Literal["original", "dense"] | Collection[int]
"""Whether survivors keep their positions, or move down for every removed column (of these) before them."""

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
ANYRES = ("llava_next", "llava_next_video", "llava_onevision")
CHOPPED = ("idefics3", "smolvlm")


@dataclass(frozen=True)
class Unit:
    """One still image, one tile of a picture, or one frame of a video.

    Attributes:
        kind: "image" or "video", by the placeholder token.
        columns: where its tokens lie in the prompt, in raster order.
        rows, cols: its grid; (1, n) where the tokens have none.
        picture: ordinal of the image or video within the row, counted per kind (idefics3, smolvlm and internvl
            do not tell which tiles belong together: every tile counts).
        part: number of the tile or frame within it.
        top, left: where its grid begins in that of the whole picture, for tiles of a composite.
    """

    kind: str
    columns: tuple[int, ...]
    rows: int
    cols: int
    picture: int
    part: int = 0
    top: int = 0
    left: int = 0


@dataclass(frozen=True)
class Prompt:
    """The visual part of a row.

    Attributes:
        length: prompt columns.
        units: in reading order.
        loose: placeholder columns of no unit: line breaks, and the [CLS] of a Video-LLaVA frame.
    """

    length: int
    units: tuple[Unit, ...]
    loose: tuple[int, ...]

    @property
    def columns(self) -> tuple[int, ...]:
        """Columns of all units, ascending."""
        return tuple(sorted(c for u in self.units for c in u.columns))


@dataclass
class Seen:
    """What the language model was given and gave back in one run.

    Attributes:
        embeds: [n, D] its `inputs_embeds`.
        positions: what its rotary module got, [1, n] or [3, 1, n], before any renumbering.
        masks: per layer which pairs (query, key) may attend, [n, n] bool, with removed columns closed.
        layer_masks: the same without removal, i.e. as stock code made them.
        attention: layer -> [heads, n, n] softmax attention.
        visual_embeds: DeepStack features, per layer [visual columns, D].
        encoded: "image" or "video" -> what stock `get_*_features` calls projected.
        logits: [n, V], or hidden states for a model without a head.
    """

    embeds: Tensor
    positions: Tensor
    masks: list[Tensor] = field(default_factory=list)
    layer_masks: list[Tensor] = field(default_factory=list)
    attention: dict[int, Tensor] = field(default_factory=dict)
    visual_embeds: list[Tensor] = field(default_factory=list)
    encoded: dict[str, Any] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def rebuilt(model: nn.Module, attention: str | None = None) -> Any:
    """A new instance from configuration and weights: no hooks, no instance attributes of the given model."""
    how = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng():
        fresh = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32, **how)
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()


class Judge:
    """Expected results of one stock vision-language model.

    Args:
        model: an unpatched model in float32; it is copied and may be patched afterwards.
        resampled: to which tile a resampled cell of LLaVA-OneVision belongs. "formula": tile row
            floor((r + 1/2) * tiles / rows). "centre": the tile that holds the cell's centre when the part that was
            cut off as padding is put back. They differ for three or more tiles along the axis that was cut.
    """

    def __init__(self, model: nn.Module, resampled: Literal["formula", "centre"] = "centre") -> None:
        self.model = rebuilt(model, "eager")
        self.stock = rebuilt(model)
        self.config = self.model.config
        self.family: str = self.config.model_type
        self.base = self.model.model if hasattr(self.model, "lm_head") else self.model
        self.decoder = self.base.text_model if self.family in CHOPPED else self.base.language_model
        self.layers: Sequence[Any] = self.decoder.layers
        self.resampled = resampled
        self.tokens = {
            kind: next(
                (
                    value
                    for name in (f"{kind}_token_id", f"{kind}_token_index")
                    if (value := getattr(self.config, name, None)) is not None
                ),
                None,
            )
            for kind in ("image", "video")
        }

    # ------------------------------------------------------------------ logits

    def stock_logits(self, row: Row, continuation: Sequence[int] | Tensor | None = None) -> Tensor:
        """Logits [n, V] of the stock model with its own attention implementation, nothing touched."""
        with torch.no_grad():
            return _head(self.stock(**self.extended(row, continuation), use_cache=False))

    def logits(
        self,
        row: Row,
        removed: Removed | None = None,
        continuation: Sequence[int] | Tensor | None = None,
        positions: Positions = "original",
        merged: Merged = (),
        merged_deepstack: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Logits [n, V] of prompt and continuation; NaN at removed columns.

        Args:
            row: inputs of one row without padding.
            removed: see :data:`Removed`.
            continuation: text tokens behind the prompt, as if generated.
            positions: see :data:`Positions`.
            merged: see :data:`Merged`.
            merged_deepstack: column -> [DeepStack layers, D], for Qwen3-VL.
        """
        return self.run(row, removed, continuation, positions, merged, merged_deepstack).logits

    def greedy(
        self, row: Row, steps: int, start: Sequence[int] = (), banned: Sequence[int] = (), **how: Any
    ) -> list[int]:
        """Greedy text after `start`, everything run anew for every token; `how` as for :meth:`logits`."""
        text = list(start)
        for _ in range(steps):
            scores = self.logits(row, continuation=text, **how)[-1].clone()
            scores[list(banned)] = -math.inf
            text.append(int(scores.argmax()))
        return text[len(start) :]

    def attention(self, row: Row, layer: int, **how: Any) -> Tensor:
        """Softmax attention [heads, n, n] of a decoder layer; `how` as for :meth:`logits`."""
        return self.run(row, attention=(layer,), **how).attention[layer]

    def extended(self, row: Row, continuation: Sequence[int] | Tensor | None = None) -> dict[str, Any]:
        """Inputs of the row followed by text, as a call without cache that generation's last step equals."""
        ids = row["input_ids"]
        if ids.shape[0] != 1:
            raise ValueError("the judge takes one row at a time")
        mask = row.get("attention_mask")
        if mask is not None and (mask.shape != ids.shape or not bool(mask.bool().all())):
            raise ValueError("the judge takes rows without padding")
        more = torch.as_tensor([] if continuation is None else continuation, dtype=ids.dtype).reshape(1, -1)
        if any(bool((more == t).any()) for t in self.tokens.values() if t is not None):
            raise ValueError("a continuation is text; it holds a placeholder")
        inputs = dict(row)
        # A generated token of PaliGemma belongs to the causal suffix (1); elsewhere 0 is text.
        fill = {
            "attention_mask": 1,
            "mm_token_type_ids": 0,
            "token_type_ids": int(self.family == "paligemma"),
        }
        for key, value in fill.items():
            if key in row and row[key] is not None:
                inputs[key] = torch.cat([row[key], torch.full_like(more, value, dtype=row[key].dtype)], 1)
        inputs["input_ids"] = torch.cat([ids, more], 1)
        return inputs

    def run(
        self,
        row: Row,
        removed: Removed | None = None,
        continuation: Sequence[int] | Tensor | None = None,
        positions: Positions = "original",
        merged: Merged = (),
        merged_deepstack: Mapping[int, Tensor] | None = None,
        attention: Collection[int] = (),
    ) -> Seen:
        """One run with everything that was seen on the way."""
        inputs = self.extended(row, continuation)
        n = inputs["input_ids"].shape[1]
        plan = {layer: set(columns) for layer, columns in (removed or {}).items() if columns}
        if any(not 0 <= layer < len(self.layers) for layer in plan):
            raise ValueError(f"there are {len(self.layers)} layers")
        if any(not 0 <= c < row["input_ids"].shape[1] for columns in plan.values() for c in columns):
            raise ValueError("only prompt columns can be removed")
        if sum(map(len, plan.values())) != len(set().union(*plan.values())):
            raise ValueError("a column is removed twice")
        everything = set().union(*plan.values())
        if isinstance(positions, str):
            closing = everything if positions == "dense" else set()
        else:
            closing = set(positions) & everything
        changes: dict[int, dict[int, Tensor | Mapping[int, float]]] = {}
        for layer, column, value in merged:
            changes.setdefault(layer, {})[column] = value

        def gone(layer: int) -> set[int]:
            return set().union(*(columns for first, columns in plan.items() if first <= layer))

        def mixed(before: Tensor, values: Mapping[int, Tensor | Mapping[int, float]]) -> Tensor:
            after = before.clone()
            for column, value in values.items():
                if isinstance(value, Mapping):
                    after[0, column] = sum(w * before[0, c] for c, w in value.items())
                else:
                    after[0, column] = value
            return after

        calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        seen: list[Seen] = []

        def enter_model(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            kwargs["inputs_embeds"] = embeds = mixed(kwargs["inputs_embeds"], changes.get(0, {}))
            if merged_deepstack:
                order = kwargs["visual_pos_masks"][0].nonzero()[:, 0].tolist()
                stacks = [x.clone() for x in kwargs["deepstack_visual_embeds"]]
                for column, values in merged_deepstack.items():
                    for stack, value in zip(stacks, values, strict=True):
                        stack[order.index(column)] = value
                kwargs["deepstack_visual_embeds"] = stacks
            seen.append(Seen(embeds[0].clone(), torch.empty(0)))
            seen[0].visual_embeds = list(kwargs.get("deepstack_visual_embeds") or [])
            return args, kwargs

        def rotary(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            calls.append((args, kwargs, output))
            seen[0].positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

        def enter_layer(layer: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
                hidden, *rest = args
                if layer and layer in changes:
                    hidden = mixed(hidden, changes[layer])
                mask = kwargs["attention_mask"]
                assert mask.is_floating_point()
                assert mask.shape == (1, 1, n, n)
                seen[0].layer_masks.append(mask[0, 0] == 0)
                closed = sorted(gone(layer))
                mask = mask.clone()
                mask[..., closed] = torch.finfo(mask.dtype).min
                kwargs["attention_mask"] = mask
                seen[0].masks.append(mask[0, 0] == 0)
                moved = sorted(gone(layer) & closing)
                if moved:
                    call = next(c for c in calls if c[2] is kwargs["position_embeddings"])
                    shift = torch.tensor([sum(g < c for g in moved) for c in range(n)])
                    kwargs["position_embeddings"] = self._rotary(call, shift)
                    ids = kwargs.get("position_ids")
                    if ids is not None:
                        kwargs["position_ids"] = ids - shift
                return (hidden, *rest), kwargs

            return hook

        def keep_attention(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen[0].attention[layer] = output[1][0]

            return hook

        handles = [
            self.decoder.register_forward_pre_hook(enter_model, with_kwargs=True),
            self.decoder.rotary_emb.register_forward_hook(rotary, with_kwargs=True),
        ]
        for number, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(enter_layer(number), with_kwargs=True))
            if number in attention:
                handles.append(layer.self_attn.register_forward_hook(keep_attention(number)))
        try:
            with torch.no_grad(), self._encoded() as encoded:
                logits = _head(self.model(**inputs, use_cache=False)).clone()
        finally:
            for handle in handles:
                handle.remove()
        logits[sorted(everything)] = math.nan
        assert len(seen) == 1
        assert len(seen[0].masks) == len(self.layers)
        seen[0].logits, seen[0].encoded = logits, encoded
        return seen[0]

    def _rotary(self, call: tuple[tuple[Any, ...], dict[str, Any], Any], shift: Tensor) -> Any:
        args, kwargs = list(call[0]), dict(call[1])
        where: Any = (kwargs, "position_ids") if "position_ids" in kwargs else (args, 1)
        old = where[0][where[1]]
        if old.ndim != 2:
            raise ValueError("dense positions have no meaning with multi-dimensional positions")
        where[0][where[1]] = old - shift
        return self.decoder.rotary_emb.forward(*args, **kwargs)

    @contextmanager
    def _encoded(self) -> Iterator[dict[str, Any]]:
        """Records what the stock `get_image_features` and `get_video_features` project."""
        found: dict[str, Any] = {}
        inside: list[str] = []

        def recorder(kind: str, stock: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                # Qwen3-VL encodes videos through the method for images.
                inside.append(kind)
                output = stock(*args, **kwargs)
                inside.pop()
                if not inside:
                    assert kind not in found
                    found[kind] = output.pooler_output
                return output

            return wrapper

        names = {kind: f"get_{kind}_features" for kind in self.tokens}
        names = {kind: name for kind, name in names.items() if hasattr(self.base, name)}
        for kind, name in names.items():
            setattr(self.base, name, recorder(kind, getattr(self.base, name)))
        try:
            yield found
        finally:
            for name in names.values():
                delattr(self.base, name)

    @staticmethod
    def shown(logits: Tensor) -> Tensor:
        """Removed columns show what the last surviving one before them shows; NaN where there is none."""
        out = logits.clone()
        for i in range(1, len(out)):
            if bool(out[i].isnan().all()):
                out[i] = out[i - 1]
        return out

    # ------------------------------------------------------------------ pictures

    def encoder_features(self, row: Row) -> list[Tensor]:
        """Per unit the projected features [columns, D], as they stand in `inputs_embeds`."""
        embeds = self.run(row).embeds
        return [embeds[list(unit.columns)] for unit in self.prompt(row).units]

    def deepstack_features(self, row: Row) -> list[Tensor]:
        """Per unit the DeepStack features [DeepStack layers, columns, D] of Qwen3-VL."""
        prompt, stacks = self.prompt(row), torch.stack(self.run(row).visual_embeds)
        return [stacks[:, [prompt.columns.index(c) for c in unit.columns]] for unit in prompt.units]

    def prompt(self, row: Row) -> Prompt:
        """The units of one row."""
        ids = row["input_ids"][0].tolist()
        units: list[Unit] = []
        encoded: dict[str, Any] | None = None
        for kind, token in self.tokens.items():
            columns = [c for c, t in enumerate(ids) if t == token]
            if not columns or token is None:
                continue
            if encoded is None:
                encoded = self.run(row).encoded
            at = 0
            for picture, cells in enumerate(self._pictures(kind, row, encoded, len(columns))):
                mine = columns[at : at + len(cells)]
                at += len(cells)
                parts: dict[int, list[tuple[int, tuple[int, int]]]] = {}
                for column, cell in zip(mine, cells, strict=True):
                    if cell is not None:
                        parts.setdefault(cell[0], []).append((column, cell[1:]))
                for part, found in sorted(parts.items()):
                    lines, across = ({place[i] for _, place in found} for i in (0, 1))
                    assert len(found) == len(lines) * len(across), "a unit is no rectangle"
                    where = tuple(c for c, _ in found)
                    corner = min(lines), min(across)
                    units.append(Unit(kind, where, len(lines), len(across), picture, part, *corner))
            assert at == len(columns), f"{len(columns)} placeholders, {at} features"
        # The base view comes first; high-resolution tiles interleave, so they are told apart by their first column.
        units.sort(key=lambda u: u.columns[0])
        taken = {c for u in units for c in u.columns}
        visual = {t for t in self.tokens.values() if t is not None}
        loose = tuple(c for c, t in enumerate(ids) if t in visual and c not in taken)
        return Prompt(len(ids), tuple(units), loose)

    def _pictures(
        self, kind: str, row: Row, encoded: Mapping[str, Any], total: int
    ) -> list[list[tuple[int, int, int] | None]]:
        """Per picture, in order: (part, row, column) of every placeholder, or None for one of no unit."""
        if self.family in QWEN:
            merge = self.config.vision_config.spatial_merge_size
            grids = row["image_grid_thw" if kind == "image" else "video_grid_thw"].tolist()
            return [
                [c for part in range(t) for c in raster(part, h // merge, w // merge)] for t, h, w in grids
            ]
        if self.family in CHOPPED:
            size = self.base.image_seq_len
            return [list(square(0, size)) for _ in range(total // size)]
        if self.family in ANYRES and kind == "image":
            return self._composites(row, [len(f) for f in encoded["image"]])
        if self.family == "mistral3":
            patch = self.config.vision_config.patch_size * self.config.spatial_merge_size
            return [list(raster(0, int(h) // patch, int(w) // patch)) for h, w in row["image_sizes"]]
        if kind == "image":
            return [list(square(0, len(f))) for f in encoded["image"]]
        videos, frames = row["pixel_values_videos"].shape[:2]
        each = total // videos
        cells: list[tuple[int, int, int] | None]
        if self.family == "llava_onevision":
            # One line break ends a video.
            cells = [c for part in range(frames) for c in square(part, (each - 1) // frames)] + [None]
        elif self.family == "video_llava":
            # The tower's [CLS] is dropped for images and kept for videos.
            cells = [c for part in range(frames) for c in (None, *square(part, each // frames - 1))]
        else:
            cells = [c for part in range(frames) for c in square(part, each // frames)]
        return [list(cells) for _ in range(videos)]

    def _composites(self, row: Row, lengths: Sequence[int]) -> list[list[tuple[int, int, int] | None]]:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        several = row.get("batch_num_images")
        pictures = []
        for (height, width), length in zip(row["image_sizes"].tolist(), lengths, strict=True):
            cells: list[tuple[int, int, int] | None] = list(raster(0, side, side))
            if several is not None and int(several[0]) != 1:
                cells.append(None)
            else:
                for line in self._composite(height, width, side):
                    cells += [*line, None]
            assert len(cells) == length, f"{len(cells)} cells by geometry, {length} features"
            pictures.append(cells)
        return pictures

    def _composite(self, height: int, width: int, side: int) -> list[list[tuple[int, int, int]]]:
        """Lines of the high-resolution composite: (tile, row, column) of every cell, tile 1 is the first."""
        size = self.config.vision_config.image_size
        best_height, best_width = best_resolution(height, width, self.config.image_grid_pinpoints)
        high, wide = best_height // size, best_width // size
        full = (high * side, wide * side)
        # The picture was scaled into the composite and centred; cells that show only padding are cut off.
        cut = [0, 0]
        if width / height > full[1] / full[0]:
            cut[0] = (full[0] - int(round(height * full[1] / width, 7))) // 2
        else:
            cut[1] = (full[1] - int(round(width * full[0] / height, 7))) // 2
        left = [full[i] - 2 * cut[i] for i in (0, 1)]
        size_now = list(left)
        if self.family == "llava_onevision":
            limit = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
            ratio = math.sqrt(left[0] * left[1] / (limit * side**2))
            if ratio > 1.1:
                size_now = [int(x // ratio) for x in left]

        def tile(i: int, axis: int, tiles: int) -> int:
            if size_now == left:
                return (cut[axis] + i) // side
            if self.resampled == "formula":
                return math.floor((i + 0.5) * tiles / size_now[axis])
            return math.floor((cut[axis] + (i + 0.5) * left[axis] / size_now[axis]) / side)

        return [
            [(1 + tile(r, 0, high) * wide + tile(c, 1, wide), r, c) for c in range(size_now[1])]
            for r in range(size_now[0])
        ]


def _head(output: Any) -> Tensor:
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state)[0]


def raster(part: int, rows: int, cols: int) -> Iterator[tuple[int, int, int]]:
    """(part, row, column) of a grid in raster order."""
    return ((part, r, c) for r in range(rows) for c in range(cols))


def square(part: int, n: int) -> Iterator[tuple[int, int, int]]:
    """The square grid of n tokens; one line if n is no square."""
    side = math.isqrt(n)
    return raster(part, side, side) if side * side == n else raster(part, 1, n)


def best_resolution(height: int, width: int, candidates: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The (height, width) that shows most pixels of the picture and, among those, wastes least; the first wins."""

    def quality(candidate: Sequence[int]) -> tuple[int, int]:
        scale = min(candidate[1] / width, candidate[0] / height)
        useful = min(int(width * scale) * int(height * scale), width * height)
        return useful, useful - candidate[0] * candidate[1]

    best = max(candidates, key=quality)
    return best[0], best[1]
