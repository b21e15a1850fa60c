"""Train the reference models of the picture world.

Nothing here knows about pruning. Run, with two threads and no accelerator::

    python -m vtprune.eval.world.train --out DIR --stage all
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPModel

from . import loop
from .data import VisionBatches, loader
from .models import clip_config, save_clip
from .pretrain import Heads, vision_losses

BATCH = 64


def train_vision(out: Path, minutes: float, resume: bool) -> None:
    """Stage 1: train CLIP with dense supervision and write it to ``out/clip``."""
    torch.manual_seed(0)
    model = CLIPModel(clip_config())
    heads = Heads(model.config.vision_config.hidden_size)
    model.vision_model.compile()
    loop.train(
        nn.ModuleDict({"clip": model, "heads": heads}),
        loop.Settings("vit", minutes, lr=1.5e-3, matrix_lr=4e-3),
        lambda step: loader(VisionBatches(step * BATCH, BATCH)),
        lambda batch: vision_losses(model, heads, batch),
        out,
        resume,
        lambda: save_clip(model, out / "clip"),
    )


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and models")
    parser.add_argument("--stage", choices=["vit", "llava", "all"], default="all")
    parser.add_argument("--minutes", type=float, default=27)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    train_vision(arguments.out, arguments.minutes, arguments.resume)


if __name__ == "__main__":
    main()
