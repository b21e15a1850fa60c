"""Train the reference model for video.

Two stages: the vision tower with dense supervision (``frames``); the decoder with that tower frozen
(``answers``), on clips and on pictures. Nothing here knows about pruning. Run, with two threads and no accelerator::

    MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000 \
        python -m vtprune.eval.world.video.train --out DIR --stage all
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from .. import loop, reference_dir
from ..batches import loader
from .batches import FrameBatches, VideoBatches
from .learning import FactHeads, FrameHeads, answer_losses, encode, frame_losses, new_model
from .model import config, save

MINUTES = {"frames": 11.0, "answers": 195.0}
LENGTH = 2.0  # of a visual token; words begin with about 0.5
FRAMES = 96  # pictures of a batch of the first stage


def modules() -> tuple[Any, nn.ModuleDict, nn.ModuleDict]:
    """The model with the picture world's decoder, and what either stage trains and saves."""
    torch.manual_seed(0)
    pictures = LlavaForConditionalGeneration.from_pretrained(reference_dir("llava"))
    model: Any = new_model(config(), pictures)
    width = model.config.text_config.hidden_size
    tower = nn.ModuleDict({"visual": model.model.visual, "heads": FrameHeads(width)})
    return model, tower, nn.ModuleDict({"model": model, "heads": FactHeads(width)})


@torch.no_grad()
def shrink(model: Any, pixels: torch.Tensor) -> None:
    """Scales visual tokens to a length of `LENGTH`.

    The first stage leaves them a hundred times as long as words. What the decoder's layers add to a visual token is lost
    beside that, and it learns nothing about the frames before it.
    """
    tokens = encode(model.model.visual, pixels)[1]
    last = model.model.visual.merger.mlp[-1]
    factor = LENGTH / tokens.norm(dim=-1).mean()
    last.weight *= factor
    last.bias *= factor


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and model")
    parser.add_argument("--stage", choices=[*MINUTES, "all"], default="all")
    parser.add_argument("--minutes", type=float, help=f"time for each chosen stage; default {MINUTES}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    model, tower, answers = modules()
    if arguments.stage in ("frames", "all"):
        loop.train(
            tower,
            loop.Settings("frames", arguments.minutes or MINUTES["frames"], lr=1.5e-3, matrix_lr=4e-3),
            lambda step: loader(FrameBatches(step, FRAMES)),
            lambda batch: frame_losses(tower["visual"], tower["heads"], batch),
            arguments.out,
            arguments.resume,
            lambda: None,
        )
    if arguments.stage in ("answers", "all"):
        saved = torch.load(arguments.out / "frames.pt", weights_only=True)["modules"]
        tower.load_state_dict(saved)
        model.model.visual.requires_grad_(False)
        if not (arguments.resume and (arguments.out / "answers.pt").is_file()):
            shrink(model, next(iter(FrameBatches(0, FRAMES)))["pixels"])
        loop.train(
            answers,
            loop.Settings("answers", arguments.minutes or MINUTES["answers"], lr=1.5e-3, matrix_lr=3e-3),
            lambda step: loader(VideoBatches(step)),
            lambda batch: answer_losses(model, answers["heads"], batch),
            arguments.out,
            arguments.resume,
            lambda: save(model, arguments.out / "qwen2-vl"),
        )


if __name__ == "__main__":
    main()
