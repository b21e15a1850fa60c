"""What an integration has to say about a model.

An integration knows where tokens are. It does not know any method, and it moves tokens only through
`Selection` values handed to it by the engine.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vtprune.finite import Check
from vtprune.layout import TokenLayout
from vtprune.method import CLS_SIGNALS, ENCODER_SIGNALS, VALUE_SIGNALS, WHOLE_IMAGE, ModelFacts, Signal
from vtprune.report import Stopwatch
from vtprune.selection import Selection

Call = tuple[tuple[Any, ...], dict[str, Any]]
Rows = Tensor | Sequence[Tensor]
"""Values of several images: [I, N, ...] or a list of [N_i, ...]."""


@dataclass(frozen=True)
class FeatureCall:
    """The call of a model's `get_image_features` or `get_video_features` that an encoder run serves.

    Attributes:
        modality: "image" or "video".
        arguments: its arguments by name.
    """

    modality: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Unit:
    """What the prompt shows of one encoder image: a whole image, a tile of it, or a frame.

    Attributes:
        layout: grid as shown (a tile loses its padding rows and columns).
        number: the encoder image.
        image: the run of placeholders that it is part of.
        slots: [n] places of its tokens in that run, in raster order.
        source: [n] tokens of the encoder image that they show; None if they are resampled from several.
        nearest: [n] tokens of the encoder image nearest to them, where `source` is None.
    """

    layout: TokenLayout
    number: int
    image: int
    slots: Tensor
    source: Tensor | None
    nearest: Tensor | None = None


@dataclass(frozen=True)
class Packing:
    """How a model puts its encoder images into runs of placeholders.

    Attributes:
        units: in the order of the encoder images.
        sizes: placeholders per run, newline and separator tokens included.
        pack: the model's own packing of values [I, N, C], one [size, C] per run; needed where units are resampled.
    """

    units: Sequence[Unit]
    sizes: Sequence[int]
    pack: Callable[[Tensor], Sequence[Tensor]] | None = None

    def to(self, device: torch.device) -> Packing:
        """The same with index tensors on a device."""
        units = [
            replace(
                u,
                slots=u.slots.to(device, non_blocking=True),
                source=None if u.source is None else u.source.to(device, non_blocking=True),
                nearest=None if u.nearest is None else u.nearest.to(device, non_blocking=True),
            )
            for u in self.units
        ]
        return replace(self, units=units)


class Encoding:
    """One run of a vision encoder: which tokens of which images are alive, and what was measured.

    Images are what the encoder sees as such: still images, tiles of images, single frames of a video; lists run
    over them.

    Attributes:
        layouts: grid of every image.
        tower: the encoder.
        packing: how the prompt shows the images; None where every image is a run of placeholders of its own.
        alive: int64 tensors, ascending indices of surviving tokens in the image's full grid.
        kept: site -> `alive` behind it.
        watches: site -> time spent measuring and deciding.
        checks: checks of scores that the device has not answered yet.
        fired: number of decisions taken so far.
        sizes: [K_i] float per image, how many original tokens each alive one stands for; None while all are one.
        proportional: whether layers weigh tokens by these sizes.
        signals: token-first values per image with the alive indices they were measured on.
        extra: whatever the vision tower needs to remember between its layers.
    """

    def __init__(
        self,
        tower: VisionTower,
        layouts: Sequence[TokenLayout],
        pixels: Callable[[], Sequence[Tensor]],
        device: torch.device,
        packing: Packing | None = None,
    ):
        self.tower = tower
        self.layouts = list(layouts)
        self.packing = packing
        self.alive = [torch.arange(layout.n_tokens, device=device) for layout in layouts]
        self.signals: dict[Signal, tuple[Rows, list[Tensor]]] = {}
        self.extra: dict[str, Any] = {}
        self.kept: dict[str, list[Tensor]] = {}
        self.watches: dict[str, Stopwatch] = {}
        self.checks: list[Check] = []
        self.fired = 0
        self.sizes: list[Tensor] | None = None
        self.proportional = False
        self.device = device
        self._packed: dict[Signal, list[Tensor]] = {}
        self._pixels: Callable[[], Sequence[Tensor]] | None = pixels
        self._seeds: list[int] = []

    def resize(self, images: Sequence[int], n: int, before: Tensor | None, selection: Selection) -> None:
        """Updates the sizes of images when their tokens are selected; those that lose nothing keep what they have.

        Args:
            images: numbers of the images of the selection.
            n: tokens of each that decided.
            before: [G, n] how many original tokens these stand for; None while all are one.
            selection: of these tokens.
        """
        if self.sizes is None:
            if not selection.merges:
                return
            self.sizes = [torch.ones(len(a), device=a.device) for a in self.alive]
        if before is None:
            before = torch.ones(len(images), n, device=self.sizes[images[0]].device)
        for image, sizes in zip(images, selection.sizes(before), strict=True):
            if selection.merges or len(sizes) < n:
                self.sizes[image] = sizes

    def __deepcopy__(self, memo: object) -> Encoding:
        return self  # a record of one run; assisted generation copies the encoder's output, which carries it

    @property
    def counts(self) -> list[int]:
        """Surviving tokens per image."""
        return [len(a) for a in self.alive]

    def pictures(self) -> Sequence[Tensor]:
        """The pixels of every image as the encoder was given them, while it is being opened."""
        assert self._pixels is not None
        return self._pixels()

    def seeds(self) -> list[int]:
        """A checksum of every image's pixels (copies them to the host once)."""
        if self._pixels is not None:
            # Rounded, so that image backends that differ in the last bit give the same number.
            self._seeds = [
                zlib.crc32(np.rint(p.detach().float().cpu().numpy() * 128).astype(np.int16).tobytes())
                for p in self._pixels()
            ]
            self._pixels = None
        return self._seeds

    def record(self, signal: Signal, values: Rows) -> None:
        """Stores a measured signal, token-first per image ([I, N, ...] or a list), for the tokens alive now."""
        self.signals[signal] = (values, self.alive)

    def signal_of(self, signal: Signal, images: Sequence[int], tokens: Sequence[Tensor] | None) -> Rows:
        """A signal of some images.

        Args:
            images: their numbers.
            tokens: per image the tokens [K] of its grid that are asked for, alive now; None for all that are alive, of
                all images in order.
        """
        values, alive = self.signals[signal]
        if tokens is None:
            if alive is self.alive or signal.kind in WHOLE_IMAGE:
                return values
            tokens = self.alive
        return [self.signal(signal, i, t) for i, t in zip(images, tokens, strict=True)]

    def signal(self, signal: Signal, image: int, tokens: Tensor) -> Tensor:
        """A signal for some tokens [K] of an image's grid that are alive now, [K, ...]."""
        values, alive = self.signals[signal]
        if signal.kind in WHOLE_IMAGE:
            return values[image]
        if signal.kind == "attention_map":
            places = torch.searchsorted(alive[image], tokens)
            p = len(values[image]) - len(alive[image])
            index = torch.cat([torch.arange(p, device=places.device), places + p])
            return values[image][index][:, index]
        if len(tokens) == len(alive[image]):
            return values[image]
        return values[image][torch.searchsorted(alive[image], tokens)]

    def units(self) -> Sequence[Unit]:
        """What the prompt shows of every image."""
        if self.packing is not None:
            return self.packing.units
        return [
            Unit(layout, i, i, everything, everything)
            for i, layout in enumerate(self.layouts)
            for everything in [torch.arange(layout.n_tokens, device=self.device)]
        ]

    def shown(self, unit: Unit, alive: Sequence[Tensor]) -> Tensor:
        """[K] indices into a unit's grid of the tokens that show an alive token of its image.

        Args:
            alive: per image, indices into the image's grid.
        """
        if unit.source is None:
            return torch.arange(unit.layout.n_tokens, device=self.device)
        here = alive[unit.number]
        if self.packing is None:
            return here
        if len(here) == self.layouts[unit.number].n_tokens:
            return torch.arange(unit.layout.n_tokens, device=self.device)
        # An image that lost tokens has lost its padding with them: all that are left are shown.
        return torch.searchsorted(unit.source, here)

    def unit_signals(self, signal: Signal, units: Sequence[Unit], tokens: Sequence[Tensor] | None) -> Rows:
        """A signal of some units.

        Args:
            tokens: per unit the tokens [K] of its grid that are asked for, alive now; None for all of its grid.
        """
        first = units[0]
        if tokens is None and signal.kind != "attention_map":
            values = self.signals[signal][0]
            if first.source is None and all(u.image == first.image for u in units):
                index = torch.cat([u.slots for u in units])
                run: Tensor = self._resampled(signal)[first.image][index]
                return run.view(len(units), -1, *run.shape[1:])
            n = first.layout.n_tokens
            # A value per token of the whole grid: nothing had been removed when it was measured.
            if (
                isinstance(values, Tensor)
                and values.shape[1] == n
                and all(layout.n_tokens == n for layout in self.layouts)
                and [u.number for u in units] == list(range(len(values)))
            ):
                return values
        if tokens is None:
            tokens = [torch.arange(u.layout.n_tokens, device=self.device) for u in units]
        return [self._unit_signal(signal, u, t) for u, t in zip(units, tokens, strict=True)]

    def _unit_signal(self, signal: Signal, unit: Unit, tokens: Tensor) -> Tensor:
        if unit.source is not None:
            return self.signal(signal, unit.number, unit.source[tokens])
        if signal.kind == "attention_map":
            # Not resampled along both axes: the map between the nearest tokens of the unit's own image.
            assert unit.nearest is not None
            return self.signal(signal, unit.number, unit.nearest[tokens])
        return self._resampled(signal)[unit.image][unit.slots][tokens]

    def _resampled(self, signal: Signal) -> list[Tensor]:
        """Values [size, ...] of every run of placeholders, as the model resamples features."""
        assert self.packing is not None
        assert self.packing.pack is not None
        if signal not in self._packed:
            # [I, N, ...]; models that resample prune behind that only.
            values = self.signals[signal][0]
            values = values if isinstance(values, Tensor) else torch.stack(list(values))
            self._packed[signal] = [
                run.unflatten(-1, values.shape[2:]) for run in self.packing.pack(values.flatten(2))
            ]
        return self._packed[signal]


@dataclass
class AttentionTap:
    """Reads queries, keys and values out of a stock attention module without changing it.

    Attributes:
        module: the attention module.
        projections: its submodules whose outputs hold q, k and v.
        heads: (outputs of `projections`, keyword arguments of `module`) -> q, k, v as [B, H, L, d]; v may be None.
        scale: factor on the logits.
        output: its submodule that receives the concatenated heads [.., H d], where there is one.
    """

    module: nn.Module
    projections: tuple[nn.Module, ...]
    heads: Callable[[Sequence[Tensor], Mapping[str, Any]], tuple[Tensor, Tensor, Tensor | None]]
    scale: float
    output: nn.Module | None = None


@dataclass
class Attended:
    """What was read at one attention layer.

    Attributes:
        q, k, v: [B, H, L, d]; v is None where the model does not show it.
        mixed: [B, L, H, d] output of every head, where it was asked for.
        scale: factor on the logits.
        kwargs: keyword arguments of the attention module.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    mixed: Tensor | None
    scale: float
    kwargs: Mapping[str, Any]


class VisionTower(ABC):
    """Where the tokens are in a vision encoder.

    Attributes:
        module: the encoder.
        entry: module that receives the pixels, once per run.
        layers: its transformer layers.
        used_layers: number of layers whose output reaches the features.
        projector: module between encoder and language model (for an encoder alone: its final norm).
        restores: whether pruned features must be put back to full length behind the projector, because the
            model compares their number with its placeholders.
        has_cls: whether token 0 is a class token.
        refuses: methods of `module` that cannot work on pruned tokens -> reason.
        side_outputs: further modules behind its layers whose outputs must be put back to full length.
    """

    module: nn.Module
    entry: nn.Module
    layers: Sequence[nn.Module]
    used_layers: int
    projector: nn.Module | None
    restores: bool
    has_cls: bool
    refuses: Mapping[str, str] = {}
    side_outputs: Sequence[nn.Module] = ()

    @abstractmethod
    def open(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], call: FeatureCall | None) -> Encoding:
        """Describes the images of an encoder call from the arguments of `module`.

        Args:
            call: the feature call that it serves, where the integration names any.
        """

    @abstractmethod
    def tap(self, layer: int) -> AttentionTap:
        """Where queries and keys of a layer can be read."""

    @abstractmethod
    def measure(
        self,
        encoding: Encoding,
        signal: Signal,
        seen: Attended,
    ) -> Rows:
        """Computes a signal from what was read at a layer, per image: token-first, but for signals in `WHOLE_IMAGE`."""

    @abstractmethod
    def pixels(self, encoding: Encoding) -> list[Tensor]:
        """[N, C, P] per image: the pixels of every token, for an encoding that was just opened."""

    @abstractmethod
    def read(self, encoding: Encoding, hidden: Tensor, at_projector: bool) -> Rows:
        """Features [K_i, D] of the alive tokens of every image."""

    @abstractmethod
    def reduce(
        self, encoding: Encoding, hidden: Tensor, rows: Sequence[Tensor], at_projector: bool
    ) -> Tensor:
        """Hidden states holding only `rows` ([K_i, D] per image, already selected)."""

    @abstractmethod
    def adapt(self, encoding: Encoding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Arguments of a layer behind the first removal: masks, rotary tables, segment borders."""

    @abstractmethod
    def restore(self, encoding: Encoding, projected: Tensor) -> Tensor:
        """Projected features at full length again, zeros where tokens were removed."""


@dataclass
class Decoder:
    """Where the tokens are in a language model of the transformers library.

    Attributes:
        module: the decoder stack; receives `inputs_embeds`, calls `layers`.
        layers: decoder layers.
        attention: layer index -> its attention module.
        projections: attention module -> (module that outputs q, module that outputs k), unrotated [B, L, *].
        output: attention module -> module that mixes the concatenated heads [B, L, H d].
        rotate: (attention module, x [B, H, R, d], cos, sin at these rows) -> rotated x.
        causal_mask: (hidden [B, M, D], valid [B, L] or None, cache, layer) -> mask a full-attention layer expects.
        rotary: (hidden, position_ids, kind of layer) -> position embeddings.
        reads_positions: whether attention now infers packed sequences from gaps in the position ids.
        mrope: whether position ids have several rows.
        kinds: kind of every layer; layers of one kind share masks and position embeddings.
        windows: kind -> sliding window in tokens, for kinds that have one.
        additive_mask: whether layers now want a float mask (eager attention) rather than a bool mask.
        prepares_masks: whether the whole model hands ready 4D masks to its language model.
        inject: name of a method (hidden, visual mask [B, L], features [V, D]) by which the language model adds
            visual features between its layers.
    """

    module: nn.Module
    layers: Sequence[nn.Module]
    attention: Callable[[int], nn.Module]
    projections: Callable[[nn.Module], tuple[nn.Module, nn.Module]]
    output: Callable[[nn.Module], nn.Module]
    rotate: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    causal_mask: Callable[[Tensor, Tensor | None, Any, int], Any]
    rotary: Callable[[Tensor, Tensor, str], tuple[Tensor, ...]]
    reads_positions: Callable[[], bool]
    additive_mask: Callable[[], bool]
    kinds: Sequence[str]
    windows: Mapping[str, int]
    mrope: bool = False
    prepares_masks: bool = False
    inject: str | None = None


@dataclass(frozen=True)
class Merged:
    """A prompt whose pictures are embeddings already.

    Attributes:
        ids: [B, L] token ids at full length, the placeholder's at visual tokens.
        mask: [B, L] attention mask, or None.
        used: pictures in the order of their tokens; others are not shown. A picture is a run of placeholders: one encoder
            image, or several where the tower knows a packing.
        key: a tensor that identifies the pictures.
    """

    ids: Tensor
    mask: Tensor | None
    used: Sequence[int]
    key: Tensor


@dataclass(frozen=True)
class MergeCall:
    """A method of a model that merges pictures into embeddings before the model is called with them.

    Attributes:
        owner, name: the method.
        read: (arguments by name, its result) -> what it merged, or None without pictures.
    """

    owner: nn.Module
    name: str
    read: Callable[[Mapping[str, Any], Any], Merged | None]


@dataclass
class Integration:
    """One model, seen through the places the engine needs.

    Attributes:
        facts: what methods may know.
        towers: its vision encoders.
        decoder: its language model; None for an encoder alone.
        base: the module that merges features into embeddings; receives `input_ids`.
        placeholders: modality -> id of its placeholder token.
        feature_calls: modality -> name of the method of `base` whose arguments the towers have to know.
        merge_call: where pictures become embeddings, for models that are called with embeddings.
    """

    facts: ModelFacts
    towers: Sequence[VisionTower]
    decoder: Decoder | None = None
    base: nn.Module | None = None
    placeholders: Mapping[str, int] = field(default_factory=dict)
    feature_calls: Mapping[str, str] = field(default_factory=dict)
    merge_call: MergeCall | None = None


def encoder_facts(
    name: str, depth: int, has_cls: bool, values: bool, proportional: bool = True, pixels: bool = True
) -> ModelFacts:
    """What methods may know of an encoder alone whose layers can all be read.

    Args:
        values: whether its values can be read, too.
        proportional: whether its layers take a mask, by which tokens can be weighed by their size.
        pixels: whether its patches are a plain grid of pixels.
    """
    layers = frozenset(range(depth))
    missing = {} if values else dict.fromkeys(VALUE_SIGNALS, f"the values of {name} are not read")
    if not has_cls:
        missing |= dict.fromkeys(CLS_SIGNALS, f"this {name} has no class token")
    if not pixels:
        missing["patch_pixels"] = f"the patch embedding of this {name} is no plain cut into patches"
    signals = {kind: layers for kind in ENCODER_SIGNALS if kind not in missing}
    return ModelFacts(
        name=name,
        encoder_layers=depth,
        decoder_layers=0,
        sites=frozenset({"vit", "encoder"}),
        signals=signals,
        missing=missing,
        proportional=proportional,
    )
