"""Which decisions a method takes on a model, and which methods a model can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vtprune import methods
from vtprune.errors import InvalidOptionError, UnsupportedMethodError, VTPruneError
from vtprune.method import (
    CARRIED_SIGNALS,
    DECODER_SIGNALS,
    HEAD_SIGNALS,
    INPUT_SIGNALS,
    Bypass,
    HeadStage,
    Method,
    ModelFacts,
    Signal,
    Site,
    Stage,
)


@dataclass(frozen=True)
class Support:
    """Whether a method runs on a model.

    Attributes:
        method: its key.
        works: whether it does, with `options`.
        options: options it needs there beside its defaults: a substitute that its class names.
        reason: why it does not run, or not with its defaults; empty if it does.
        training: whether it acts in training only.
    """

    method: str
    works: bool
    options: Mapping[str, object] = field(default_factory=dict)
    reason: str = ""
    training: bool = False

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"{self.method}({options})" if options else self.method


def support(method: type[Method], facts: ModelFacts) -> Support:
    """Whether a method runs on a model with its defaults, else with the first of its substitutes that does."""
    reason = ""
    for options in ({}, *method.substitutes):
        try:
            plan_stages(method(keep=0.5, **options), facts)  # type: ignore[arg-type]
        except VTPruneError as error:
            reason = reason or str(error)
        else:
            return Support(method.key, True, options, reason, method.training_only)
    return Support(method.key, False, {}, reason, method.training_only)


def plan(method: Method, facts: ModelFacts) -> list[Stage]:
    """The stages of a method on a model, in the order of the forward pass.

    Raises:
        UnsupportedMethodError: the model lacks a site or a signal; names methods that work there.
    """
    try:
        stages = plan_stages(method, facts)
    except UnsupportedMethodError as error:
        own = support(type(method), facts)
        reason = str(error)
        if own.works and own.options:
            reason = f"{reason.rstrip('.')}; use {', '.join(f'{k}={v!r}' for k, v in own.options.items())}."
        others = [support(cls, facts) for name, cls in methods.REGISTRY.items() if name != method.key]
        working = [str(s) for s in others if s.works and not s.training]
        raise UnsupportedMethodError(
            f"method {method.key!r} cannot run on {facts.name}: {reason} Methods that work there: "
            f"{', '.join(sorted(working))}."
        ) from None
    if not stages and not method.bypasses(facts):
        raise VTPruneError(f"method {method.key!r} has no stages on {facts.name}")
    return stages


def plan_stages(method: Method, facts: ModelFacts) -> list[Stage]:
    """As :func:`plan`, without looking at other methods."""
    stages = [
        # The input of layer 0 is the input of the language model.
        replace(s, site=Site("projector")) if s.site == Site("decoder", 0) else s
        for s in method.stages(facts)
    ]
    stages.sort(key=lambda s: s.site.order)
    for stage in stages:
        _check_stage(stage, facts)
    _check_segments(stages)
    _check_bypasses(method.bypasses(facts), stages, facts)
    _check_heads(method.head_stages(facts), method.bypasses(facts), facts)
    return stages


def _check_heads(heads: Sequence[HeadStage], bypasses: Sequence[Bypass], facts: ModelFacts) -> None:
    """Raises InvalidOptionError if heads cannot be silenced as asked."""
    if heads and bypasses:
        raise InvalidOptionError("heads cannot be silenced in layers that tokens bypass; choose one of both.")
    layers = [stage.layer for stage in heads]
    wrong = sorted({x for x in layers if not 0 <= x < facts.decoder_layers or layers.count(x) > 1})
    if wrong:
        raise InvalidOptionError(
            f"heads cannot be decided on at decoder layers {wrong}: give each of 0 to {facts.decoder_layers - 1} at most once."
        )
    for stage in heads:
        for signal in stage.needs:
            if signal.kind not in HEAD_SIGNALS or not 0 <= signal.layer < stage.layer:
                raise InvalidOptionError(
                    f"{signal.kind} of layer {signal.layer} says nothing about heads, or is not known yet at layer {stage.layer}."
                )


def _check_bypasses(bypasses: Sequence[Bypass], stages: Sequence[Stage], facts: ModelFacts) -> None:
    """Raises InvalidOptionError if layers cannot be bypassed as asked, or a stage reads one that is."""
    layers = [layer for bypass in bypasses for layer in bypass.layers]
    wrong = sorted({x for x in layers if not 0 <= x < facts.decoder_layers or layers.count(x) > 1})
    if wrong:
        raise InvalidOptionError(
            f"decoder layers {wrong} cannot be bypassed: give each of 0 to {facts.decoder_layers - 1} at most once."
        )
    for stage in stages:
        for signal in stage.needs:
            measured = signal.kind in DECODER_SIGNALS and signal.kind not in INPUT_SIGNALS
            # At its own layer a stage computes ahead, from the states of all tokens.
            if measured and signal.layer != stage.site.layer and signal.layer in layers:
                raise InvalidOptionError(
                    f"the stage at {stage.site} reads {signal.kind} of layer {signal.layer}, which in training some tokens "
                    "are carried past; bypass other layers."
                )


def _check_segments(stages: Sequence[Stage]) -> None:
    """Raises InvalidOptionError if a stage reads a decoder layer that still held tokens removed in between."""
    borders = [s.site.layer or 0 for s in stages if s.site.kind == "decoder"]
    for stage in stages:
        for signal in stage.needs:
            between = [b for b in borders if signal.layer < b < (stage.site.layer or 0)]
            if (
                signal.kind in DECODER_SIGNALS
                and signal.kind not in (*INPUT_SIGNALS, *CARRIED_SIGNALS)
                and between
            ):
                raise InvalidOptionError(
                    f"{signal.kind} of layer {signal.layer} was measured before tokens are removed at "
                    f"decoder[{between[-1]}], so the stage at {stage.site} cannot read it; let it read a layer from "
                    f"{between[-1]} on."
                )


def _check_stage(stage: Stage, facts: ModelFacts) -> None:
    site = stage.site
    if site.kind not in facts.sites:
        raise UnsupportedMethodError(
            f"it has no site {site.kind!r} (sites: {', '.join(sorted(facts.sites))})."
        )
    depth = facts.encoder_layers if site.kind == "vit" else facts.decoder_layers
    if site.layer is not None and not 0 <= site.layer < depth:
        raise InvalidOptionError(f"site {site} is outside the model: layers 0 to {depth - 1} can be pruned.")
    if stage.proportional and not facts.proportional:
        raise UnsupportedMethodError(
            "its encoder cannot weigh tokens by their size (proportional attention)."
        )
    for signal in stage.needs:
        if signal.kind in facts.missing:
            raise UnsupportedMethodError(f"{facts.missing[signal.kind]}.")
        if signal.kind in HEAD_SIGNALS:
            raise InvalidOptionError(f"{signal.kind} is read by head stages only, not at site {site}.")
        layers = facts.signals.get(signal.kind)
        if layers is None or signal.layer not in layers:
            raise UnsupportedMethodError(f"it cannot provide {signal.kind} of layer {signal.layer}.")
        if not _known(signal, site):
            raise InvalidOptionError(
                f"{signal.kind} of layer {signal.layer} is not known yet at site {site}."
            )


def _known(signal: Signal, site: Site) -> bool:
    """Whether a signal has been measured, or can be computed ahead, when a site is reached."""
    if signal.kind == "patch_pixels":
        return True
    if signal.kind not in DECODER_SIGNALS:
        return site.kind != "vit" or signal.layer < (site.layer or 0)
    if signal.kind in INPUT_SIGNALS:
        return site.kind in ("projector", "decoder")
    return site.kind == "decoder" and signal.layer <= (site.layer or 0)
