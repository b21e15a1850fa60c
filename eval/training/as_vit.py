"""AS-ViT's thresholds.

Source: Cydia2018/AS-ViT at ea7ccdb: loss = cross-entropy + 2 |GFLOPs - t dense GFLOPs| + .5 KL(dense
model) (the second about 9 times the relative gap on DeiT-S), a token's mask being 1
forward and sigmoid((S - theta) / 1e-4) backward, pruned tokens hidden from attention.

Ours: a budget here is a number of tokens behind the encoder, so the term is 20 (|mean over layers of the share that is left
- t| + |share left at the end - keep / N|), t being that mean when every stage leaves the same share; with a factor of 2 the
answers outweigh a budget of a ninth. Masks of the stages multiply, and scores carry no gradient (theirs: the other way round). The width of the sigmoid is theta / 10, theirs at theta = .001,
because in deep layers few tokens lie within 1e-4 of a threshold; for the same reason log theta is trained. Pruned tokens are hidden from the language model, too, which answers. Only theta is trained: theirs
fine-tunes the ViT along.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from vtprune.method import ModelFacts, resolve_keep
from vtprune.methods.as_vit import ASViT, weighted

from .fading import Places, Seen
from .learner import Learner, straight_through

BUDGET = 20.0


class ASViTLearner(Learner):
    """One threshold per layer.

    Args:
        method: whose budget is trained for, and whose `thresholds` are the start.
        tokens: of a picture.
    """

    lr = 0.1
    distil = 0.5

    def __init__(self, method: ASViT, tokens: int) -> None:
        super().__init__()
        assert method.keep is not None
        self.method, self.n = method, tokens
        self.target = resolve_keep(method.keep, tokens) / tokens
        self.log = nn.Parameter(torch.tensor(method.thresholds).log())
        self.shares: list[float] = []
        self.last = 0

    def tensors(self) -> Mapping[str, Tensor]:
        return {"thresholds": self.log.exp()}

    def places(self, facts: ModelFacts) -> Places:
        number = replace(self.method, thresholds=tuple(map(float, range(len(self.log))))).places(facts)
        self.last = int(number[max(number)])
        # Share of the encoder's layers that see what each stage leaves.
        borders = [*number, facts.encoder_layers]
        self.shares = [(end - start) / facts.encoder_layers for start, end in itertools.pairwise(borders)]
        return Places(
            vit={layer: partial(self.cut, stage, int(i)) for stage, (layer, i) in enumerate(number.items())}
        )

    def cut(self, stage: int, number: int, seen: Seen) -> Tensor:
        """Mask [B, N] from a stage on."""
        assert seen.norms is not None
        scores = weighted(seen.attention[:, :, 0].float(), seen.norms.float()).detach()
        theta = self.log[number].exp()
        if stage == 0:
            self.kept, self._mask = [], torch.ones_like(scores)
        above = scores > theta
        alive = self._mask.detach() > 0.5
        best = scores.where(alive, -1.0).argmax(1, keepdim=True)
        hard = (above & alive).scatter(1, best, True)
        soft = ((scores - theta) / (theta.detach() / 10)).sigmoid()
        self._mask = hard.float() if self.hard else straight_through(hard, self._mask * soft)
        self.kept.append(self._mask.sum(1))
        return self._mask

    def shift(self, by: float) -> None:
        # Of the last stage alone: fewer tokens left by the others raise the S of those that are left.
        self.log[self.last] += by

    def penalty(self) -> Tensor:
        left = torch.stack(self.kept).mean(1) / self.n  # [stages]
        shares = left.new_tensor(self.shares)
        even = left.new_tensor([self.target ** ((i + 1) / len(left)) for i in range(len(left))])
        return BUDGET * ((shares * (left - even)).sum().abs() + (left[-1] - self.target).abs())
