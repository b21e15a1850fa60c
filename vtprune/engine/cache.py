"""The key-value cache of a pruned sequence: physical in its layers, logical towards the caller.

`generate()` slices inputs and counts positions by `cache.get_seq_length()`, which has to be the length of the
prompt as the user knows it. Masks are sized by the physical length of each layer. A pruned cache answers both
rightly, carries the validity of its slots through beam search, and refuses to be used by an unpatched model.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from vtprune.errors import UnsupportedCallError


@dataclass
class SegmentState:
    """Slots of the layers from `first_layer` up to the next segment.

    Attributes:
        first_layer: first decoder layer of the segment.
        length: physical slots per row.
        valid: [B, length] bool, None when no slot is padding.
        shift: [B] positions by which tokens of this segment moved down (dense policy), None for 0.
        columns: [B, length] column of every slot in the whole sequence; None where no layer has a window.
    """

    first_layer: int
    length: int
    valid: Tensor | None
    shift: Tensor | None
    columns: Tensor | None


@dataclass
class CacheState:
    """What a pruned cache knows beyond keys and values.

    Attributes:
        owner: number of the patch that made it.
        logical: sequence length as the caller counts it, pruned tokens included.
        segments: from the first layer to the last.
        report: the report that further decoding steps are counted in.
        pruned: [B, L] bool, False for removed tokens and padding, of the last pass that removed any.
        since: tokens added since that pass.
        heads: decoder layer -> [B, H] bool, heads that speak in it and in the layers up to the next such layer.
    """

    owner: int
    logical: int
    segments: list[SegmentState]
    report: Any
    pruned: Tensor | None
    since: int
    heads: dict[int, Tensor] = field(default_factory=dict)

    @property
    def padded(self) -> bool:
        """Whether every segment holds padding, so that its masks are explicit."""
        return all(segment.valid is not None for segment in self.segments)

    @property
    def croppable(self) -> int:
        """How many tokens can be cut off the end before a removed one is met."""
        if self.pruned is None:
            return self.logical
        whole = self.pruned.all(0).flip(0).long()
        return self.since + int(whole.cumprod(0).sum())


_writer: ContextVar[CacheState | None] = ContextVar("vtprune_cache_writer", default=None)


class PrunedDynamicCache(DynamicCache):
    """A `DynamicCache` whose layers may hold fewer slots than the sequence has tokens. Made by the engine only."""

    vtprune: CacheState

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the sequence as the caller counts them (pruned ones included), for every layer."""
        return self.vtprune.logical

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Physical slots of a layer; masks are sized by it."""
        return physical_length(self, layer_idx)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if _writer.get() is not self.vtprune:
            raise UnsupportedCallError(
                "this cache was pruned by vtprune and the model that now continues it is not patched (or is patched "
                "anew), so its masks would be wrong. Continue it while the patch is active, or start from a fresh "
                "cache."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _each(self, change: Any) -> None:
        for segment in self.vtprune.segments:
            if segment.valid is not None:
                segment.valid = change(segment.valid)
            if segment.shift is not None:
                segment.shift = change(segment.shift)
            if segment.columns is not None:
                segment.columns = change(segment.columns)
        self.vtprune.heads = {layer: change(alive) for layer, alive in self.vtprune.heads.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens (never reaching back to pruned ones)."""
        n, state = abs(tokens_to_remove), self.vtprune
        if tokens_to_remove > 0:
            raise UnsupportedCallError("crop() of a pruned cache takes a negative number of tokens to remove")
        if n > state.since and n > state.croppable:
            raise UnsupportedCallError(
                f"crop({tokens_to_remove}) of a pruned cache would reach back to tokens that were removed; at most "
                f"{state.croppable} can be cut off its end"
            )
        super().crop(tokens_to_remove)
        state.logical -= n
        if n > state.since and state.pruned is not None:
            state.pruned = state.pruned[:, : state.pruned.shape[1] - (n - state.since)]
        state.since = max(0, state.since - n)
        for segment in self.vtprune.segments:
            segment.length -= n
            if segment.valid is not None and n:
                segment.valid = segment.valid[:, :-n]
            if segment.columns is not None and n:
                segment.columns = segment.columns[:, :-n]

    def reset(self) -> None:
        """Empties the cache; it is an ordinary `DynamicCache` again afterwards."""
        super().reset()  # type: ignore[no-untyped-call]
        self.__class__ = DynamicCache  # type: ignore[assignment]
        del self.vtprune


def state_of(cache: object) -> CacheState | None:
    """The state of a pruned cache, None for any other object."""
    return cache.vtprune if isinstance(cache, PrunedDynamicCache) else None


def check_cache(cache: object) -> None:
    """Raises UnsupportedCallError for caches whose layers cannot differ in length."""
    if cache is None or isinstance(cache, PrunedDynamicCache):
        return
    plain = type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer or _is_empty_window(layer) for layer in cache.layers
    )
    if not plain:
        kind = type(cache).__name__
        if isinstance(cache, Cache) and type(cache) is DynamicCache:
            kind += f" with filled {', '.join(sorted({type(layer).__name__ for layer in cache.layers}))}"
        raise UnsupportedCallError(
            f"a {kind} cannot hold a pruned sequence (its layers have one fixed length or layout). Use a fresh "
            "DynamicCache: leave `cache_implementation` unset, or remove the patch for this call."
        )


def _is_empty_window(layer: object) -> bool:
    return type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized


def widen(cache: Any) -> None:
    """Replaces the empty sliding-window layers of a cache by such that keep everything.

    A window counts tokens of the unpruned sequence, a `DynamicSlidingWindowLayer` drops slots: it would drop
    survivors too early or too late. The window is kept by the masks instead.
    """
    if cache is not None:
        cache.layers = [DynamicLayer() if _is_empty_window(layer) else layer for layer in cache.layers]


def physical_length(cache: object, layer: int) -> int:
    """Slots that a layer of any supported cache holds now."""
    if cache is None or layer >= len(cache.layers):  # type: ignore[attr-defined]
        return 0
    return int(cache.layers[layer].get_seq_length())  # type: ignore[attr-defined]


def install(cache: Any, state: CacheState) -> None:
    """Turns a DynamicCache into a pruned one, or replaces the state of a pruned one."""
    cache.__class__ = PrunedDynamicCache
    cache.vtprune = state


def writing(state: CacheState | None) -> Any:
    """Allows updates of the cache with this state until the returned token is given to :func:`done`."""
    return _writer.set(state)


def done(token: Any) -> None:
    """Ends what :func:`writing` began."""
    _writer.reset(token)
