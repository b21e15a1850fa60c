"""The command `vtprune video-qa`: one question about many videos."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import vtprune
from vtprune.combining import Quota, split_options, with_budget
from vtprune.video.answering import (
    Answer,
    Answerer,
    AnswererSource,
    Places,
    Protocol,
    answer_videos,
    find_videos,
)
from vtprune.video.embedding import CLIPEmbedder
from vtprune.video.positions import frame_positions
from vtprune.video.selection import SELECTORS, create_selector

from .prompts import EvaluationError, Prompter, generate, load_model
from .settings import parse_method
from .world import reference_dir

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtprune.video.reading import Frame

TICKS = 1000  # per second, of the times that a processor is told
TITLE = "answer a question about every video of a folder"
SHOWN = ("auto", "video", "pictures")
POSITIONS = ("auto", "original", "dense")
PLACED = "qwen2_vl"  # the one model whose temporal positions count frames and not seconds
DESCRIPTION = """\
Chooses frames of every video, shows them to a model in the order of time, and writes one line of JSON per video: the
answer, the frames' times in seconds, the visual tokens before and after pruning, the seconds that each step took.

Per video: CANDIDATES small frames, evenly spaced, are read; --select chooses FRAMES of them; these are read again in full size and
shown with the question; --method prunes their tokens inside the model.

A file that cannot be read gets a line with its error, and the run goes on. Stopped or killed in the middle, the same command
goes on where it was: nothing is lost but what was being answered, and nothing is answered twice. An output of another question,
model or setting is refused.
"""
EPILOG = """\
at scale:
  --workers N answers N videos at a time on Ray Data (pip install 'vtprune[ray]'), each worker with a model of its own, on this
  machine or with --address on a running cluster, where the paths have to mean the same files on every machine. The output is that of
  one process, line by line, but for the seconds. A worker that dies gets its video once more, and if it dies again, that
  video's line says so.

fields of a line:
  video question answer times tokens_in tokens_out error notes seconds run
  notes: damage of the file that could be read over, and substitutes of the selector; run: a digest of all settings

examples:
  vtprune video-qa clips/ --question "what happens ?" --model llava-hf/llava-onevision-qwen2-7b-ov-hf --output answers.jsonl
  vtprune video-qa a.mp4 b.mp4 --question "is there a dog ?" --select keyscore --frames 4 --method vtprune --keep 32
  vtprune video-qa a.mp4 --question "is there a dog ?" --select quota:cap=16 --method vtprune --keep 4 --allot
  vtprune video-qa clips/ --question "what happens ?" --model DIR --device cuda --workers 8 --address ray-head:6379
"""


@dataclass(frozen=True)
class ModelSource(AnswererSource):
    """Loads a checkpoint as :class:`ModelAnswerer`, here or in workers.

    Attributes:
        path: folder or hub id; None: the shipped reference model for video.
        method: what to prune with; None removes nothing.
        device, dtype: as :func:`~vtprune.eval.prompts.load_model` takes them.
        threads: CPU threads of one model; None: what torch chooses, in workers an equal share.
        new_tokens, show, positions, allot: see :class:`ModelAnswerer`.
    """

    path: str | None = None
    method: vtprune.Method | None = None
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    new_tokens: int = 32
    show: str = "auto"
    positions: str = "auto"
    allot: bool = False

    @property
    def name(self) -> str:
        """Of the model, for the record."""
        return self.path or "vtprune reference Qwen2-VL"

    @property
    def about(self) -> dict[str, Any]:
        """What decides the answers."""
        return _about(self.name, self.method, self.new_tokens, self.show, self.positions, self.allot)

    @property
    def gpus(self) -> int:
        """1 on CUDA."""
        return int(self.device.startswith("cuda"))

    @property
    def cpus(self) -> int | None:
        """`threads`."""
        return self.threads

    def open(self, threads: int | None) -> ModelAnswerer:
        """Loads and patches the model.

        Raises:
            VTPruneError: it cannot be loaded, or not be patched so.
        """
        from transformers.utils import logging

        if threads is not None:
            torch.set_num_threads(threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model, processor = load_model(self.path or str(reference_dir("qwen2-vl")), self.device, self.dtype)
        options = (self.new_tokens, self.show, self.positions, self.allot)
        return ModelAnswerer(model, processor, self.method, self.name, *options)


class ModelAnswerer(Answerer):
    """An image-text-to-text model of transformers that is shown frames; patched until :meth:`close`.

    Args:
        model: unpatched, in evaluation mode.
        processor: its processor, with a chat template.
        method: what to prune with; None removes nothing.
        name: of the model, for the record.
        new_tokens: the most tokens of an answer.
        show: "video": the frames are one video, with their times where the processor takes them; "pictures": one
            picture each, in the order of time; "auto": as a video where the model, its processor and chat template take one.
        positions: "original": frames of a video keep their places in time among the candidates, as survivors of pruning do
            (:func:`~vtprune.video.positions.frame_positions`; Qwen2-VL); "dense": they are numbered without gaps; "auto":
            original where the model can. Qwen2.5-VL and later ones get the frames' mean spacing in seconds from the processor.
        allot: every frame keeps as many tokens as the selector allots to it, those that score highest with the method; where
            the model merges several frames into one, their mean. For models that take a video, and methods that score.

    Attributes:
        as_video: whether frames are shown as a video.
        placed: whether they keep their places.

    Raises:
        VTPruneError: the model cannot be patched so.
        EvaluationError: `show` is "video" and the model takes none, `positions` "original" and it cannot, or `allot` without
            a method or a video.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        method: vtprune.Method | None,
        name: str,
        new_tokens: int = 32,
        show: str = "auto",
        positions: str = "auto",
        allot: bool = False,
    ) -> None:
        for option, value, known in (("show", show, SHOWN), ("positions", positions, POSITIONS)):
            if value not in known:
                raise EvaluationError(f"{option}={value!r}: choose one of {', '.join(known)}.")
        self._prompter = Prompter(model, processor)
        self._model, self._processor, self._new_tokens = model, processor, new_tokens
        obstacle = _no_video(model, processor)
        if show == "video" and obstacle is not None:
            raise EvaluationError(f"frames cannot be shown as a video: {obstacle}; show them as pictures.")
        self.as_video = show != "pictures" and obstacle is None
        kind = getattr(model.config, "model_type", "")
        if positions == "original" and not (self.as_video and kind == PLACED):
            raise EvaluationError(
                f"positions='original' is for {PLACED} and frames shown as a video, and this is {kind or 'no such model'}"
                f"{'' if self.as_video else ' with pictures'}; use positions='auto' or 'dense'."
            )
        self.placed = positions != "dense" and self.as_video and kind == PLACED
        self._method = _dense() if method is None else method
        self._allot = allot
        if allot and (method is None or not self.as_video):
            raise EvaluationError(
                "tokens can be allotted to frames by a method, of frames that are shown as a video; "
                + (
                    "give a method."
                    if method is None
                    else f"here they are pictures ({obstacle or 'as asked for'})."
                )
            )
        self._patch = vtprune.patch(model, with_budget(self._method, Quota((1,))) if allot else self._method)
        self.about = _about(name, method, new_tokens, show, positions, allot)

    def answer(self, frames: Sequence[Frame], question: str, places: Places) -> Answer:
        notes = () if not self._allot else (self._share_out(places),)
        prompter, given = self._prompter, dict(self.inputs(frames, question))
        if self.placed:
            given["position_ids"] = self._positions(given, places)
        inputs = prepared(given, prompter.device, prompter.dtype)
        with torch.no_grad():
            output = generate(self._model, inputs, self._new_tokens)
        report = self._patch.report()
        text = prompter.texts(inputs, output)[0]
        return Answer(text, sum(report.visual_tokens_in), sum(report.visual_tokens_out), notes)

    def _share_out(self, places: Places) -> str:
        """Patches anew, for what the selector allots; says what that is."""
        if places.tokens is None:
            raise EvaluationError(
                "the frame selector allots no tokens to frames; use one that does, such as quota."
            )
        patch = getattr(self._processor.video_processor, "temporal_patch_size", 1)
        merged = [places.tokens[start : start + patch] for start in range(0, len(places.tokens), patch)]
        tokens = [max(1, round(sum(some) / len(some))) for some in merged]
        self._patch.remove()
        self._patch = vtprune.patch(self._model, with_budget(self._method, Quota(tokens)))
        return f"tokens allotted to frames: {', '.join(map(str, tokens))}"

    def inputs(self, frames: Sequence[Frame], question: str) -> Mapping[str, Any]:
        """What the processor makes of the prompt: one row, on the CPU."""
        pictures = [self._prompter.fit(Image.fromarray(frame.image)) for frame in frames]
        kinds = ["video"] if self.as_video else ["image"] * len(pictures)
        text = _rendered(self._processor, kinds, question)
        if not self.as_video:
            given: Mapping[str, Any] = self._processor(text=[text], images=pictures, return_tensors="pt")
            return given
        given = self._processor(
            text=[text],
            videos=[np.stack([np.asarray(picture) for picture in pictures])],
            video_metadata=[metadata([frame.time for frame in frames])],
            do_sample_frames=False,
            return_tensors="pt",
        )
        return given

    def _positions(self, given: Mapping[str, Any], places: Places) -> torch.Tensor:
        """A temporal patch of several frames stands where its first frame does."""
        patch = self._processor.video_processor.temporal_patch_size
        chosen = [place // patch for place in places.indices[::patch]]
        return frame_positions(self._model, given, [chosen], math.ceil(places.candidates / patch))

    def close(self) -> None:
        """Gives the model back as it was."""
        self._patch.remove()


def metadata(times: Sequence[float]) -> dict[str, Any]:
    """Metadata of transformers for frames that were chosen, at ascending `times` in seconds.

    In ticks of a millisecond, so that a frame's number / fps is its own time (Qwen3-VL writes it into the prompt), and the
    rate of what is shown is that of the mean distance between its frames (from which Qwen2.5-VL takes the seconds per
    grid: it has one number for all, so times that are not evenly spaced are even to it, and to Qwen2-VL, which gets none).
    """
    distance = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    span = len(times) * (distance or 1.0)  # one frame, or one shown again and again: a second each
    return {
        "fps": float(TICKS),
        "frames_indices": [round(time * TICKS) for time in times],
        "total_num_frames": max(1, round(span * TICKS)),
        "duration": span,
    }


def prepared(given: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors on the device, pixels in the model's dtype."""
    moved = {}
    for key, value in given.items():
        pixels = key.startswith("pixel_values")
        moved[key] = value.to(device, dtype if pixels else None) if torch.is_tensor(value) else value
    return moved


def _no_video(model: nn.Module, processor: Any) -> str | None:
    """Why the model cannot be shown a video; None if it can."""
    config: Any = model.config
    if getattr(processor, "video_processor", None) is None:
        return f"{type(processor).__name__} takes no videos"
    if getattr(config, "video_token_id", None) is None and getattr(config, "video_token_index", None) is None:
        return f"{type(model).__name__} has no video token"
    token = getattr(processor, "video_token", None)
    try:
        text = _rendered(processor, ["video"], "?")
    except (TypeError, ValueError, TemplateError) as error:
        return f"the chat template refuses a video ({error})"
    if not isinstance(token, str) or text.count(token) != 1:
        return "the chat template leaves videos out"
    return None


def _rendered(processor: Any, kinds: Sequence[str], question: str) -> str:
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return text


def _dense() -> vtprune.Method:
    return vtprune.methods.create("keep-all")


def _about(
    name: str, method: vtprune.Method | None, new_tokens: int, show: str, positions: str, allot: bool
) -> dict[str, Any]:
    chosen = _dense() if method is None else method
    return {
        "model": name,
        "method": chosen.key,
        "options": {key: str(value) for key, value in chosen.options().items()},
        "new_tokens": new_tokens,
        "show": show,
        "positions": positions,
        **({"allot": True} if allot else {}),
    }


def add_arguments(parser: argparse.ArgumentParser, keep: Callable[[str], int | float]) -> None:
    """Adds the arguments of the command; `keep` reads a budget."""
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
        "--allot",
        action="store_true",
        help="every frame keeps what the selector allots to it, --keep tokens per frame at most in the mean; for --select quota, "
        "an int as --keep, and a --method that scores tokens",
    )
    parser.add_argument(
        "--as",
        dest="show",
        choices=SHOWN,
        default="auto",
        help="how the model gets the frames: as one video with their times, as pictures in the order of time, or as a video "
        "where the model takes one (default auto)",
    )
    parser.add_argument(
        "--positions",
        choices=POSITIONS,
        default="auto",
        help="chosen frames of a video keep their original places in time among the candidates (Qwen2-VL), or are numbered "
        "without gaps (default auto: original where the model can)",
    )
    parser.add_argument(
        "--new-tokens", type=int, default=32, help="the most tokens of an answer (default 32)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("answers.jsonl"),
        help="JSON lines to write, or to go on with (default answers.jsonl)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes of Ray Data with a model each; --threads is then per worker (default: this process)",
    )
    parser.add_argument(
        "--address",
        help="running Ray cluster for the workers, such as HOST:PORT or auto (default: Ray is started here)",
    )
    parser.set_defaults(run=run)


def _allotting(arguments: argparse.Namespace, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a selector that allots `--keep` tokens per frame in the mean."""
    if name in SELECTORS and not any(
        f.name == "per_frame" for f in dataclasses.fields(cast(Any, SELECTORS[name]))
    ):
        raise EvaluationError(
            f"--allot: the selector {name!r} allots no tokens to frames; use --select quota."
        )
    if arguments.method is None or not isinstance(arguments.keep, int) or "per_frame" in options:
        raise EvaluationError(
            "--allot needs a --method, and --keep N: the tokens that a frame gets in the mean (per_frame of the selector)."
        )
    return {**options, "per_frame": arguments.keep}


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    name, options = split_options(arguments.select)
    if arguments.allot:
        options = _allotting(arguments, name, options)
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
    if arguments.threads is not None and arguments.threads < 1:
        raise EvaluationError(f"--threads {arguments.threads} is no number of threads; give 1 or more.")
    if arguments.workers is not None and ":" in arguments.device:
        raise EvaluationError(
            f"--device {arguments.device}: every worker gets a GPU of its own from Ray; use --device cuda."
        )
    videos = find_videos(arguments.videos)
    source = ModelSource(
        arguments.model,
        method,
        arguments.device,
        arguments.dtype,
        arguments.threads,
        arguments.new_tokens,
        arguments.show,
        arguments.positions,
        arguments.allot,
    )
    console, errors, new = Console(width=140), 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("videos", total=len(videos))
        results = answer_videos(
            videos,
            protocol,
            source,
            arguments.output,
            CLIPEmbedder(),
            workers=arguments.workers,
            address=arguments.address,
        )
        for result in results:
            new += 1
            errors += result.error is not None
            said = result.error or result.answer
            progress.console.print(f"{result.video}: {said}", markup=False, highlight=False)
            progress.update(task, advance=1)
        progress.update(task, completed=len(videos))
    console.print(
        f"{len(videos)} videos: {new} answered now, {errors} of them with an error, {len(videos) - new} before; "
        f"answers in {arguments.output}",
        markup=False,
        highlight=False,
    )
    return 0
