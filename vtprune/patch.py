"""The public entry: patch a model, read the report, undo."""

from __future__ import annotations

import itertools
import os
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from vtprune import methods
from vtprune.engine.encoder import EncoderEngine
from vtprune.engine.journal import Journal, refuse_compiled
from vtprune.errors import AlreadyPatchedError, InvalidOptionError, VTPruneError
from vtprune.finite import answer
from vtprune.integrations import FAMILIES, integrate, unwrap
from vtprune.integrations.base import Encoding, Integration
from vtprune.method import DECODER_SIGNALS, Method, Signal, compose
from vtprune.methods import files
from vtprune.planning import plan
from vtprune.report import ImageReport, Report

# The step of generate() with which every kind of speculative decoding begins.
SPECULATION = "_get_candidate_generator"

_numbers = itertools.count(1)
_patches: weakref.WeakKeyDictionary[nn.Module, Patch] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class Patch:
    """A method at work on a model. Made by :func:`patch`; a context manager that removes itself.

    Attributes:
        method: the method.
        facts: what the method knows of the model.
        stages: its decisions in the order of the forward pass.
        bypasses: decoder layers that it carries tokens past in training.
        head_stages: its decisions about attention heads, likewise in order.
    """

    def __init__(self, model: nn.Module, method: Method, notes: Sequence[str] = ()) -> None:
        integration = integrate(model)
        self.method = method
        self.facts = integration.facts
        self.stages = plan(method, self.facts)
        self.bypasses = method.bypasses(self.facts)
        self.head_stages = sorted(method.head_stages(self.facts), key=lambda stage: stage.layer)
        self._model = weakref.ref(model)
        self._journal = Journal()
        self._report: Report | None = None
        self._notes = notes
        self._number = next(_numbers)
        try:
            self._attach(model, integration)
        except BaseException:
            self._journal.revert()
            raise

    def _attach(self, model: nn.Module, integration: Integration) -> None:
        vision = [s for s in self.stages if s.site.kind in ("vit", "encoder")]
        signals: dict[Signal, str] = {}
        for stage in self.stages:
            for signal in stage.needs:
                if signal.kind not in DECODER_SIGNALS:
                    signals.setdefault(signal, str(stage.site))
        # Compiled code runs the hooks of the outermost module, whatever it does with those below.
        self._journal.pre_hook(model, refuse_compiled)
        alone = integration.decoder is None
        encoder = EncoderEngine(
            integration.towers, vision, signals, self._number, self._encoder_finished if alone else None
        )
        encoder.attach(self._journal)
        if integration.decoder is not None and integration.base is not None:
            encoder.attach_calls(self._journal, integration.base, integration.feature_calls)
            from vtprune.engine.bypass import BypassEngine
            from vtprune.engine.decoder import DecoderEngine

            decoder = DecoderEngine(
                integration,
                encoder,
                [s for s in self.stages if s.site.kind in ("projector", "decoder")],
                self.head_stages,
                any(s.positions == "dense" for s in vision),
                self._number,
                self._new_report,
                self._publish,
            )
            decoder.attach(self._journal)
            if self.bypasses:
                bypass = BypassEngine(
                    integration.decoder,
                    integration.base,
                    self.bypasses,
                    self.method.key,
                    decoder.current,
                    self._new_report,
                    self._publish,
                )
                decoder.publish = bypass.publish
                bypass.attach(self._journal, model)
        reads_text = any(s.kind in DECODER_SIGNALS for stage in self.stages for s in stage.needs)
        reads_text |= any(stage.needs for stage in self.head_stages)
        if reads_text and hasattr(model, SPECULATION):
            self._journal.refuse(
                model,
                SPECULATION,
                "speculative decoding puts draft tokens behind the prompt before the prefill, so the last prompt token "
                f"that {self.method.key!r} asks cannot be told from a draft; use a method that does not read the text, "
                "or generate without assistant model and prompt lookup",
            )
        self._journal.settle(model)

    def _new_report(self) -> Report:
        if self._report is not None:
            answer(self._report.checks, wait=False)
        return Report(
            method=self.method.key,
            options=self.method.options(),
            model=self.facts.name,
            positions={str(s.site): s.positions for s in self.stages},
        )

    def _publish(self, report: Report) -> None:
        notes = {
            f"an image with {image.tokens_in} tokens has fewer than keep={stage.keep}; all of them were kept at "
            f"{stage.site}"
            for image in report.images
            for stage in self.stages
            if isinstance(stage.keep, int) and stage.keep > image.tokens_in
        }
        report.notes = sorted({*self._notes, *report.notes, *notes})
        self._report = report

    def _encoder_finished(self, encoding: Encoding) -> None:
        report = self._new_report()
        report.n_samples = len(encoding.layouts)
        report.watches = encoding.watches
        report.checks = encoding.checks
        for i, layout in enumerate(encoding.layouts):
            report.images.append(
                ImageReport(i, layout, {site: kept[i] for site, kept in encoding.kept.items()})
            )
        self._publish(report)

    def report(self) -> Report:
        """What happened in the last call (of any thread).

        Raises:
            VTPruneError: the model has not been called since it was patched.
            InertPruningError: other code removed hooks of the patch.
            NonFiniteScoresError: scores of that call were NaN, which a GPU had not told yet.
        """
        self._journal.check()
        if self._report is None:
            raise VTPruneError(
                "the model has not been called since it was patched, so there is nothing to report"
            )
        answer(self._report.checks, wait=True)
        return self._report

    @property
    def active(self) -> bool:
        """Whether the patch is in force."""
        model = self._model()
        return model is not None and _patches.get(model) is self

    def remove(self) -> None:
        """Undoes every change to the model, exactly. Safe to call twice."""
        with _lock:
            self._journal.revert()
            model = self._model()
            if model is not None and _patches.get(model) is self:
                del _patches[model]

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        sites = f"sites {[str(s.site) for s in self.stages]}"
        layers = sorted(layer for bypass in self.bypasses for layer in bypass.layers)
        if layers:
            sites += f", in training bypasses decoder layers {layers}"
        if self.head_stages:
            sites += f", silences heads from decoder layer {self.head_stages[0].layer} on"
        return f"<Patch {self.method.key} on {self.facts.name}, {state}, {sites}>"


def patch(
    model: nn.Module, method: str | os.PathLike[str] | Method | Sequence[Method], **options: Any
) -> Patch:
    """Prunes visual tokens of a stock model from now on.

    Nothing is replaced: the model is given forward hooks, all recorded in a journal. All checks come before the
    first change.

    Args:
        model: see :func:`list_models`; also one in a PEFT model or a DistributedDataParallel wrapper. Adapters come first:
            what replaces modules of a patched model is noticed, and calls are refused where hooks would go astray.
        method: a registry key with its options, a Method, several Methods to apply one after the other, or the path
            of a file that `vtprune search` wrote.
        **options: options of the method when it is given by its key, e.g. ``keep=64``.

    Returns:
        The patch: ``report()``, ``remove()``, and a context manager.

    Raises:
        VTPruneError: unknown method or option, option out of range, unsupported model or pair, patched before,
            unreadable file.

    Warns:
        UserWarning: the file was searched on a model of another class.
    """
    file = files.load(method) if files.names_file(method) else None
    chosen = _as_method(method if file is None else file.method, options)
    if not isinstance(model, nn.Module):
        from vtprune.errors import UnsupportedModelError

        raise UnsupportedModelError(f"a {type(model).__name__} is no torch module; give a loaded model.")
    model = unwrap(model)
    with _lock:
        for owner, other in list(_patches.items()):
            if any(m is owner for m in model.modules()) or any(m is model for m in owner.modules()):
                raise AlreadyPatchedError(
                    f"{type(owner).__name__} already carries {other!r}. Call unpatch(model) first, or pass several "
                    "methods in one patch to combine them."
                )
        note = None if file is None else file.note(type(model).__name__)
        if note is not None:
            warnings.warn(note, stacklevel=2)
        result = Patch(model, chosen, () if note is None else (note,))
        _patches[model] = result
    return result


def _as_method(method: str | os.PathLike[str] | Method | Sequence[Method], options: dict[str, Any]) -> Method:
    if isinstance(method, str):
        return methods.create(method, **options)
    if options:
        raise InvalidOptionError(
            f"options {sorted(options)} can only be given with a method's name; a {type(method).__name__} carries "
            "its own."
        )
    if isinstance(method, Method):
        return method
    if isinstance(method, Sequence) and method and all(isinstance(m, Method) for m in method):
        return compose(*method)
    raise InvalidOptionError(
        f"{method!r} is no method; give a name ({', '.join(sorted(methods.REGISTRY))}), a Method, or a list of Methods."
    )


def unpatch(model: nn.Module) -> None:
    """Undoes the patch of a model; wrappers are looked through as in :func:`patch`.

    Raises:
        VTPruneError: the model carries no patch.
    """
    current = _patches.get(unwrap(model))
    if current is None:
        raise VTPruneError(f"this {type(model).__name__} carries no patch")
    current.remove()


@dataclass(frozen=True)
class ModelSupport:
    """One supported model family.

    Attributes:
        name: its key.
        title: name for people.
        classes: classes that can be patched.
        library: library that defines them.
        kind: "lvlm" or "encoder".
    """

    name: str
    title: str
    classes: tuple[str, ...]
    library: str
    kind: str


def list_models() -> list[ModelSupport]:
    """All supported model families."""
    return [ModelSupport(f.name, f.title, f.classes, f.library, f.kind) for f in FAMILIES]


def list_methods() -> list[str]:
    """Registry keys of all methods."""
    return sorted(methods.REGISTRY)
