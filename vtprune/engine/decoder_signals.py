"""What methods read of a language model: queries, keys and attention of some of its layers, beside its own attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune import ops
from vtprune.engine.journal import Journal
from vtprune.engine.prompt import PromptImage
from vtprune.engine.run import Run
from vtprune.engine.sequence import Segment, gather_tables
from vtprune.integrations.base import Decoder
from vtprune.method import CARRIED_SIGNALS, DECODER_SIGNALS, INPUT_SIGNALS, Signal

# Signals for which the last token's query suffices.
LAST = ("text_attention",)
CHUNK = 256  # query rows per step of a column sum


class DecoderSignals:
    """Reads signals of one language model.

    Args:
        decoder: the model.
        wanted: (signal, site layer) pairs; a signal of the very layer at whose input a stage acts is computed ahead.
        borders: layers at whose input tokens may be removed.
    """

    def __init__(
        self, decoder: Decoder, wanted: Iterable[tuple[Signal, int | None]], borders: Sequence[int] = ()
    ) -> None:
        self.decoder = decoder
        pairs = [(s, site) for s, site in wanted if s.kind in DECODER_SIGNALS]
        self.needs_inputs = any(s.kind in INPUT_SIGNALS for s, _ in pairs)
        tapped = [s for s, site in pairs if s.kind not in INPUT_SIGNALS and s.layer != site]
        self.layers = sorted({s.layer for s in tapped})
        self.crossing = {
            s for s, site in pairs if s.kind in CARRIED_SIGNALS for b in borders if s.layer < b < (site or 0)
        }
        self.all_queries = {s.layer for s in tapped if s.kind not in LAST}

    def attach(self, journal: Journal, run: Callable[[], Run | None]) -> None:
        """Registers hooks on the projections of the layers that are read."""
        for layer in self.layers:
            projections = self.decoder.projections(self.decoder.attention(layer))
            for name, projection in zip("qk", projections, strict=True):
                journal.hook(projection, self._capture(layer, name, run))

    def _capture(self, layer: int, name: str, current: Callable[[], Run | None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            run = current()
            if run is None or not run.images:
                return
            if name == "q":
                whole = layer in self.all_queries
                run.captured[layer, name] = (
                    output.detach() if whole else ops.gather_tokens(output.detach(), run.tokens.last_slot())
                )
            elif run.tokens.cache is None:  # a cache keeps the keys anyway
                run.captured[layer, name] = output.detach()

        return hook

    def carry(self, run: Run, layer: int, hidden: Tensor) -> None:
        """Measures what stages behind `layer` read of the layers in front of it, before tokens leave at its input."""
        segment = run.tokens.now
        for signal in self.crossing:
            if not segment.first_layer <= signal.layer < layer or signal in run.carried:
                continue
            slot_of = run.tokens.slot_of(segment)
            measured = self.measure(run, signal, hidden)
            run.carried[signal] = {}
            for image in run.images:
                rows = measured(image, slot_of[image.row, image.cols[image.alive]])
                full = rows.new_zeros(len(image.cols), *rows.shape[1:])
                full[image.alive] = rows
                run.carried[signal][id(image)] = full

    def measure(self, run: Run, signal: Signal, hidden: Tensor) -> Callable[[PromptImage, Tensor], Tensor]:
        """A signal of this pass, as a function (image, [K] slots of its tokens) -> token-first value.

        Args:
            hidden: [B, n_slots, D] states at the stage, for signals computed ahead.
        """
        if signal in run.carried:
            carried = run.carried[signal]
            return lambda image, slots: carried[id(image)][image.alive]
        with torch.no_grad():
            if signal.kind in INPUT_SIGNALS:
                return self._inputs(run, signal)
            q, k, visible, scale = self._attention(run, signal, hidden)
            new = run.tokens.now.n_slots
            if signal.kind == "decoder_keys":
                return lambda image, slots: k[image.row, :, -new:][:, slots].transpose(0, 1)
            if signal.kind == "decoder_queries":
                return lambda image, slots: q[image.row][:, slots].transpose(0, 1)
            if signal.kind == "text_attention":
                last = run.tokens.last_slot()
                if q.shape[2] > 1:
                    q = q.gather(2, last[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
                rows = ops.attention_rows(q, k, scale, visible(last))[:, :, 0, -new:]
                return lambda image, slots: rows[image.row][:, slots].transpose(0, 1)
            if signal.kind == "prompt_attention":
                return self._prompt(run, q, k, visible, scale)
            return self._received(run, signal, q, k, visible, scale)

    def _inputs(self, run: Run, signal: Signal) -> Callable[[PromptImage, Tensor], Tensor]:
        assert run.embeds is not None
        embeds = run.embeds
        if signal.kind == "input_features":
            return lambda image, slots: embeds[image.row, image.cols[image.alive]]
        return lambda image, slots: embeds[image.row, run.text_columns(image.row)]

    def _attention(
        self, run: Run, signal: Signal, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor], float]:
        """Rotated q [B, H, R, d] and k [B, H_kv, past + new, d], which keys queries [B, R] see, and the scale."""
        tokens, segment, layer = run.tokens, run.tokens.now, signal.layer
        attention: Any = self.decoder.attention(layer)
        kind = self.decoder.kinds[layer]
        ahead = layer not in self.layers or (layer, "q") not in run.captured
        if ahead and segment.first_layer <= layer:
            tables = self._tables_ahead(run, segment, kind, hidden)
            normed = self.decoder.layers[layer].get_submodule("input_layernorm").forward(hidden)
            raw_q, raw_k = (p.forward(normed) for p in self.decoder.projections(attention))
        else:
            tables = segment.tables[kind]
            raw_q, raw_k = run.captured[layer, "q"], run.captured.get((layer, "k"))

        def heads(x: Tensor, name: str) -> Tensor:
            x = x.unflatten(-1, (-1, attention.head_dim))
            norm = getattr(attention, f"{name}_norm", None)
            return (x if norm is None else norm.forward(x)).transpose(1, 2)

        q = heads(raw_q, "q")
        rows = gather_tables(tables, tokens.last_slot()) if q.shape[2] == 1 else tables
        q = self.decoder.rotate(attention, q, *rows)
        if raw_k is None:
            k: Tensor = tokens.cache.layers[layer].keys
        else:
            k = self.decoder.rotate(attention, heads(raw_k, "k"), *tables)
            past = (
                tokens.cache.layers[layer].keys
                if ahead and tokens.past and tokens.cache is not None
                else None
            )
            k = k if past is None else torch.cat([past, k], 2)

        def visible(slots: Tensor) -> Tensor:
            if kind in run.ready:
                return _shown(run.ready[kind], segment, slots)
            return sees(segment, slots, k.shape[2], self.decoder.windows.get(kind))

        return q, k, visible, attention.scaling

    def _tables_ahead(self, run: Run, segment: Segment, kind: str, hidden: Tensor) -> tuple[Tensor, ...]:
        if kind not in segment.tables:
            segment.tables[kind] = self.decoder.rotary(hidden, run.tokens.position_ids(segment), kind)
        return segment.tables[kind]

    def _prompt(
        self, run: Run, q: Tensor, k: Tensor, visible: Callable[[Tensor], Tensor], scale: float
    ) -> Callable[[PromptImage, Tensor], Tensor]:
        tokens, segment = run.tokens, run.tokens.now
        slot_of = tokens.slot_of(segment)
        cached: dict[int, Tensor] = {}

        def value(image: PromptImage, slots: Tensor) -> Tensor:
            row = image.row
            if row not in cached:
                asking = slot_of[row, run.text_columns(row)]
                may = visible(asking.expand(tokens.batch, -1))[row : row + 1]
                cached[row] = ops.attention_rows(
                    q[row : row + 1][:, :, asking], k[row : row + 1], scale, may
                )[0]
            return cached[row][:, :, -segment.n_slots :][:, :, slots].transpose(0, 1)  # [T, H, K]

        return value

    def _received(
        self,
        run: Run,
        signal: Signal,
        q: Tensor,
        k: Tensor,
        visible: Callable[[Tensor], Tensor],
        scale: float,
    ) -> Callable[[PromptImage, Tensor], Tensor]:
        tokens, segment = run.tokens, run.tokens.now
        kind = self.decoder.kinds[signal.layer]
        if kind not in run.ready and kind not in self.decoder.windows:
            received = ops.attention_columns(q, k, scale, segment.all_valid, segment.valid, causal=True)[
                :, :, -segment.n_slots :
            ]
            return lambda image, slots: received[image.row][:, slots].transpose(0, 1)
        total = torch.zeros(q.shape[0], q.shape[1], k.shape[2], device=q.device)
        for start in range(0, q.shape[2], CHUNK):
            slots = torch.arange(start, min(start + CHUNK, q.shape[2]), device=q.device)
            may = visible(slots.expand(tokens.batch, -1))
            rows = ops.attention_rows(q[:, :, slots], k, scale, may)
            if segment.valid is not None:
                rows = rows * segment.valid[:, None, slots, None]
            total += rows.sum(2)
        received = total[:, :, -segment.n_slots :]
        return lambda image, slots: received[image.row][:, slots].transpose(0, 1)


def _shown(mask: Tensor, segment: Segment, slots: Tensor) -> Tensor:
    """[B, R, n_slots] bool: what the new slots [B, R] attend to by the model's own mask [B or 1, 1, L, L] of the prompt.

    A row that sees nothing, which is padding, sees everything.
    """
    if segment.col is not None:
        mask = ops.gather_mask(mask, segment.col, segment.valid)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    rows = seen[:, 0].expand(len(slots), -1, -1)
    rows = rows.gather(1, slots.unsqueeze(-1).expand(-1, -1, rows.shape[2]))
    return rows | ~rows.any(-1, keepdim=True)


def sees(segment: Segment, slots: Tensor, total: int, window: int | None) -> Tensor:
    """[B, R, total] bool: which slots the new slots [B, R] of a segment attend to, causally.

    Padding sees itself, so that no row is empty.
    """
    keys = torch.arange(total, device=slots.device)
    own = slots + (total - segment.n_slots)
    allowed = keys <= own.unsqueeze(-1)
    if window is not None:
        assert segment.columns is not None
        columns = segment.columns
        allowed = allowed & (columns.gather(1, own).unsqueeze(-1) - columns.unsqueeze(1) < window)
    if segment.all_valid is not None:
        allowed = allowed & (segment.all_valid.unsqueeze(1) | (keys == own.unsqueeze(-1)))
    return allowed
