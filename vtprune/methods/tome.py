"""ToMe: merges the most similar tokens a few at a time, in every ViT layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from vtprune.errors import InvalidOptionError, UnsupportedMethodError
from vtprune.finite import check_finite
from vtprune.method import Method, ModelFacts, Signal, Site, Stage, View, resolve_keep
from vtprune.scoring import by_count, merge_pairs, rounded
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """Training-free, text-agnostic; bipartite soft matching inside the ViT.

        A = tokens 0, 2, 4, ...;  B = tokens 1, 3, ...;   b(a) = argmax_{b in B} cos(k_a, k_b), k head-mean keys
        the r best pairs merge:   x_b <- (s_b x_b + sum s_a x_a) / (s_b + sum s_a),   s_b <- s_b + sum s_a
        proportional attention:   softmax(q k^T / sqrt(d) + log s)

    [CLS] and registers are never merged.

    Source: Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023); facebookresearch/ToMe at af95e4b (read, not
    copied: non-commercial licence). The authors give r per model (DeiT-S: 13 in each of 12 layers, which leaves
    40 of 196 patches), from which the default ratio is; their schedule (r, inflect) is r_i = r (1 - inflect +
    2 inflect i / (S - 1)), i = 0 .. S - 1.
    Deviations: (1) they merge between attention and MLP of every layer; here at the input of the next one, with the
    keys of the layer before, so S is one less than the layers. (2) r follows from `keep`: behind stage i N -
    round((N - k) (r_0 + .. + r_i) / (S r)) tokens are left. (3) A budget that needs more than half of the tokens
    merged in a stage repeats the matching there (theirs stops at half), keys of merged tokens being their means.
    (4) Token parity counts from the first patch (theirs from [CLS], so A and B swap). (5) Output is in raster order
    (theirs: A, then B).

    Attributes:
        inflect: -1 merges early, 0 the same number in all layers (authors' default), 1 late.
        proportional: False leaves the logits alone, for encoders that cannot weigh tokens.
    """

    key: ClassVar[str] = "tome"
    substitutes = ({"proportional": False},)

    keep: int | float = 40 / 196
    inflect: float = 0.0
    proportional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.inflect <= 1:
            raise InvalidOptionError(f"inflect={self.inflect} is outside [-1, 1]; 0 is a constant schedule.")

    def stages(self, facts: ModelFacts) -> list[Stage]:
        steps = facts.encoder_layers - 1
        if steps < 1:
            raise UnsupportedMethodError("it has no second encoder layer to merge at.")
        return [
            Stage(
                Site("vit", i + 1),
                self.keep if i == steps - 1 else None,
                partial(self.merge, share=self.share(i, steps)),
                (Signal("encoder_keys", i),),
                must_prune=i == steps - 1,
                positions=self.position_policy(facts),
                proportional=self.proportional,
            )
            for i in range(steps)
        ]

    def share(self, i: int, steps: int) -> float:
        """Part of all merges that is done behind stage i."""
        slope = [1 - self.inflect + 2 * self.inflect * j / max(1, steps - 1) for j in range(steps)]
        return 1.0 if i == steps - 1 else sum(slope[: i + 1]) / sum(slope)

    def merge(self, view: View, share: float) -> Selection:
        """The stage behind which `share` of all merges is done."""
        goals = [n - rounded((n - resolve_keep(self.keep, n)) * share) for n in view.n_original]
        return by_count(view, [min(view.n, goal) for goal in goals], self.decide)

    def decide(self, view: View) -> Selection:
        (keys,) = (view[signal] for signal in view.signals)
        check_finite(keys)
        return merge_pairs(keys, view.sizes, view.k)
