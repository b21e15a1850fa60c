"""Asks a model all questions under one setting and scores the answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from vtprune.errors import VTPruneError
from vtprune.patch import Patch

from .memo import remembered
from .prompts import Prompter, generate
from .settings import DOWNSAMPLE, NO_IMAGE, Setting
from .shrink import Inputs, shrink
from .world import Example, score

NEW_TOKENS = 8


@dataclass
class Batch:
    """Questions that are asked together.

    Attributes:
        numbers: their places in the list of examples.
        inputs: one row each.
    """

    numbers: list[int]
    inputs: Inputs


@dataclass(frozen=True)
class Kept:
    """The tokens of one picture that were left at the end.

    Attributes:
        rows, cols: token grid.
        index: ascending indices into the grid.
    """

    rows: int
    cols: int
    index: tuple[int, ...]


@dataclass
class Outcome:
    """Answers of one setting.

    Attributes:
        correct: share of right answers per example, in [0, 1]: 0 or 1, or in between for several draws.
        texts: answers per example, of the first draw.
        kept: example number -> tokens left, of the first draw, for the examples that were watched.
        errors: example number -> reason why there is no answer; it counts as wrong.
    """

    correct: list[float]
    texts: list[str]
    kept: dict[int, Kept] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


def make_batches(
    prompter: Prompter, examples: Sequence[Example], size: int, blank: bool = False
) -> list[Batch]:
    """Batches of one question kind each, so that all answers of a batch are about equally long.

    Args:
        prompter: builds the inputs.
        examples: the questions.
        size: most questions in a batch.
        blank: mid-grey pictures instead of theirs.
    """
    by_kind: dict[str, list[int]] = {}
    for number, example in enumerate(examples):
        by_kind.setdefault(example.kind, []).append(number)
    batches = []
    for numbers in by_kind.values():
        for start in range(0, len(numbers), size):
            chosen = numbers[start : start + size]
            rows = [examples[n] for n in chosen]
            inputs = prompter.inputs([e.image for e in rows], [e.question for e in rows], blank)
            batches.append(Batch(chosen, inputs))
    return batches


def adapt(model: nn.Module, setting: Setting, inputs: Inputs) -> Inputs:
    """The inputs a setting wants, from those of the dense model."""
    if setting.method != DOWNSAMPLE:
        return inputs
    assert setting.keep is not None
    return shrink(model, inputs, setting.keep)


@torch.no_grad()
def ask(
    model: nn.Module,
    prompter: Prompter,
    examples: Sequence[Example],
    batches: Sequence[Batch],
    settings: Sequence[Setting],
    watch: Collection[int] = (),
    on_answers: Callable[[Setting, int], None] = lambda setting, count: None,
) -> list[Outcome | VTPruneError]:
    """Answers to all examples under several settings.

    The settings take turns on every batch, so that they can share the encoder's work (:mod:`.memo`). If a batch fails, its
    questions are asked one by one, so that one bad question costs one answer.

    Args:
        model: an unpatched model.
        prompter: made for it.
        examples: the questions.
        batches: the same questions from :func:`make_batches`.
        settings: how to run the model.
        watch: numbers of the examples whose kept tokens are wanted.
        on_answers: told how many questions have just been answered under which setting.

    Returns:
        One outcome per setting; an error where the model cannot be run this way, or no question of the first batch could be
        answered.
    """
    outcomes = [Outcome([0.0] * len(examples), [""] * len(examples)) for _ in settings]
    failed: dict[int, VTPruneError] = {}
    with remembered(model) as forget:
        for batch in batches:
            for i, setting in enumerate(settings):
                if i in failed:
                    continue
                try:
                    for run in range(setting.runs):
                        _ask_batch(model, prompter, examples, batch, setting, run, outcomes[i], watch)
                        on_answers(setting, len(batch.numbers))
                    if batch is batches[0] and set(outcomes[i].errors) >= set(batch.numbers):
                        reason = next(iter(outcomes[i].errors.values()))
                        raise VTPruneError(f"no question could be answered: {reason}")
                except VTPruneError as error:
                    failed[i] = error
            forget()
    return [failed.get(i, outcome) for i, outcome in enumerate(outcomes)]


def _ask_batch(
    model: nn.Module,
    prompter: Prompter,
    examples: Sequence[Example],
    batch: Batch,
    setting: Setting,
    run: int,
    outcome: Outcome,
    watch: Collection[int],
) -> None:
    """Asks one batch under one setting, and adds the answers to the outcome."""
    inputs = batch.inputs
    if setting.method == NO_IMAGE:
        rows = [examples[number] for number in batch.numbers]
        inputs = prompter.inputs([e.image for e in rows], [e.question for e in rows], blank=True)
    with setting.applied(model, run) as patch:
        inputs = adapt(model, setting, inputs)
        try:
            texts = prompter.texts(inputs, generate(model, inputs, NEW_TOKENS))
        except Exception:  # noqa: BLE001 - asked again, one by one
            texts = _one_by_one(model, prompter, examples, batch, setting, outcome)
        else:
            if patch is not None and run == 0:
                _note_kept(outcome, batch, patch, watch)
    for number, text in zip(batch.numbers, texts, strict=True):
        right = number not in outcome.errors and score(text, examples[number].answer)
        outcome.correct[number] += right / setting.runs
        if run == 0:
            outcome.texts[number] = text


def _one_by_one(
    model: nn.Module,
    prompter: Prompter,
    examples: Sequence[Example],
    batch: Batch,
    setting: Setting,
    outcome: Outcome,
) -> list[str]:
    texts = []
    for number in batch.numbers:
        example = examples[number]
        try:
            single = prompter.inputs([example.image], [example.question], setting.method == NO_IMAGE)
            inputs = adapt(model, setting, single)
            texts += prompter.texts(inputs, generate(model, inputs, NEW_TOKENS))
        except Exception as error:  # noqa: BLE001 - any failure costs this one answer
            outcome.errors[number] = _reason(error)
            texts.append("")
    return texts


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _note_kept(outcome: Outcome, batch: Batch, patch: Patch, watch: Collection[int]) -> None:
    for image in patch.report().images:
        number = batch.numbers[image.sample]
        if number in watch:
            layout = image.layout
            index = list(image.kept.values())[-1].tolist() if image.kept else range(layout.n_tokens)
            outcome.kept[number] = Kept(layout.rows, layout.cols, tuple(index))
