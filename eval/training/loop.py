"""The training loop of all trained methods: batches, loss, checkpoints, and the file."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from vtprune.errors import InvalidOptionError
from vtprune.method import Method, check_keep, resolve_keep
from vtprune.methods import weights
from vtprune.methods.as_vit import ASViT
from vtprune.methods.atp_llava import ATPLLaVA
from vtprune.methods.ucofia import UCoFiA

from ..prompts import EvaluationError, Prompter
from ..results import versions
from ..world import KINDS, examples
from .as_vit import ASViTLearner
from .atp_llava import ATPLearner
from .data import Lesson, lesson
from .fading import Fading
from .learner import Learner
from .ucofia import UCoFiALearner

STEPS = 60
BATCH_SIZE = 24
PER_KIND = 200  # training questions of each kind, taken in turns
VAL_PER_KIND = 15
CHECKS = 2  # validations, the last one at the end
HALVINGS, REACH = 7, 2.0  # of the shift that meets the budget
WARM_UP = 10
TOLERANCE = 0.1  # of the budget: checkpoints within it come before all others


@dataclass(frozen=True)
class Step:
    """What happened in a step.

    Attributes:
        number: from 1 on.
        loss, task: of this batch: all of it, and cross-entropy of the answers alone.
        kept: mean number of tokens that the budget speaks of.
        agreement: share of validation questions that are answered as by the dense model, where it was measured.
    """

    number: int
    loss: float
    task: float
    kept: float
    agreement: float | None = None


@dataclass(frozen=True)
class TrainingResult:
    """What training gives.

    Attributes:
        tensors: learned parameters.
        metadata: what they were trained for and how.
        steps: all steps.
        agreement, kept: of the chosen checkpoint on validation questions.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    steps: Sequence[Step]
    agreement: float
    kept: float

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that `weights=` of the method takes."""
        weights.save(path, self.tensors, self.metadata)


def learner_for(method: Method, fading: Fading, batch: Lesson, seed: int) -> Learner:
    """Fresh parameters of a method for a model.

    Args:
        method: with the budget.
        fading: made for the model.
        batch: says how many tokens a picture has.
        seed: of everything random.

    Raises:
        InvalidOptionError: the method has nothing to train.
    """
    tokens = fading.columns(batch.inputs).shape[1]
    if isinstance(method, (ASViT, ATPLLaVA)) and method.threshold != "learned":
        raise InvalidOptionError(f"threshold={method.threshold!r} has nothing to train; use 'learned'.")
    if isinstance(method, ASViT):
        if method.scorer != "cls" or not fading.tower.has_cls:
            raise InvalidOptionError(
                "thresholds are trained with scorer='cls' and an encoder with [CLS] only."
            )
        return ASViTLearner(method, tokens)
    if isinstance(method, ATPLLaVA):
        encoding = fading.tower.open((batch.inputs["pixel_values"],), {}, None)
        return ATPLearner(method, tokens, encoding.layouts[0].cols, seed)
    if isinstance(method, UCoFiA):
        return UCoFiALearner(method, _features(fading, batch), seed)
    raise InvalidOptionError(
        f"{method.key!r} has nothing to train; trained methods: as-vit, atp-llava, ucofia."
    )


def _features(fading: Fading, batch: Lesson) -> Tensor:
    """[B, N, D] what the projector receives."""
    seen: list[Tensor] = []
    assert fading.tower.projector is not None
    handle = fading.tower.projector.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    try:
        _dense(fading.model, batch)
    finally:
        handle.remove()
    return seen[0].float()


def train(
    model: nn.Module,
    processor: Any,
    method: Method,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    per_kind: int = PER_KIND,
    val_per_kind: int = VAL_PER_KIND,
    seed: int = 0,
    command: str = "",
    on_step: Callable[[Step], None] = lambda step: None,
) -> TrainingResult:
    """Trains the parameters of a method for one budget.

    The model's own parameters stay as they are, and no hook stays.

    Args:
        model: an unpatched vision-language model that shows each picture as one run of tokens, such as LLaVA.
        processor: its processor, with a chat template.
        method: `atp-llava`, `as-vit` or `ucofia` with a budget.
        steps: optimiser steps.
        batch_size: questions per step.
        per_kind, val_per_kind: questions of each kind for training and for choosing a checkpoint.
        seed: of parameters, order of questions and noise; the same call gives the same result on the same machine.
        command: written to the metadata.
        on_step: told of every step.

    Raises:
        EvaluationError: a number is out of range, or pictures differ in their tokens.
        InvalidOptionError: the method has nothing to train.
        UnsupportedModelError: the model is no such model.
    """
    if min(steps, batch_size, per_kind, val_per_kind) < 1:
        raise EvaluationError("training needs at least one step and one question of each kind per batch.")
    check_keep(method.keep)
    fading, prompter = Fading(model), Prompter(model, processor)
    rng = np.random.default_rng(seed)
    with _frozen(model):
        learner = learner_for(method, fading, lesson(prompter, examples("train", 1, seed)), seed)
        learner = learner.to(prompter.device)
        pool, held_out = examples("train", per_kind, seed), examples("val", val_per_kind)
        parts = [held_out[i : i + batch_size] for i in range(0, len(held_out), batch_size)]
        checks = [
            (batch, _dense(model, batch).argmax(-1)) for part in parts for batch in [lesson(prompter, part)]
        ]
        some = pool[: 2 * batch_size]
        meeting = [lesson(prompter, some[i : i + batch_size]) for i in range(0, len(some), batch_size)]
        optimizer = torch.optim.Adam(learner.groups(), betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
        )
        done: list[Step] = []
        best: tuple[tuple[bool, float], Mapping[str, Tensor], float, float] | None = None
        tokens = fading.columns(checks[0][0].inputs).shape[1]
        budget = resolve_keep(method.keep, tokens)
        order = _order(rng, len(pool), batch_size)
        for number in range(1, steps + 1):
            learner.progress = (number - 1) / steps
            batch = lesson(prompter, [pool[i] for i in next(order)])
            loss, task = _loss(fading, learner, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            kept = float(learner.budgeted().detach().mean())
            agreement = None
            if number * CHECKS // steps > (number - 1) * CHECKS // steps:
                before = copy.deepcopy(learner.state_dict())
                _meet(fading, learner, budget, meeting)
                agreement, left = _validate(fading, learner, checks)
                rank = (abs(left - budget) <= TOLERANCE * budget, agreement)
                if best is None or rank >= best[0]:
                    best = rank, _detached(learner), agreement, left
                learner.load_state_dict(before)
            done.append(Step(number, float(loss.detach()), float(task.detach()), kept, agreement))
            on_step(done[-1])
    assert best is not None
    _, tensors, agreement, left = best
    assert isinstance(method, weights.Trained)
    assert fading.facts.fingerprint is not None
    metadata = {
        "format": weights.FORMAT,
        "method": method.key,
        "options": json.dumps(weights.described(method)),
        "model": fading.facts.name,
        "fingerprint": fading.facts.fingerprint(),
        "tokens": str(tokens),
        "keep": str(budget),
        "seed": str(seed),
        "steps": str(steps),
        "batch_size": str(batch_size),
        "data": f"picture world, train, {per_kind} questions of each of {len(KINDS)} kinds, seed {seed}",
        "validation": json.dumps({"agreement": round(agreement, 4), "kept": round(left, 2)}),
        "versions": json.dumps(versions()),
        "command": command,
    }
    return TrainingResult(tensors, metadata, done, agreement, left)


def _detached(learner: Learner) -> Mapping[str, Tensor]:
    return {name: t.detach().float().cpu().clone() for name, t in learner.tensors().items()}


def _order(rng: np.random.Generator, count: int, size: int) -> Iterator[list[int]]:
    """Numbers of the questions of every batch, reshuffled once all have been asked."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += rng.permutation(count).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients of its own; as it was afterwards."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    training = {m: m.training for m in model.modules()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        for module, flag in training.items():
            module.training = flag


def _dense(model: nn.Module, batch: Lesson) -> Tensor:
    """Logits [A, V] of the model without pruning wherever it predicts an answer."""
    plain: Any = model
    with torch.no_grad():
        logits: Tensor = plain(**batch.inputs, use_cache=False).logits
    return logits[batch.predicting].float()


def _answers(fading: Fading, learner: Learner, batch: Lesson) -> Tensor:
    places = learner.places(fading.facts)
    return fading(batch.inputs, batch.asking, places)[batch.predicting].float()


def _loss(fading: Fading, learner: Learner, batch: Lesson) -> tuple[Tensor, Tensor]:
    dense = _dense(fading.model, batch)
    logits = _answers(fading, learner, batch)
    task = cross_entropy(logits, dense.argmax(-1))
    loss = task + learner.penalty()
    if learner.distil:
        divergence = kl_div(
            logits.log_softmax(-1), dense.log_softmax(-1), reduction="batchmean", log_target=True
        )
        loss = loss + learner.distil * divergence
    return loss, task


@torch.no_grad()
def _meet(fading: Fading, learner: Learner, budget: int, batches: Sequence[Lesson]) -> None:
    """Shifts thresholds until training questions keep the budget on average.

    The losses pull to the budget, but where answers pull harder they stop short of it.
    """
    if learner.exact:
        return
    learner.hard, width = True, REACH
    for _ in range(HALVINGS):
        kept: list[float] = []
        for batch in batches:
            _answers(fading, learner, batch)
            kept += learner.budgeted().tolist()
        learner.shift(width if sum(kept) / len(kept) > budget else -width)
        width /= 2
    learner.hard = False


@torch.no_grad()
def _validate(
    fading: Fading, learner: Learner, batches: Sequence[tuple[Lesson, Tensor]]
) -> tuple[float, float]:
    """Share of questions all of whose answer tokens are the dense model's, and mean number of tokens kept."""
    same: list[float] = []
    kept: list[float] = []
    learner.hard = True
    for batch, dense in batches:
        differ = _answers(fading, learner, batch).argmax(-1) != dense
        rows = batch.predicting.nonzero()[:, 0]
        wrong = torch.zeros(len(batch.predicting), device=rows.device).index_add(0, rows, differ.float())
        same += (wrong == 0).float().tolist()
        kept += learner.budgeted().tolist()
    learner.hard = False
    return sum(same) / len(same), sum(kept) / len(kept)
