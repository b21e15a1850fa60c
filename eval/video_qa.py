"""The command `vtprune video-qa`: one question about many videos."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import vtprune
from vtprune.combining import split_options
from vtprune.video.answering import Answer, Answerer, Protocol, answer_videos, find_videos
from vtprune.video.embedding import CLIPEmbedder
from vtprune.video.selection import create_selector

from .prompts import EvaluationError, Prompter, generate
from .settings import parse_method

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtprune.video.reading import Frame

TITLE = "answer a question about every video of a folder"
DESCRIPTION = """\
Chooses frames of every video, shows them to a model as pictures in the order of time, and writes one line per video: the
answer, the frames' times, the visual tokens before and after pruning, and how long it took. Files that cannot be read are
recorded and passed over. Stopped in the middle, the same command goes on where it was.
"""
EPILOG = """\
examples:
  vtprune video-qa clips/ --question "what happens ?" --model llava-hf/llava-onevision-qwen2-7b-ov-hf --output answers.jsonl
  vtprune video-qa a.mp4 b.mp4 --question "is there a dog ?" --select keyscore --frames 4 --method vtprune --keep 32
"""


class ModelAnswerer(Answerer):
    """An image-text-to-text model of transformers that is shown frames as pictures; patched until :meth:`close`.

    Args:
        model: unpatched, in evaluation mode.
        processor: its processor, with a chat template.
        method: what to prune with; None removes nothing.
        name: of the model, for the record.
        new_tokens: the most tokens of an answer.

    Raises:
        VTPruneError: the model cannot be patched so.
    """

    def __init__(
        self, model: nn.Module, processor: Any, method: vtprune.Method | None, name: str, new_tokens: int = 32
    ) -> None:
        self._prompter = Prompter(model, processor)
        self._model, self._processor, self._new_tokens = model, processor, new_tokens
        chosen = vtprune.methods.create("keep-all") if method is None else method
        self._patch = vtprune.patch(model, chosen)
        self.about = {
            "model": name,
            "method": chosen.key,
            "options": {key: str(value) for key, value in chosen.options().items()},
            "new_tokens": new_tokens,
        }

    def answer(self, frames: Sequence[Frame], question: str) -> Answer:
        pictures = [self._prompter.fit(Image.fromarray(frame.image)) for frame in frames]
        content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
        text = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        batch = self._processor(text=[text], images=pictures, return_tensors="pt")
        prompter = self._prompter
        inputs = {
            key: value.to(prompter.device, prompter.dtype if value.is_floating_point() else None)
            for key, value in batch.items()
        }
        with torch.no_grad():
            output = generate(self._model, inputs, self._new_tokens)
        report = self._patch.report()
        return Answer(
            prompter.texts(inputs, output)[0], sum(report.visual_tokens_in), sum(report.visual_tokens_out)
        )

    def close(self) -> None:
        """Gives the model back as it was."""
        self._patch.remove()


def add_arguments(
    parser: argparse.ArgumentParser,
    keep: Callable[[str], int | float],
    load: Callable[[argparse.Namespace], tuple[nn.Module, Any, str]],
) -> None:
    """Adds the arguments of the command.

    Args:
        keep: reads a budget.
        load: model, processor and name from the arguments.
    """
    parser.add_argument(
        "videos", nargs="+", type=Path, metavar="PATH", help="video files, or folders of them"
    )
    parser.add_argument("--question", required=True, help="what to ask about every video")
    parser.add_argument(
        "--select",
        default="uniform",
        metavar="NAME[:OPTION=VALUE,...]",
        help="frame selector (default uniform); an unknown name lists them",
    )
    parser.add_argument("--frames", type=int, default=8, help="frames that the model sees (default 8)")
    parser.add_argument("--candidates", type=int, default=64, help="frames to choose from (default 64)")
    parser.add_argument(
        "--method",
        metavar="NAME[:OPTION=VALUE,...]",
        help="what prunes the frames' tokens (default: nothing)",
    )
    parser.add_argument("--keep", type=keep, help="tokens per frame, or a ratio; for --method")
    parser.add_argument(
        "--new-tokens", type=int, default=32, help="the most tokens of an answer (default 32)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("answers.jsonl"),
        help="JSON lines to write, or to go on with (default answers.jsonl)",
    )
    parser.set_defaults(run=lambda arguments: run(arguments, load))


def run(
    arguments: argparse.Namespace, load: Callable[[argparse.Namespace], tuple[nn.Module, Any, str]]
) -> int:
    """Runs the command."""
    name, options = split_options(arguments.select)
    protocol = Protocol(
        arguments.question, create_selector(name, **options), arguments.frames, arguments.candidates
    )
    method = None
    if arguments.method is not None:
        key, chosen = parse_method(arguments.method)
        budget = {} if arguments.keep is None else {"keep": arguments.keep}
        method = vtprune.methods.create(key, **{**budget, **chosen})
    elif arguments.keep is not None:
        raise EvaluationError("--keep is a budget of a --method; give both.")
    if arguments.new_tokens < 1:
        raise EvaluationError(f"--new-tokens {arguments.new_tokens}: give 1 or more.")
    videos = find_videos(arguments.videos)
    model, processor, title = load(arguments)
    answerer = ModelAnswerer(model, processor, method, title, arguments.new_tokens)
    console, errors, new = Console(width=140), 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("videos", total=len(videos))
            for result in answer_videos(videos, protocol, answerer, arguments.output, CLIPEmbedder()):
                new += 1
                errors += result.error is not None
                said = result.error or result.answer
                progress.console.print(f"{result.video}: {said}", markup=False, highlight=False)
                progress.update(task, advance=1)
            progress.update(task, completed=len(videos))
    finally:
        answerer.close()
    console.print(
        f"{len(videos)} videos: {new} answered now, {errors} of them with an error, {len(videos) - new} before; "
        f"answers in {arguments.output}",
        markup=False,
        highlight=False,
    )
    return 0
