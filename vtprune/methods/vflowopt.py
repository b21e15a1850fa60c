"""VFlowOpt: calibrated ViT attention and patch entropy, three stages, recycling of what the first one prunes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from vtprune.errors import InvalidOptionError
from vtprune.method import Method, ModelFacts, Signal, Site, Stage, View, resolve_layer
from vtprune.methods.staged import three_counts
from vtprune.scoring import by_count, calibrated, grey_entropy, recycled
from vtprune.selection import Selection
from vtprune.space import Range, Space


@dataclass(frozen=True, kw_only=True)
class VFlowOpt(Method):
    """Training-free, text-agnostic; one importance map prunes before and twice inside the language model.

        r_j = mean_i A_ij,   K = {q : r_q > t mean_j r_j}    (A head-mean ViT attention)
        I_i = mean_{q in K} A_qi + alpha softmax_i(Ent_i)
        (R1 L1 + R1 R2 L2 + R1 R2 R3 L3) / L = keep,   L1 + L2 + L3 = L decoder layers

    Ent is the Shannon entropy in bits of the 256-bin histogram of a token's grey values, grey = mean of red, green and
    blue. Stage 1 cuts the grid into a x a cells; the pruned tokens of a cell become sum I v / sum I in the place of the
    one of largest I. These recycled tokens count for R1. Stages 2 and 3 discard. R3 follows from `keep`.

    Source: Yang et al., "VFlowOpt" (ICCV 2025); sihany077/VFlowOpt at 129eeef. Defaults are what the authors' search found
    for LLaVA-OneVision-7B at 25 %: R (.2651, .9833, .8773; R3 is solved anew, .870 at exactly 25 %), t 34.76, a 15.58,
    alpha 0; stages before layers 0, 9 and 18 of 28. Other published results: 10 % R (.1166, 1, .6011), t 39.26, a 17.39;
    50 % R (.7233, .7487, .487), t 28.68, a 11.76, alpha 0 in all. `search_space` is the box of their search at 25 %.
    Deviations: (1) queries, means and the softmax run over the tokens left, so that stages 2 and 3 use a map of the
    survivors (theirs: the first map). (2) If no query exceeds the threshold, the one of largest r votes. (3) If there are
    not more tokens left than cells, nothing is recycled. (4) Where no R3 in (0, 1] meets the budget, R2 and then R1 give
    way. (5) Every tile and frame has its own map and budget; separators are always kept, as theirs are. (6) Pixels are
    brought back to 0 .. 255 and clamped there (theirs: normalised pixels times 255 as uint8, where negative ones wrap).
    (7) Positions stay original (theirs:
    counted anew behind stage 1, kept in stages 2 and 3). (8) Counts are met exactly (theirs reserves floor(N / a^2) tokens for
    recycling, whatever the number of cells), frames and several images recycle, too, and newlines count in no budget. (9) I below 0, which a negative alpha can make, weighs nothing in a recycled token (theirs divides by the plain sum).

    Attributes:
        keep: visual tokens per image (or share of them) on average over all decoder layers.
        r1: R1 in units of `keep`.
        r2: share of them behind stage 2.
        t: threshold of the query set in units of the mean.
        a: side of a cell in tokens; need not be whole.
        alpha: weight of the patch entropy; at 0 no pixels are read, which not all models can show.
        pixel_mean, pixel_std: what the model's processor normalises pixels with (image_mean and image_std; a model does
            not know them). Default: CLIP's, which LLaVA 1.5 and Qwen-VL use; SigLIP towers use 0.5 for all six.
        attention_layer: ViT layer of A, an index or a fraction of the depth.
        layers: decoder layers of stages 2 and 3, indices or fractions.
    """

    key: ClassVar[str] = "vflowopt"
    search_space: ClassVar[dict[str, Space]] = {
        "r1": Range(1.0, 1.5),
        "r2": Range(0.533, 1.0),
        "t": Range(0.0, 50.0),
        "a": Range(3.0, 24.0),
        "alpha": Range(-1.0, 1.0),
    }

    keep: int | float = 0.25
    r1: float = 1.0604
    r2: float = 0.9833
    t: float = 34.76
    a: float = 15.58
    alpha: float = 0.0
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    attention_layer: int | float = -1
    layers: tuple[int | float, int | float] = (9 / 28, 18 / 28)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r1 <= 0 or not 0 < self.r2 <= 1:
            raise InvalidOptionError(f"r1={self.r1}, r2={self.r2}: r1 has to be above 0, r2 in (0, 1].")
        if self.t < 0 or self.a < 1:
            raise InvalidOptionError(f"t={self.t}, a={self.a}: t has to be at least 0, a at least 1 token.")
        if len(self.pixel_mean) != len(self.pixel_std) or min(self.pixel_std, default=0) <= 0:
            raise InvalidOptionError(
                f"pixel_mean={self.pixel_mean}, pixel_std={self.pixel_std}: give the processor's image_mean and image_std, "
                "one per channel, the latter above 0."
            )

    def stages(self, facts: ModelFacts) -> list[Stage]:
        inner = {resolve_layer(one, facts.decoder_layers, "layers", first=1) for one in self.layers}
        starts = [0, *sorted(inner)]
        spans = [b - a for a, b in zip(starts, [*starts[1:], facts.decoder_layers], strict=True)]
        spans += [0] * (3 - len(spans))
        layer = resolve_layer(self.attention_layer, facts.encoder_layers, "attention_layer")
        needs = (Signal("attention_map", layer), *([Signal("patch_pixels", 0)] if self.alpha else []))
        return [
            Stage(
                Site("decoder", start) if start else Site("projector"),
                None,
                partial(self.flow, stage=i, spans=spans),
                needs,
                must_prune=False,
                positions=self.position_policy(facts),
            )
            for i, start in enumerate(starts)
        ]

    def counts(self, n: int, spans: Sequence[int]) -> tuple[int, int, int]:
        """Tokens of n behind each stage, which are processed by `spans` layers each."""
        budget = self.keep * n if isinstance(self.keep, float) else min(self.keep, n)
        return three_counts(n, budget, spans, self.r1 * budget, self.r1 * self.r2 * budget)

    def importance(self, view: View) -> Tensor:
        """I [G, N]."""
        attention, *pixels = (view[signal] for signal in view.signals)
        p = attention.shape[-1] - view.n
        scores = calibrated(attention[:, p:, p:].float(), self.t)
        for x in pixels:
            scores = scores + self.alpha * grey_entropy(x, self.pixel_mean, self.pixel_std).softmax(-1)
        return scores

    def flow(self, view: View, stage: int, spans: Sequence[int]) -> Selection:
        """Stage 0, 1 or 2."""
        counts = [min(view.n, self.counts(m, spans)[stage]) for m in view.n_original]
        return by_count(view, counts, self.discard if stage else self.decide)

    def discard(self, view: View) -> Selection:
        """The decision of stages 2 and 3."""
        return Selection.topk(self.importance(view), view.k)

    def decide(self, view: View) -> Selection:
        cols = view.index.new_tensor([[one.cols] for one in view.layout])
        cells = (view.index // cols / self.a).long() * view.n + (view.index % cols / self.a).long()
        return recycled(self.importance(view), cells, view.k)
