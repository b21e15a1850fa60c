"""The algebra of slots: what a pruned sequence looks like in every decoder layer.

The sequence a layer sees is a list of slots. A *segment* is a run of decoder layers that hold the same slots;
the first begins at layer 0, each decoder stage begins another. Hidden states, positions, masks and caches of a
segment are all applications of one index from slots to the columns of the prompt as the caller knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtprune import ops
from vtprune.engine.cache import CacheState, SegmentState, physical_length
from vtprune.errors import UnsupportedCallError


@dataclass
class Segment:
    """The new slots of one forward pass in the layers from `first_layer` to the next segment.

    Attributes:
        first_layer: first decoder layer.
        n_slots: new slots per row, padding included.
        col: [B, n_slots] prompt column of each new slot; None while nothing was removed.
        valid: [B, n_slots] bool, None when no new slot is padding.
        all_valid: [B, past + n_slots] bool or None, see `valid`.
        shift: [B] positions taken off by dense renumbering, None for none.
        columns: [B, past + n_slots] column of every slot in the whole sequence, where windows need it.
        index: [B, n_slots] slots of these tokens in the first segment; None in the first segment itself.
        renumbered: whether positions differ from those of the first segment.
        tables: kind of layer -> position embeddings of these slots, as layers take them.
        masks: kind of layer -> attention mask, as layers take it.
        position_ids: for layers that hand them on to their attention.
    """

    first_layer: int
    n_slots: int
    col: Tensor | None
    valid: Tensor | None
    all_valid: Tensor | None
    shift: Tensor | None
    columns: Tensor | None
    index: Tensor | None = None
    renumbered: bool = False
    tables: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    masks: dict[str, Any] = field(default_factory=dict)
    position_ids: Tensor | None = None


@dataclass
class TokenSequence:
    """The new tokens of one forward pass of the language model, and what is left of them.

    Attributes:
        batch, length: rows and new tokens per row as the caller counts them.
        device: where it lives.
        cache: the key-value cache or None.
        state: what a pruned cache knows before the pass.
        history: slots of an unpruned cache before the pass.
        past: length of the sequence before the pass, as the caller counts it.
        new_valid: [B, length] bool from the caller's mask, None when it has no padding.
        host_valid: the same on the host.
        left: whether padding goes before the tokens.
        windowed: whether the columns of slots have to be remembered.
        counts: valid new tokens per row now (host).
        alive: [B, length] bool, False for padding and removed tokens; None while nothing was removed.
        renumbered: [B, length] bool, True for tokens removed by a stage that renumbers positions.
        positions: position ids as they would be without pruning, [B, length] or [3 | 4, B, length].
        segments: so far.
    """

    batch: int
    length: int
    device: torch.device
    cache: Any
    state: CacheState | None
    history: SegmentState | None
    past: int
    new_valid: Tensor | None
    host_valid: Tensor | None
    left: bool
    windowed: bool
    counts: list[int]
    alive: Tensor | None = None
    renumbered: Tensor | None = None
    positions: Tensor | None = None
    segments: list[Segment] = field(default_factory=list)

    @classmethod
    def open(
        cls, embeds: Tensor, mask: Tensor | None, cache: Any, state: CacheState | None, windowed: bool
    ) -> TokenSequence:
        """Describes the new tokens of a pass.

        Args:
            embeds: [B, length, D].
            mask: the caller's [B, past + length] mask or None. It is copied to the host once, but not in decoding single
                tokens of a single row (which are no padding) or behind rows with padding (which are masked anyway).
            windowed: see :class:`TokenSequence`.
        """
        batch, length = embeds.shape[:2]
        new_valid: Tensor | None = None
        host: Tensor | None = None
        host_valid: Tensor | None = None
        left = True
        counts = [length] * batch
        if mask is not None and state is not None and length == 1 and (batch == 1 or state.padded):
            new_valid = mask[:, -1:].to(embeds.device, torch.bool) if state.padded else None
        elif mask is not None:
            host = mask.to("cpu", torch.bool)
            host_valid = host[:, -length:]
            counts = host_valid.sum(1).tolist()
            if min(counts) == length:
                host_valid = None
            else:
                new_valid = mask[:, -length:].to(embeds.device, torch.bool)
                left = bool(host_valid[:, -1].all())
        past = state.logical if state is not None else physical_length(cache, 0)
        history: SegmentState | None = None
        if state is None and past:
            # A history of plain text, the same in all layers; its padding stands in the caller's mask only.
            valid: Tensor | None = None
            if host is not None and mask is not None and not bool(host[:, :past].all()):
                valid = mask[:, :past].to(embeds.device, torch.bool)
            columns = torch.arange(past, device=embeds.device).expand(batch, -1) if windowed else None
            history = SegmentState(0, past, valid, None, columns)
        return cls(
            batch,
            length,
            embeds.device,
            cache,
            state,
            history,
            past,
            new_valid,
            host_valid,
            left,
            windowed,
            counts,
        )

    @property
    def now(self) -> Segment:
        """The current segment."""
        return self.segments[-1]

    def set_positions(self, given: Tensor | None, mrope: bool) -> None:
        """Remembers the caller's position ids, or makes the ones the model would have made.

        Raises:
            UnsupportedCallError: they are not those of the new tokens, one for one.
        """
        # Stock generate() gives text behind a cache one axis for all three.
        fits = given is None or (
            given.ndim in (2, 3)
            and given.shape[-1] == self.length
            and given.shape[-2] in (1, self.batch)
            and (given.ndim == 2 or (mrope and len(given) in (1, 3, 4)))
        )
        if not fits:
            assert given is not None
            axes = (
                ", or [3 or 4, rows, columns] with an axis for time, height and width each" if mrope else ""
            )
            raise UnsupportedCallError(
                f"position_ids of shape {tuple(given.shape)} do not fit {self.batch} rows of {self.length} columns. Give "
                f"[rows, columns]{axes}; every column of the unpruned prompt has its own, padding too."
            )
        if given is None:
            given = torch.arange(self.past, self.past + self.length, device=self.device).expand(
                self.batch, -1
            )
            if mrope:
                given = given.expand(3, self.batch, -1)
        self.positions = given.expand(*given.shape[:-2], self.batch, -1)

    def drop(self, removed: Sequence[tuple[int, Tensor]], renumber: bool) -> None:
        """Marks tokens as removed.

        Args:
            removed: (row, columns [K]) pairs.
            renumber: whether later tokens move up in their positions.
        """
        places = flat(removed, self.device)
        if self.alive is None:
            ones = torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
            self.alive = ones if self.new_valid is None else self.new_valid.clone()
        gone = torch.zeros((), dtype=torch.bool, device=self.device)
        self.alive.index_put_(places, gone)
        for row, cols in removed:
            self.counts[row] -= len(cols)
        if renumber:
            if self.renumbered is None:
                self.renumbered = torch.zeros(self.batch, self.length, dtype=torch.bool, device=self.device)
            self.renumbered.index_put_(places, ~gone)

    def begin_segment(self, layer: int) -> Segment:
        """Starts a segment at a layer, from what is alive now."""
        past = self.history
        if self.state is not None:
            past = self.state.segments[len(self.segments)]
        shift = past.shift if past is not None else None
        if self.renumbered is not None:
            moved = self.renumbered.sum(1)
            shift = moved if shift is None else shift + moved
        col, valid, n_slots = None, self.new_valid, self.length
        if self.alive is not None:
            n_slots = max(self.counts)
            col, valid = ops.compact(self.alive, n_slots, self.left)
            if min(self.counts) == n_slots:
                valid = None
        all_valid = self._join(past, valid, n_slots)
        columns: Tensor | None = None
        if self.windowed:
            new = torch.arange(self.length, device=self.device).expand(self.batch, -1) if col is None else col
            columns = new + self.past
            if past is not None and past.columns is not None:
                columns = torch.cat([past.columns, columns], 1)
        segment = Segment(layer, n_slots, col, valid, all_valid, shift, columns)
        self.segments.append(segment)
        return segment

    def _join(self, past: SegmentState | None, valid: Tensor | None, n_slots: int) -> Tensor | None:
        before = past.valid if past is not None else None
        if before is None and valid is None:
            return None

        def real(n: int) -> Tensor:
            return torch.ones(self.batch, n, dtype=torch.bool, device=self.device)

        length = past.length if past is not None else 0
        return torch.cat(
            [real(length) if before is None else before, real(n_slots) if valid is None else valid], 1
        )

    def all_position_ids(self, segment: Segment) -> Tensor:
        """Position ids in a segment of all columns, [B, length] or [3 | 4, B, length]; of removed ones meaningless."""
        assert self.positions is not None
        positions, before = self.positions, segment.shift
        if self.renumbered is not None and before is not None:
            positions = positions - self.renumbered.cumsum(1)
            before = before - self.renumbered.sum(1)
        return positions if before is None else positions - before.unsqueeze(1)

    def position_ids(self, segment: Segment) -> Tensor:
        """Position ids of a segment's slots, [B, n_slots] or [3 | 4, B, n_slots]."""
        positions = self.all_position_ids(segment)
        return positions if segment.col is None else gather_positions(positions, segment.col)

    def slot_of(self, segment: Segment) -> Tensor:
        """[B, length] slot of every prompt column in a segment; meaningless for removed columns."""
        if segment.col is None:
            return torch.arange(self.length, device=self.device).expand(self.batch, -1)
        slots = torch.arange(segment.n_slots, device=self.device).expand(self.batch, -1)
        out = torch.zeros(self.batch, self.length + 1, dtype=torch.int64, device=self.device)
        col = segment.col if segment.valid is None else segment.col.masked_fill(~segment.valid, self.length)
        return out.scatter(1, col, slots)[:, :-1]

    def last_slot(self) -> Tensor:
        """[B, 1] slot of every row's last token in the current segment."""
        if self.now.valid is None or self.left:
            return torch.full((self.batch, 1), self.now.n_slots - 1, device=self.device)
        return self.now.valid.sum(1, keepdim=True) - 1

    def aligned(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, n_slots, D] at the caller's length: each column shows the last survivor up to it."""
        if self.alive is None:
            return hidden
        rank = self.alive.cumsum(1) - 1
        if self.left:
            rank = rank + (self.now.n_slots - self.alive.sum(1, keepdim=True))
        return ops.gather_tokens(hidden, rank.clamp(min=0))

    def cache_state(self, cache: Any, owner: int, report: Any) -> CacheState:
        """What a cache has to know after the pass."""
        segments = [
            SegmentState(
                s.first_layer, physical_length(cache, s.first_layer), s.all_valid, s.shift, s.columns
            )
            for s in self.segments
        ]
        pruned, since = self.alive, 0
        if pruned is None and self.state is not None:
            pruned, since = self.state.pruned, self.state.since + self.length
        return CacheState(owner, self.past + self.length, segments, report, pruned, since)


def flat(places: Sequence[tuple[int, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows [M] and columns [M] of (row, columns [K]) pairs, one behind the other."""
    # Rows are made on the host, where the numbers of columns are known, so that nothing waits for the device.
    lengths = torch.tensor([len(cols) for _, cols in places])
    rows = torch.tensor([row for row, _ in places]).repeat_interleave(lengths)
    return rows.to(device, non_blocking=True), torch.cat([cols for _, cols in places])


def gather_positions(ids: Tensor, index: Tensor) -> Tensor:
    """Columns `index` [B, K] of position ids [..., B or 1, L]."""
    return ops.gather_many([ids.unsqueeze(-1)], [index])[0].squeeze(-1)


def gather_tables(tables: Sequence[Tensor], index: Tensor) -> tuple[Tensor, ...]:
    """Rows `index` [B, K] of rotary tables [..., B or 1, L, D]."""
    return tuple(ops.gather_many(tables, [index] * len(tables)))
