"""UCoFiA's patch selector: a small network scores every token against the whole picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from vtprune.errors import InvalidOptionError, UnsupportedMethodError
from vtprune.method import Method, ModelFacts, Site, Stage, View
from vtprune.selection import Selection

TRAINING = (
    "it needs the weights of a trained selector, which cannot come with this library: train Linear layers with GELU "
    "between them, 2 D -> .. -> 1, on the frozen model's features behind the encoder (the authors use perturbed top-k: 500 "
    "Gaussian samples, sigma .05, k = 3 per frame), torch.save their state dict {'0.weight': .., '0.bias': .., "
    "'1.weight': ..}, and give its path as weights=."
)


@dataclass(frozen=True, kw_only=True)
class UCoFiA(Method):
    """Text-agnostic; top-k of a learned score.

        g_i = tanh(MLP([x_i; x_mean])),   keep = argtopk(g, k)

    Source: Wang et al., "Unified Coarse-to-Fine Alignment for Video-Text Retrieval" (ICCV 2023); Ziyang412/UCoFiA at 6098be2.
    Default: their 3 patches per frame (they keep [CLS] beside them).
    Deviations: (1) the picture is represented by the mean of its tokens; theirs by [CLS], which a method does not see behind
    the encoder. (2) Their perturbed top-k is for training; at inference it is top-k. (3) The form of the MLP is whatever
    the file holds. Similarity heads and Sinkhorn normalisation belong to retrieval and are left out.

    Attributes:
        weights: path of the selector's state dict.
    """

    key: ClassVar[str] = "ucofia"

    keep: int | float = 3
    weights: str | None = None

    def site(self, facts: ModelFacts) -> Site:
        return facts.behind_encoder()

    def stages(self, facts: ModelFacts) -> list[Stage]:
        if self.weights is None:
            raise UnsupportedMethodError(TRAINING)
        _load(self.weights)
        return super().stages(facts)

    def decide(self, view: View) -> Selection:
        if self.weights is None:
            raise UnsupportedMethodError(TRAINING)
        x = view.features.float()
        x = torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], -1)
        layers = _load(self.weights)
        if layers[0][0].shape[1] != x.shape[-1]:
            raise InvalidOptionError(
                f"weights={self.weights!r} takes {layers[0][0].shape[1]} numbers, but a token and its picture have "
                f"{x.shape[-1]}; train the selector on this model."
            )
        for i, (weight, bias) in enumerate(layers):
            x = linear(x if i == 0 else gelu(x), weight.to(x.device), bias.to(x.device))
        return Selection.topk(x[..., 0].tanh(), view.k)


@lru_cache(maxsize=4)
def _load(path: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Weights and biases of the layers.

    Raises:
        InvalidOptionError: the file cannot be read or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        layers = tuple(
            (state[f"{i}.weight"].float(), state[f"{i}.bias"].float()) for i in range(len(state) // 2)
        )
    except Exception as error:
        raise InvalidOptionError(f"weights={path!r} cannot be read ({error}): {TRAINING}") from error
    if not layers or layers[-1][0].shape[0] != 1:
        raise InvalidOptionError(f"weights={path!r} does not end in one number per token: {TRAINING}")
    return layers
