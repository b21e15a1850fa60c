"""UCoFiA's patch selector: a small network scores every token against the whole picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from vtprune.errors import InvalidOptionError
from vtprune.method import Method, ModelFacts, Site, Stage, View
from vtprune.methods.weights import Trained, located
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class UCoFiA(Trained):
    """Trained; text-agnostic; top-k of a learned score.

        g_i = tanh(MLP([x_i; x_mean])),   keep = argtopk(g, k)

    Source: Wang et al., "Unified Coarse-to-Fine Alignment for Video-Text Retrieval" (ICCV 2023); Ziyang412/UCoFiA at 6098be2.
    Default: their 3 patches per frame (they keep [CLS] beside them). `vtprune train` trains the MLP on frozen features;
    see `vtprune.eval.training.ucofia` for the perturbed top-k and the loss.
    Deviations: (1) the picture is represented by the mean of its tokens; theirs by [CLS], which a method does not see behind
    the encoder. (2) At inference it is plain top-k. (3) The MLP is plain; theirs
    begins with a LayerNorm, has no biases, and joins [CLS] behind the first layer (text to video: before and behind it). Similarity heads and
    Sinkhorn normalisation belong to retrieval and are left out.

    Attributes:
        weights: see :class:`Trained`; "0.weight" [h, 2 D], "0.bias" [h], "1.weight", ..: Linear layers with GELU between.
    """

    key: ClassVar[str] = "ucofia"

    keep: int | float = 3

    @property
    def parameters(self) -> Sequence[str]:
        return ("0.weight", "0.bias")

    def site(self, facts: ModelFacts) -> Site:
        return facts.behind_encoder()

    def stages(self, facts: ModelFacts) -> list[Stage]:
        method = located(self, facts)
        last = f"{len(method.tensors) // 2 - 1}.weight"
        if last not in method.tensors or method.tensors[last].shape[0] != 1:
            raise InvalidOptionError(f"weights={self.weights!r} do not end in one number per token.")
        return Method.stages(method, facts)

    def decide(self, view: View) -> Selection:
        x, wanted = view.features.float(), self.tensors["0.weight"].shape[1]
        if wanted != 2 * x.shape[-1]:
            raise InvalidOptionError(
                f"weights={self.weights!r} take {wanted} numbers, but a token and its picture have {2 * x.shape[-1]}; "
                "train the selector on this model."
            )
        return Selection.topk(selector({name: t.to(x.device) for name, t in self.tensors.items()}, x), view.k)


def selector(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """g [G, N] of features [G, N, D]."""
    x = torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], -1)
    for i in range(len(tensors) // 2):
        x = linear(x if i == 0 else gelu(x), tensors[f"{i}.weight"], tensors[f"{i}.bias"])
    return x[..., 0].tanh()
