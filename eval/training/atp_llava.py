"""ATP-LLaVA's thresholds by soft masks.

Source: the re-implementation Sneha421/AI6103-ATP-LLaVA at c9a622f: mask max(sigmoid(10 (s_red - theta_r)),
sigmoid(10 (s_sp - theta_s))); loss L_ntp + lambda sum_l l kept_l / 576 + .2 |mean kept - target|, lambda .05 (.01 in
train_atp.py of its branch atp_integration_fix), l the number of the layer among 32, and the mean over the three stages.

Ours: the stages' masks multiply and act in all later layers as log m on the logits of visual keys. The 10 grows to 100 while
training goes on, since at 10 most of what inference removes still shows through a soft mask; and `kept` counts what inference
keeps, its gradient being that of the soft count. L_ntp is the cross-entropy of the dense model's answers. Scores are taken as
they are, without gradients. Only W, b, V and c are trained: theirs fine-tunes the language model along, whose attention can
then become the score that the method wants; a frozen model's is what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtprune.method import ModelFacts, resolve_keep, resolve_layer
from vtprune.methods.atp_llava import ATPLLaVA, redundancy, thresholds

from .fading import Places, Seen
from .learner import Learner, straight_through

WIDTH, TEMPERATURE, SHARPER = 32, 10.0, 10.0
LAYERS, BUDGET = 0.05, 0.2


class ATPLearner(Learner):
    """W, b, V and c of every stage.

    V starts small and c learns fastest, so that thresholds are much the same for all pictures before they come to differ.

    Args:
        method: whose budget is trained for.
        tokens, cols: of a picture, and how many of them are in a row.
        seed: of the parameters.
    """

    lr = 5e-4
    rates: ClassVar[Mapping[str, float]] = {"thresholds/weight": 5e-3, "thresholds/bias": 5e-2}

    def __init__(self, method: ATPLLaVA, tokens: int, cols: int, seed: int) -> None:
        super().__init__()
        self.method, self.n, self.cols = method, tokens, cols
        self.target = resolve_keep(method.keep, tokens)
        make = torch.Generator().manual_seed(seed)
        self.layers = nn.ParameterDict()
        for stage in range(len(method.layers)):
            shapes = {"project": (WIDTH, 2 * tokens), "thresholds": (2, WIDTH)}
            for name, shape in shapes.items():
                weight = torch.randn(*shape, generator=make) / shape[1] ** 0.5
                weight *= 0.1 if name == "thresholds" else 1.0
                self.layers[f"{stage}/{name}/weight"] = nn.Parameter(weight)
                self.layers[f"{stage}/{name}/bias"] = nn.Parameter(torch.zeros(shape[0]))
        self.numbers: list[float] = []

    def tensors(self) -> Mapping[str, Tensor]:
        return {name.replace("/", "."): p for name, p in self.layers.items()}

    def places(self, facts: ModelFacts) -> Places:
        depth = facts.decoder_layers
        stage_of = {resolve_layer(layer, depth, "layers"): i for i, layer in enumerate(self.method.layers)}
        layers = sorted(layer for layer in stage_of if layer + 1 < depth)
        self.numbers = [layer * 32 / depth for layer in layers]
        return Places(
            decoder={layer: partial(self.fade, place, stage_of[layer]) for place, layer in enumerate(layers)}
        )

    def fade(self, place: int, stage: int, seen: Seen) -> Tensor:
        """Mask [B, N] behind a stage."""
        assert seen.queries is not None
        assert seen.keys is not None
        if place == 0:
            self.kept = []
            self.soft = self.alive = torch.ones(len(seen.queries), self.n, device=seen.queries.device)
        alive = self.soft.detach()
        q, k, attention = (x.detach().float() for x in (seen.queries, seen.keys, seen.attention))
        s_red = redundancy(q, k, attention, alive)
        index = torch.arange(self.n, device=alive.device).expand_as(alive)
        s_sp = self.method.spatial(stage, index, index.new_full((len(index), 1), self.cols))
        theta = thresholds(self.tensors(), stage, s_red * alive, s_sp * alive)
        red, sp = s_red - theta[:, :1], s_sp - theta[:, 1:]
        sharp = TEMPERATURE * SHARPER**self.progress
        soft = torch.maximum((sharp * red).sigmoid(), (sharp * sp).sigmoid())
        above = torch.maximum(red, sp).detach()
        best = above.where(self.alive > 0, -1e9).argmax(1, keepdim=True)
        self.alive = ((above > 0) & (self.alive > 0)).float().scatter(1, best, 1.0)
        self.soft = self.alive if self.hard else self.soft * soft
        self.kept.append(straight_through(self.alive, self.soft).sum(1))
        return self.soft

    def shift(self, by: float) -> None:
        for name, parameter in self.layers.items():
            if name.endswith("thresholds/bias"):
                parameter.add_(by)

    def budgeted(self) -> Tensor:
        return torch.stack(self.kept).mean(0)

    def penalty(self) -> Tensor:
        kept = torch.stack(self.kept).mean(1)  # [stages]
        deep = (kept / self.n * kept.new_tensor(self.numbers)).sum()
        return LAYERS * deep + BUDGET * (kept.mean() - self.target).abs()
