"""Carries tokens past decoder layers in training: some go through a layer, the others reach its output unchanged."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtprune import ops
from vtprune.engine.cache import physical_length
from vtprune.engine.encoder import REPLACED
from vtprune.engine.journal import Bound, Journal, refuse_rerun
from vtprune.engine.run import Run
from vtprune.engine.sequence import gather_positions, gather_tables
from vtprune.errors import InertPruningError, UnsupportedCallError, VTPruneError
from vtprune.integrations.base import Decoder
from vtprune.method import Bypass, BypassView
from vtprune.report import LayerReport, Report
from vtprune.selection import Selection

GENERATE = "generate"


@dataclass
class Chosen:
    """The tokens that go through a layer.

    Attributes:
        index: [B, R] slots: `counts[b]` ascending ones that go through, then others to fill the row up.
        real: [B, R] bool, False for the fillers; None when there are none.
        counts: tokens that go through, per row (host).
    """

    index: Tensor
    real: Tensor | None
    counts: list[int]


@dataclass
class Rows:
    """The slots in front of a layer.

    Attributes:
        candidates, fixed: [B, L] bool, slots that may be carried past, and slots that always go through. Padding is
            neither.
        visual: [B, L] bool.
        n_candidates, n_fixed: their numbers per row (host).
        columns: [B, L] prompt column of every slot; None where slots are columns.
    """

    candidates: Tensor
    fixed: Tensor
    visual: Tensor
    n_candidates: list[int]
    n_fixed: list[int]
    columns: Tensor | None


@dataclass
class TrainingPass:
    """One training forward pass of the language model.

    Attributes:
        step: training passes before it.
        run: what the pruning engine knows of it; None for text alone.
        mask: [B, L] the caller's mask or None.
        layers: bypassed layers that have to run.
        uncached: whether a cache was left out.
        rows: (first layer of a segment, candidates) -> its slots.
        entered: layer, its input [B, L, D], its gathered part and the choice, while the layer runs.
        through: layer -> the choice and its rows.
        finished: layers that have run.
    """

    step: int
    run: Run | None
    mask: Tensor | None
    layers: set[int]
    uncached: bool
    rows: dict[tuple[int, str], Rows] = field(default_factory=dict)
    entered: tuple[int, Tensor, Tensor, Chosen] | None = None
    through: dict[int, tuple[Chosen, Rows]] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)


class BypassEngine(Bound):
    """Hooks of one patch on the decoder layers that tokens bypass.

    A step is a forward pass in which one of these layers is in training mode. `generate()` never bypasses.

    Args:
        decoder: the language model.
        base: the module that merges features into embeddings.
        bypasses: what is bypassed; no layer twice.
        key: of the method, for messages.
        current: the pass that the pruning engine follows, and the caller's 2D mask.
        new_report, publish: make an empty report; hand over a finished one.
    """

    def __init__(
        self,
        decoder: Decoder,
        base: nn.Module,
        bypasses: Sequence[Bypass],
        key: str,
        current: Callable[[], tuple[Run | None, Tensor | None]],
        new_report: Callable[[], Report],
        publish: Callable[[Report], None],
    ) -> None:
        self.decoder, self.base, self.key, self.current = decoder, base, key, current
        self.bypasses = {layer: bypass for bypass in bypasses for layer in bypass.layers}
        self.new_report, self.hand_over = new_report, publish
        self.signature = inspect.signature(base.forward)
        self.step, self.lock = 0, threading.Lock()
        self.local = threading.local()

    def attach(self, journal: Journal, model: nn.Module) -> None:
        """Registers all hooks, behind those of the pruning engine.

        Args:
            model: the whole model.
        """
        self.journal = journal
        journal.pre_hook(self.base, self._enter)
        journal.pre_hook(self.decoder.module, self._begin)
        journal.hook(self.decoder.module, self._end, always=True)
        for layer in self.bypasses:
            journal.pre_hook(self.decoder.layers[layer], self._before(layer))
            # First, so that whoever else looks at the layer's output sees the whole sequence.
            journal.hook(self.decoder.layers[layer], self._after(layer), first=True)
        if hasattr(model, GENERATE):
            journal.attribute(model, GENERATE, self._generating(getattr(model, GENERATE)))

    def publish(self, report: Report) -> None:
        """Takes a report from the pruning engine, to be completed when the pass is over."""
        self.local.report = report
        self.hand_over(report)

    def _generating(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def generate(*args: Any, **kwargs: Any) -> Any:
            before = getattr(self.local, "generating", False)
            self.local.generating = True
            try:
                return stock(*args, **kwargs)
            finally:
                self.local.generating = before

        return generate

    def _trained(self) -> set[int]:
        """Layers that this pass has to bypass."""
        if getattr(self.local, "generating", False):
            return set()
        return {layer for layer in self.bypasses if self.decoder.layers[layer].training}

    # The whole model -------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.signature.bind_partial(*args, **kwargs).arguments
        if given.get("past_key_values") is not None and self._trained():
            raise UnsupportedCallError(
                f"{self.key!r} carries tokens past layers in this training step, and these layers keep no keys for them, so "
                "the key-value cache of the call can neither be used nor filled. Leave `past_key_values` out, or call "
                "model.eval() first."
            )

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.local.now = None
        layers = self._trained()
        if not layers:
            return None
        if torch.compiler.is_compiling():
            raise UnsupportedCallError(
                f"torch.compile cannot trace a training step under {self.key!r} (token counts change); train eagerly"
            )
        if kwargs.get("cu_seq_lens_q") is not None:
            raise UnsupportedCallError(
                f"packed sequences (cu_seq_lens_q) cannot be trained under {self.key!r}, which would have to cut them anew; "
                "give rows with padding"
            )
        cache = kwargs.get("past_key_values")
        if physical_length(cache, 0):
            raise UnsupportedCallError(
                f"a training step under {self.key!r} cannot go on from a filled cache; run the whole sequence at once"
            )
        refuse_rerun([self.decoder.layers[layer] for layer in layers])
        run, mask = self.current()
        if run is None:  # otherwise checked already
            self.journal.check()
        given = kwargs.get("attention_mask")
        if mask is None and isinstance(given, Tensor) and given.ndim == 2:
            mask = given
        config: Any = getattr(module, "config", None)
        caches = kwargs.get("use_cache")
        caches = getattr(config, "use_cache", False) if caches is None else caches
        self.local.now = TrainingPass(self.step, run, mask, layers, bool(caches))
        # Layers would fill it with the tokens that go through them alone.
        return args, {**kwargs, "past_key_values": None, "use_cache": False}

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        now: TrainingPass | None = getattr(self.local, "now", None)
        report: Report | None = getattr(self.local, "report", None)
        self.local.now = self.local.report = None
        if output is None:
            return
        if now is None:
            if report is not None:
                asked = getattr(self.local, "generating", False)
                why = "generate() ran" if asked else "the model is in evaluation mode"
                report.notes.append(
                    f"{self.key!r} carries tokens past layers in training only; {why}, so none was in this call"
                )
                self.hand_over(report)
            return
        missing = sorted(now.layers - now.finished)
        if missing:
            raise InertPruningError(f"the hooks on decoder layers {missing} did not run. {REPLACED}")
        with self.lock:
            self.step = max(self.step, now.step + 1)
        self._complete(self.new_report() if report is None else report, now, output[0])

    # Layers ----------------------------------------------------------------------------------------------------

    def _before(self, layer: int) -> Callable[..., Any]:
        bypass = self.bypasses[layer]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now: TrainingPass | None = getattr(self.local, "now", None)
            if now is None or layer not in now.layers:
                return None
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            rows = self._rows(now, bypass, hidden)
            chosen = self._choose(now, bypass, layer, rows, hidden)
            if chosen is None:
                return None
            part = ops.gather_tokens(hidden, chosen.index)
            now.entered = layer, hidden, part, chosen
            now.through[layer] = chosen, rows
            kwargs = self._gathered(kwargs, chosen, hidden.shape[1])
            if args:
                return (part, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": part}

        return hook

    def _after(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            now: TrainingPass | None = getattr(self.local, "now", None)
            if now is None or layer not in now.layers:
                return None
            now.finished.add(layer)
            if now.entered is None:
                return None
            entered, hidden, part, chosen = now.entered
            now.entered = None
            out: Tensor = output[0] if isinstance(output, tuple) else output
            if entered != layer or out.shape != part.shape:
                raise InertPruningError(
                    f"decoder layer {layer} did not run on the tokens chosen for it. {REPLACED}"
                )
            if chosen.real is not None:
                out = torch.where(chosen.real.unsqueeze(-1), out, part)
            full = hidden.to(out.dtype).scatter(1, chosen.index.unsqueeze(-1).expand_as(out), out)
            return (full, *output[1:]) if isinstance(output, tuple) else full

        return hook

    def _rows(self, now: TrainingPass, bypass: Bypass, hidden: Tensor) -> Rows:
        segment = None if now.run is None else now.run.tokens.now
        key = (0 if segment is None else segment.first_layer, bypass.tokens)
        if key not in now.rows:
            now.rows[key] = self._make_rows(now, bypass, hidden)
        return now.rows[key]

    def _make_rows(self, now: TrainingPass, bypass: Bypass, hidden: Tensor) -> Rows:
        batch, length = hidden.shape[:2]
        valid = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        visual = torch.zeros_like(valid)
        n_visual, columns = [0] * batch, None
        if now.run is None:
            if now.mask is not None:
                valid = now.mask[:, -length:].to(device=hidden.device, dtype=torch.bool)
            counts = [length] * batch if now.mask is None else valid.sum(1).tolist()
        else:
            tokens, segment = now.run.tokens, now.run.tokens.now
            counts, columns = tokens.counts, segment.col
            if segment.valid is not None:
                valid = segment.valid
            slot_of = tokens.slot_of(segment)
            for image in now.run.images:
                visual[image.row, slot_of[image.row, image.cols[image.alive]]] = True
                n_visual[image.row] += len(image.alive)
        if bypass.tokens == "all":
            return Rows(valid, torch.zeros_like(valid), visual, list(counts), [0] * batch, columns)
        n_text = [n - v for n, v in zip(counts, n_visual, strict=True)]
        return Rows(visual, valid & ~visual, visual, n_visual, n_text, columns)

    def _choose(
        self, now: TrainingPass, bypass: Bypass, layer: int, rows: Rows, hidden: Tensor
    ) -> Chosen | None:
        """The tokens that go through a layer, None for all of them."""
        k = [min(n, max(0, bypass.length(now.step, n))) for n in rows.n_candidates]
        if k == rows.n_candidates:
            return None
        with torch.no_grad():
            selection = bypass.decide(BypassView(hidden, rows.candidates, k, layer, now.step))
        _check(selection, rows.candidates, k, layer)
        chosen = rows.fixed.clone()
        for row, index in enumerate(selection.index):
            chosen[row, index] = True
        counts = [a + b for a, b in zip(k, rows.n_fixed, strict=True)]
        most = max(counts)
        index = chosen.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
        real = None
        if min(counts) < most:
            real = torch.arange(most, device=hidden.device) < chosen.sum(1, keepdim=True)
        return Chosen(index, real, counts)

    def _gathered(self, kwargs: dict[str, Any], chosen: Chosen, length: int) -> dict[str, Any]:
        """Arguments of a layer for the tokens that go through it, at their own positions."""
        index = chosen.index
        kwargs = {**kwargs, "attention_mask": self._mask(kwargs.get("attention_mask"), chosen, length)}
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            kwargs["position_embeddings"] = gather_tables(tables, index)
        ids = kwargs.get("position_ids")
        if ids is not None:
            # FlashAttention would read the gaps as borders of packed sequences.
            packed = self.decoder.reads_positions()
            kwargs["position_ids"] = None if packed else gather_positions(ids, index)
        if kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = kwargs["cache_position"][: index.shape[1]]
        return kwargs

    def _mask(self, mask: Any, chosen: Chosen, length: int) -> Tensor | None:
        if mask is None:
            # Causal by order: fillers stand last, where no real token sees them.
            return None
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == length:
            kept = mask.expand(len(chosen.index), -1).gather(1, chosen.index)
            return kept if chosen.real is None else kept * chosen.real.to(kept.dtype)
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2:] == (length, length):
            return ops.gather_mask(mask, chosen.index, chosen.real)
        found = f"a mask of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedCallError(
            f"tokens cannot be carried past layers that are given {found} for {length} tokens; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )

    # Reporting -------------------------------------------------------------------------------------------------

    def _complete(self, report: Report, now: TrainingPass, hidden: Tensor) -> None:
        batch = len(hidden)
        if not report.layers:
            first = next(iter(now.rows.values()))
            tokens = [a + b for a, b in zip(first.n_candidates, first.n_fixed, strict=True)]
            report.n_samples, report.separator_tokens = batch, report.separator_tokens or [0] * batch
            report.layers = [
                LayerReport(i, list(tokens), [0] * batch, 0) for i in range(len(self.decoder.layers))
            ]
        report.training_step = now.step
        visual = []
        for layer, (chosen, rows) in now.through.items():
            seen = rows.visual.gather(1, chosen.index)
            visual.append((seen if chosen.real is None else seen & chosen.real).sum(1))
            columns = chosen.index if rows.columns is None else rows.columns.gather(1, chosen.index)
            report.through[layer] = [row[:n] for row, n in zip(columns, chosen.counts, strict=True)]
        if visual:
            for (layer, (chosen, _)), counts in zip(
                now.through.items(), torch.stack(visual).tolist(), strict=True
            ):
                report.layers[layer].tokens, report.layers[layer].visual_tokens = chosen.counts, counts
        else:
            report.notes.append(
                f"in training step {now.step} the schedule of {self.key!r} lets all tokens through every layer"
            )
        if now.uncached:
            report.notes.append("a training step that carries tokens past layers returns no key-value cache")
        self.hand_over(report)


def _check(selection: object, candidates: Tensor, k: Sequence[int], layer: int) -> None:
    if not isinstance(selection, Selection) or selection.merges or list(selection.counts) != list(k):
        found = selection.counts if isinstance(selection, Selection) else type(selection).__name__
        raise VTPruneError(
            f"the decision at decoder layer {layer} has to be a Selection of {list(k)} tokens per row without merging, "
            f"got {found}"
        )
    # Elsewhere than on CPU this would wait for the device.
    if candidates.device.type == "cpu" and not all(
        bool(row[index].all()) and len(index.unique()) == len(index)
        for row, index in zip(candidates, selection.index, strict=True)
    ):
        raise VTPruneError(
            f"the decision at decoder layer {layer} names tokens twice, or tokens that are no candidates"
        )
