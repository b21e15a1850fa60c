"""From clips and questions to the inputs of a model for video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from vtprune.video.answering import read_all
from vtprune.video.positions import frame_positions
from vtprune.video.reading import read_frames

from ..prompts import GREY, EvaluationError
from ..shrink import Inputs
from ..world.video import VideoExample

Frames = NDArray[np.uint8]
TOLERANCE = 1e-3  # seconds


@dataclass(frozen=True, eq=False)
class ReadClip:
    """The candidate frames of a clip.

    Attributes:
        frames: [N, h, w, 3] uint8 RGB.
        times: [N] seconds.
        duration: seconds.
    """

    frames: Frames
    times: NDArray[np.float64]
    duration: float


def read_clip(example: VideoExample, candidates: int, folder: Path | None = None) -> ReadClip:
    """Writes a clip as an mp4 file if it is not there yet, and reads evenly spaced frames of it.

    Args:
        example: a question about the clip.
        candidates: frames to read.
        folder: where clips are kept, see :meth:`vtprune.eval.world.video.VideoExample.path`.

    Raises:
        VideoError: the file cannot be read.
        EvaluationError: it is damaged, or its times are not those of the clip's frames.
    """
    path = example.path(folder)
    reader = read_frames(path, count=candidates)
    found = read_all(reader)
    if reader.damage or len(found) != candidates:
        raise EvaluationError(
            f"{path} gave {len(found)} of {candidates} frames ({'; '.join(reader.damage) or 'no damage found'}); "
            "delete it, so that it is written again."
        )
    fps = example.scene.fps
    given = np.array([frame.time for frame in found])
    times = np.rint(given * fps) / fps  # some backends give single precision
    if np.abs(times - given).max() > TOLERANCE:
        raise EvaluationError(f"{path} gave frames at {given.tolist()} s, which has frames every 1/{fps} s.")
    return ReadClip(np.stack([frame.image for frame in found]), times, reader.info.duration)


class VideoPrompter:
    """Builds inputs in a model's own prompt format, the frames as one video at their places in time.

    Args:
        model: Qwen2-VL or Qwen2.5-VL.
        processor: its processor, with a chat template.

    Raises:
        EvaluationError: the processor has no chat template, or takes no videos.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        if getattr(processor, "video_processor", None) is None:
            raise EvaluationError(f"the {type(processor).__name__} takes no videos; use a model that does.")
        if getattr(processor, "chat_template", None) is None:
            raise EvaluationError(
                f"the {type(processor).__name__} has no chat template, so prompts cannot be built; set "
                "`processor.chat_template` or use a checkpoint that has one."
            )
        processor.tokenizer.padding_side = "left"
        self.model, self.processor = model, processor
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        config: Any = model.config
        self._together = getattr(config.vision_config, "temporal_patch_size", 1)

    def inputs(
        self,
        frames: Sequence[Frames],
        places: Sequence[Sequence[int]],
        questions: Sequence[str],
        candidates: int,
    ) -> Inputs:
        """One row per question with one video each, padded on the left, on the model's device.

        Args:
            frames: per question [F, h, w, 3] uint8 RGB.
            places: per question the frames' places among the candidates, see
                :func:`vtprune.video.positions.frame_positions`; where the model joins frames to a temporal patch, that of the
                first of them counts.
            questions: one per video.
            candidates: places there are.
        """
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            for question in questions
        ]
        batch = self.processor(
            text=texts, videos=list(frames), padding=True, return_tensors="pt", do_sample_frames=False
        )
        inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        chosen = [list(one)[:: self._together] for one in places]
        inputs["position_ids"] = frame_positions(self.model, inputs, chosen, candidates)
        return inputs

    def texts(self, inputs: Inputs, output: Tensor) -> list[str]:
        """What was generated behind the prompts, [B, L + new] token ids to one text per row."""
        new = output[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]


def blank(frames: Frames) -> Frames:
    """Mid-grey frames of the same shape."""
    out = np.empty_like(frames)
    out[:] = GREY
    return out
