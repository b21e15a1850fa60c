"""Where chosen frames stand in time: M-RoPE positions of frames that were taken out of a longer video."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.errors import InvalidOptionError, UnsupportedModelError

SUPPORTED = ("qwen2_vl", "qwen2_5_vl")
VIDEO = 2  # in mm_token_type_ids


def frame_positions(
    model: nn.Module, inputs: Mapping[str, Any], places: Sequence[Sequence[int]], candidates: int
) -> Tensor:
    """Position ids with which chosen frames keep their places among all candidate frames, as survivors of pruning do.

    Stock code numbers the frames that it is given 0, 1, 2, ... in time. Here frame i of a video stands at temporal position
    start + places[i], start being the position at which the video begins; height and width stay. What is behind a video
    begins at start + max(candidates, height, width) (in merged tokens) in all three axes, whatever frames were chosen, and
    generated tokens go on from there. To be given to the model as ``position_ids``, in a forward pass or to ``generate``,
    patched or not.

    Args:
        model: Qwen2-VL or Qwen2.5-VL of transformers, with its language model's head.
        inputs: what its processor made: input_ids [B, L], mm_token_type_ids [B, L], video_grid_thw [V, 3], and
            attention_mask [B, L] and image_grid_thw where there are any.
        places: for each of the V videos, in the order of the prompt, the place of each of its temporal patches on the grid
            of candidates, ascending from 0.
        candidates: places there are.

    Returns:
        [3, B, L] int64: time, height, width; 0 under padding.

    Raises:
        UnsupportedModelError: the model has no M-RoPE, or puts text between the frames of a video.
        InvalidOptionError: `places` does not fit the videos or is not ascending in 0 .. candidates - 1.
    """
    config: Any = model.config
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in SUPPORTED:
        raise UnsupportedModelError(
            f"frames of {kind!r} cannot be given places in time; that needs one run of tokens per video with M-RoPE, which "
            f"{' and '.join(SUPPORTED)} have. Without position_ids the model takes the frames as consecutive."
        )
    base: Any = model
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    grids = [[int(n) for n in grid] for grid in inputs.get("video_grid_thw", ())]
    mask = inputs.get("attention_mask")
    given = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw", "attention_mask") if k in inputs}
    positions: Tensor = base.model.get_rope_index(ids, mm_token_type_ids=types, **given)[0]
    if len(grids) != len(places):
        raise InvalidOptionError(f"places are given for {len(places)} videos; the prompt has {len(grids)}.")
    merge = config.vision_config.spatial_merge_size
    number = 0
    for row in range(ids.shape[0]):
        columns = torch.arange(ids.shape[1], device=ids.device) if mask is None else mask[row].nonzero()[:, 0]
        video = types[row, columns] == VIDEO
        at = 0
        while at < len(columns) and bool(video[at:].any()):
            at += int(video[at:].int().argmax())
            frames, height, width = grids[number][0], grids[number][1] // merge, grids[number][2] // merge
            chosen = _checked(places[number], frames, candidates, number)
            end = at + frames * height * width
            start = positions[0, row, columns[at]].clone()
            times = torch.tensor(chosen, device=ids.device).repeat_interleave(height * width)
            positions[0, row, columns[at:end]] = start + times
            positions[:, row, columns[end:]] += max(candidates, height, width) - max(height, width)
            at, number = end, number + 1
    return positions


def _checked(places: Sequence[int], frames: int, candidates: int, number: int) -> list[int]:
    found = [int(place) for place in places]
    ascending = all(a < b for a, b in itertools.pairwise(found))
    if len(found) != frames or not ascending or found[0] < 0 or found[-1] >= candidates:
        raise InvalidOptionError(
            f"video {number} has {frames} frames and the places {found}; give so many ascending numbers in "
            f"0 .. {candidates - 1}."
        )
    return found
