"""Finds the visual tokens of a call: which columns belong to which image of which encoder run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vtprune.engine.cache import check_cache, physical_length, state_of
from vtprune.engine.deciding import Decision
from vtprune.engine.encoder import ATTRIBUTE, REPLACED
from vtprune.errors import InertPruningError, UnsupportedCallError
from vtprune.integrations.base import Encoding, Merged, Packing, Rows, Unit
from vtprune.method import Signal
from vtprune.report import ImageReport


@dataclass
class PromptImage:
    """One image, tile or frame in one row of the prompt.

    Attributes:
        row: row in the batch.
        cols: [N] columns of its full-length placeholders.
        alive: [K] ascending indices of surviving tokens in the image's full grid.
        encoding, unit: the encoder run it came from, and what the prompt shows of it.
        report: its entry in the report.
    """

    row: int
    cols: Tensor
    alive: Tensor
    encoding: Encoding
    unit: Unit
    report: ImageReport

    def seed(self) -> int:
        """Checksum of its pixels."""
        return self.encoding.seeds()[self.unit.number]


def encoder_signal(signal: Signal, images: Sequence[PromptImage]) -> Rows:
    """An encoder signal of images with equally many tokens, for those alive now, token-first."""
    first = images[0]
    encoding, device = first.encoding, first.alive.device
    if all(i.encoding is encoding for i in images):
        whole = all(len(i.alive) == i.unit.layout.n_tokens for i in images)
        tokens = None if whole else [i.alive.to(encoding.device) for i in images]
        values = encoding.unit_signals(signal, [i.unit for i in images], tokens)
    else:
        values = [
            i.encoding.unit_signals(signal, [i.unit], [i.alive.to(i.encoding.device)])[0] for i in images
        ]
    return values.to(device) if isinstance(values, Tensor) else [v.to(device) for v in values]


@dataclass
class Memo:
    """Decisions of an earlier step of the same generation that ran without a cache.

    A step belongs to the same generation if it holds the same picture tensors and one more token.

    Attributes:
        ids: [B, L] prompt they were made for.
        length: tokens per row in the last step.
        decisions: stage number -> what it decided.
        heads: decoder layer -> heads that speak from it on, see :class:`~vtprune.engine.run.Run`.
    """

    ids: Tensor
    length: int
    decisions: dict[int, list[Decision]] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)


class Memos:
    """Remembers decisions per picture tensor, for as long as that tensor lives.

    Without a cache every step of a generation is a prefill; repeating the first step's decisions makes it equal
    to generation with a cache.
    """

    def __init__(self) -> None:
        self._memos: Any = WeakIdKeyDictionary()

    def recall(self, key: Tensor, ids: Tensor) -> Memo:
        """The memo of the generation that this step continues, or a new one."""
        memo: Memo | None = self._memos.get(key)
        grown = memo is not None and ids.shape == (len(memo.ids), memo.length + 1)
        if memo is None or not grown or not torch.equal(memo.ids, ids[:, : memo.ids.shape[1]]):
            memo = Memo(ids, ids.shape[1])
            self._memos[key] = memo
        memo.length = ids.shape[1]
        return memo


@dataclass
class Frame:
    """One forward pass of the whole model, opened before its language model runs.

    Attributes:
        ids: [B, L] prompt.
        features: modality -> encoder output computed beforehand (generation does so).
        mask: the caller's [B, L] attention mask, or None.
        visual: whether the call holds visual tokens.
        key: a tensor that identifies the pictures.
        runs: encoder runs of this call, where they came before it.
        seen: whether the language model's hook has run.
    """

    ids: Tensor | None
    features: Mapping[str, Any]
    mask: Tensor | None
    visual: bool
    key: Tensor | None
    runs: Sequence[Encoding] | None = None
    seen: bool = False

    def repeated(self, batch: int) -> Frame:
        """The same for a batch whose rows were repeated, as beam search does."""
        times = batch // len(self.ids) if self.ids is not None else 1
        if times < 2:
            return self
        ids, mask = (None if t is None else t.repeat_interleave(times, 0) for t in (self.ids, self.mask))
        return replace(self, ids=ids, mask=mask)


def merged_frame(merged: Merged, runs: Sequence[Encoding]) -> Frame:
    """A frame of a prompt that reaches the model as embeddings."""
    for encoding in runs:
        place = {image: i for i, image in enumerate(merged.used)}
        sizes = [x.n_tokens for x in encoding.layouts] if encoding.packing is None else encoding.packing.sizes
        encoding.packing = Packing(
            [replace(u, image=place[u.image]) for u in encoding.units() if u.image in place],
            [sizes[image] for image in merged.used],
        )
    return Frame(merged.ids, {}, merged.mask, True, merged.key, runs)


def open_frame(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], embeds: bool = False
) -> Frame:
    """Reads the arguments of the whole model.

    Args:
        embeds: whether embeddings without ids are known to hold no visual tokens.

    Raises:
        UnsupportedCallError: the call cannot be pruned rightly, or it cannot be told what it holds.
    """
    given = signature.bind_partial(*args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    ids: Tensor | None = given.get("input_ids")
    features = {k: v for k, v in (given.get("mm_encoder_outputs") or {}).items() if v is not None}
    pixels = [v for k, v in given.items() if k.startswith("pixel_values") and v is not None]
    cache = given.get("past_key_values")
    mask = given.get("attention_mask")
    visual = bool(features or pixels)
    if ids is None and visual:
        raise UnsupportedCallError(
            "visual tokens cannot be located without `input_ids`; pass input_ids instead of inputs_embeds together "
            "with pixel values"
        )
    if not embeds and ids is None and state_of(cache) is None and not physical_length(cache, 0):
        raise UnsupportedCallError(
            "the patched model was called with inputs_embeds only, so it cannot be told whether they hold visual "
            "tokens. Pass input_ids, or remove the patch for calls with embeddings."
        )
    if visual:
        check_cache(cache)
        if isinstance(mask, Mapping) or (mask is not None and mask.ndim != 2):
            raise UnsupportedCallError(
                "the attention mask of a pruned call must be 2D [batch, length] (1 = token, 0 = padding); got "
                f"{'a dict of masks' if isinstance(mask, Mapping) else f'shape {tuple(mask.shape)}'}. Static caches "
                "and compiled generation build such masks; use a dynamic cache."
            )
    key: Tensor | None = None
    if visual:
        pooled = next(iter(features.values())).pooler_output if features else pixels[0]
        key = pooled if isinstance(pooled, Tensor) else pooled[0]
    two = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    return Frame(ids, features, two, visual, key)


def locate(
    frame: Frame,
    host_ids: Tensor,
    placeholders: Mapping[str, int],
    runs: Sequence[Encoding],
    owner: int,
    device: torch.device,
) -> tuple[list[PromptImage], list[Encoding], list[int]]:
    """The images of a prompt in reading order, the encoder runs they came from, and separator tokens per row.

    Args:
        host_ids: the prompt on the host; where placeholders are, and how many, is data.
        placeholders: modality -> id of its placeholder token.
        runs: encoder runs of this call, for features that were not computed beforehand.
        owner: number of the patch.
        device: of the language model's input.

    Raises:
        UnsupportedCallError: placeholders and encoded images do not match.
    """
    images: list[PromptImage] = []
    encodings: list[Encoding] = []
    firsts: list[int] = []
    separators = [0] * len(host_ids)
    waiting = list(runs if frame.runs is None else frame.runs)
    for modality, token in placeholders.items():
        where = host_ids == token
        per_row: list[int] = where.sum(1).tolist()
        if not sum(per_row):
            continue
        encoding = _encoding_of(frame, modality, waiting, owner)
        encodings.append(encoding)
        host_cols = where.nonzero()[:, 1]
        cols, known = host_cols.to(device, non_blocking=True).split(per_row), host_cols.split(per_row)
        units = encoding.units()
        sizes = [unit.layout.n_tokens for unit in units]
        if encoding.packing is not None:
            sizes = list(encoding.packing.sizes)
        shown: dict[int, list[Unit]] = {}
        for unit in units:
            shown.setdefault(unit.image, []).append(unit)
        for row, numbers in enumerate(assign(sizes, per_row, modality)):
            shows = sum(unit.layout.n_tokens for n in numbers for unit in shown.get(n, []))
            separators[row] += per_row[row] - shows
            lengths = [sizes[n] for n in numbers]
            starts = known[row].split(lengths)
            for number, run, start in zip(numbers, cols[row].split(lengths), starts, strict=True):
                for unit in shown.get(number, []):
                    kept = {site: encoding.shown(unit, alive) for site, alive in encoding.kept.items()}
                    alive = encoding.shown(unit, encoding.alive).to(device)
                    entry = ImageReport(row, unit.layout, kept)
                    # Without packing a run of placeholders shows an image as it is.
                    place = run if encoding.packing is None else run[unit.slots.to(device)]
                    images.append(PromptImage(row, place, alive, encoding, unit, entry))
                    firsts.append(int(start[0]))
    if not images:
        raise UnsupportedCallError("pixel values were given, but the prompt holds no placeholder for them")
    # Pictures and videos were found one kind after the other.
    order = sorted(range(len(images)), key=lambda i: (images[i].row, firsts[i]))
    return [images[i] for i in order], encodings, separators


def _encoding_of(frame: Frame, modality: str, waiting: list[Encoding], owner: int) -> Encoding:
    if modality in frame.features:
        made: dict[int, Encoding] = getattr(frame.features[modality], ATTRIBUTE, {})
        if owner in made:
            return made[owner]
    elif waiting:
        return waiting.pop(0)
    else:
        raise InertPruningError(f"the hooks on the vision encoder did not run. {REPLACED}")
    raise UnsupportedCallError(
        f"the {modality} features of this call were not computed under this patch (before it, by other code, or cut up "
        "by chunked prefill). Leave `prefill_chunk_size` unset, and pass pixel values (or features computed after patching)."
    )


def assign(sizes: Sequence[int], per_row: Sequence[int], modality: str) -> list[list[int]]:
    """Images of every row; rows may be repeated in groups (beam search, several return sequences).

    Args:
        sizes: placeholders of every image.
        per_row: placeholders in every row.

    Raises:
        UnsupportedCallError: rows do not hold whole images.
    """
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
            f"the prompt holds {list(per_row)} {modality} placeholders per row, the encoder made images of {list(sizes)} "
            "tokens: rows must hold whole images (chunked prefill that cuts one is not supported)"
        )
    return out
