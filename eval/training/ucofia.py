"""UCoFiA's patch selector by perturbed top-k.

Source: Ziyang412/UCoFiA at 6098be2, after Cordonnier et al., "Differentiable Patch Selection" (CVPR 2021): the selection is
averaged over Gaussian perturbations of the scores, sigma .05; theirs has 500 samples and k = 3, and its loss is that of
text-video retrieval.

Ours: 100 samples, for time. The forward pass takes the plain top-k and the backward pass the gradient of that average
(straight through): the language model sees all selected tokens, and a blurred selection would show it all of them. The loss
is what the answers need: cross-entropy of the dense model's answer, and half the divergence from its distribution. The
encoder, the projector and the language model are frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.method import ModelFacts, resolve_keep
from vtprune.methods.ucofia import UCoFiA, selector

from .fading import Places
from .learner import Learner, straight_through

SAMPLES, SIGMA, WIDTH = 100, 0.05, 32


class Perturbed(torch.autograd.Function):
    """[B, N] share of samples in which a token is among the k best of scores [B, N] + sigma noise [B, S, N]."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, noise: Tensor, k: int) -> Tensor:
        """Averages the samples."""
        best = (scores[:, None] + SIGMA * noise).topk(k, -1).indices
        chosen = torch.zeros_like(noise).scatter(-1, best, 1.0)
        ctx.save_for_backward(chosen, noise)
        return chosen.mean(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """E[<grad, chosen> noise] / sigma."""
        chosen, noise = ctx.saved_tensors
        gain = (chosen * grad[:, None]).sum(-1, keepdim=True)
        return (gain * noise).mean(1) / SIGMA, None, None


class UCoFiALearner(Learner):
    """Two Linear layers, 2 D -> 32 -> 1.

    They start where the gradient of a perturbation of sigma is largest: the first layer as for features of unit variance,
    the last one small, so that scores differ by about sigma and tanh is nowhere flat.

    Args:
        method: whose budget is trained for.
        features: [B, N, D] some features.
        seed: of parameters and noise.
    """

    lr = 3e-3
    distil = 0.5
    exact = True

    def __init__(self, method: UCoFiA, features: Tensor, seed: int) -> None:
        super().__init__()
        width = features.shape[-1]
        self.k = resolve_keep(method.keep, features.shape[1])
        self.noise = torch.Generator().manual_seed(seed)
        self.layers = nn.ParameterDict()
        shapes = ((2 * width, WIDTH, 1 / float(features.std())), (WIDTH, 1, 2 * SIGMA))
        for i, (inner, outer, scale) in enumerate(shapes):
            weight = torch.randn(outer, inner, generator=self.noise) * scale / inner**0.5
            self.layers[f"{i}/weight"] = nn.Parameter(weight)
            self.layers[f"{i}/bias"] = nn.Parameter(torch.zeros(outer))

    def tensors(self) -> Mapping[str, Tensor]:
        return {name.replace("/", "."): p for name, p in self.layers.items()}

    def places(self, facts: ModelFacts) -> Places:
        return Places(features=self.chosen)

    def chosen(self, features: Tensor) -> Tensor:
        """Mask [B, N] of the k best."""
        scores = selector(self.tensors(), features.detach().float())
        best = torch.zeros_like(scores).scatter(1, scores.topk(self.k, 1).indices, 1.0)
        self.kept = [best.sum(1)]
        if self.hard:
            return best
        noise = torch.randn(len(scores), SAMPLES, scores.shape[1], generator=self.noise).to(scores.device)
        soft: Tensor = Perturbed.apply(scores, noise, self.k)
        return straight_through(best, soft)
