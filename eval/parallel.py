"""Asks a model under several settings at the same time, in worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import nn

from vtprune.errors import VTPruneError

from .accuracy import Batch, Outcome, ask, make_batches
from .prompts import EvaluationError, Prompter, load_model
from .settings import Setting
from .world import Example


@dataclass(frozen=True)
class Source:
    """Where every worker loads its own copy of the model from.

    Attributes:
        path, device, dtype: as for :func:`~vtprune.eval.prompts.load_model`.
    """

    path: str
    device: str = "cpu"
    dtype: str = "auto"


@dataclass
class _Worker:
    model: nn.Module
    prompter: Prompter
    examples: Mapping[str, Sequence[Example]]
    batch_size: int
    batches: dict[str, list[Batch]]


_worker: _Worker | None = None


def _start(source: Source, examples: Mapping[str, Sequence[Example]], batch_size: int, threads: int) -> None:
    from transformers.utils import logging

    global _worker
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, processor = load_model(source.path, source.device, source.dtype)
    _worker = _Worker(model, Prompter(model, processor), examples, batch_size, {})


def _answer(split: str, settings: Sequence[Setting], watch: Sequence[int]) -> list[Outcome | VTPruneError]:
    assert _worker is not None
    chosen = _worker.examples[split]
    if split not in _worker.batches:
        _worker.batches[split] = make_batches(_worker.prompter, chosen, _worker.batch_size)
    outcomes = ask(_worker.model, _worker.prompter, chosen, _worker.batches[split], settings, watch)
    # Errors with arguments of their own do not travel.
    return [VTPruneError(str(one)) if isinstance(one, VTPruneError) else one for one in outcomes]


def answers(
    source: Source,
    examples: Mapping[str, Sequence[Example]],
    tasks: Sequence[tuple[str, Sequence[Setting], Sequence[int]]],
    batch_size: int,
    jobs: int,
    threads: int,
) -> Iterator[list[Outcome | VTPruneError]]:
    """What :func:`~vtprune.eval.accuracy.ask` returns for every task, in their order.

    Args:
        source: the model.
        examples: questions per split.
        tasks: split, settings, and the examples to watch.
        batch_size: questions per call.
        jobs: worker processes.
        threads: CPU threads of all together, shared evenly.

    Raises:
        EvaluationError: a worker died.
    """
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),
        initializer=_start,
        initargs=(source, examples, batch_size, max(1, threads // jobs)),
    )
    try:
        futures: list[Future[list[Outcome | VTPruneError]]] = [pool.submit(_answer, *task) for task in tasks]
        for future in futures:
            yield future.result()
    except BrokenProcessPool as error:
        raise EvaluationError(
            "a worker process died, most likely for want of memory; use fewer --jobs."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
