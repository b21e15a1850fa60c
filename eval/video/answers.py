"""Asks a model questions about clips under all settings, here or in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtprune.video.embedding import CLIPEmbedder, Embedder

from ..parallel import Source
from ..prompts import EvaluationError, generate, load_model
from ..shrink import Inputs
from ..world import score
from ..world.video import VideoExample
from .choosing import Chooser
from .inputs import VideoPrompter, blank, read_clip
from .relevance import ModelRelevance
from .settings import VideoSetting
from .tower import frames_remembered

NEW_TOKENS = 8
MOST_FRAMES = 240  # of a batch


@dataclass(frozen=True)
class Said:
    """One question under one setting.

    Attributes:
        correct: share of right answers over the draws, in [0, 1].
        text: the answer of the first draw.
        times: seconds of the frames that the model saw in the first draw.
        recall: see :meth:`~vtprune.eval.video.choosing.Chooser.recall`, averaged over the draws.
        tau, rho: of the selector's scores, averaged over the draws; None where it has none or they are not defined.
        random_tau, random_rho: of random scores, where the selector has scores.
        notes: what the selector declares.
        error: why there is no answer; it counts as wrong.
    """

    correct: float
    text: str
    times: tuple[float, ...]
    recall: float | None
    tau: float | None = None
    rho: float | None = None
    random_tau: float | None = None
    random_rho: float | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None


class Asker:
    """Answers questions with one loaded model.

    Args:
        model: unpatched, in evaluation mode.
        processor: its processor.
        candidates: frames of a clip to choose from.
        rows: most questions in a batch.
        folder: where clips are kept; None for the user's cache folder.
        embedder: of frames and texts; the reference CLIP if None.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        candidates: int,
        rows: int,
        folder: Path | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        self.model, self.candidates, self.rows, self.folder = model, candidates, rows, folder
        self.prompter = VideoPrompter(model, processor)
        self.embedder = CLIPEmbedder(device=str(self.prompter.device)) if embedder is None else embedder
        self.relevance = ModelRelevance(model, processor)

    def chooser(self, example: VideoExample) -> Chooser:
        """Reads the clip of a question."""
        return Chooser(
            example, read_clip(example, self.candidates, self.folder), self.embedder, self.relevance
        )

    def inputs(self, choosers: Sequence[Chooser], setting: VideoSetting, run: int = 0) -> Inputs:
        """What the model gets under a setting: one row per question."""
        chosen = [one.choose(setting.selection, run).indices.tolist() for one in choosers]
        frames = [one.clip.frames[places] for one, places in zip(choosers, chosen, strict=True)]
        if setting.blank:
            frames = [blank(one) for one in frames]
        questions = [one.example.question for one in choosers]
        return self.prompter.inputs(frames, chosen, questions, self.candidates)

    @torch.no_grad()
    def ask(
        self,
        examples: Sequence[VideoExample],
        settings: Sequence[VideoSetting],
        on_answers: Callable[[int], None] = lambda count: None,
    ) -> list[list[Said]]:
        """Answers to some questions under all settings.

        Args:
            examples: so few that their frames and encodings fit into memory together.
            settings: how to run the model.
            on_answers: told how many answers have just been given, ``len(settings) * len(examples)`` in all.

        Returns:
            One list per setting, with one entry per question.
        """
        choosers = [self.chooser(example) for example in examples]
        groups: dict[tuple[Any, bool], list[VideoSetting]] = {}
        for setting in settings:
            groups.setdefault((setting.selection, setting.blank), []).append(setting)
        texts: dict[VideoSetting, list[list[str]]] = {s: [[] for _ in examples] for s in settings}
        errors: dict[VideoSetting, dict[int, str]] = {s: {} for s in settings}
        with frames_remembered(self.model) as forget_layers:
            for (selection, _), members in groups.items():
                count = selection.frames or self.candidates
                size = max(1, min(self.rows, MOST_FRAMES // count))
                for start in range(0, len(examples), size):
                    numbers = range(start, min(start + size, len(examples)))
                    for draw in range(max(1, len(selection.draws))):
                        forget_layers()
                        inputs = self.inputs([choosers[n] for n in numbers], members[0], draw)
                        for setting in members:
                            for run in [draw] if selection.draws else range(setting.runs):
                                given = self._batch(setting, run, inputs, choosers, numbers, errors[setting])
                                for number, text in zip(numbers, given, strict=True):
                                    texts[setting][number].append(text)
                    on_answers(len(numbers) * len(members))
        return [
            [
                self._said(setting, chooser, texts[setting][number], errors[setting].get(number))
                for number, chooser in enumerate(choosers)
            ]
            for setting in settings
        ]

    def _batch(
        self,
        setting: VideoSetting,
        run: int,
        inputs: Inputs,
        choosers: Sequence[Chooser],
        numbers: Sequence[int],
        errors: dict[int, str],
    ) -> list[str]:
        with setting.applied(self.model, run):
            try:
                return self.prompter.texts(inputs, generate(self.model, inputs, NEW_TOKENS))
            except Exception:  # noqa: BLE001 - asked again, one by one
                return [self._alone(setting, run, choosers[number], number, errors) for number in numbers]

    def _alone(
        self, setting: VideoSetting, run: int, chooser: Chooser, number: int, errors: dict[int, str]
    ) -> str:
        try:
            inputs = self.inputs([chooser], setting, run)
            return self.prompter.texts(inputs, generate(self.model, inputs, NEW_TOKENS))[0]
        except Exception as error:  # noqa: BLE001 - any failure costs this one answer
            errors[number] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            return ""

    def _said(self, setting: VideoSetting, chooser: Chooser, texts: Sequence[str], error: str | None) -> Said:
        right = [error is None and score(text, chooser.example.answer) for text in texts]
        draws = [
            chooser.choose(setting.selection, run) for run in range(max(1, len(setting.selection.draws)))
        ]
        recalls = [chooser.recall(one) for one in draws]
        known = [one for one in recalls if one is not None]
        scores = [one.scores for one in draws if one.scores is not None]
        tau, rho = chooser.agreement(scores) if scores else (None, None)
        random = chooser.random_agreement() if scores else (None, None)
        return Said(
            correct=sum(right) / len(right),
            text=texts[0],
            times=tuple(chooser.clip.times[draws[0].indices].tolist()),
            recall=sum(known) / len(known) if known and not setting.blank else None,
            tau=tau,
            rho=rho,
            random_tau=random[0],
            random_rho=random[1],
            notes=draws[0].notes,
            error=error,
        )


_asker: Asker | None = None


def _start(source: Source, candidates: int, rows: int, folder: Path | None, threads: int) -> None:
    from transformers.utils import logging

    global _asker
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    _asker = Asker(*load_model(source.path, source.device, source.dtype), candidates, rows, folder)


def _answer(examples: Sequence[VideoExample], settings: Sequence[VideoSetting]) -> list[list[Said]]:
    assert _asker is not None
    return _asker.ask(examples, settings)


def answers(
    asker: Asker,
    source: Source | None,
    parts: Sequence[Sequence[VideoExample]],
    settings: Sequence[VideoSetting],
    jobs: int,
    on_answers: Callable[[int], None] = lambda count: None,
) -> Iterator[list[list[Said]]]:
    """What :meth:`Asker.ask` returns for every part, in their order.

    Args:
        asker: used with one job; with several it says how the others are made.
        source: where worker processes load the model from; None for one job only.
        parts: the questions, some at a time.
        settings: how to run the model.
        jobs: processes.
        on_answers: told how many answers have just been given.

    Raises:
        EvaluationError: a worker died.
    """
    if jobs == 1 or source is None:
        for part in parts:
            yield asker.ask(part, settings, on_answers)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    arguments = (source, asker.candidates, asker.rows, asker.folder, threads)
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start, initargs=arguments)
    try:
        futures = [pool.submit(_answer, part, settings) for part in parts]
        for part, future in zip(parts, futures, strict=True):
            found = future.result()
            on_answers(len(part) * len(settings))
            yield found
    except BrokenProcessPool as error:
        raise EvaluationError(
            "a worker process died, most likely for want of memory; use fewer --jobs."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
