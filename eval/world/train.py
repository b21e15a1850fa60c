"""Train the reference models of the picture world.

Two stages: the CLIP model with dense supervision of its vision tower (``vit``); projector and language model with that
tower frozen (``llava``). Nothing here knows about pruning. Run, with two
threads and no accelerator::

    MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000 \
        python -m vtprune.eval.world.train --out DIR --stage all
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPModel

from . import loop
from .batches import DialogueBatches, VisionBatches, loader
from .models import clip_config, save_clip, save_llava, vision_config
from .pretrain import Heads, vision_losses
from .tuning import Finder, answer_losses, join

MINUTES = {"vit": 27.0, "llava": 71.5}
VISION_BATCH = 64
DIALOGUE_BATCH = 32
FIRST_SEED = {"vit": 0, "llava": 100_000_000}


def new_clip() -> tuple[CLIPModel, Heads]:
    """An untrained CLIP model with its auxiliary heads."""
    torch.manual_seed(0)
    model = CLIPModel(clip_config())
    return model, Heads(vision_config().hidden_size)


def load_stage(out: Path, stage: str, modules: nn.ModuleDict) -> None:
    """Load what a finished stage has left in ``out``.

    Raises:
        FileNotFoundError: if the stage has not been trained.
    """
    file = out / f"{stage}.pt"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; train stage {stage!r} first")
    modules.load_state_dict(torch.load(file, weights_only=True)["modules"])


def train_vision(out: Path, minutes: float, resume: bool) -> None:
    """Stage 1: train CLIP with dense supervision and write it to ``out/clip``."""
    model, heads = new_clip()
    model.vision_model.compile()
    loop.train(
        nn.ModuleDict({"clip": model, "heads": heads}),
        loop.Settings("vit", minutes, lr=1.5e-3, matrix_lr=4e-3),
        lambda step: loader(VisionBatches(FIRST_SEED["vit"] + step * VISION_BATCH, VISION_BATCH)),
        lambda batch: vision_losses(model, heads, batch),
        out,
        resume,
        lambda: save_clip(model, out / "clip"),
    )


def train_language(out: Path, minutes: float, resume: bool) -> None:
    """Stage 2: train projector and language model on the frozen tower of stage 1; write ``out/llava``."""
    clip, heads = new_clip()
    load_stage(out, "vit", nn.ModuleDict({"clip": clip, "heads": heads}))
    model = join(clip)
    finder = Finder(model.lm_head.in_features)
    model.model.vision_tower.compile()
    model.model.language_model.compile()
    loop.train(
        nn.ModuleDict({"llava": model, "finder": finder}),
        loop.Settings("llava", minutes, lr=1.5e-3, matrix_lr=4e-3),
        lambda step: loader(DialogueBatches(FIRST_SEED["llava"] + step * DIALOGUE_BATCH, DIALOGUE_BATCH)),
        lambda batch: answer_losses(model, finder, batch),
        out,
        resume,
        lambda: save_llava(model, out / "llava"),
    )


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and models")
    parser.add_argument("--stage", choices=[*MINUTES, "all"], default="all")
    parser.add_argument("--minutes", type=float, help=f"time for each chosen stage; default {MINUTES}")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    stages = {"vit": train_vision, "llava": train_language}
    for stage, run in stages.items():
        if arguments.stage in (stage, "all"):
            run(arguments.out, arguments.minutes or MINUTES[stage], arguments.resume)


if __name__ == "__main__":
    main()
