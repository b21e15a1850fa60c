"""AS-ViT: [CLS] attention with every head weighted by how much it says at a token, cut at trained thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.errors import InvalidOptionError
from vtprune.finite import check_finite
from vtprune.method import ModelFacts, Signal, Site, Stage, View, check_choice, resolve_keep, resolve_layer
from vtprune.methods.emergent import Emergent
from vtprune.methods.weights import Trained, located
from vtprune.scoring import by_count, geometric
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class ASViT(Emergent, Trained):
    """Trained; text-agnostic, inside the ViT; per-picture counts by one threshold per layer.

        rho_h(i) = ||O_h[i]|| / sum_h' ||O_h'[i]||,  O_h = A_h V_h;   S(i) = sum_h rho_h(i) A_h[CLS, i]
        a token stays if S(i) > theta_l; S is of the layer before

    Source: Liu et al., "Adaptive Sparse ViT" (IJCAI 2023); Cydia2018/AS-ViT at ea7ccdb. Layers 4, 7 and 10 of 12
    (counted from 0) as fractions of the depth. `vtprune train` trains theta with the model frozen (theirs fine-tunes
    the ViT along); see `vtprune.eval.training.as_vit` for the loss.
    Deviations: (1) counts are per image in any batch (theirs: the mean count, then top-k). (2) The token of largest S
    always stays. (3) The variants that accumulate S over layers are left out.

    Attributes:
        keep: with "learned", the mean number of tokens left by the last stage that theta was trained for (each picture
            has its own); with "topk" exactly this; with "given" None.
        threshold: "learned" (authors); or explicitly "given", `thresholds` as they are; or explicitly "topk" (ours,
            untrained): the largest S, all stages keeping the same share.
        weights: see :class:`Trained`; "thresholds" [number of layers].
        layers: where it acts, at the input of ViT layers; indices or fractions of the depth. Those that fall together in
            a shallow encoder act once, with the last one's threshold.
        thresholds: one theta per layer for "given": by default the values from which the authors' training starts, which
            compare attention mass and so suit DeiT's 196 patches.
        scorer: "cls", or explicitly "received" (ours: mean attention received) on encoders without [CLS].
    """

    key: ClassVar[str] = "as-vit"
    substitutes = ({"threshold": "topk"}, {"threshold": "topk", "scorer": "received"})

    threshold: Literal["learned", "given", "topk"] = "learned"
    layers: tuple[int | float, ...] = (4 / 12, 7 / 12, 10 / 12)
    thresholds: tuple[float, ...] = (0.001, 0.002, 0.003)
    scorer: Literal["cls", "received"] = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("threshold", self.threshold, ("learned", "given", "topk"))
        check_choice("scorer", self.scorer, ("cls", "received"))
        if not self.layers or len(self.layers) != len(self.thresholds):
            raise InvalidOptionError(
                f"{len(self.layers)} layers need as many thresholds; {len(self.thresholds)} were given."
            )
        if (self.keep is None) != (self.threshold == "given"):
            raise InvalidOptionError(
                f"threshold={self.threshold!r} with keep={self.keep}: give keep=None with threshold='given', whose counts "
                "emerge from `thresholds`, and a budget with 'learned' and 'topk'."
            )

    @property
    def parameters(self) -> Sequence[str]:
        return ("thresholds",)

    def places(self, facts: ModelFacts) -> Mapping[int, float]:
        """Layer -> threshold, ascending."""
        layers = [max(1, resolve_layer(one, facts.encoder_layers, "layers")) for one in self.layers]
        return dict(sorted(dict(zip(layers, self.thresholds, strict=True)).items()))

    def stages(self, facts: ModelFacts) -> list[Stage]:
        if self.threshold == "learned":
            theta = located(self, facts).tensors["thresholds"].tolist()
            return replace(self, threshold="given", keep=None, thresholds=tuple(theta)).stages(facts)
        places = self.places(facts)
        kind: Literal["cls_attention", "received_attention"] = (
            "cls_attention" if self.scorer == "cls" else "received_attention"
        )
        return [
            Stage(
                Site("vit", layer),
                self.keep if i == len(places) else None,
                partial(self.cut, stage=i, stages=len(places), threshold=threshold),
                (Signal(kind, layer - 1), Signal("head_output_norms", layer - 1)),
                must_prune=i == len(places),
                positions=self.position_policy(facts),
            )
            for i, (layer, threshold) in enumerate(places.items(), start=1)
        ]

    def cut(self, view: View, stage: int, stages: int, threshold: float) -> Selection:
        """Stage 1 .. `stages`."""
        if self.keep is None:
            scores = self.scores(view)
            check_finite(scores)
            # As many as exceed the threshold: the best are those.
            counts = (scores > threshold).sum(-1).clamp(min=1).tolist()
        else:
            keep = self.keep
            counts = [geometric(m, resolve_keep(keep, m), stage, stages) for m in view.n_original]
        return by_count(view, [min(view.n, count) for count in counts], self.decide)

    def scores(self, view: View) -> Tensor:
        """S [G, N]."""
        return weighted(*(view[signal].float() for signal in view.signals))

    def decide(self, view: View) -> Selection:
        return Selection.topk(self.scores(view), view.k)


def weighted(attention: Tensor, norms: Tensor) -> Tensor:
    """S [G, N] from attention and norms of the heads' outputs, both [G, H, N]."""
    return (norms / (norms.sum(1, keepdim=True) + 1e-8) * attention).sum(1)
