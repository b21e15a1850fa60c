"""What a pruning method is: stages, each saying where, from which signals, and how to decide.

A method never sees a model. It receives a :class:`View` of the tokens of equally large images and
returns a :class:`~vtprune.selection.Selection`; the engine finds the tokens and moves them.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.errors import InvalidOptionError, UnsupportedMethodError, VTPruneError
from vtprune.layout import TokenLayout
from vtprune.selection import HeadSelection, Selection
from vtprune.space import Space

SiteKind = Literal["vit", "encoder", "projector", "decoder"]
SITE_KINDS: tuple[SiteKind, ...] = ("vit", "encoder", "projector", "decoder")
SignalKind = Literal[
    "cls_attention",
    "received_attention",
    "attention_map",
    "encoder_keys",
    "encoder_key_heads",
    "encoder_values",
    "head_output_norms",
    "patch_pixels",
    "cls_query",
    "cls_key",
    "cls_value",
    "text_attention",
    "prompt_attention",
    "text_features",
    "input_features",
    "decoder_queries",
    "decoder_keys",
    "decoder_received",
    "decoder_head_outputs",
]
# Signals without a token dimension, and groups that models lack together.
WHOLE_IMAGE = ("cls_query", "cls_key", "cls_value")
CLS_SIGNALS: tuple[str, ...] = ("cls_attention", "cls_query", "cls_key", "cls_value")
VALUE_SIGNALS: tuple[str, ...] = ("encoder_values", "cls_value")
ENCODER_SIGNALS: tuple[str, ...] = (
    *CLS_SIGNALS,
    "received_attention",
    "attention_map",
    "encoder_keys",
    "encoder_key_heads",
    "encoder_values",
    "head_output_norms",
    "patch_pixels",
)
INPUT_SIGNALS = ("text_features", "input_features")
DECODER_SIGNALS: tuple[str, ...] = (
    "text_attention",
    "prompt_attention",
    "text_features",
    "input_features",
    "decoder_queries",
    "decoder_keys",
    "decoder_received",
)
# Kept for later stages by the token they belong to, so that a stage may read layers before an earlier removal.
CARRIED_SIGNALS = ("decoder_received",)
# Of a row's heads, not of tokens: read by head stages only.
HEAD_SIGNALS = ("decoder_head_outputs",)
POSITION_POLICIES = ("auto", "original", "dense")
BypassTokens = Literal["all", "visual"]
BYPASS_TOKENS: tuple[BypassTokens, ...] = ("all", "visual")


@dataclass(frozen=True)
class Site:
    """Where tokens are removed.

    `vit`: at the input of ViT layer `layer`. `encoder`: behind the encoder, before the projector.
    `projector`: behind the projector, i.e. at the input of the language model. `decoder`: at the input of
    decoder layer `layer`. Layers count from 0.
    """

    kind: SiteKind
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}[{self.layer}]"

    @property
    def order(self) -> tuple[int, int]:
        """Sort key along the forward pass."""
        return SITE_KINDS.index(self.kind), self.layer or 0


@dataclass(frozen=True)
class Signal:
    """A quantity that the model computes anyway and that a method wants to read.

    Where several patches make a token, a token's value is the mean of its patches', if not said otherwise.

    Kinds and the shape a View gives them, G images, H heads, N tokens at the site:
        cls_attention: [G, H, N] softmax attention of the [CLS] query in one ViT layer (keys include [CLS]).
        received_attention: [G, H, N] mean over the layer's queries of the attention that a token receives there
            (in a window-attention layer: over the queries of its window; padding patches are no queries).
        attention_map: [G, P + N, P + N] head-mean attention of one ViT layer, P prefix tokens ([CLS], registers) first;
            where several patches make a token, means over its queries and sums over its keys.
        encoder_keys: [G, N, d] head-mean keys of one ViT layer, behind any rotary embedding.
        encoder_key_heads, encoder_values: [G, H, N, d] keys and values of one ViT layer.
        head_output_norms: [G, H, N] Euclidean norm of every head's output at every token of one ViT layer.
        patch_pixels: [G, N, C, P] all P pixels of the patches that make a token, in the units in which the model is
            given them (normalised by its processor) and at its precision, in no particular order; patches of several
            frames hold the pixels of all of them (`layer` is 0).
        cls_query, cls_key, cls_value: [G, H, d] of the [CLS] token in one ViT layer.
        text_attention: [G, H, N] softmax attention of the last prompt token in one decoder layer. In the layer at
            whose input the stage acts: computed ahead, from the states that are about to enter it.
        prompt_attention: [G, H, T, N] the same for all T text tokens of the row (zero rows fill up shorter prompts).
        text_features, input_features: [G, T, D] and [G, N, D] embeddings of these text tokens, and of the visual
            tokens, at the input of the language model (`layer` is 0).
        decoder_queries, decoder_keys: [G, H, N, d] rotated queries and keys of one decoder layer (keys of grouped
            queries as they are, [G, H_kv, N, d]).
        decoder_received: [G, H, N] attention that a token receives in one decoder layer, summed over all queries; known
            for the tokens left also where others were removed in between.
        decoder_head_outputs: [R, H] sum of the absolute entries of every head's output at all tokens of a row in one
            decoder layer, for a :class:`HeadView`.
    """

    kind: SignalKind
    layer: int


@dataclass(frozen=True)
class ModelFacts:
    """What a method may know of the model when it plans its stages.

    Attributes:
        name: integration and class, for messages.
        encoder_layers: ViT layers whose output reaches the features (23 of 24 for `hidden_states[-2]`).
        decoder_layers: layers of the language model, 0 for an encoder alone.
        sites: site kinds the integration offers.
        signals: signal kinds the model can provide, mapped to the layers that provide them.
        missing: reason for every signal kind that it cannot provide.
        mrope: whether positions are multi-dimensional (M-RoPE).
        proportional: whether ViT layers can weigh tokens by their size (see `Stage.proportional`).
        folder: local folder of the model's checkpoint, where it comes from one.
        fingerprint: tells this model from others, whatever its precision; reads its parameters when it is called.
    """

    name: str
    encoder_layers: int
    decoder_layers: int
    sites: frozenset[str]
    signals: Mapping[str, frozenset[int]]
    missing: Mapping[str, str]
    mrope: bool = False
    proportional: bool = False
    folder: str | None = None
    fingerprint: Callable[[], str] | None = field(default=None, compare=False)

    def behind_encoder(self) -> Site:
        """The first site behind the encoder: before the projector, or behind it where the model pools or resizes
        features in between."""
        return Site("encoder" if "encoder" in self.sites else "projector")


class View:
    """The tokens of G images that all have N tokens left at this site.

    Attributes:
        features: [G, N, D] token features at the site, in raster order.
        index: [G, N] index of every token in its image's full token grid.
        layout: where each of the N tokens lies, per image.
        k: tokens to keep per image, already resolved from `keep` and at most N.
        n_original: [G] tokens per image before any pruning (host integers).
    """

    def __init__(
        self,
        features: Tensor,
        index: Tensor,
        layout: Sequence[TokenLayout],
        k: int,
        n_original: Sequence[int],
        seeds: Callable[[], Sequence[int]],
        signals: Mapping[Signal, Tensor],
        sizes: Tensor | None = None,
    ) -> None:
        self.features = features
        self.index = index
        self.layout = layout
        self.k = k
        self.n_original = n_original
        self._seeds = seeds
        self._signals = signals
        self._sizes = sizes

    @property
    def sizes(self) -> Tensor:
        """[G, N] float, how many original tokens every token stands for (merged ones count)."""
        if self._sizes is not None:
            return self._sizes
        return torch.ones(self.index.shape, device=self.index.device)

    @property
    def n(self) -> int:
        """Tokens per image at this site."""
        return self.features.shape[1]

    @property
    def image_seeds(self) -> Sequence[int]:
        """One integer per image made from its pixels: the same picture gives the same number in any batch."""
        return self._seeds()

    @property
    def signals(self) -> tuple[Signal, ...]:
        """The stage's declared signals, in the order of `needs`."""
        return tuple(self._signals)

    def __getitem__(self, signal: Signal) -> Tensor:
        """The value of a declared signal, see :class:`Signal` for shapes."""
        try:
            return self._signals[signal]
        except KeyError:
            raise VTPruneError(f"{signal} was read but not declared in the stage's `needs`") from None


@dataclass(frozen=True)
class Stage:
    """One decision of a method.

    Attributes:
        site: where it acts.
        keep: budget: int = tokens per image (per frame of a video), float in (0, 1] = ratio of the image's
            original tokens, None = the count emerges from the decision.
        decide: View -> Selection.
        needs: signals to collect for it.
        must_prune: whether leaving all tokens although the budget is smaller is an error.
        positions: whether survivors keep their position ids or are renumbered without gaps.
        proportional: whether later ViT layers add the logarithm of a token's size to its attention logits (ToMe).
    """

    site: Site
    keep: int | float | None
    decide: Callable[[View], Selection]
    needs: tuple[Signal, ...] = ()
    must_prune: bool = True
    positions: Literal["original", "dense"] = "original"
    proportional: bool = False


class HeadView:
    """The attention heads of R rows (samples with pictures) in the decoder layers from a head stage on.

    Attributes:
        alive: [R, H] bool, heads that no earlier stage silenced.
    """

    def __init__(self, alive: Tensor, signals: Mapping[Signal, Tensor]) -> None:
        self.alive = alive
        self._signals = signals

    @property
    def n(self) -> int:
        """Heads per layer, silenced ones included."""
        return self.alive.shape[1]

    @property
    def signals(self) -> tuple[Signal, ...]:
        """The stage's declared signals, in the order of `needs`."""
        return tuple(self._signals)

    def __getitem__(self, signal: Signal) -> Tensor:
        """The value [R, H] of a declared signal."""
        try:
            return self._signals[signal]
        except KeyError:
            raise VTPruneError(f"{signal} was read but not declared in the stage's `needs`") from None


@dataclass(frozen=True)
class HeadStage:
    """One decision about the query heads of a language model; :class:`Stage` decides about tokens.

    Heads are silenced, not removed: their outputs count as zero, in prefill and in every decoding step, and stock
    attention takes the time and the memory that it always takes.

    Attributes:
        layer: first decoder layer in which silenced heads are silent; they stay so in all layers behind.
        decide: HeadView -> HeadSelection.
        needs: signals to collect for it, of kind `decoder_head_outputs` and layers before `layer`.
    """

    layer: int
    decide: Callable[[HeadView], HeadSelection]
    needs: tuple[Signal, ...] = ()


@dataclass(frozen=True)
class BypassView:
    """The tokens in front of a decoder layer in a training step.

    Attributes:
        features: [B, L, D] hidden states, padding included.
        candidates: [B, L] bool, tokens that may be carried past the layer.
        k: per row, how many of its candidates go through (host integers).
        layer: the decoder layer.
        step: training forward passes before this one.
    """

    features: Tensor
    candidates: Tensor
    k: Sequence[int]
    layer: int
    step: int


@dataclass(frozen=True)
class Bypass:
    """Decoder layers that only some tokens go through in training; the others are carried past unchanged.

    The sequence has its full length again behind every layer, and outside training nothing happens.

    Attributes:
        layers: indices of the decoder layers.
        length: (step, candidates of a row) -> how many of them go through.
        decide: which ones, per row indices into L.
        tokens: the candidates: "all" tokens but padding, or "visual" ones, so that all text goes through.
    """

    layers: tuple[int, ...]
    length: Callable[[int, int], int]
    decide: Callable[[BypassView], Selection]
    tokens: BypassTokens = "all"


def check_keep(keep: int | float, name: str = "keep") -> None:
    """Raises InvalidOptionError unless `keep` is an int >= 1 or a float in (0, 1]."""
    hint = "an int >= 1 (tokens per image) or a float in (0, 1] (ratio)"
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise InvalidOptionError(f"{name}={keep!r} is a {type(keep).__name__}; give {hint}.")
    if isinstance(keep, int):
        if keep < 1:
            raise InvalidOptionError(
                f"{name}={keep} would leave no visual token; the smallest budget is {name}=1. Give {hint}."
            )
    elif not 0 < keep <= 1:
        near = "1.0 (keep all)" if keep > 1 else "a small ratio such as 0.05"
        whole = f", or {name}={round(keep)} for tokens per image" if keep >= 1.5 else ""
        raise InvalidOptionError(f"{name}={keep} is no ratio; the nearest is {near}{whole}. Give {hint}.")


def resolve_keep(keep: int | float, n_original: int) -> int:
    """Tokens to keep of an image with `n_original` tokens: the one definition of a budget.

    An int is taken as it is, a float is rounded half up and at least 1; never more than `n_original`.
    """
    k = keep if isinstance(keep, int) else max(1, math.floor(keep * n_original + 0.5))
    return min(k, n_original)


def resolve_layer(layer: int | float, depth: int, name: str, first: int = 0) -> int:
    """A layer given as an index (negative counts from the end) or as a fraction of the depth.

    Raises:
        InvalidOptionError: outside [first, depth).
        UnsupportedMethodError: there are no such layers at all.
    """
    if not depth:
        raise UnsupportedMethodError("it has no language model to prune in.")
    index = round(layer * depth) if isinstance(layer, float) else layer + depth if layer < 0 else layer
    if (
        isinstance(layer, bool)
        or (isinstance(layer, float) and not 0 <= layer < 1)
        or not first <= index < depth
    ):
        raise InvalidOptionError(
            f"{name}={layer} is outside the model: give an index from {first} to {depth - 1}, or a fraction of "
            f"its {depth} layers in [0, 1)."
        )
    return index


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base class of all methods: a frozen record of options.

    A subclass with one decision sets `key`, and implements `site`, `needs` and `decide`; a method with several
    overrides `stages`.

    Attributes:
        substitutes: options with which the method works on models that lack what its defaults read, best first;
            named in errors and in the support matrix, never chosen silently.
        training_only: whether it acts in training only; in evaluation the patched model is dense and its report says so.
        search_space: options that `vtprune search` varies unless it is told otherwise, with sensible bounds.
        keep: int = tokens per image, float in (0, 1] = ratio.
        positions: "original" keeps the position ids of survivors, "dense" renumbers them without gaps, "auto"
            does as the method's authors do (original wherever positions are multi-dimensional).
    """

    key: ClassVar[str]
    authors_positions: ClassVar[Literal["original", "dense"]] = "original"
    substitutes: ClassVar[tuple[Mapping[str, object], ...]] = ()
    search_space: ClassVar[Mapping[str, Space]] = {}
    training_only: ClassVar[bool] = False

    keep: int | float
    positions: Literal["auto", "original", "dense"] = "auto"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("positions", self.positions, POSITION_POLICIES)

    def site(self, facts: ModelFacts) -> Site:
        """Where the single stage acts.

        Raises:
            VTPruneError: the class defines neither this nor `stages`.
            UnsupportedMethodError, InvalidOptionError: the model has no such place.
        """
        raise VTPruneError(f"{type(self).__name__} defines neither site() nor stages()")

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        """Signals the single stage reads."""
        return ()

    @abstractmethod
    def decide(self, view: View) -> Selection:
        """The method's formula: which tokens of these images stay."""

    def stages(self, facts: ModelFacts) -> list[Stage]:
        """All decisions along the forward pass."""
        return [
            Stage(
                self.site(facts),
                self.keep,
                self.decide,
                self.needs(facts),
                positions=self.position_policy(facts),
            )
        ]

    def bypasses(self, facts: ModelFacts) -> list[Bypass]:
        """Decoder layers that some tokens are carried past in training."""
        return []

    def head_stages(self, facts: ModelFacts) -> list[HeadStage]:
        """All decisions about attention heads along the forward pass."""
        return []

    def position_policy(self, facts: ModelFacts) -> Literal["original", "dense"]:
        """ "original" or "dense" on this model.

        Raises:
            UnsupportedMethodError: "dense" was asked for on a model with multi-dimensional positions.
        """
        if self.positions == "dense" and facts.mrope:
            raise UnsupportedMethodError(
                f"positions='dense' has no meaning with the multi-dimensional positions (M-RoPE) of {facts.name}; "
                "use positions='original'."
            )
        if self.positions != "auto":
            return self.positions
        return "original" if facts.mrope else self.authors_positions

    def options(self) -> dict[str, object]:
        """All options with their values, for reports and results."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class Scored(Method):
    """Base of methods with one score per token, by default of those that keep the k largest.

    Their scores can be combined with other transforms, budgets, selectors and reducers, see :mod:`vtprune.combining`.
    """

    @abstractmethod
    def scores(self, view: View) -> Tensor:
        """[G, N], the larger the better."""

    def decide(self, view: View) -> Selection:
        return Selection.topk(self.scores(view), view.k)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises InvalidOptionError unless `value` is one of `choices`."""
    if value not in choices:
        from vtprune.errors import did_you_mean

        raise InvalidOptionError(f"{name}={value!r} is unknown. {did_you_mean(str(value), choices)}")


@dataclass(frozen=True, kw_only=True)
class Sequential(Method):
    """Several methods one after the other, e.g. `vtc-cls` behind the encoder, then `fastv` at layer 2.

    Budgets of all parts are relative to the image's original tokens; each part has its own position policy.
    """

    key: ClassVar[str] = "sequential"

    keep: int | float = 1.0
    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods:
            raise InvalidOptionError("a composition needs at least one method")

    def decide(self, view: View) -> Selection:
        raise VTPruneError("a composition decides through its parts")

    def stages(self, facts: ModelFacts) -> list[Stage]:
        return [stage for method in self.methods for stage in method.stages(facts)]

    def bypasses(self, facts: ModelFacts) -> list[Bypass]:
        return [bypass for method in self.methods for bypass in method.bypasses(facts)]

    def head_stages(self, facts: ModelFacts) -> list[HeadStage]:
        return [stage for method in self.methods for stage in method.head_stages(facts)]

    def options(self) -> dict[str, object]:
        return {"methods": [{"method": m.key, **m.options()} for m in self.methods]}


def compose(*methods: Method) -> Method:
    """One method that applies several in the order of the forward pass.

    Raises:
        InvalidOptionError: nothing to compose.
    """
    return Sequential(methods=methods)
