"""What a trained method has to say to the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.method import ModelFacts

from .fading import Places


class Learner(nn.Module, ABC):
    """Learned parameters of a method, and how they act while they are trained.

    Attributes:
        lr: peak learning rate of Adam, for parameters that `rates` does not name.
        rates: end of a parameter's name -> its own peak learning rate.
        distil: weight of the Kullback-Leibler divergence from the dense model in the loss.
        progress: share of the training that is done.
        exact: whether every picture keeps as many tokens as the budget says.
        hard: whether masks are 0 and 1 also in the forward pass; set while validating.
        kept: [B] tokens left at every stage of the last pass, with gradients.
    """

    lr: ClassVar[float] = 1e-3
    rates: ClassVar[Mapping[str, float]] = {}
    distil: ClassVar[float] = 0.0
    exact: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.progress, self.hard = 0.0, False
        self.kept: list[Tensor] = []

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rates, for an optimiser."""
        return [
            {
                "params": [parameter],
                "lr": next((rate for end, rate in self.rates.items() if name.endswith(end)), self.lr),
            }
            for name, parameter in self.named_parameters()
        ]

    @abstractmethod
    def places(self, facts: ModelFacts) -> Places:
        """Where the method decides on this model."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """What is written to the file."""

    def penalty(self) -> Tensor:
        """The part of the loss that pulls to the budget, from `kept`."""
        return torch.zeros(())

    def shift(self, by: float) -> None:
        """Raises thresholds, so that fewer tokens are kept; nothing where the budget is exact."""

    def budgeted(self) -> Tensor:
        """[B] the number of tokens in the last pass that the budget speaks of."""
        return self.kept[-1]


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Forward `hard`, backward `soft`."""
    return hard.to(soft) + soft - soft.detach()
