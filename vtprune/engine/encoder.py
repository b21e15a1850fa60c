"""Applies stages inside and behind vision encoders, and collects the signals that later stages read."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.deciding import Candidates, decide
from vtprune.engine.journal import Bound, Journal, refuse_compiled, refuse_rerun
from vtprune.errors import InertPruningError
from vtprune.integrations.base import Attended, Encoding, FeatureCall, Rows, Unit, VisionTower
from vtprune.method import Signal, Stage
from vtprune.report import Stopwatch

# Name of the attribute of an encoder's output that carries {owner: Encoding} to the prefill.
ATTRIBUTE = "_vtprune_encodings"


REPLACED = (
    "The call held visual tokens that were not pruned as they had to be: something replaced, wrapped or bypassed a "
    "submodule after patching. Remove the patch and patch again."
)


class EncoderEngine(Bound):
    """Hooks of one patch on the vision encoders of one model.

    Args:
        towers: where the tokens are.
        stages: stages at sites `vit` and `encoder`, in order.
        signals: encoder signals that any stage reads, mapped to the site whose time they count for.
        owner: number of the patch.
        finish: called with the encoding when an encoder alone has finished.
    """

    def __init__(
        self,
        towers: Sequence[VisionTower],
        stages: Sequence[Stage],
        signals: Mapping[Signal, str],
        owner: int,
        finish: Callable[[Encoding], None] | None,
    ) -> None:
        self.towers, self.stages, self.signals, self.owner, self.finish = (
            towers,
            stages,
            signals,
            owner,
            finish,
        )
        self.local = threading.local()

    def attach(self, journal: Journal) -> None:
        """Registers all hooks."""
        self.journal = journal
        for tower in self.towers:
            self._attach(journal, tower)
        # Encoders of one model may share a projector.
        for projector in {id(t.projector): t.projector for t in self.towers}.values():
            if projector is not None and self.stages:
                journal.pre_hook(projector, self._before_projector)
                journal.hook(projector, self._after_projector)

    def _attach(self, journal: Journal, tower: VisionTower) -> None:
        journal.pre_hook(tower.entry, functools.partial(self._open, tower))
        journal.hook(tower.module, self._label)
        for layer in sorted({s.layer for s in self.signals if s.kind != "patch_pixels"}):
            self._tap(journal, tower, layer)
        vit = [s for s in self.stages if s.site.kind == "vit"]
        if vit:
            first = min(s.site.layer or 0 for s in vit)
            for index in range(first, len(tower.layers)):
                here = [s for s in vit if s.site.layer == index]
                journal.pre_hook(tower.layers[index], self._layer_hook(tower, here))
        if self.stages:
            for module in tower.side_outputs:
                journal.hook(module, self._after_projector)
        if self.finish is not None:
            journal.hook(tower.layers[-1], self._exit)
        for name, reason in tower.refuses.items():
            journal.refuse(tower.module, name, reason)

    def attach_calls(self, journal: Journal, base: nn.Module, names: Mapping[str, str]) -> None:
        """Wraps methods of `base` so that encoder runs know the arguments of the feature call they serve."""
        for modality, name in names.items():
            journal.attribute(base, name, self._wrapped(modality, getattr(base, name)))

    def _wrapped(self, modality: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(stock)

        @functools.wraps(stock)
        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(self.local, "call", None) is not None:
                # Qwen3-VL encodes videos through the method for images.
                return stock(*args, **kwargs)
            arguments = signature.bind_partial(*args, **kwargs).arguments
            self.local.call = FeatureCall(modality, {**arguments, **arguments.get("kwargs", {})})
            try:
                return stock(*args, **kwargs)
            finally:
                self.local.call = None

        return call

    def _current(self, tower: VisionTower | None = None) -> Encoding | None:
        """The encoder run of this thread, if it is one of `tower`."""
        encoding: Encoding | None = getattr(self.local, "encoding", None)
        return encoding if encoding is None or tower in (None, encoding.tower) else None

    def history(self, restart: bool = False) -> list[Encoding]:
        """Encoder runs of this thread since the last restart."""
        if restart:
            self.local.encoding = None
            self.local.runs = []
        runs: list[Encoding] = vars(self.local).setdefault("runs", [])
        return runs

    def check(self, encoding: Encoding) -> None:
        """Raises InertPruningError unless every stage and every measurement of an encoder run took place."""
        silent = [str(s.site) for s in self.stages[encoding.fired :]]
        silent += [f"{s.kind} of layer {s.layer}" for s in self.signals if s not in encoding.signals]
        if silent:
            raise InertPruningError(f"the hooks for {', '.join(silent)} did not run. {REPLACED}")

    def watch(self, encoding: Encoding, site: str, device: torch.device) -> Stopwatch:
        """The stopwatch of a site."""
        watch: Stopwatch = encoding.watches.setdefault(site, Stopwatch(device))
        return watch

    def _open(
        self, tower: VisionTower, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        refuse_compiled()
        self.journal.check()
        if self.finish is not None or any(s.site.kind == "vit" for s in self.stages):
            refuse_rerun(tower.layers)
        self.local.encoding = encoding = tower.open(args, kwargs, getattr(self.local, "call", None))
        for signal, site in self.signals.items():
            if signal.kind == "patch_pixels":
                with self.watch(encoding, site, encoding.device), torch.no_grad():
                    encoding.record(signal, tower.pixels(encoding))
        self.local.captured = {}
        self.history().append(self.local.encoding)

    def _label(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        encoding = self._current()
        if self.finish is not None and encoding is not None:
            raise InertPruningError(f"the hook behind the last layer did not run. {REPLACED}")
        # The output object travels through generate() to the prefill; the encoding travels with it.
        if encoding is not None and not isinstance(output, (Tensor, tuple)):
            vars(output).setdefault(ATTRIBUTE, {})[self.owner] = encoding
            alive = [r for r in vars(self.local).get("labelled", []) if r() is not None]
            self.local.labelled = [*alive, weakref.ref(output)]

    def relabel(self, outputs: Iterable[Any]) -> None:
        """Labels copies of encoder outputs: accelerate makes such where it moves the arguments of a call to a device."""
        labelled: list[weakref.ref[Any]] = vars(self.local).get("labelled", [])
        for output in outputs:
            for original in [r() for r in labelled] if not hasattr(output, ATTRIBUTE) else []:
                if original is not None and _same(original.pooler_output, output.pooler_output):
                    setattr(output, ATTRIBUTE, getattr(original, ATTRIBUTE))

    def _tap(self, journal: Journal, tower: VisionTower, layer: int) -> None:
        tap = tower.tap(layer)
        wanted = [s for s in self.signals if s.layer == layer and s.kind != "patch_pixels"]

        def keep(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                if self._current(tower) is not None:
                    self.local.captured[layer, i] = output

            return hook

        def measure(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            encoding = self._current(tower)
            captured = getattr(self.local, "captured", {})
            outputs = [captured.pop((layer, i), None) for i in range(len(tap.projections))]
            if encoding is None or any(o is None for o in outputs):
                return
            with torch.no_grad():
                for signal in wanted:
                    with self.watch(encoding, self.signals[signal], outputs[0].device):
                        q, k, v = tap.heads(outputs, kwargs)
                        mixed = captured.get((layer, -1))
                        if mixed is not None:
                            mixed = mixed.reshape(len(q), q.shape[2], q.shape[1], -1)
                        seen = Attended(q, k, v, mixed, tap.scale, kwargs)
                        encoding.record(signal, tower.measure(encoding, signal, seen))
            captured.pop((layer, -1), None)

        def keep_mixed(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
            if self._current(tower) is not None:
                self.local.captured[layer, -1] = args[0]

        for i, projection in enumerate(tap.projections):
            journal.hook(projection, keep(i))
        if tap.output is not None and any(s.kind == "head_output_norms" for s in wanted):
            journal.pre_hook(tap.output, keep_mixed)
        journal.hook(tap.module, measure)

    def _select(self, encoding: Encoding, stage: Stage, rows: Rows) -> list[Tensor]:
        """Lets a stage decide; returns the surviving rows of every image and narrows the encoding."""
        before = encoding.alive
        with self.watch(encoding, str(stage.site), rows[0].device):
            tokens = _Encoded(encoding, rows)
            decisions = decide(stage, tokens)
            encoding.alive = list(before)
            kept = list(rows)
            for decision in decisions:
                selection, numbers = decision.selection, [tokens.numbers[i] for i in decision.images]
                n = tokens.counts[decision.images[0]]
                # An image that loses nothing keeps its padding too: its other tokens attend to that.
                changed = [selection.merges or k < n for k in selection.counts]
                if not any(changed):
                    continue
                left = selection.index_of(tokens.grid_index(decision.images))
                new = selection.apply_all(tokens.features(decision.images))
                encoding.resize(numbers, n, tokens.sizes(decision.images), selection)
                for g, image in enumerate(numbers):
                    if changed[g]:
                        encoding.alive[image], kept[image] = left[g], new[g]
        encoding.fired += 1
        encoding.proportional |= stage.proportional
        encoding.kept[str(stage.site)] = list(encoding.alive)
        return kept

    def _layer_hook(self, tower: VisionTower, stages: Sequence[Stage]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            encoding = self._current(tower)
            if encoding is None:
                return None
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            for stage in stages:
                rows = self._select(encoding, stage, tower.read(encoding, hidden, False))
                hidden = tower.reduce(encoding, hidden, rows, False)
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": hidden}
            return tower.adapt(encoding, args, kwargs)

        return hook

    def _behind(self, encoding: Encoding, features: Tensor) -> Tensor:
        """Applies the stages at site `encoder`."""
        for stage in self.stages:
            if stage.site.kind == "encoder":
                rows = self._select(encoding, stage, encoding.tower.read(encoding, features, True))
                features = encoding.tower.reduce(encoding, features, rows, True)
        return features

    def _before_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        encoding = self._current()
        if encoding is None:
            return None
        return (self._behind(encoding, args[0]), *args[1:]), kwargs

    def _after_projector(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        encoding = self._current()
        return None if encoding is None else encoding.tower.restore(encoding, output)

    def _exit(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Behind the last layer of an encoder alone."""
        encoding = self._current()
        self.history(restart=True)
        if encoding is None:
            raise InertPruningError(f"the hook at the encoder's entry did not run. {REPLACED}")
        assert self.finish is not None
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        hidden = self._behind(encoding, hidden)
        self.check(encoding)
        self.finish(encoding)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _same(features: Any, others: Any) -> bool:
    """Whether two pooled outputs are the same tensors, or equal ones on other devices."""
    pairs = [[f] if isinstance(f, Tensor) else list(f) if f is not None else [] for f in (features, others)]
    return len(pairs[0]) == len(pairs[1]) > 0 and all(
        a is b or (a.device != b.device and a.shape == b.shape and torch.equal(a.to(b.device), b))
        for a, b in zip(*pairs, strict=True)
    )


class _Encoded(Candidates):
    """The tokens of an encoder run as a stage sees them: without padding of tiles, which must not take part of a budget.

    Args:
        encoding: the run.
        rows: features of the alive tokens of every image.
    """

    def __init__(self, encoding: Encoding, rows: Rows) -> None:
        self.encoding, self._rows, self.checks = encoding, rows, encoding.checks
        units = encoding.packing.units if encoding.packing is not None else None
        if units is None:
            self.numbers = list(range(len(encoding.layouts)))
            self.layouts = encoding.layouts
            self._index = self._tokens = encoding.alive
        else:
            self.numbers = [unit.number for unit in units]
            self.layouts = [unit.layout for unit in units]
            self._index = [encoding.shown(unit, encoding.alive) for unit in units]
            self._tokens = [_source(unit)[index] for unit, index in zip(units, self._index, strict=True)]
        self.counts = [len(index) for index in self._index]
        alive = encoding.counts
        # Whether all alive tokens of an image are shown.
        self._whole = [n == alive[number] for n, number in zip(self.counts, self.numbers, strict=True)]

    def index(self, images: Sequence[int]) -> Tensor:
        return torch.stack([self._index[i] for i in images])

    def grid_index(self, images: Sequence[int]) -> Tensor:
        """[G, N] indices of the tokens in the encoder's own grid."""
        return torch.stack([self._tokens[i] for i in images])

    def places(self, image: int) -> Tensor | None:
        """[N] places of the tokens among the alive ones of their image; None if they are all of them."""
        if self._whole[image]:
            return None
        return torch.searchsorted(self.encoding.alive[self.numbers[image]], self._tokens[image])

    def _of(self, values: Rows, image: int) -> Tensor:
        here, places = values[self.numbers[image]], self.places(image)
        return here if places is None else here[places]

    def _all(self, images: Sequence[int]) -> bool:
        """Whether these are all alive tokens of all images, in order."""
        everyone = list(range(len(self.encoding.layouts)))
        return [self.numbers[i] for i in images] == everyone and all(self._whole)

    def features(self, images: Sequence[int]) -> Tensor:
        if isinstance(self._rows, Tensor) and self._all(images):
            return self._rows
        return torch.stack([self._of(self._rows, i) for i in images])

    def signal(self, signal: Signal, images: Sequence[int]) -> Rows:
        numbers = [self.numbers[i] for i in images]
        tokens = None if self._all(images) else [self._tokens[i] for i in images]
        return self.encoding.signal_of(signal, numbers, tokens)

    def seed(self, image: int) -> int:
        return self.encoding.seeds()[self.numbers[image]]

    def sizes(self, images: Sequence[int]) -> Tensor | None:
        sizes = self.encoding.sizes
        return None if sizes is None else torch.stack([self._of(sizes, i) for i in images])


def _source(unit: Unit) -> Tensor:
    assert unit.source is not None
    return unit.source
