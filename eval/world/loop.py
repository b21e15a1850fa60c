"""The training loop shared by all stages: optimisers, time budget, checkpoints and log."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

WARM_UP = 100  # steps
LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class Settings:
    """How long and how fast a stage trains.

    Attributes:
        name: name of the stage; its checkpoint is ``<name>.pt``.
        minutes: wall-clock time of training, all resumed parts together.
        lr: peak learning rate of AdamW, for embeddings, heads, norms and biases.
        matrix_lr: peak learning rate of Muon, for the matrices inside the layers.
        save_minutes: time between checkpoints.
    """

    name: str
    minutes: float
    lr: float
    matrix_lr: float
    save_minutes: float = 3.0


def train(
    modules: nn.ModuleDict,
    settings: Settings,
    batches: Callable[[int], Iterator[dict[str, Tensor]]],
    loss: Callable[[dict[str, Tensor]], tuple[Tensor, dict[str, float]]],
    out: Path,
    resume: bool,
    on_save: Callable[[], None],
) -> None:
    """Train until the time is used up; the learning rate falls linearly with the time.

    Args:
        modules: what is trained and saved; parameters that need no gradient are left alone.
        settings: see `Settings`.
        batches: gives the stream of batches that starts with a step.
        loss: gives the loss of a batch and figures for the log.
        out: folder for the checkpoint and ``training.log``.
        resume: go on from the checkpoint in ``out`` if there is one.
        on_save: called after every checkpoint and at the end.
    """
    file = out / f"{settings.name}.pt"
    optimizers = _optimizers(modules, settings)
    step, used = 0, 0.0
    if resume and file.is_file():
        state = torch.load(file, weights_only=True)
        modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, used = state["step"], state["seconds"]
    budget = settings.minutes * 60
    stream = batches(step)
    sums: dict[str, list[float]] = defaultdict(list)
    start, saved_at, logged_at = time.monotonic() - used, used, used
    modules.train()
    while (used := time.monotonic() - start) < budget:
        factor = min(1.0, (step + 1) / WARM_UP) * (1 - used / budget)
        for optimizer in optimizers:
            peak = settings.matrix_lr if isinstance(optimizer, torch.optim.Muon) else settings.lr
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.zero_grad()
        total, figures = loss(next(stream))
        total.backward()
        nn.utils.clip_grad_norm_([p for p in modules.parameters() if p.grad is not None], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        for key, value in figures.items():
            if not math.isnan(value):  # a batch without any question of a kind
                sums[key].append(value)
        if step % LOG_EVERY == 0:
            now = time.monotonic() - start
            means = {key: round(sum(values) / len(values), 4) for key, values in sums.items()}
            entry: dict[str, object] = {"stage": settings.name, "step": step, "minutes": round(now / 60, 1)}
            entry["step_seconds"] = round((now - logged_at) / LOG_EVERY, 3)
            log(out, entry | means)
            sums.clear()
            logged_at = now
        if time.monotonic() - start - saved_at > settings.save_minutes * 60:
            saved_at = time.monotonic() - start
            _save(file, modules, optimizers, step, saved_at)
            on_save()
    _save(file, modules, optimizers, step, used)
    on_save()


def log(out: Path, entry: dict[str, object]) -> None:
    """Append one JSON line to ``training.log`` and print it."""
    line = json.dumps(entry)
    print(line, flush=True)
    with (out / "training.log").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _optimizers(modules: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    matrices, vectors, rest = [], [], []
    for name, parameter in modules.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and any(part in name for part in (".layers.", ".blocks.", ".merger.")):
            matrices.append(parameter)
        elif parameter.ndim < 2:
            vectors.append(parameter)
        else:
            rest.append(parameter)
    groups = [{"params": rest, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98)),
        torch.optim.Muon(matrices, lr=settings.matrix_lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
    ]


def _save(
    file: Path, modules: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, seconds: float
) -> None:
    state = {
        "modules": modules.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "seconds": seconds,
    }
    part = file.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, file)
