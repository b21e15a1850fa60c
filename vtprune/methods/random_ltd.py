"""Random-LTD: in training, random tokens bypass the layers in the middle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import torch

from vtprune.errors import InvalidOptionError, UnsupportedMethodError, VTPruneError
from vtprune.method import (
    BYPASS_TOKENS,
    Bypass,
    BypassTokens,
    BypassView,
    Method,
    ModelFacts,
    Stage,
    View,
    check_choice,
    check_keep,
    resolve_keep,
    resolve_layer,
)
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class RandomLTD(Method):
    """Cheaper training: at every decoder layer but the first and last, a random part of the tokens goes through.

        x'[S] = layer(x[S]),  x'[others] = x[others],   S uniform over the sorted sets of r tokens, anew per layer and row
        r(step) = min(r_max, m - m mod increase),   m = floor(step / steps (r_max - r_min) + r_min)

    It acts in training mode only. In evaluation and under `generate()` the model is dense, and the report says so.

    Source: Yao et al., "Random-LTD: Random and Layerwise Token Dropping" (2022); microsoft/DeepSpeed at 38327e07f
    (data_routing/basic_layer.py, scheduler.py). As theirs: tokens of the whole sequence are drawn, text and pictures
    alike; the schedule is linear; tokens keep their positions.
    Deviations: (1) a step is a forward pass in training mode (theirs: an optimiser step), so `steps` counts micro-batches.
    (2) Padding is never drawn and r is at most a row's own length (theirs draw padding too). (3) r is at least r_min, also
    where that is no multiple of `increase`, and budgets may be ratios. (4) Draws come from `seed`, step and layer, not from
    torch's global generator, so that resumed runs repeat them; give every process of a distributed run its own seed.
    (5) Masks are cut at the drawn rows and columns (theirs: the first r of a decoder's), rotary tables too. The paper's
    learning-rate schedule by layer tokens is the trainer's, the default r_min is ours, and ViT layers are not bypassed.

    Attributes:
        keep: r_min, tokens of a row that go through a layer in the first step, an int or a share of the row's candidates.
        until: r_max, likewise; 1.0 ends with dense training.
        steps: T, after which r_max is reached; None keeps r = r_min for good, with no schedule.
        increase: r grows in steps of so many tokens (theirs: 16 for GPT).
        tokens: "all" as the authors, or "visual": only visual tokens are carried past, `keep` counts them alone.
        layers: bypassed decoder layers; () takes all but the first and last.
        first_step: steps done before this patch, to resume a run.
        seed: changes the draws.
    """

    key: ClassVar[str] = "random-ltd"
    training_only: ClassVar[bool] = True

    keep: int | float = 0.5
    until: int | float = 1.0
    steps: int | None = None
    increase: int = 16
    tokens: BypassTokens = "all"
    layers: tuple[int, ...] = ()
    first_step: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.until, "until")
        check_choice("tokens", self.tokens, BYPASS_TOKENS)
        if self.positions == "dense":
            raise InvalidOptionError(
                "positions='dense' has no meaning for random-ltd, which removes no token; use 'original'."
            )
        for name, value, least in (
            ("steps", 1 if self.steps is None else self.steps, 1),
            ("increase", self.increase, 1),
            ("first_step", self.first_step, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidOptionError(f"{name}={value!r}: give an int of at least {least}.")

    def stages(self, facts: ModelFacts) -> list[Stage]:
        return []

    def bypasses(self, facts: ModelFacts) -> list[Bypass]:
        depth = facts.decoder_layers
        layers = tuple(resolve_layer(x, depth, "layers") for x in self.layers) or tuple(range(1, depth - 1))
        if not layers:
            what = f"only {depth} decoder layers, and none between the first and last" if depth else "none"
            raise UnsupportedMethodError(
                f"it bypasses layers of a language model, and this model has {what}."
            )
        return [Bypass(layers, self.length, self.sample, self.tokens)]

    def length(self, step: int, n: int) -> int:
        """r: how many of a row's n candidates go through in a step."""
        low, high = resolve_keep(self.keep, n), resolve_keep(self.until, n)
        if self.steps is None:
            return low
        m = math.floor((self.first_step + step) / self.steps * (high - low) + low)
        return min(high, max(low, m - m % self.increase))

    def sample(self, view: BypassView) -> Selection:
        """Uniform sets of k candidates per row."""
        generator = torch.Generator().manual_seed(
            crc32(f"{self.seed} {self.first_step + view.step} {view.layer}".encode())
        )
        draws = torch.rand(view.candidates.shape, generator=generator).to(view.candidates.device)
        order = draws.masked_fill(~view.candidates, 2).argsort(1)
        return Selection(tuple(row[:k].sort().values for row, k in zip(order, view.k, strict=True)))

    def decide(self, view: View) -> Selection:
        raise VTPruneError("random-ltd removes no token; it bypasses layers through sample()")
