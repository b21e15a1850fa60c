"""What happened in a call: tokens, bytes and time, per sample, per layer and per site."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.finite import Check
from vtprune.layout import TokenLayout


class Stopwatch:
    """Adds up the time of a code section: wall clock on CPU, stream events on CUDA (read when asked for)."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def __enter__(self) -> Stopwatch:
        self._start = self._now()
        return self

    def __exit__(self, *exc: object) -> None:
        self._spans.append((self._start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def ms(self) -> float:
        """Milliseconds spent inside so far (on CUDA: waits for the device)."""
        if not self._cuda:
            return float(sum(1e3 * (end - start) for start, end in self._spans))
        if self._spans:
            self._spans[-1][1].synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in self._spans)


@dataclass
class ImageReport:
    """One image, tile of an image, or video frame of one sample.

    Attributes:
        sample: row in the batch.
        layout: its token grid.
        kept: site -> ascending indices of the tokens that remained behind it, in the full grid.
    """

    sample: int
    layout: TokenLayout
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens_in(self) -> int:
        """Tokens the encoder made of it."""
        return self.layout.n_tokens

    @property
    def tokens_out(self) -> int:
        """Tokens left behind the last site."""
        return len(next(reversed(self.kept.values()))) if self.kept else self.layout.n_tokens


@dataclass
class LayerReport:
    """One decoder layer during prefill.

    Attributes:
        layer: its index.
        tokens: tokens it processed, per sample, padding not counted.
        visual_tokens: visual ones among them, per sample.
        kv_bytes: bytes its cache held after prefill (all samples, padding included); 0 without a cache.
    """

    layer: int
    tokens: list[int]
    visual_tokens: list[int]
    kv_bytes: int


@dataclass
class Report:
    """The engagement report of the last call.

    Attributes:
        method, options, model, positions: what was patched, and the position policy in force per site.
        images: every image (tile, frame) of every sample.
        separator_tokens: placeholders per sample that show no content, such as newlines; they are always kept and
            count as text.
        layers: decoder layers (empty for an encoder alone).
        decide_ms: site -> milliseconds spent measuring signals and deciding.
        decode_steps: forward passes after prefill that used this cache.
        training_step: training passes before this one, under a method that carries tokens past layers in training; None
            in any other call.
        through: decoder layer -> per sample the prompt columns, ascending, that went through it in a training step; the
            others were carried past. Layers that all tokens went through are not listed.
        speaking: decoder layer -> [samples, heads] bool, heads that speak in it and in the layers up to the next such layer;
            empty while no method silences heads.
        notes: anything the user should know, e.g. an image with fewer tokens than the budget.
    """

    method: str
    options: dict[str, object]
    model: str
    positions: dict[str, str]
    n_samples: int = 0
    separator_tokens: list[int] = field(default_factory=list)
    images: list[ImageReport] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    decode_steps: int = 0
    training_step: int | None = None
    through: dict[int, list[Tensor]] = field(default_factory=dict)
    speaking: dict[int, Tensor] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)
    watches: dict[str, Stopwatch] = field(default_factory=dict, repr=False)
    checks: list[Check] = field(default_factory=list, repr=False)

    @property
    def decide_ms(self) -> dict[str, float]:
        """Site -> milliseconds spent measuring signals and deciding."""
        return {site: watch.ms for site, watch in self.watches.items()}

    def __deepcopy__(self, memo: object) -> Report:
        return self  # a record of the past; copies of a cache or model share it

    def grid(self, sample: int = 0, picture: int = 0, time: int = 0) -> tuple[int, int, list[int]]:
        """Rows and columns of a picture as a whole, and its surviving tokens in raster order.

        Where a model cuts a picture into tiles this is the composite of the tiles, not the small base view.

        Args:
            sample: row of the batch.
            picture: which image or video of that row, from 0.
            time: which frame of a video.

        Raises:
            VTPruneError: there is no such picture.
        """
        found: dict[tuple[str, int], list[ImageReport]] = {}
        for image in self.images:
            if image.sample == sample:
                found.setdefault((image.layout.modality, image.layout.image), []).append(image)
        if not 0 <= picture < len(found):
            raise VTPruneError(
                f"sample {sample} of this call has {len(found)} pictures; there is no {picture}."
            )
        units = [i for i in list(found.values())[picture] if i.layout.time == time]
        parts = [i for i in units if i.layout.tile] or units
        if not parts:
            raise VTPruneError(f"picture {picture} of sample {sample} has no frame {time}.")
        rows = max(i.layout.top + i.layout.rows for i in parts)
        cols = max(i.layout.left + i.layout.cols for i in parts)
        kept: list[int] = []
        for i in parts:
            survivors = next(reversed(i.kept.values())) if i.kept else torch.arange(i.layout.n_tokens)
            _, row, col = i.layout.coordinates(survivors.cpu())
            kept += (row * cols + col).tolist()
        return rows, cols, sorted(kept)

    def _per_sample(self, values: Sequence[tuple[int, int]]) -> list[int]:
        out = [0] * self.n_samples
        for sample, value in values:
            out[sample] += value
        return out

    @property
    def visual_tokens_in(self) -> list[int]:
        """Visual tokens per sample before pruning."""
        return self._per_sample([(i.sample, i.tokens_in) for i in self.images])

    @property
    def visual_tokens_llm(self) -> list[int]:
        """Visual tokens per sample that enter the language model."""
        if not self.layers:
            return self.visual_tokens_out
        return list(self.layers[0].visual_tokens)

    @property
    def visual_tokens_out(self) -> list[int]:
        """Visual tokens per sample behind the last site."""
        return self._per_sample([(i.sample, i.tokens_out) for i in self.images])

    @property
    def layer_average_tokens(self) -> list[float]:
        """Visual tokens per sample averaged over decoder layers (for an encoder alone: those that come out)."""
        if not self.layers:
            return [float(n) for n in self.visual_tokens_out]
        sums = [sum(counts) for counts in zip(*(layer.visual_tokens for layer in self.layers), strict=True)]
        return [s / len(self.layers) for s in sums]

    @property
    def heads(self) -> dict[int, list[list[int]]]:
        """Decoder layer -> per sample the query heads that speak from it on; the others are silenced, not removed."""
        return {
            layer: [row.nonzero()[:, 0].tolist() for row in alive.cpu()]
            for layer, alive in sorted(self.speaking.items())
        }

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole cache after prefill."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def engaged(self) -> bool:
        """Whether any visual token was removed, or any token carried past a layer."""
        return bool(self.through) or self.visual_tokens_out != self.visual_tokens_in

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings and lists."""
        return {
            "method": self.method,
            "options": _plain(self.options),
            "model": self.model,
            "positions": self.positions,
            "engaged": self.engaged,
            "separator_tokens": self.separator_tokens,
            "samples": [
                {
                    "visual_tokens_in": a,
                    "visual_tokens_llm": b,
                    "visual_tokens_out": c,
                    "layer_average_tokens": d,
                }
                for a, b, c, d in zip(
                    self.visual_tokens_in,
                    self.visual_tokens_llm,
                    self.visual_tokens_out,
                    self.layer_average_tokens,
                    strict=True,
                )
            ],
            "images": [
                {
                    "sample": i.sample,
                    "modality": i.layout.modality,
                    "grid": [i.layout.rows, i.layout.cols],
                    "image": i.layout.image,
                    "tile": i.layout.tile,
                    "origin": [i.layout.top, i.layout.left],
                    "time": i.layout.time,
                    "tokens_in": i.tokens_in,
                    "tokens_out": i.tokens_out,
                    "kept": {site: kept.tolist() for site, kept in i.kept.items()},
                }
                for i in self.images
            ],
            "layers": [
                {
                    "layer": x.layer,
                    "tokens": x.tokens,
                    "visual_tokens": x.visual_tokens,
                    "kv_bytes": x.kv_bytes,
                    "through": [columns.tolist() for columns in self.through[x.layer]]
                    if x.layer in self.through
                    else None,
                }
                for x in self.layers
            ],
            "kv_bytes": self.kv_bytes,
            "decide_ms": self.decide_ms,
            "decode_steps": self.decode_steps,
            "training_step": self.training_step,
            "heads": {str(layer): rows for layer, rows in self.heads.items()},
            "notes": self.notes,
        }

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        lines = [f"{self.method}({options}) on {self.model}"]
        if not self.images:
            lines.append("  no visual tokens in this call")
        for s in range(self.n_samples if self.images else 0):
            n_in, n_llm, n_out = (
                self.visual_tokens_in[s],
                self.visual_tokens_llm[s],
                self.visual_tokens_out[s],
            )
            lines.append(
                f"  sample {s}: {n_in} visual tokens -> {n_llm} into the language model -> {n_out} at the end, "
                f"layer average {self.layer_average_tokens[s]:.1f}"
                if self.layers
                else f"  image {s}: {n_in} tokens -> {n_out}"
            )
        first = 0
        for i in range(1, len(self.layers) + 1):
            if i == len(self.layers) or self.layers[i].tokens != self.layers[first].tokens:
                a = self.layers[first]
                size = sum(x.kv_bytes for x in self.layers[first:i]) / 2**20
                lines.append(
                    f"  layers {first}-{i - 1}: {a.tokens} tokens per sample, {size:.3f} MiB of KV cache"
                )
                first = i
        if self.training_step is not None:
            lines.append(f"  training step {self.training_step}: {self._carried()}")
        for site, ms in self.decide_ms.items():
            lines.append(f"  {site}: {ms:.2f} ms deciding, positions {self.positions.get(site, 'original')}")
        for layer, rows in self.heads.items():
            total = self.speaking[layer].shape[1]
            lines.append(
                f"  heads from decoder layer {layer} on: {[len(r) for r in rows]} of {total} per sample speak"
            )
        if self.decode_steps:
            lines.append(f"  {self.decode_steps} decoding steps")
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])

    def _carried(self) -> str:
        if not self.through:
            return "all tokens went through every layer"
        layers = ", ".join(map(str, sorted(self.through)))
        return f"in decoder layers {layers} the other tokens were carried past"


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
