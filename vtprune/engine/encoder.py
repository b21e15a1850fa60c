"""Applies stages inside and behind a vision encoder, and collects the signals that later stages read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.deciding import Candidate, decide
from vtprune.engine.journal import Bound, Journal
from vtprune.errors import InertPruningError
from vtprune.integrations.base import Encoding, VisionTower
from vtprune.method import Signal, Stage
from vtprune.report import Stopwatch

# Name of the attribute of an encoder's output that carries {owner: Encoding} to the prefill.
ATTRIBUTE = "_vtprune_encodings"


REPLACED = (
    "The call held visual tokens that were not pruned as they had to be: something replaced, wrapped or bypassed a "
    "submodule after patching. Remove the patch and patch again."
)


class EncoderEngine(Bound):
    """Hooks of one patch on one vision encoder.

    Args:
        tower: where the tokens are.
        stages: stages at sites `vit` and `encoder`, in order.
        signals: encoder signals that any stage reads, mapped to the site whose time they count for.
        owner: number of the patch.
        finish: called with the encoding when an encoder alone has finished.
    """

    def __init__(
        self,
        tower: VisionTower,
        stages: Sequence[Stage],
        signals: Mapping[Signal, str],
        owner: int,
        finish: Callable[[Encoding], None] | None,
    ) -> None:
        self.tower, self.stages, self.signals, self.owner, self.finish = tower, stages, signals, owner, finish
        self.local = threading.local()

    def attach(self, journal: Journal) -> None:
        """Registers all hooks."""
        tower = self.tower
        journal.pre_hook(tower.entry, self._open)
        journal.hook(tower.module, self._label)
        for layer in sorted({s.layer for s in self.signals}):
            self._tap(journal, layer)
        vit = [s for s in self.stages if s.site.kind == "vit"]
        if vit:
            first = min(s.site.layer or 0 for s in vit)
            for index in range(first, len(tower.layers)):
                here = [s for s in vit if s.site.layer == index]
                journal.pre_hook(tower.layers[index], self._layer_hook(here))
        if tower.projector is not None and self.stages:
            journal.pre_hook(tower.projector, self._before_projector)
            if tower.restores:
                journal.hook(tower.projector, self._after_projector)
        if self.finish is not None and tower.projector is not None:
            journal.hook(tower.projector, self._finish)
        for name, reason in tower.refuses.items():
            journal.refuse(tower.module, name, reason)

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

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.local.encoding = self.tower.open(args, kwargs)
        self.local.captured = {}
        self.history().append(self.local.encoding)

    def _label(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.finish is not None and getattr(self.local, "encoding", None) is not None:
            raise InertPruningError(f"the hook behind the last layer did not run. {REPLACED}")
        # The output object travels through generate() to the prefill; the encoding travels with it.
        encoding = getattr(self.local, "encoding", None)
        if encoding is not None and not isinstance(output, (Tensor, tuple)):
            vars(output).setdefault(ATTRIBUTE, {})[self.owner] = encoding

    def _tap(self, journal: Journal, layer: int) -> None:
        tap = self.tower.tap(layer)
        wanted = [s for s in self.signals if s.layer == layer]

        def keep(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                if getattr(self.local, "encoding", None) is not None:
                    self.local.captured[layer, i] = output

            return hook

        def measure(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            encoding: Encoding | None = getattr(self.local, "encoding", None)
            captured = getattr(self.local, "captured", {})
            outputs = [captured.pop((layer, i), None) for i in range(len(tap.projections))]
            if encoding is None or any(o is None for o in outputs):
                return
            with torch.no_grad():
                for signal in wanted:
                    with self.watch(encoding, self.signals[signal], outputs[0].device):
                        q, k = tap.heads(outputs, kwargs)
                        encoding.record(signal, self.tower.measure(encoding, signal, q, k, tap.scale, kwargs))

        for i, projection in enumerate(tap.projections):
            journal.hook(projection, keep(i))
        journal.hook(tap.module, measure)

    def _select(self, encoding: Encoding, stage: Stage, rows: list[Tensor]) -> list[Tensor]:
        with self.watch(encoding, str(stage.site), rows[0].device):
            candidates = [
                Candidate(
                    layout=layout,
                    index=encoding.alive[i],
                    features=rows[i],
                    signal=lambda s, i=i: encoding.signal(s, i),  # type: ignore[misc]
                    seed=lambda i=i: encoding.seeds()[i],  # type: ignore[misc]
                )
                for i, layout in enumerate(encoding.layouts)
            ]
            selections = decide(stage, candidates)
        encoding.apply(selections)
        encoding.fired += 1
        encoding.kept[str(stage.site)] = list(encoding.alive)
        return [s.apply(row) for s, row in zip(selections, rows, strict=True)]

    def _layer_hook(self, stages: Sequence[Stage]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            encoding: Encoding | None = getattr(self.local, "encoding", None)
            if encoding is None:
                return None
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            for stage in stages:
                rows = self._select(encoding, stage, self.tower.read(encoding, hidden, False))
                hidden = self.tower.reduce(encoding, hidden, rows, False)
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": hidden}
            return self.tower.adapt(encoding, args, kwargs)

        return hook

    def _before_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        encoding: Encoding | None = getattr(self.local, "encoding", None)
        stages = [s for s in self.stages if s.site.kind == "encoder"]
        if encoding is None or not stages:
            return None
        features: Tensor = args[0]
        for stage in stages:
            rows = self._select(encoding, stage, self.tower.read(encoding, features, True))
            features = self.tower.reduce(encoding, features, rows, True)
        return (features, *args[1:]), kwargs

    def _after_projector(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        encoding: Encoding | None = getattr(self.local, "encoding", None)
        return None if encoding is None else self.tower.restore(encoding, output)

    def _finish(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        encoding: Encoding | None = getattr(self.local, "encoding", None)
        self.history(restart=True)
        if self.finish is not None:
            if encoding is None:
                raise InertPruningError(
                    f"the hook on {type(self.tower.entry).__name__} did not run. {REPLACED}"
                )
            self.check(encoding)
            self.finish(encoding)
