"""Removes tokens at the input of a language model and of its layers, in prefill and ever after."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune import ops
from vtprune.engine.cache import done, install, state_of, widen, writing
from vtprune.engine.deciding import Candidates, decide
from vtprune.engine.decoder_signals import DecoderSignals, sees
from vtprune.engine.encoder import REPLACED, EncoderEngine
from vtprune.engine.heads import SILENCED, HeadEngine
from vtprune.engine.journal import Bound, Journal, refuse_compiled, refuse_rerun
from vtprune.engine.prompt import (
    Frame,
    Memos,
    PromptImage,
    encoder_signal,
    locate,
    merged_frame,
    open_frame,
)
from vtprune.engine.run import Run
from vtprune.engine.sequence import Segment, TokenSequence, flat, gather_tables
from vtprune.errors import InertPruningError, UnsupportedCallError
from vtprune.finite import answer
from vtprune.integrations.base import Decoder, Integration, Rows
from vtprune.method import DECODER_SIGNALS, HeadStage, Signal, Stage
from vtprune.report import LayerReport, Report, Stopwatch
from vtprune.selection import Selection


class DecoderEngine(Bound):
    """Hooks of one patch on one language model.

    Args:
        integration: the model.
        encoder: the engine on its vision encoder.
        stages: stages at sites `projector` and `decoder`, in order.
        heads: decisions about attention heads, in order.
        renumber_encoder: whether stages in and behind the encoder renumber positions.
        owner: number of the patch.
        new_report, publish: make an empty report; hand over a finished one.
    """

    def __init__(
        self,
        integration: Integration,
        encoder: EncoderEngine,
        stages: Sequence[Stage],
        heads: Sequence[HeadStage],
        renumber_encoder: bool,
        owner: int,
        new_report: Callable[[], Report],
        publish: Callable[[Report], None],
    ) -> None:
        assert integration.decoder is not None
        assert integration.base is not None
        self.decoder: Decoder = integration.decoder
        self.base: nn.Module = integration.base
        self.placeholders, self.merge_call = integration.placeholders, integration.merge_call
        self.encoder = encoder
        self.stages = list(enumerate(stages))
        self.renumber_encoder, self.owner = renumber_encoder, owner
        self.new_report, self.publish = new_report, publish
        self.local = threading.local()
        self.memos = Memos()
        self.signature = inspect.signature(self.base.forward)
        # Masks that stock code makes for full rows are replaced in every layer, not only behind a stage.
        self.masks_everywhere = self.decoder.prepares_masks or bool(self.decoder.windows)
        self.borders = sorted({s.site.layer or 0 for s in stages if s.site.kind == "decoder"})
        self.signals = DecoderSignals(
            self.decoder,
            [(n, s.site.layer if s.site.kind == "decoder" else 0) for s in stages for n in s.needs],
            self.borders,
        )
        self.heads = HeadEngine(self.decoder, heads)

    def attach(self, journal: Journal) -> None:
        """Registers all hooks."""
        decoder, self.journal = self.decoder, journal
        if self.merge_call is not None:
            owner, name = self.merge_call.owner, self.merge_call.name
            journal.attribute(owner, name, self._merging(getattr(owner, name)))
        journal.pre_hook(self.base, self._enter)
        journal.hook(self.base, self._leave, always=True)
        journal.pre_hook(decoder.module, self._begin)
        journal.hook(decoder.module, self._end, always=True)
        self.signals.attach(journal, self._run)
        self.heads.attach(journal, self._run)
        first = min([*self.borders, *self.signals.layers], default=len(decoder.layers))
        if decoder.reads_positions() or self.masks_everywhere:
            first = 0
        if decoder.inject is not None:
            stock = getattr(decoder.module, decoder.inject)
            journal.attribute(decoder.module, decoder.inject, self._injection(stock))
        self.first_hooked = first
        for layer in range(first, len(decoder.layers)):
            journal.pre_hook(decoder.layers[layer], self._layer_hook(layer))

    def _run(self) -> Run | None:
        run: Run | None = getattr(self.local, "run", None)
        return run

    def current(self) -> tuple[Run | None, Tensor | None]:
        """The pass under way, None where it is text alone, and the [B, L] mask that the model was called with."""
        frame: Frame | None = getattr(self.local, "frame", None)
        return self._run(), None if frame is None else frame.mask

    # The whole model -------------------------------------------------------------------------------------------

    def _merging(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the method that merges pictures into embeddings, before or within a call of the model."""
        assert self.merge_call is not None
        signature, read = inspect.signature(stock), self.merge_call.read

        @functools.wraps(stock)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.encoder.history(restart=True)
            result = stock(*args, **kwargs)
            merged = read(signature.bind_partial(*args, **kwargs).arguments, result)
            if merged is not None:
                frame = merged_frame(merged, list(self.encoder.history()))
                if getattr(self.local, "frame", None) is None:
                    self.local.pending = frame
                else:
                    self.local.frame = frame
            return result

        return call

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_compiled()
        pending: Frame | None = getattr(self.local, "pending", None)
        if pending is not None:
            self.local.pending = None
            embeds = kwargs.get("inputs_embeds")
            if embeds is not None:
                self.journal.check()
                self.local.frame = pending.repeated(len(embeds))
                return
        frame = open_frame(self.signature, args, kwargs, embeds=self.merge_call is not None)
        self.encoder.relabel(frame.features.values())
        if frame.visual and not frame.features:
            self.encoder.history(restart=True)
        if frame.visual:
            self.journal.check()
        self.local.frame = frame

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        frame: Frame | None = getattr(self.local, "frame", None)
        self.local.frame = None
        self.encoder.history(restart=True)
        if output is not None and frame is not None and frame.visual and not frame.seen:
            raise InertPruningError(f"the hook on the language model did not run. {REPLACED}")

    # The language model ----------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame: Frame | None = getattr(self.local, "frame", None)
        cache = None if self._drops_cache() else kwargs.get("past_key_values")
        state = state_of(cache)
        self.local.run = None
        if frame is not None and frame.visual:
            frame.seen = True
            refuse_rerun(self.decoder.layers[self.first_hooked :])
            self.heads.check()
        elif state is None:
            if frame is not None:
                self._check_no_placeholders(frame)
                self.publish(self.new_report())
            elif kwargs.get("inputs_embeds") is not None:
                raise InertPruningError(f"the hook on {type(self.base).__name__} did not run. {REPLACED}")
            return None
        if state is not None and state.owner != self.owner:
            raise UnsupportedCallError(
                "this cache was pruned under another patch; continue it while that patch is active, or start from a "
                "fresh cache"
            )
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        if embeds is None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            embeds = module.get_submodule("embed_tokens")(ids)
            args, kwargs = (), {k: v for k, v in kwargs.items() if k != "input_ids"}
        assert embeds is not None
        given = kwargs.get("attention_mask")
        ready = _ready_masks(given, self.decoder.kinds)
        mask = given if isinstance(given, Tensor) and not ready else None
        if frame is not None and frame.mask is not None:
            mask = frame.mask
        windowed = bool(self.decoder.windows)
        if state is not None:
            answer(state.report.checks, wait=False)
        run = Run(TokenSequence.open(embeds, mask, cache, state, windowed))
        run.heads = dict(state.heads) if state is not None else {}
        if windowed and self.decoder.reads_positions():
            raise UnsupportedCallError(
                "FlashAttention counts the window of sliding layers in slots, which is wrong once tokens are removed; "
                "load the model with attn_implementation='sdpa'"
            )
        if frame is not None and frame.visual:
            if mask is None and not ready and cache is None and self._packed(module, kwargs):
                raise UnsupportedCallError(
                    "position_ids with gaps or new starts, without attention_mask and with use_cache=False, pack several "
                    "sequences into a row, which cannot be pruned. Give every sequence a row of its own; if it is one "
                    "sequence, pass an attention_mask of ones."
                )
            if ready and run.tokens.past:
                raise UnsupportedCallError(
                    f"new pictures behind a cache are not supported for {type(self.base).__name__}, which makes masks "
                    "of its own around pictures; run the whole conversation at once"
                )
            run.ready = ready
            assert frame.ids is not None
            ids = frame.ids.cpu()
            run.images, encodings, separators = locate(
                frame, ids, self.placeholders, self.encoder.history(), self.owner, embeds.device
            )
            run.placeholders = torch.isin(ids, torch.tensor(list(self.placeholders.values())))
            run.report = self.new_report()
            run.report.separator_tokens = separators
            run.report.n_samples = len(embeds)
            run.report.images = [i.report for i in run.images]
            for encoding in encodings:
                self.encoder.check(encoding)
                run.report.watches.update(encoding.watches)
                run.report.checks += encoding.checks
            if cache is None and frame.key is not None and frame.ids is not None:
                run.memo = self.memos.recall(frame.key, frame.ids)
        run.tokens.set_positions(kwargs.get("position_ids"), self.decoder.mrope)
        kwargs = {**kwargs, **self._input(run, embeds)}
        if ready:
            kwargs["attention_mask"] = given  # replaced layer by layer
        self.local.run = run
        self.local.token = writing(state)
        return args, kwargs

    def _drops_cache(self) -> bool:
        """Whether the layers will ignore a cache: transformers does so under gradient checkpointing."""
        layer: Any = self.decoder.layers[0]
        return bool(layer.training and getattr(layer, "gradient_checkpointing", False))

    def _packed(self, module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
        """Whether stock code reads packed sequences from the position ids of a call without mask and cache."""
        config: Any = module.config
        use_cache = kwargs.get("use_cache")
        places: Tensor | None = kwargs.get("position_ids")
        if places is None or (config.use_cache if use_cache is None else use_cache):
            return False
        if self.decoder.mrope:
            # Of four axes the first is for this; fewer are never read so.
            if places.ndim != 3 or len(places) != 4:
                return False
            places = places[0]
        return bool((places.diff() != 1).any())

    def _check_no_placeholders(self, frame: Frame) -> None:
        # One token per row is decoding, where reading the ids would only wait for the device.
        if frame.ids is None or frame.ids.shape[1] == 1:
            return
        for modality, token in self.placeholders.items():
            if bool((frame.ids == token).any()):
                raise InertPruningError(
                    f"the prompt holds {modality} placeholders, but the call held no {modality}, so nothing can be "
                    "pruned. Pass the pixel values with the prompt (chunked prefill of older transformers drops them)."
                )

    def _input(self, run: Run, embeds: Tensor) -> dict[str, Any]:
        """Arguments of the language model after all stages before its first layer."""
        tokens = run.tokens
        if self.signals.needs_inputs:
            run.embeds = embeds.detach()
        dropped = _dropped_before(run.images)
        if dropped:
            tokens.drop(dropped, self.renumber_encoder)
        for number, stage in self.stages:
            if stage.site.kind == "projector" and run.images:
                embeds = self._stage(run, number, stage, embeds, None)
        segment = tokens.begin_segment(0)
        if segment.col is None and tokens.state is None:
            return {"inputs_embeds": embeds}
        positions = tokens.all_position_ids(segment)
        if segment.col is not None:
            index = [segment.col, segment.col]
            embeds, positions = ops.gather_many([embeds, positions.unsqueeze(-1)], index)
            positions = positions.squeeze(-1)
        mask = segment.all_valid
        if mask is None and tokens.cache is None:
            # An explicit mask keeps gaps in the positions from being read as packed sequences.
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return {
            "inputs_embeds": embeds,
            "position_ids": positions,
            "attention_mask": None if mask is None else mask.long(),
        }

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        run = self._run()
        self.local.run = None
        token = getattr(self.local, "token", None)
        if token is not None:
            self.local.token = None
            done(token)
        if run is None or output is None:
            return None
        missing = [str(s.site) for n, s in self.stages if run.images and n not in run.fired]
        missing += self.heads.missing(run) if run.images else []
        if missing:
            raise InertPruningError(f"the hooks at {', '.join(missing)} did not run. {REPLACED}")
        is_tuple = isinstance(output, tuple)
        cache = (
            next((o for o in output if hasattr(o, "layers")), None) if is_tuple else output.past_key_values
        )
        cache = None if self._drops_cache() else cache
        self._commit(run, cache)
        full = run.tokens.aligned(output[0])
        if is_tuple:
            return (full, *output[1:])
        output.last_hidden_state = full
        return output

    def _commit(self, run: Run, cache: Any) -> None:
        tokens = run.tokens
        report = run.report
        if report is not None:
            report.layers = self._layer_reports(run, cache)
            report.speaking = run.heads
            if run.heads:
                report.notes.append(SILENCED)
        elif tokens.state is not None:
            report = tokens.state.report
            report.decode_steps += 1
        if report is not None:
            self.publish(report)
        if cache is not None:
            fresh = tokens.cache_state(cache, self.owner, report)
            fresh.heads = run.heads
            install(cache, fresh)

    # Decoder layers --------------------------------------------------------------------------------------------

    def _layer_hook(self, layer: int) -> Callable[..., Any]:
        stages = [(n, s) for n, s in self.stages if s.site.kind == "decoder" and s.site.layer == layer]
        kind = self.decoder.kinds[layer]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = self._run()
            if run is None:
                return None
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            tokens = run.tokens
            tokens.cache = None if self._drops_cache() else kwargs.get("past_key_values")
            if self.decoder.windows and layer == 0 and not tokens.past:
                widen(tokens.cache)
            first = tokens.segments[0]
            first.tables.setdefault(kind, kwargs["position_embeddings"])
            if first.position_ids is None:
                first.position_ids = kwargs.get("position_ids")
            if stages:
                hidden = self._enter_segment(run, layer, stages, hidden)
            segment = tokens.now
            if segment.first_layer or (
                self.masks_everywhere and (segment.col is not None or tokens.state is not None)
            ):
                kwargs = {**kwargs, "attention_mask": self._mask(run, segment, layer, hidden)}
            if segment.first_layer:
                kwargs["position_embeddings"] = self._tables(run, segment, kind, hidden)
                kwargs["position_ids"] = segment.position_ids
            if self.decoder.reads_positions():
                # Survivors have gaps in their positions, which would be read as borders of packed sequences.
                kwargs = {**kwargs, "position_ids": None}
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    def _enter_segment(
        self, run: Run, layer: int, stages: Sequence[tuple[int, Stage]], hidden: Tensor
    ) -> Tensor:
        tokens = run.tokens
        before, first = tokens.now, tokens.segments[0]
        if run.images:
            repeated = run.memo is not None and all(n in run.memo.decisions for n, _ in self.stages)
            if self.signals.crossing and not repeated:
                assert run.report is not None
                with run.report.watches.setdefault(str(stages[0][1].site), Stopwatch(hidden.device)):
                    self.signals.carry(run, layer, hidden)
            slot_of = tokens.slot_of(before)
            for number, stage in stages:
                hidden = self._stage(run, number, stage, hidden, slot_of)
        segment = tokens.begin_segment(layer)
        segment.renumbered = before.renumbered or any(stage.positions == "dense" for _, stage in stages)
        segment.position_ids = first.position_ids
        if segment.col is not None:
            index = tokens.slot_of(before).gather(1, segment.col)
            segment.index = tokens.slot_of(first).gather(1, segment.col) if before is not first else index
            hidden = self._gather(run, segment, hidden, index)
        if segment.renumbered:
            segment.position_ids = tokens.position_ids(segment)
        return hidden

    def _gather(self, run: Run, segment: Segment, hidden: Tensor, index: Tensor) -> Tensor:
        """Hidden states of a segment's slots; in the same launch position ids and tables that only need gathering."""
        first = run.tokens.segments[0]
        assert segment.index is not None
        moved, kinds = [hidden], list(first.tables) if not segment.renumbered else []
        for kind in kinds:
            moved += first.tables[kind]
        if first.position_ids is not None and not segment.renumbered:
            moved.append(first.position_ids.unsqueeze(-1))
        hidden, *rest = ops.gather_many(moved, [index] + [segment.index] * (len(moved) - 1))
        for kind in kinds:
            n = len(first.tables[kind])
            segment.tables[kind], rest = tuple(rest[:n]), rest[n:]
        if rest:
            segment.position_ids = rest[0].squeeze(-1)
        return hidden

    def _tables(self, run: Run, segment: Segment, kind: str, hidden: Tensor) -> tuple[Tensor, ...]:
        """Position embeddings of a segment's slots for one kind of layer."""
        if kind not in segment.tables:
            tables = run.tokens.segments[0].tables[kind]
            if segment.renumbered:
                tables = self.decoder.rotary(hidden, run.tokens.position_ids(segment), kind)
            elif segment.index is not None:
                index = segment.index
                tables = gather_tables(tables, index)
            segment.tables[kind] = tables
        return segment.tables[kind]

    def _mask(self, run: Run, segment: Segment, layer: int, hidden: Tensor) -> Any:
        """Attention mask of a segment for the kind of a layer, about to run as the first of its kind."""
        kind = self.decoder.kinds[layer]
        if kind not in segment.masks:
            segment.masks[kind] = self._make_mask(run, segment, layer, hidden)
        return segment.masks[kind]

    def _make_mask(self, run: Run, segment: Segment, layer: int, hidden: Tensor) -> Any:
        kind = self.decoder.kinds[layer]
        if kind in run.ready:
            ready = run.ready[kind]
            return ready if segment.col is None else ops.gather_mask(ready, segment.col, segment.valid)
        if kind not in self.decoder.windows:
            # Sized by this layer: those before it have taken up the new tokens already.
            return self.decoder.causal_mask(hidden, segment.all_valid, run.tokens.cache, layer)
        new = torch.arange(segment.n_slots, device=hidden.device).expand(len(hidden), -1)
        assert segment.columns is not None
        allowed = sees(segment, new, segment.columns.shape[1], self.decoder.windows[kind]).unsqueeze(1)
        if not self.decoder.additive_mask():
            return allowed
        return torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(
            ~allowed, torch.finfo(hidden.dtype).min
        )

    def _injection(self, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Adds visual features between layers to the survivors they belong to."""

        def inject(hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
            run = self._run()
            if run is None or run.tokens.now.col is None:
                return stock(hidden, visual, features)
            segment = run.tokens.now
            col = segment.col
            assert col is not None
            visual = visual.to(col.device)
            rank = (visual.flatten().cumsum(0) - 1).view_as(visual)
            survives = visual.gather(1, col)
            if segment.valid is not None:
                survives &= segment.valid
            return stock(hidden, survives, features[rank.gather(1, col)[survives].to(features.device)])

        return inject

    # Shared by both kinds of sites -----------------------------------------------------------------------------

    def _stage(self, run: Run, number: int, stage: Stage, hidden: Tensor, slot_of: Tensor | None) -> Tensor:
        """Lets a stage decide, and applies the decision to everything but the slots.

        Args:
            slot_of: [B, length] slot of every prompt column in `hidden`; None if it holds all of them.
        """
        assert run.report is not None
        with run.report.watches.setdefault(str(stage.site), Stopwatch(hidden.device)):
            tokens = _Prompted(run, hidden, slot_of)
            decisions = run.memo.decisions.get(number) if run.memo is not None else None
            if decisions is None:
                kinds = [s for s in stage.needs if s.kind in DECODER_SIGNALS]
                tokens.measured = {s: self.signals.measure(run, s, hidden) for s in kinds}
                decisions = decide(stage, tokens)
                if run.memo is not None:
                    run.memo.decisions[number] = decisions
            removed: list[tuple[int, Tensor]] = []
            places: list[tuple[int, Tensor]] = []
            values: list[Tensor] = []
            for decision in decisions:
                selection, images = decision.selection, [run.images[i] for i in decision.images]
                n = tokens.counts[decision.images[0]]
                if selection.merges:
                    slots = selection.index_of(tokens.slots(decision.images))
                    places += zip((i.row for i in images), slots, strict=True)
                    values += selection.apply_all(tokens.features(decision.images))
                if any(k < n for k in selection.counts):
                    gone = selection.dropped(tokens.cols(decision.images))
                    removed += [(i.row, cols) for i, cols in zip(images, gone, strict=True) if len(cols)]
                left = selection.index_of(tokens.index(decision.images))
                for image, alive in zip(images, left, strict=True):
                    image.alive = alive
                    image.report.kept[str(stage.site)] = alive
            if values:
                hidden = hidden.index_put(flat(places, hidden.device), torch.cat(values))
            if removed:
                run.tokens.drop(removed, stage.positions == "dense")
        run.fired.add(number)
        return hidden

    # Reporting -------------------------------------------------------------------------------------------------

    def _layer_reports(self, run: Run, cache: Any) -> list[LayerReport]:
        tokens = run.tokens
        text = list(tokens.counts)
        for image in run.images:
            text[image.row] -= len(image.alive)
        reports = []
        ends = [s.first_layer for s in tokens.segments[1:]] + [len(self.decoder.layers)]
        for segment, end in zip(tokens.segments, ends, strict=True):
            visual = [0] * tokens.batch
            for image in run.images:
                visual[image.row] += self._alive_at(image, segment.first_layer)
            for layer in range(segment.first_layer, end):
                size = 0
                if cache is not None:
                    held = cache.layers[layer]
                    size = sum(x.numel() * x.element_size() for x in (held.keys, held.values))
                total = [t + v for t, v in zip(text, visual, strict=True)]
                reports.append(LayerReport(layer, total, list(visual), size))
        return reports

    def _alive_at(self, image: PromptImage, layer: int) -> int:
        """Tokens of an image that were alive in a decoder layer."""
        later = {
            str(s.site) for _, s in self.stages if s.site.kind == "decoder" and (s.site.layer or 0) > layer
        }
        kept = [alive for site, alive in image.report.kept.items() if site not in later]
        return len(kept[-1]) if kept else image.report.tokens_in


class _Prompted(Candidates):
    """The visual tokens of a prompt as a stage at or in the language model sees them.

    Args:
        run: the pass.
        hidden: [B, n_slots, D] states at the stage.
        slot_of: see :meth:`DecoderEngine._stage`.

    Attributes:
        measured: signals of the language model.
    """

    def __init__(self, run: Run, hidden: Tensor, slot_of: Tensor | None) -> None:
        assert run.report is not None
        self._run, self._hidden, self._slot_of, self.checks = run, hidden, slot_of, run.report.checks
        self.layouts = [i.unit.layout for i in run.images]
        self.counts = [len(i.alive) for i in run.images]
        self.measured: dict[Signal, Callable[[PromptImage, Tensor], Tensor]] = {}
        self._columns: dict[tuple[int, ...], Tensor] = {}
        self._features: dict[tuple[int, ...], Tensor] = {}

    def _some(self, images: Sequence[int]) -> list[PromptImage]:
        return [self._run.images[i] for i in images]

    def index(self, images: Sequence[int]) -> Tensor:
        return torch.stack([i.alive for i in self._some(images)])

    def cols(self, images: Sequence[int]) -> Tensor:
        """[G, N] columns of the tokens in the prompt."""
        if tuple(images) not in self._columns:
            self._columns[tuple(images)] = torch.stack(
                [i.cols if len(i.alive) == len(i.cols) else i.cols[i.alive] for i in self._some(images)]
            )
        return self._columns[tuple(images)]

    def _rows(self, images: Sequence[int]) -> Tensor:
        return (
            torch.tensor([i.row for i in self._some(images)])
            .to(self._hidden.device, non_blocking=True)
            .unsqueeze(1)
        )

    def slots(self, images: Sequence[int]) -> Tensor:
        """[G, N] places of the tokens in the hidden states."""
        cols = self.cols(images)
        return cols if self._slot_of is None else self._slot_of[self._rows(images), cols]

    def features(self, images: Sequence[int]) -> Tensor:
        if tuple(images) not in self._features:
            self._features[tuple(images)] = self._hidden[self._rows(images), self.slots(images)]
        return self._features[tuple(images)]

    def signal(self, signal: Signal, images: Sequence[int]) -> Rows:
        if signal in self.measured:
            read = self.measured[signal]
            return [read(i, s) for i, s in zip(self._some(images), self.slots(images), strict=True)]
        return encoder_signal(signal, self._some(images))

    def seed(self, image: int) -> int:
        return self._run.images[image].seed()


def _dropped_before(images: Sequence[PromptImage]) -> list[tuple[int, Tensor]]:
    """(row, columns) of what stages in and behind the encoder removed."""
    groups: dict[int, list[PromptImage]] = {}
    for image in images:
        if len(image.alive) < len(image.cols):
            groups.setdefault(len(image.cols), []).append(image)
    removed: list[tuple[int, Tensor]] = []
    for some in groups.values():
        gone = Selection(tuple(i.alive for i in some)).dropped(torch.stack([i.cols for i in some]))
        removed += [(i.row, cols) for i, cols in zip(some, gone, strict=True)]
    return removed


def _ready_masks(given: Any, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Kind of layer -> 4D mask [B or 1, 1, L, L] among the masks given to a language model."""
    masks = given if isinstance(given, Mapping) else dict.fromkeys(kinds, given)
    return {k: m for k, m in masks.items() if isinstance(m, Tensor) and m.ndim == 4}
