"""Removes tokens at the input of a language model and of its layers, in prefill and ever after.

The sequence a layer sees is a list of slots. A *segment* is a run of decoder layers that hold the same slots;
the first begins at layer 0, each decoder stage begins another. Hidden states, positions, masks and caches of a
segment are all applications of one index from slots to the columns of the prompt as the caller knows it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from vtprune import ops
from vtprune.cache import (
    CacheState,
    SegmentState,
    cat_valid,
    check_cache,
    done,
    install,
    physical_length,
    state_of,
    writing,
)
from vtprune.deciding import Candidate, decide
from vtprune.encoder_engine import ATTRIBUTE, EncoderEngine
from vtprune.errors import InertPruningError, UnsupportedCallError
from vtprune.integrations.base import Decoder, Encoding
from vtprune.journal import Journal
from vtprune.method import Signal, Stage
from vtprune.report import ImageReport, LayerReport, Report, Stopwatch
from vtprune.selection import Selection


@dataclass
class PromptImage:
    """One image of one row of the prompt.

    Attributes:
        row: row in the batch.
        cols: [N] columns of its full-length placeholders.
        alive: [K] ascending indices of surviving tokens in the image's full grid.
        encoding, number: the encoder run it came from, and which image of that run it is.
        report: its entry in the report.
    """

    row: int
    cols: Tensor
    alive: Tensor
    encoding: Encoding
    number: int
    report: ImageReport


@dataclass
class Segment:
    """The slots of one forward pass in the layers from `first_layer` to the next segment.

    Attributes:
        first_layer: first decoder layer.
        n_slots: new slots per row, padding included.
        col: [B, n_slots] prompt column of each new slot; None while nothing was removed.
        valid: [B, n_slots] bool, None when no new slot is padding.
        counts: valid new slots per row; None where that is not known on the host.
        all_valid: [B, past + n_slots] bool or None, see `valid`.
        shift: [B] positions taken off by dense renumbering, None for none.
        tables: position embeddings for these slots.
        mask: what layers expect as attention mask.
        position_ids: for layers that hand them to their attention.
    """

    first_layer: int
    n_slots: int
    col: Tensor | None = None
    valid: Tensor | None = None
    all_valid: Tensor | None = None
    shift: Tensor | None = None
    tables: tuple[Tensor, ...] | None = None
    mask: Any = None
    position_ids: Tensor | None = None
    ready: bool = False


@dataclass
class Run:
    """One forward pass of the language model.

    Attributes:
        batch, length: rows and new tokens per row as the caller counts them.
        cache: the key-value cache or None.
        state: state of the cache before the pass.
        history: slots of an unpruned cache before the pass.
        past: length of the sequence before the pass, as the caller counts it.
        new_valid: [B, length] bool from the caller's mask, None when it has no padding.
        left: whether padding goes before the tokens.
        images: visual tokens of this pass.
        alive: [B, length] bool, False for padding and removed tokens; None while nothing was removed.
        renumbered: [B, length] bool, True for tokens removed by a stage that renumbers positions.
        positions: position ids as they would be without pruning, [B, length] or [3 | 4, B, length].
        segments: so far.
        rows: [K] query and all key projections per layer, for stages to come.
        memo: decisions to repeat instead of deciding again (generation without a cache).
        report: None when the pass holds no visual tokens.
    """

    batch: int
    length: int
    device: torch.device
    cache: Any
    state: CacheState | None
    history: SegmentState | None
    past: int
    new_valid: Tensor | None
    left: bool
    images: list[PromptImage] = field(default_factory=list)
    alive: Tensor | None = None
    renumbered: Tensor | None = None
    positions: Tensor | None = None
    segments: list[Segment] = field(default_factory=list)
    captured: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    fired: set[int] = field(default_factory=set)
    memo: Memo | None = None
    report: Report | None = None
    row_valid: list[int] = field(default_factory=list)


@dataclass
class Memo:
    """Decisions of an earlier step of the same generation that ran without a cache.

    A step belongs to the same generation if it holds the same picture tensors and one more token.

    Attributes:
        ids: [B, L] prompt they were made for.
        length: tokens per row in the last step.
        selections: stage number -> one selection per image.
    """

    ids: Tensor
    length: int
    selections: dict[int, list[Selection]] = field(default_factory=dict)


@dataclass
class Frame:
    """One forward pass of the whole model, opened before its language model runs."""

    ids: Tensor | None
    features: Mapping[str, Any]
    visual: bool
    key: Any
    seen: bool = False


class DecoderEngine:
    """Hooks of one patch on one language model.

    Args:
        decoder, base, placeholders: see :class:`~vtprune.integrations.base.Integration`.
        encoder: the engine on its vision encoder.
        stages: stages at sites `projector` and `decoder`, in order.
        encoder_positions: policy of the last stage in or behind the encoder, None if there is none.
        owner: number of the patch.
        new_report, publish: make an empty report; hand over a finished one.
    """

    def __init__(
        self,
        decoder: Decoder,
        base: nn.Module,
        placeholders: Mapping[str, int],
        encoder: EncoderEngine,
        stages: Sequence[Stage],
        encoder_positions: str | None,
        owner: int,
        new_report: Callable[[], Report],
        publish: Callable[[Report], None],
    ) -> None:
        self.decoder, self.base, self.placeholders, self.encoder = decoder, base, placeholders, encoder
        self.stages = list(enumerate(stages))
        self.encoder_positions = encoder_positions
        self.owner, self.new_report, self.publish = owner, new_report, publish
        self.local = threading.local()
        self.signature = inspect.signature(base.forward)
        self.memos: Any = WeakIdKeyDictionary()
        self.borders = sorted({s.site.layer or 0 for s in stages if s.site.kind == "decoder"})
        self.text_layers = sorted({n.layer for s in stages for n in s.needs if n.kind == "text_attention"})

    def attach(self, journal: Journal) -> None:
        """Registers all hooks."""
        decoder = self.decoder
        journal.pre_hook(self.base, self._enter)
        journal.hook(self.base, self._leave, always=True)
        journal.pre_hook(decoder.module, self._begin)
        journal.hook(decoder.module, self._end, always=True)
        for layer in self.text_layers:
            attention = decoder.attention(layer)
            for name, projection in zip("qk", decoder.projections(attention), strict=True):
                journal.hook(projection, self._capture(layer, name))
        first = min([*self.borders, *self.text_layers], default=len(decoder.layers))
        for layer in range(first, len(decoder.layers)):
            journal.pre_hook(decoder.layers[layer], self._layer_hook(layer))

    # The whole model -------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        ids: Tensor | None = given.get("input_ids")
        features: dict[str, Any] = given.get("mm_encoder_outputs") or {}
        features = {k: v for k, v in features.items() if v is not None}
        pixels = [v for k, v in given.items() if k.startswith("pixel_values") and v is not None]
        if ids is None and (features or pixels):
            raise UnsupportedCallError(
                "visual tokens cannot be located without `input_ids`; pass input_ids instead of inputs_embeds together "
                "with pixel values"
            )
        cache = given.get("past_key_values")
        if ids is None and state_of(cache) is None and physical_length(cache, 0) == 0:
            raise UnsupportedCallError(
                "the patched model was called with inputs_embeds only, so it cannot be told whether they hold visual "
                "tokens. Pass input_ids, or remove the patch for text-only calls with embeddings."
            )
        visual = bool(features or pixels)
        if visual:
            check_cache(cache)
            mask = given.get("attention_mask")
            if isinstance(mask, Mapping) or (mask is not None and mask.ndim != 2):
                raise UnsupportedCallError(
                    "the attention mask of a pruned call must be 2D [batch, length] (1 = token, 0 = padding); got "
                    f"{'a dict of masks' if isinstance(mask, Mapping) else f'shape {tuple(mask.shape)}'}. Static caches "
                    "and compiled generation build such masks; use a dynamic cache."
                )
            if torch.compiler.is_compiling():
                raise UnsupportedCallError(
                    "torch.compile cannot trace a patched model (token counts are data); compile the unpatched "
                    "model, or call the patched one eagerly"
                )
        key = next(iter(features.values())).pooler_output[0] if features else pixels[0] if pixels else None
        self.local.frame = Frame(ids, features, visual, key)
        if pixels:
            self.encoder.history(restart=True)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        frame: Frame | None = getattr(self.local, "frame", None)
        self.local.frame = None
        self.encoder.history(restart=True)
        if output is not None and frame is not None and frame.visual and not frame.seen:
            raise InertPruningError(
                "the call held visual tokens, but the hook on the language model did not run, so nothing was pruned. "
                "Something replaced or wrapped a submodule after patching; remove the patch and patch again."
            )

    # The language model ----------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame: Frame | None = getattr(self.local, "frame", None)
        cache = kwargs.get("past_key_values")
        state = state_of(cache)
        self.local.run = None
        visual = frame is not None and frame.visual
        if not visual and state is None:
            if frame is not None:
                self.publish(self.new_report())
            return None
        if state is not None and state.owner != self.owner:
            raise UnsupportedCallError(
                "this cache was pruned under another patch; continue it while that patch is active, or start from a "
                "fresh cache"
            )
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        if embeds is None:
            if visual:
                raise UnsupportedCallError("the language model was called without inputs_embeds")
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            embeds = module.get_submodule("embed_tokens")(ids)
            args, kwargs = (), {**kwargs, "input_ids": None}
        run = self._open_run(embeds, kwargs, cache, state)
        if visual:
            assert frame is not None
            run.images, run.report = self._locate(frame, embeds)
            run.memo = self._recall(frame, cache)
            frame.seen = True
        kwargs = self._input_stages(run, {**kwargs, "inputs_embeds": embeds})
        self.local.run = run
        self.local.token = writing(state)
        return args, kwargs

    def _open_run(self, embeds: Tensor, kwargs: Mapping[str, Any], cache: Any, state: CacheState | None) -> Run:
        batch, length = embeds.shape[:2]
        mask: Tensor | None = kwargs.get("attention_mask")
        new_valid: Tensor | None = None
        left = True
        row_valid = [length] * batch
        if mask is not None:
            new_valid = mask[:, -length:].to(device=embeds.device, dtype=torch.bool)
            row_valid = new_valid.sum(1).tolist()
            if min(row_valid) == length:
                new_valid = None
            else:
                left = bool(new_valid[:, -1].all())
        past = state.logical if state is not None else physical_length(cache, 0)
        history: SegmentState | None = None
        if state is None and past:
            # A history of plain text, the same in all layers; its padding stands in the caller's mask only.
            seen = None if mask is None else mask[:, :past].to(device=embeds.device, dtype=torch.bool)
            history = SegmentState(0, past, None if seen is None or bool(seen.all()) else seen, None)
        return Run(
            batch, length, embeds.device, cache, state, history, past, new_valid, left, row_valid=row_valid
        )

    def _locate(self, frame: Frame, embeds: Tensor) -> tuple[list[PromptImage], Report]:
        assert frame.ids is not None
        report = self.new_report()
        report.n_samples = len(embeds)
        images: list[PromptImage] = []
        runs = list(self.encoder.history())
        for modality, token in self.placeholders.items():
            where = frame.ids == token
            per_row: list[int] = where.sum(1).tolist()
            if not sum(per_row):
                continue
            encoding = self._encoding(frame, modality, runs)
            cols = where.nonzero()[:, 1].split(per_row)
            for row, numbers in enumerate(self._assign(encoding, per_row, modality)):
                sizes = [encoding.layouts[n].n_tokens for n in numbers]
                for number, c in zip(numbers, cols[row].split(sizes), strict=True):
                    entry = ImageReport(row, encoding.layouts[number])
                    entry.kept = {site: alive[number] for site, alive in encoding.kept.items()}
                    images.append(PromptImage(row, c, encoding.alive[number], encoding, number, entry))
            report.watches.update(encoding.watches)
        if not images:
            raise UnsupportedCallError("pixel values were given, but the prompt holds no placeholder for them")
        images.sort(key=lambda i: i.row)
        report.images = [i.report for i in images]
        return images, report

    def _encoding(self, frame: Frame, modality: str, runs: list[Encoding]) -> Encoding:
        if modality in frame.features:
            made: dict[int, Encoding] = getattr(frame.features[modality], ATTRIBUTE, {})
            if self.owner in made:
                return made[self.owner]
        elif runs:
            return runs.pop(0)
        raise UnsupportedCallError(
            f"the {modality} features of this call were not computed under this patch, or were cut up by chunked "
            "prefill. Leave `prefill_chunk_size` unset, and pass pixel values (or features computed after patching)."
        )

    @staticmethod
    def _assign(encoding: Encoding, per_row: Sequence[int], modality: str) -> list[list[int]]:
        """Images of every row; rows may be repeated in groups (beam search, several return sequences)."""
        sizes = [layout.n_tokens for layout in encoding.layouts]
        times, rest = divmod(sum(per_row), sum(sizes))
        out: list[list[int]] = []
        number = 0
        if not rest and times and len(per_row) % times == 0:
            for row in range(0, len(per_row), times):
                numbers: list[int] = []
                left = per_row[row]
                while left > 0 and number < len(sizes):
                    left -= sizes[number]
                    numbers.append(number)
                    number += 1
                if left or any(n != per_row[row] for n in per_row[row : row + times]):
                    break
                out += [numbers] * times
        if len(out) != len(per_row) or number != len(sizes):
            raise UnsupportedCallError(
                f"the prompt holds {list(per_row)} {modality} placeholders per row, the encoder made images of "
                f"{sizes} tokens: rows must hold whole images (chunked prefill that cuts one is not supported)"
            )
        return out

    def _recall(self, frame: Frame, cache: Any) -> Memo | None:
        """Without a cache every step is a prefill: repeat the first step's decisions instead of drifting."""
        assert frame.ids is not None
        if cache is not None or frame.key is None:
            return None
        memo: Memo | None = self.memos.get(frame.key)
        ids = frame.ids
        grown = memo is not None and ids.shape == (len(memo.ids), memo.length + 1)
        if memo is None or not grown or not torch.equal(memo.ids, ids[:, : memo.ids.shape[1]]):
            memo = self.memos[frame.key] = Memo(ids, ids.shape[1])
        memo.length = ids.shape[1]
        return memo

    def _input_stages(self, run: Run, kwargs: dict[str, Any]) -> dict[str, Any]:
        embeds: Tensor = kwargs["inputs_embeds"]
        positions: Tensor | None = kwargs.get("position_ids")
        if positions is None and (run.images or run.state is not None):
            positions = torch.arange(run.past, run.past + run.length, device=run.device).expand(run.batch, -1)
            if self.decoder.mrope:
                positions = positions.expand(3, run.batch, -1)
        elif positions is not None and positions.ndim == 2 and len(positions) != run.batch:
            positions = positions.expand(run.batch, -1)
        run.positions = positions

        dropped = [(i.row, i.cols, i.alive) for i in run.images if len(i.alive) < len(i.cols)]
        if dropped:
            self._drop(run, [(row, _without(cols, alive)) for row, cols, alive in dropped], self.encoder_positions)
        for number, stage in self.stages:
            if stage.site.kind == "projector" and run.images:
                features = [embeds[i.row, i.cols[i.alive]] for i in run.images]
                embeds = self._stage(run, number, stage, features, embeds, lambda i, index: i.cols[index])

        segment = self._slots(run, 0)
        run.segments.append(segment)
        if segment.col is not None:
            embeds = ops.gather_tokens(embeds, segment.col)
        kwargs["inputs_embeds"] = embeds
        if run.state is not None or segment.col is not None:
            kwargs["position_ids"] = self._positions(run, segment)
            mask = segment.all_valid
            if mask is None and run.cache is None:
                # An explicit mask keeps gaps in the positions from being read as packed sequences.
                mask = torch.ones(run.batch, segment.n_slots, dtype=torch.bool, device=run.device)
            kwargs["attention_mask"] = None if mask is None else mask.long()
        return kwargs

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        run: Run | None = getattr(self.local, "run", None)
        self.local.run = None
        token = getattr(self.local, "token", None)
        if token is not None:
            self.local.token = None
            done(token)
        if run is None or output is None:
            return None
        missing = [str(s.site) for n, s in self.stages if run.images and n not in run.fired]
        if missing:
            raise InertPruningError(
                f"the call held visual tokens, but the hooks at {', '.join(missing)} did not run, so nothing was "
                "pruned there. Something replaced a decoder layer after patching; remove the patch and patch again."
            )
        cache = output[1] if isinstance(output, tuple) and len(output) > 1 else getattr(output, "past_key_values", None)
        self._commit(run, cache)
        if run.alive is None:
            return None
        hidden = output[0]
        full = self._aligned(run, hidden)
        if isinstance(output, tuple):
            return (full, *output[1:])
        output.last_hidden_state = full
        return output

    def _commit(self, run: Run, cache: Any) -> None:
        if run.report is not None:
            run.report.layers = self._layer_reports(run, cache)
            self.publish(run.report)
        elif run.state is not None and run.state.report is not None:
            run.state.report.decode_steps += 1
            self.publish(run.state.report)
        if cache is None or not hasattr(cache, "layers"):
            return
        segments = [
            SegmentState(
                first_layer=s.first_layer,
                length=physical_length(cache, s.first_layer),
                valid=s.all_valid,
                shift=s.shift,
            )
            for s in run.segments
        ]
        report = run.report or (run.state.report if run.state is not None else None)
        install(cache, CacheState(self.owner, run.past + run.length, segments, report))

    def _aligned(self, run: Run, hidden: Tensor) -> Tensor:
        """Hidden states at the caller's length: every column shows the last survivor at or before it."""
        assert run.alive is not None
        rank = run.alive.cumsum(1) - 1
        if run.left:
            rank = rank + (run.segments[-1].n_slots - run.alive.sum(1, keepdim=True))
        return ops.gather_tokens(hidden, rank.clamp(min=0))

    # Decoder layers --------------------------------------------------------------------------------------------

    def _capture(self, layer: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            run: Run | None = getattr(self.local, "run", None)
            if run is None or not run.images:
                return
            if name == "q":
                output = ops.gather_tokens(output, self._last_slot(run, run.segments[-1]))
            elif run.cache is not None:
                return  # the cache keeps the keys
            run.captured[layer, name] = output

        return hook

    @staticmethod
    def _last_slot(run: Run, segment: Segment) -> Tensor:
        """[B, 1] slot of every row's last token."""
        if segment.valid is None or run.left:
            return torch.full((run.batch, 1), segment.n_slots - 1, device=run.device)
        return segment.valid.sum(1, keepdim=True) - 1

    def _layer_hook(self, layer: int) -> Callable[..., Any]:
        stages = [(n, s) for n, s in self.stages if s.site.kind == "decoder" and s.site.layer == layer]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run: Run | None = getattr(self.local, "run", None)
            if run is None:
                return None
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            kwargs = dict(kwargs)
            if not run.segments[0].ready:
                first = run.segments[0]
                first.tables, first.position_ids = kwargs.get("position_embeddings"), kwargs.get("position_ids")
                first.mask, first.ready = kwargs.get("attention_mask"), True
            if layer in self.borders:
                hidden = self._enter_segment(run, layer, stages, hidden, kwargs)
            segment = run.segments[-1]
            if segment.first_layer:
                kwargs["attention_mask"] = segment.mask
                kwargs["position_embeddings"] = segment.tables
                kwargs["position_ids"] = segment.position_ids
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    def _enter_segment(
        self, run: Run, layer: int, stages: Sequence[tuple[int, Stage]], hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        run.cache = kwargs.get("past_key_values", run.cache)
        before = run.segments[-1]
        slot_of = self._slot_of(run, before) if run.images else None
        dense = False
        for number, stage in stages:
            dense |= stage.positions == "dense"
            if run.images:
                assert slot_of is not None
                where: Callable[[PromptImage, Tensor], Tensor] = (
                    lambda i, index: i.cols[index] if slot_of is None else slot_of[i.row, i.cols[index]]
                )
                features = [hidden[i.row, where(i, i.alive)] for i in run.images]
                hidden = self._stage(run, number, stage, features, hidden, where, slot_of)
        segment = self._slots(run, layer)
        if segment.col is None:
            segment.tables, segment.position_ids = before.tables, before.position_ids
        else:
            if slot_of is None:
                slot_of = self._slot_of(run, before)
            index = slot_of.gather(1, segment.col)
            hidden = ops.gather_tokens(hidden, index)
            assert before.tables is not None
            segment.tables = tuple(_gather_table(t, index) for t in before.tables)
            if before.position_ids is not None:
                ids = before.position_ids.expand(run.batch, -1)
                segment.position_ids = ids.gather(1, index)
        if dense:
            positions = self._positions(run, segment)
            assert positions is not None
            segment.tables = self.decoder.rotary(hidden, positions)
            segment.position_ids = positions
        segment.mask = self.decoder.causal_mask(hidden, segment.all_valid, run.cache, layer)
        segment.ready = True
        run.segments.append(segment)
        return hidden

    # Shared by both kinds of sites -----------------------------------------------------------------------------

    def _stage(
        self,
        run: Run,
        number: int,
        stage: Stage,
        features: Sequence[Tensor],
        hidden: Tensor,
        where: Callable[[PromptImage, Tensor], Tensor],
        slot_of: Tensor | None = None,
    ) -> Tensor:
        assert run.report is not None
        watch = run.report.watches.setdefault(str(stage.site), Stopwatch(run.device))
        with watch:
            repeated = run.memo.selections.get(number) if run.memo is not None else None
            if repeated is None:
                text = {s: self._text_attention(run, s) for s in stage.needs if s.kind == "text_attention"}

                def signal(image: PromptImage, s: Signal) -> Tensor:
                    if s.kind == "text_attention":
                        rows = text[s][image.row]  # [H, slots]
                        return rows[:, where(image, image.alive)].transpose(0, 1)
                    return _narrow(image, s)

                candidates = [
                    Candidate(
                        layout=i.encoding.layouts[i.number],
                        index=i.alive,
                        features=f,
                        signal=lambda s, i=i: signal(i, s),  # type: ignore[misc]
                        seed=lambda i=i: i.encoding.seeds()[i.number],  # type: ignore[misc]
                    )
                    for i, f in zip(run.images, features, strict=True)
                ]
                selections = decide(stage, candidates)
                if run.memo is not None:
                    run.memo.selections[number] = selections
            else:
                selections = repeated
        run.fired.add(number)
        removed = []
        merges = any(s.into is not None for s in selections)
        if merges:
            hidden = hidden.clone()
        for image, selection, f in zip(run.images, selections, features, strict=True):
            index = selection.index[0]
            kept = image.alive[index]
            if merges:
                hidden[image.row, where(image, kept)] = selection.apply(f)
            if len(kept) < len(image.alive):
                removed.append((image.row, image.cols[_without(image.alive, index)]))
            image.alive = kept
            image.report.kept[str(stage.site)] = kept
        if removed:
            self._drop(run, removed, stage.positions)
        return hidden

    def _drop(self, run: Run, removed: Sequence[tuple[int, Tensor]], policy: str | None) -> None:
        rows = torch.cat([torch.full_like(cols, row) for row, cols in removed])
        cols = torch.cat([cols for _, cols in removed])
        if run.alive is None:
            ones = torch.ones(run.batch, run.length, dtype=torch.bool, device=run.device)
            run.alive = ones if run.new_valid is None else run.new_valid.clone()
        run.alive[rows, cols] = False
        for row, c in removed:
            run.row_valid[row] -= len(c)
        if policy == "dense":
            if run.renumbered is None:
                run.renumbered = torch.zeros(run.batch, run.length, dtype=torch.bool, device=run.device)
            run.renumbered[rows, cols] = True

    def _slots(self, run: Run, layer: int) -> Segment:
        """The slots of a new segment from what is alive now."""
        past = run.history
        if run.state is not None:
            past = next(s for s in run.state.segments if s.first_layer == layer)
        shift = past.shift if past is not None else None
        if run.renumbered is not None:
            moved = run.renumbered.sum(1)
            shift = moved if shift is None else shift + moved
        if run.alive is None:
            segment = Segment(layer, run.length, valid=run.new_valid, shift=shift)
        else:
            n_slots = max(run.row_valid)
            index, valid = ops.compact(run.alive, n_slots, run.left)
            full = min(run.row_valid) == n_slots
            segment = Segment(layer, n_slots, col=index, valid=None if full else valid, shift=shift)
        past_valid = past.valid if past is not None else None
        past_length = past.length if past is not None else 0
        segment.all_valid = cat_valid(
            past_valid, past_length, segment.valid, segment.n_slots, run.batch, run.device
        )
        return segment

    def _slot_of(self, run: Run, segment: Segment) -> Tensor:
        """[B, length] slot of every prompt column in a segment (arbitrary for removed columns)."""
        if segment.col is None:
            return torch.arange(run.length, device=run.device).expand(run.batch, -1)
        slots = torch.arange(segment.n_slots, device=run.device).expand(run.batch, -1)
        out = torch.zeros(run.batch, run.length + 1, dtype=torch.int64, device=run.device)
        col = segment.col if segment.valid is None else segment.col.masked_fill(~segment.valid, run.length)
        return out.scatter(1, col, slots)[:, :-1]

    def _positions(self, run: Run, segment: Segment) -> Tensor | None:
        """Position ids of a segment's slots under the policies of the stages so far."""
        positions = run.positions
        if positions is None:
            return None
        past = segment.shift
        if run.renumbered is not None:
            positions = positions - run.renumbered.cumsum(1)
            assert past is not None
            past = past - run.renumbered.sum(1)
        if past is not None:
            positions = positions - past.unsqueeze(1)
        if segment.col is None:
            return positions
        lead = positions.shape[:-2]
        return positions.gather(-1, segment.col.expand(*lead, -1, -1))

    def _text_attention(self, run: Run, signal: Signal) -> Tensor:
        """[B, H, n_slots] attention of every row's last token over the new slots of the current segment."""
        segment = run.segments[-1]
        attention: Any = self.decoder.attention(signal.layer)
        assert segment.tables is not None
        head_dim: int = attention.head_dim
        last = self._last_slot(run, segment)

        def heads(x: Tensor, norm: str) -> Tensor:
            x = x.unflatten(-1, (-1, head_dim))
            normed: Tensor = getattr(attention, norm)(x) if hasattr(attention, norm) else x
            return normed.transpose(1, 2)

        with torch.no_grad():
            tables = [_gather_table(t, last) for t in segment.tables]
            q = self.decoder.rotate(attention, heads(run.captured.pop((signal.layer, "q")), "q_norm"), *tables)
            if run.cache is not None:
                k: Tensor = run.cache.layers[signal.layer].keys
            else:
                k = heads(run.captured.pop((signal.layer, "k")), "k_norm")
                k = self.decoder.rotate(attention, k, *segment.tables)
            rows = ops.attention_rows(q, k, attention.scaling, segment.all_valid)[:, :, 0]
        return rows[:, :, -segment.n_slots :]

    # Reporting -------------------------------------------------------------------------------------------------

    def _layer_reports(self, run: Run, cache: Any) -> list[LayerReport]:
        reports = []
        borders = [s.first_layer for s in run.segments] + [len(self.decoder.layers)]
        text = [0] * run.batch
        for row, n in enumerate(run.row_valid):
            text[row] = n - sum(len(i.alive) for i in run.images if i.row == row)
        for segment, end in zip(run.segments, borders[1:], strict=True):
            visual = [0] * run.batch
            for image in run.images:
                visual[image.row] += self._alive_at(image, segment.first_layer)
            for layer in range(segment.first_layer, end):
                size = 0
                if cache is not None and hasattr(cache, "layers") and layer < len(cache.layers):
                    keys, values = cache.layers[layer].keys, cache.layers[layer].values
                    size = keys.numel() * keys.element_size() + values.numel() * values.element_size()
                tokens = [t + v for t, v in zip(text, visual, strict=True)]
                reports.append(LayerReport(layer, tokens, list(visual), size))
        return reports

    def _alive_at(self, image: PromptImage, layer: int) -> int:
        """Tokens of an image that were alive in a decoder layer."""
        late = {str(s.site) for _, s in self.stages if s.site.kind == "decoder" and (s.site.layer or 0) > layer}
        kept = [k for site, k in image.report.kept.items() if site not in late]
        return len(kept[-1]) if kept else image.report.tokens_in


def _without(values: Tensor, index: Tensor) -> Tensor:
    """`values` [N] less the entries at `index` [K]."""
    stays = torch.ones(len(values), dtype=torch.bool, device=values.device)
    stays[index] = False
    return values[stays]


def _gather_table(table: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, K] of a rotary table [..., B or 1, L, D]."""
    lead = table.shape[:-3]
    table = table.expand(*lead, len(index), -1, -1)
    return table.gather(-2, index.unsqueeze(-1).expand(*lead, *index.shape, table.shape[-1]))


def _narrow(image: PromptImage, signal: Signal) -> Tensor:
    """An encoder signal for the tokens of a prompt image that are alive now."""
    values, alive = image.encoding.signals[signal]
    value, was = values[image.number], alive[image.number]
    return value if len(was) == len(image.alive) else value[torch.searchsorted(was, image.alive)]
