"""Whether two settings that answered the same questions differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vtprune.errors import did_you_mean

from .evaluation import Evaluation
from .prompts import EvaluationError
from .results import ALL, mean_and_stderr

FLIPS = 10_000
SEED = 0
EPSILON = 1e-9  # sums of the same values in another order are equal


@dataclass(frozen=True)
class Paired:
    """The comparison of a with b, question by question.

    Attributes:
        n: questions.
        difference: mean of a - b.
        stderr: its standard error over questions, None for a single question.
        p: two-sided p-value of "no difference".
        test: how p was found.
    """

    n: int
    difference: float
    stderr: float | None
    p: float
    test: Literal["exact McNemar", "sign flips"]


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compares the scores of two settings on the same questions.

    Scores that are all 0 or 1 get the exact McNemar test; shares in between (means of several draws) a sign-flip
    permutation test of the mean difference with 10,000 draws of a fixed seed, whose p is at least 1 / 10,001.

    Args:
        a, b: scores in [0, 1] of the same questions in the same order.

    Raises:
        ValueError: different numbers of questions, none, or a score outside [0, 1].
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} scores are no pairs; give both settings the same questions")
    if not all(0 <= score <= 1 for score in (*a, *b)):
        raise ValueError("a score is outside [0, 1]")
    differences = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    mean, stderr = mean_and_stderr(differences)
    if all(score in (0, 1) for score in (*a, *b)):
        return Paired(
            len(a), mean, stderr, mcnemar(differences.count(1.0), differences.count(-1.0)), "exact McNemar"
        )
    return Paired(len(a), mean, stderr, sign_flips(differences), "sign flips")


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: both counts come from a fair coin.

    Args:
        only_a, only_b: questions that only one of the two answered rightly.
    """
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / (1 << n))


def sign_flips(differences: Sequence[float]) -> float:
    """Two-sided p of a mean difference under random signs, (1 + draws at least as extreme) / (1 + draws)."""
    values = torch.tensor([d for d in differences if d], dtype=torch.float64)
    signs = torch.randint(0, 2, (FLIPS, len(values)), generator=torch.Generator().manual_seed(SEED)) * 2 - 1
    extreme = (signs.double() @ values).abs() >= abs(math.fsum(values.tolist())) - EPSILON
    return (1 + int(extreme.sum())) / (1 + FLIPS)


@dataclass(frozen=True)
class Comparison:
    """One method against another at the same budget on one split: a line of `comparisons.jsonl`.

    Attributes:
        split, keep, task: what is compared; task "all" is all kinds together.
        method, other: labels of a and b.
        result: method minus other.
    """

    split: str
    keep: int | float | None
    task: str
    method: str
    other: str
    result: Paired

    def to_dict(self) -> dict[str, Any]:
        """All values under their names, ready for JSON."""
        flat = dataclasses.asdict(self)
        return {**{k: v for k, v in flat.items() if k != "result"}, **flat["result"]}


def compare(evaluation: Evaluation, label: str) -> list[Comparison]:
    """A method against every other setting of the same budget, per split, best rival first, and per task.

    Args:
        evaluation: finished or interrupted.
        label: of the method, with its options as in :attr:`~vtprune.eval.settings.Setting.label`.

    Raises:
        EvaluationError: there is no such method in it.
    """
    mine = [key for key in evaluation.outcomes if key[1].label == label]
    if not mine:
        known = sorted({setting.label for _, setting in evaluation.outcomes})
        raise EvaluationError(f"there are no results of {label!r} to compare. {did_you_mean(label, known)}")
    out = []
    for split, setting in mine:
        own = evaluation.outcomes[split, setting].correct
        rivals = [
            (other, outcome.correct)
            for (where, other), outcome in evaluation.outcomes.items()
            if where == split and other.keep == setting.keep and other != setting
        ]
        kinds = [example.kind for example in evaluation.examples[split]]
        for other, theirs in sorted(rivals, key=lambda one: -math.fsum(one[1])):
            for task in dict.fromkeys([ALL, *kinds]):
                pairs = [(a, b) for a, b, k in zip(own, theirs, kinds, strict=True) if task in (ALL, k)]
                result = paired([a for a, _ in pairs], [b for _, b in pairs])
                out.append(Comparison(split, setting.keep, task, label, other.label, result))
    return out
