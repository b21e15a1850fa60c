"""From the messages of a chat task to model inputs: any number of pictures and videos per row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from vtprune.video.answering import read_all
from vtprune.video.reading import probe, read_frames

from ..prompts import GREY, EvaluationError, Prompter
from ..shrink import Inputs
from ..video_qa import metadata, prepared

Array = NDArray[np.uint8]
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass
class Conversation:
    """One request: turns for the chat template, and what is shown in them, in their order.

    Attributes:
        turns: messages as the chat template of a processor takes them, without the media themselves.
        images: pictures of all turns.
        videos: videos of all turns: a file, a folder of frames, or a dict of lmms-eval with a place in a file.
    """

    turns: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Shown:
    """Frames of a video, [N, h, w, 3] uint8 RGB, and their times in seconds."""

    frames: Array
    times: tuple[float, ...]


def conversation(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Reads messages as lmms-eval's `doc_to_messages` gives them.

    Raises:
        EvaluationError: a part that is neither text, picture nor video, such as sound.
    """
    out = Conversation()
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turn: list[dict[str, Any]] = []
        for part in parts:
            kind = part["type"]
            if kind == "text":
                turn.append({"type": "text", "text": part["text"]})
                continue
            if kind not in ("image", "video"):
                raise EvaluationError(
                    f"a task shows {kind!r}, which model 'vtprune' does not take: it takes text, pictures and videos."
                )
            value = part["url"] if "url" in part else part[kind]
            turn.append({"type": kind})
            if kind == "image":
                out.images.append(_picture(value))
            else:
                span = {key: part[key] for key in ("start_time", "end_time") if part.get(key) is not None}
                out.videos.append({"url": value, **span} if span else value)
        out.turns.append({"role": message["role"], "content": turn})
    return out


def _picture(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (str, os.PathLike)):
        with Image.open(value) as file:
            picture: Image.Image = file.convert("RGB")
        return picture
    raise EvaluationError(
        f"a task shows a picture as {type(value).__name__}; a PIL picture or a file is needed."
    )


def frames_of(video: Any, count: int) -> Shown:
    """Evenly spaced frames of a video.

    Args:
        video: a file; a folder of pictures, in the order of their names; a list of pictures; or a dict with "url" or
            "path" and "start_time", "end_time", "video_start", "video_end" in seconds.
        count: the most frames to read; a folder or list with fewer gives all.

    Raises:
        VideoError: the file cannot be read.
        EvaluationError: none of these.
    """
    start = end = None
    if isinstance(video, Mapping):
        start = video.get("start_time", video.get("video_start"))
        end = video.get("end_time", video.get("video_end"))
        video = video.get("url", video.get("path"))
        if isinstance(video, Mapping):
            return frames_of({**video, "start_time": start, "end_time": end}, count)
    if isinstance(video, (list, tuple)):
        return _stacked([_picture(one) for one in _even(video, count)])
    if not isinstance(video, (str, os.PathLike)):
        raise EvaluationError(f"a task shows a video as {type(video).__name__}; a file or folder is needed.")
    path = Path(video)
    if path.is_dir():
        names = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
        if not names:
            raise EvaluationError(f"{path} is a folder without pictures, so it is no video.")
        return _stacked([_picture(one) for one in _even(names, count)])
    if start is None and end is None:
        reader = read_frames(path, count=count)
    else:
        first = float(start or 0.0)
        last = float(end) if end is not None else probe(path).duration
        if not 0 <= first < last:
            raise EvaluationError(f"a task shows {path} from {first} s to {last} s, which is no part of it.")
        step = (last - first) / count
        reader = read_frames(path, times=[first + (i + 0.5) * step for i in range(count)])
    found = read_all(reader)
    if not found:
        raise EvaluationError(f"{path} gave no frames ({'; '.join(reader.damage) or 'no damage found'}).")
    return Shown(np.stack([frame.image for frame in found]), tuple(frame.time for frame in found))


def _even(values: Sequence[Any], count: int) -> list[Any]:
    if len(values) <= count:
        return list(values)
    return [values[int((i + 0.5) * len(values) / count)] for i in range(count)]


def _stacked(pictures: Sequence[Image.Image]) -> Shown:
    size = pictures[0].size
    same = [picture.convert("RGB").resize(size) for picture in pictures]
    return Shown(np.stack([np.asarray(picture) for picture in same]), tuple(map(float, range(len(same)))))


class ChatPrompter(Prompter):
    """Builds inputs of conversations in a model's own prompt format.

    Args:
        model: an image-text-to-text model of transformers.
        processor: its processor, with a chat template.
        max_frames: frames of a video.
        video_as: "video" or "pictures", see :class:`~vtprune.eval.lmms.arguments.ModelArguments`.

    Raises:
        EvaluationError: the processor has no chat template.
    """

    def __init__(
        self, model: nn.Module, processor: Any, max_frames: int = 32, video_as: str = "video"
    ) -> None:
        super().__init__(model, processor)
        self.max_frames, self.video_as = max_frames, video_as
        config: Any = model.config
        ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        self.placeholders = [one for one in ids if isinstance(one, int)]

    def text(self, talk: Conversation) -> str:
        """The prompt of a conversation, up to where the answer begins.

        Raises:
            EvaluationError: the chat template leaves media out, or the task's text holds a placeholder itself.
        """
        turns = talk.turns
        if talk.videos and self.video_as == "pictures":
            raise ValueError("videos are to be replaced by pictures first")
        rendered: str = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        for kind, count in (("image", len(talk.images)), ("video", len(talk.videos))):
            token = getattr(self.processor, f"{kind}_token", None)
            if count and kind == "video" and getattr(self.processor, "video_processor", None) is None:
                raise EvaluationError(
                    f"a task shows a video, and the {type(self.processor).__name__} takes none; add video_as=pictures to "
                    "show its frames as pictures."
                )
            if isinstance(token, str) and rendered.count(token) != count:
                raise EvaluationError(
                    f"the prompt has {rendered.count(token)} places {token} for {count} {kind}s: the chat template leaves "
                    f"them out, or the task's text holds {token} itself. Prompt: {rendered[:200]!r}"
                )
        return rendered

    def rows(self, talks: Sequence[Conversation], blank: bool = False) -> Inputs:
        """One row per conversation, padded on the left, on the model's device.

        Args:
            talks: all with pictures or all without, all with videos or all without (:func:`alike`).
            blank: replaces every picture and frame by a mid-grey one of its size.
        """
        films = [[frames_of(video, self.max_frames) for video in talk.videos] for talk in talks]
        if self.video_as == "pictures":
            talks = [_as_pictures(talk, shown) for talk, shown in zip(talks, films, strict=True)]
            films = [[] for _ in talks]
        texts = [self.text(talk) for talk in talks]
        given: dict[str, Any] = {}
        if any(talk.images for talk in talks):
            images = [[self.fit(image) for image in talk.images] for talk in talks]
            if blank:
                images = [[Image.new("RGB", image.size, GREY) for image in row] for row in images]
            given["images"] = images
        clips = [shown for row in films for shown in row]
        if clips:
            frames = [self._fitted(shown.frames) for shown in clips]
            if blank:
                frames = [np.broadcast_to(np.array(GREY, dtype=np.uint8), f.shape).copy() for f in frames]
            given.update(
                videos=frames,
                video_metadata=[metadata(shown.times) for shown in clips],
                do_sample_frames=False,
            )
        batch = self.processor(text=texts, padding=True, return_tensors="pt", **given)
        return prepared(batch, self.device, self.dtype)

    def _fitted(self, frames: Array) -> Array:
        return np.stack([np.asarray(self.fit(Image.fromarray(frame))) for frame in frames])

    def visual_tokens(self, inputs: Inputs) -> list[int]:
        """Placeholders of pictures and videos in every row; where a model has separators, they are among them."""
        ids = inputs["input_ids"]
        counts = [0] * len(ids)
        for placeholder in self.placeholders:
            counts = [a + b for a, b in zip(counts, (ids == placeholder).sum(1).tolist(), strict=True)]
        return counts


def _as_pictures(talk: Conversation, films: Sequence[Shown]) -> Conversation:
    """The same conversation with every video as pictures, one after the other."""
    out = Conversation()
    images, clips = iter(talk.images), iter(films)
    for turn in talk.turns:
        content: list[dict[str, Any]] = []
        for part in turn["content"]:
            if part["type"] == "video":
                frames = [Image.fromarray(frame) for frame in next(clips).frames]
                content += [{"type": "image"} for _ in frames]
                out.images += frames
            else:
                content.append(part)
                if part["type"] == "image":
                    out.images.append(next(images))
        out.turns.append({"role": turn["role"], "content": content})
    return out


def alike(talks: Sequence[Conversation], size: int) -> Iterator[list[int]]:
    """Numbers of conversations that can share a batch, at most `size` together, in their order.

    Processors take pictures for all rows of a call or for none.
    """
    groups: dict[tuple[bool, bool], list[int]] = {}
    for number, talk in enumerate(talks):
        groups.setdefault((bool(talk.images), bool(talk.videos)), []).append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]
