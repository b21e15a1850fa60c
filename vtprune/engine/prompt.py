"""Finds the visual tokens of a call: which columns belong to which image of which encoder run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vtprune.engine.cache import check_cache, physical_length, state_of
from vtprune.engine.encoder import ATTRIBUTE
from vtprune.errors import UnsupportedCallError
from vtprune.integrations.base import Encoding
from vtprune.method import Signal
from vtprune.report import ImageReport
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

    def signal(self, signal: Signal) -> Tensor:
        """An encoder signal for the tokens alive now, token-first."""
        values, alive = self.encoding.signals[signal]
        value, was = (x[self.number].to(self.alive.device) for x in (values, alive))
        return value if len(was) == len(self.alive) else value[torch.searchsorted(was, self.alive)]


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
        visual: whether the call holds visual tokens.
        key: a tensor that identifies the pictures.
        seen: whether the language model's hook has run.
    """

    ids: Tensor | None
    features: Mapping[str, Any]
    visual: bool
    key: Tensor | None
    seen: bool = False


def open_frame(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Frame:
    """Reads the arguments of the whole model.

    Raises:
        UnsupportedCallError: the call cannot be pruned rightly, or it cannot be told what it holds.
    """
    given = signature.bind_partial(*args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    ids: Tensor | None = given.get("input_ids")
    features = {k: v for k, v in (given.get("mm_encoder_outputs") or {}).items() if v is not None}
    pixels = [v for k, v in given.items() if k.startswith("pixel_values") and v is not None]
    cache = given.get("past_key_values")
    visual = bool(features or pixels)
    if ids is None and visual:
        raise UnsupportedCallError(
            "visual tokens cannot be located without `input_ids`; pass input_ids instead of inputs_embeds together "
            "with pixel values"
        )
    if ids is None and state_of(cache) is None and not physical_length(cache, 0):
        raise UnsupportedCallError(
            "the patched model was called with inputs_embeds only, so it cannot be told whether they hold visual "
            "tokens. Pass input_ids, or remove the patch for calls with embeddings."
        )
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
                "torch.compile cannot trace a patched model (token counts are data); compile the unpatched model, or "
                "call the patched one eagerly"
            )
    key: Tensor | None = None
    if visual:
        key = next(iter(features.values())).pooler_output[0] if features else pixels[0]
    return Frame(ids, features, visual, key)


def locate(
    frame: Frame,
    placeholders: Mapping[str, int],
    runs: Sequence[Encoding],
    owner: int,
    device: torch.device,
) -> tuple[list[PromptImage], list[Encoding]]:
    """The images of a prompt, in reading order, and the encoder runs they came from.

    Finding placeholders synchronises the device (their number is data).

    Args:
        placeholders: modality -> id of its placeholder token.
        runs: encoder runs of this call, for features that were not computed beforehand.
        owner: number of the patch.
        device: of the language model's input.

    Raises:
        UnsupportedCallError: placeholders and encoded images do not match.
    """
    assert frame.ids is not None
    images: list[PromptImage] = []
    encodings: list[Encoding] = []
    waiting = list(runs)
    for modality, token in placeholders.items():
        where = frame.ids == token
        per_row: list[int] = where.sum(1).tolist()
        if not sum(per_row):
            continue
        encoding = _encoding_of(frame, modality, waiting, owner)
        encodings.append(encoding)
        cols = where.nonzero()[:, 1].to(device).split(per_row)
        for row, numbers in enumerate(assign(encoding, per_row, modality)):
            sizes = [encoding.layouts[n].n_tokens for n in numbers]
            for number, c in zip(numbers, cols[row].split(sizes), strict=True):
                kept = {site: survivors[number] for site, survivors in encoding.kept.items()}
                entry = ImageReport(row, encoding.layouts[number], kept)
                alive = encoding.alive[number].to(device)
                images.append(PromptImage(row, c, alive, encoding, number, entry))
    if not images:
        raise UnsupportedCallError("pixel values were given, but the prompt holds no placeholder for them")
    # Pictures and videos were found one kind after the other; only where both occur is their order not known yet.
    images.sort(key=(lambda i: i.row) if len(encodings) < 2 else (lambda i: (i.row, int(i.cols[0]))))
    return images, encodings


def _encoding_of(frame: Frame, modality: str, waiting: list[Encoding], owner: int) -> Encoding:
    if modality in frame.features:
        made: dict[int, Encoding] = getattr(frame.features[modality], ATTRIBUTE, {})
        if owner in made:
            return made[owner]
    elif waiting:
        return waiting.pop(0)
    raise UnsupportedCallError(
        f"the {modality} features of this call were not computed under this patch, or were cut up by chunked "
        "prefill. Leave `prefill_chunk_size` unset, and pass pixel values (or features computed after patching)."
    )


def assign(encoding: Encoding, per_row: Sequence[int], modality: str) -> list[list[int]]:
    """Images of every row; rows may be repeated in groups (beam search, several return sequences).

    Raises:
        UnsupportedCallError: rows do not hold whole images.
    """
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
            f"the prompt holds {list(per_row)} {modality} placeholders per row, the encoder made images of {sizes} "
            "tokens: rows must hold whole images (chunked prefill that cuts one is not supported)"
        )
    return out
