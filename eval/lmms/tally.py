"""Visual tokens before and after pruning: per request, and summed over requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtprune.report import Report

FIELDS = ("visual_tokens", "visual_tokens_llm", "visual_tokens_out", "layer_average_tokens")


@dataclass(frozen=True)
class Tokens:
    """One request, all its pictures and videos together.

    Attributes:
        visual_tokens: tokens that the vision encoder makes; for a model without a patch its placeholders.
        visual_tokens_llm: those that enter the language model.
        visual_tokens_out: those left behind the last site.
        layer_average_tokens: averaged over the decoder layers.
    """

    visual_tokens: int
    visual_tokens_llm: int
    visual_tokens_out: int
    layer_average_tokens: float

    def to_dict(self) -> dict[str, int | float]:
        """All values under their names."""
        return {name: getattr(self, name) for name in FIELDS}


def untouched(before: int, after: int) -> Tokens:
    """Of a request to a model that is not patched."""
    return Tokens(before, after, after, float(after))


def of_report(report: Report, rows: int) -> list[Tokens]:
    """Of every row of a call; beams of one row count once."""
    if not report.n_samples:  # text only
        return [untouched(0, 0)] * rows
    each = max(1, report.n_samples // rows)
    columns = (
        report.visual_tokens_in,
        report.visual_tokens_llm,
        report.visual_tokens_out,
        report.layer_average_tokens,
    )
    return [Tokens(*values) for values in list(zip(*columns, strict=True))[::each]]


@dataclass
class Tally:
    """Sums over requests that showed anything.

    Attributes:
        requests: all of them.
        shown: those with visual tokens.
        pruned: those of which a visual token was removed, somewhere.
        visual_tokens, ...: sums of :class:`Tokens`.
    """

    requests: int = 0
    shown: int = 0
    pruned: int = 0
    visual_tokens: int = 0
    visual_tokens_llm: int = 0
    visual_tokens_out: int = 0
    layer_average_tokens: float = 0.0

    def add(self, tokens: Tokens) -> None:
        """Counts one request."""
        self.requests += 1
        self.shown += tokens.visual_tokens > 0
        self.pruned += tokens.visual_tokens_out < tokens.visual_tokens
        for name in FIELDS:
            setattr(self, name, getattr(self, name) + getattr(tokens, name))

    def mean(self, name: str) -> float:
        """Mean of a field over the requests that showed anything; 0 if none did."""
        return float(getattr(self, name)) / self.shown if self.shown else 0.0

    def to_dict(self) -> dict[str, int | float]:
        """Numbers of requests, and the means."""
        return {
            "requests": self.requests,
            "requests_with_visuals": self.shown,
            "requests_pruned": self.pruned,
            **{name: self.mean(name) for name in FIELDS},
        }

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.shown} with visual tokens, {self.pruned} pruned; on average "
            f"{self.mean('visual_tokens'):.1f} visual tokens -> {self.mean('visual_tokens_llm'):.1f} into the language "
            f"model -> {self.mean('visual_tokens_out'):.1f} at the end, layer average "
            f"{self.mean('layer_average_tokens'):.1f}"
        )


def total(records: Sequence[Mapping[str, Any]]) -> Tally:
    """A tally of the `token_counts` in samples of lmms-eval; those of other models are passed over."""
    out = Tally()
    for record in records:
        for one in record.get("token_counts") or []:
            if one and all(name in one for name in FIELDS):
                out.add(Tokens(**{name: one[name] for name in FIELDS}))
    return out
