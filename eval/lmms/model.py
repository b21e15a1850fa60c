"""The model `vtprune` of lmms-eval: any chat model of transformers with any method at work on it."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from vtprune.errors import InertPruningError, UnsupportedCallError
from vtprune.patch import Patch

from ..accuracy import adapt
from ..prompts import EvaluationError, load_model
from ..settings import CONTROLS, NO_IMAGE, Setting
from ..shrink import Inputs
from .arguments import ModelArguments, parse
from .conversations import ChatPrompter, Conversation, alike, conversation
from .generation import Wanted, same, wanted
from .likelihood import continuation_losses
from .tally import FIELDS, Tally, Tokens, of_report, untouched


class VisualTokenCounts(TokenCounts):  # type: ignore[misc]
    """Token counts of lmms-eval with the visual tokens before and after pruning; they go into its samples files."""

    def __init__(self, input_tokens: int, output_tokens: int, visual: Tokens) -> None:
        super().__init__(input_tokens=input_tokens, output_tokens=output_tokens)
        self.visual = visual

    def to_dict(self) -> dict[str, Any]:
        """All counts under their names."""
        return {**super().to_dict(), **self.visual.to_dict()}


class _VTPrune(lmms):  # type: ignore[misc]
    """Any model that `AutoModelForImageTextToText` and `AutoProcessor` load, patched while it answers.

    Args:
        arguments: see :func:`~vtprune.eval.lmms.arguments.parse`.

    Attributes:
        setting: how the model is run.
        tally: visual tokens of all requests of this process so far.

    Raises:
        VTPruneError: an argument is wrong, or the model cannot be loaded or patched so.
    """

    def __init__(self, **arguments: Any) -> None:
        from accelerate import Accelerator

        plan, setting = parse(arguments)
        accelerator = Accelerator()
        device = plan.device
        if accelerator.num_processes > 1:
            device = str(accelerator.device)
        elif device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model, processor = load_model(plan.pretrained, device, plan.dtype)
        if plan.attn_implementation is not None:
            _set_attention(model, plan.attn_implementation)
        self._start(model, processor, setting, plan, accelerator)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        processor: Any,
        setting: Setting,
        arguments: ModelArguments,
        run: int = 0,
    ) -> _VTPrune:
        """Around a model that is loaded already.

        Args:
            model: unpatched, in evaluation mode.
            processor: its processor.
            setting: how to run it.
            arguments: batch size and how to show videos; the rest of it is not read.
            run: which draw of the setting.
        """
        from accelerate import Accelerator

        self = cls.__new__(cls)
        self._start(model, processor, setting, arguments, Accelerator(), run)
        return self

    def _start(
        self,
        model: nn.Module,
        processor: Any,
        setting: Setting,
        arguments: ModelArguments,
        accelerator: Any,
        run: int = 0,
    ) -> None:
        super().__init__()
        self.accelerator = accelerator
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._model, self.setting, self._run = model, setting, run
        self.prompter = ChatPrompter(model, processor, arguments.max_num_frames, arguments.video_as)
        self.batch_size = arguments.batch_size
        self.device = self.prompter.device
        self.tally = Tally()
        with setting.applied(model, run):
            pass  # a model that cannot be patched so is told before any data is loaded

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused.

        Raises:
            UnsupportedCallError: always.
        """
        raise UnsupportedCallError(
            "model 'vtprune' does not take tasks of several rounds (generate_until_multi_round): which tokens of a "
            "picture are left would depend on the round in which it was first shown. Choose a task with one round."
        )

    @abstractmethod
    def _conversation(self, request: Any) -> Conversation:
        """What is shown and asked."""

    @abstractmethod
    def _generation(self, request: Any) -> dict[str, Any]:
        """The task's generation settings."""

    def inputs(self, request: Any) -> Inputs:
        """The model's inputs for one request, a single row."""
        return self.prompter.rows([self._conversation(request)], blank=self.setting.method == NO_IMAGE)

    def _batches(
        self, requests: Sequence[Any], numbers: Sequence[int]
    ) -> Iterator[tuple[list[int], list[Conversation]]]:
        for start in range(0, len(numbers), self.batch_size):
            chunk = list(numbers[start : start + self.batch_size])
            talks = [self._conversation(requests[number]) for number in chunk]
            for places in alike(talks, self.batch_size):
                yield [chunk[place] for place in places], [talks[place] for place in places]

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers, each with its token counts, in the order of the requests.

        Raises:
            InertPruningError: a method is at work and no visual token of any request was removed.
            VTPruneError: a request cannot be asked this way.
        """
        results: list[Any] = [None] * len(requests)
        tally, seconds, new_tokens = Tally(), 0.0, 0
        asked = [self._generation(request) for request in requests]
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        with self.setting.applied(self._model, self._run) as patch:
            for numbers in same(asked):
                want = wanted(asked[numbers[0]])
                if want.ignored:
                    logger.info(
                        f"vtprune: generation_kwargs {', '.join(want.ignored)} has no meaning here: the processor of "
                        "the model decides how pictures are prepared"
                    )
                for chosen, talks in self._batches(requests, numbers):
                    start = time.perf_counter()
                    answers = self._answers(talks, want, patch)
                    seconds += time.perf_counter() - start
                    for number, answer in zip(chosen, answers, strict=True):
                        results[number] = answer
                        new_tokens += answer.token_counts.output_tokens
                        if not _padding(requests[number]):
                            tally.add(answer.token_counts.visual)
                    bar.update(len(chosen))
        bar.close()
        self._finish(tally, seconds, new_tokens)
        return results

    def _answers(self, talks: Sequence[Conversation], want: Wanted, patch: Patch | None) -> list[Any]:
        whole = self.prompter.rows(talks, blank=self.setting.method == NO_IMAGE)
        inputs = adapt(self._model, self.setting, whole)
        tokenizer: Any = self.prompter.processor.tokenizer
        model: Any = self._model
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = tokenizer.eos_token_id
        output: Tensor = model.generate(**inputs, pad_token_id=pad, **want.options)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self.prompter.texts(inputs, output)
        prompt = inputs["attention_mask"].sum(1).tolist()
        return [
            GenerationResult(
                want.cut(text).strip(),
                VisualTokenCounts(prompt[row], _length(new[row], model.generation_config, pad), tokens),
            )
            for row, (text, tokens) in enumerate(zip(texts, self._tokens(whole, inputs, patch), strict=True))
        ]

    def _tokens(self, whole: Inputs, inputs: Inputs, patch: Patch | None) -> list[Tokens]:
        if patch is not None:
            return of_report(patch.report(), len(inputs["input_ids"]))
        before, after = self.prompter.visual_tokens(whole), self.prompter.visual_tokens(inputs)
        return [untouched(a, b) for a, b in zip(before, after, strict=True)]

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Loss of every continuation and whether it is the greedy one, in the order of the requests.

        The number is the mean negative log-likelihood of the continuation's tokens, not its log-likelihood: lmms-eval
        takes the choice with the smallest number, because its own models return losses. The pair comes as the text of a
        ``GenerationResult``: lmms-eval 0.7.3 makes a string of a bare pair, and then cannot score it.
        """
        results: list[Any] = [None] * len(requests)
        tally, start = Tally(), time.perf_counter()
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        with self.setting.applied(self._model, self._run) as patch:
            for chosen, talks in self._batches(requests, range(len(requests))):
                whole = self.prompter.rows(talks, blank=self.setting.method == NO_IMAGE)
                inputs = adapt(self._model, self.setting, whole)
                texts = [self.prompter.text(talk) for talk in talks]
                ends = [self._continuation(requests[number]) for number in chosen]
                tokenizer = self.prompter.processor.tokenizer
                found = continuation_losses(self._model, tokenizer, inputs, texts, ends)
                counts = self._tokens(whole, inputs, patch)
                prompt = inputs["attention_mask"].sum(1).tolist()
                for row, (number, result, tokens) in enumerate(zip(chosen, found, counts, strict=True)):
                    results[number] = GenerationResult(result, VisualTokenCounts(prompt[row], 0, tokens))
                    if not _padding(requests[number]):
                        tally.add(tokens)
                bar.update(len(chosen))
        bar.close()
        self._finish(tally, time.perf_counter() - start, 0)
        return results

    def _continuation(self, request: Any) -> str:
        _, end, _, doc_id, task, split = request.args
        return str(end(self.task_dict[task][split][doc_id]) if callable(end) else end)

    def _finish(self, tally: Tally, seconds: float, new_tokens: int) -> None:
        """Writes what happened to the log and to the `throughput` of the results."""
        for name in vars(tally):
            setattr(self.tally, name, getattr(self.tally, name) + getattr(tally, name))
        name = self.setting.label + ("" if self.setting.keep is None else f" keep={self.setting.keep}")
        where = f" (process {self.rank} of {self.world_size})" if self.world_size > 1 else ""
        logger.info(f"vtprune: {name}{where}: {tally}")
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=new_tokens,
            avg_speed=new_tokens / seconds if seconds else 0.0,
            additional_metrics={
                "total_requests": tally.requests,
                **{field: tally.mean(field) for field in FIELDS},
            },
        )
        everything = isinstance(self.setting.keep, float) and self.setting.keep == 1.0
        if self.setting.method in (*CONTROLS, "keep-all") or everything:
            return
        if tally.shown and not tally.pruned:
            raise InertPruningError(
                f"{name} removed no visual token of {tally.shown} requests with {tally.mean('visual_tokens'):.1f} each, so "
                "its results would be those of the dense model. Lower keep, or ask for method=keep-all."
            )


class VTPruneChat(_VTPrune):
    """For chat tasks, lmms-eval's default: the task's messages go through the model's chat template."""

    is_simple = False

    def _conversation(self, request: Any) -> Conversation:
        if len(request.args) == 6 and callable(request.args[1]):
            _, doc_to_messages, _, doc_id, task, split = request.args
            return conversation(doc_to_messages(self.task_dict[task][split][doc_id]))
        raise EvaluationError(
            f"task {request.task_name} has no messages; run it with --force_simple, which gives model 'vtprune' its text "
            "and pictures instead."
        )

    def _generation(self, request: Any) -> dict[str, Any]:
        return dict(request.args[2])


class VTPruneSimple(_VTPrune):
    """For ``--force_simple``: what is shown comes first, then the task's text, in one user turn."""

    is_simple = True

    def _conversation(self, request: Any) -> Conversation:
        # The third argument shows: (text, continuation, visual, ...) or (text, generation_kwargs, visual, ...).
        text, _, doc_to_visual, doc_id, task, split = request.args
        shown = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        content = [
            {"type": "video" if _is_video(one) else "image", "url": one} for one in shown if one is not None
        ]
        return conversation([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])

    def _generation(self, request: Any) -> dict[str, Any]:
        return dict(request.args[1])


def _is_video(value: Any) -> bool:
    if isinstance(value, dict):
        return True
    return isinstance(value, str) and not value.lower().endswith((".jpg", ".jpeg", ".png", ".bmp", ".webp"))


def _set_attention(model: Any, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise EvaluationError(f"attn_implementation={name!r} cannot be used: {reason}") from error


def _padding(request: Any) -> bool:
    """Whether lmms-eval asks only so that all processes ask equally often."""
    return bool((request.metadata or {}).get("__padding_only__"))


def _length(row: Tensor, config: Any, pad: int | None) -> int:
    """Tokens of an answer, its end token included."""
    end = config.eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    for place, token in enumerate(row.tolist()):
        if token in ends:
            return place + 1
        if token == pad:
            return place
    return len(row)
