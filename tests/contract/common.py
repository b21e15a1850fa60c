"""What all contract tests share: families, methods, models, prompts, and how a report becomes the judge's input."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from judge import Judge
from torch import Tensor

import vtprune
from vtprune import methods
from vtprune.testing.matrix import cells
from vtprune.testing.zoo import LVLMS, Image, Video

TOLERANCE = 1e-4
FAMILIES = tuple(LVLMS)
METHODS = tuple(sorted(methods.REGISTRY))
# The cells of the support matrix; every test that is parametrised by them counts for its cell.
CELLS = [pytest.param(f, m, id=f"{f}-{m}") for f in FAMILIES for m in METHODS]
# One method for every kind of site and signal, for tests that are too slow for all of them.
KEY_METHODS = ("divprune", "fastv", "vtc-cls")
KEY_CELLS = [pytest.param(f, m, id=f"{f}-{m}") for f in FAMILIES for m in KEY_METHODS]

Prompt = list[Any]


@functools.cache
def subject(family: str, attention: str = "sdpa") -> Any:
    """The model that is patched; shared by tests that leave it as they found it."""
    return LVLMS[family].build(attention=attention)


@functools.cache
def judge_of(family: str) -> Judge:
    """The reference on a twin that is never patched."""
    return Judge(LVLMS[family].build())


def rows_of(family: str) -> dict[str, Prompt]:
    """Prompts by name: one picture, two pictures of other shapes, text only, and a video where the family has it."""
    rows: dict[str, Prompt] = {
        "one": [20, 21, Image(1), 22, 23, 24],
        "two": [20, Image(2, 1), 21, Image(3, 2), 22, 23, 24, 25],
        "text": [20, 21, 22, 23],
    }
    if LVLMS[family].has_video:
        rows["video"] = [20, 26, Video(4, 2), 27, 28]
    return rows


def batch_of(family: str, *names: str, padding: str = "left") -> dict[str, Tensor]:
    """Inputs of some rows; all of them when none is named."""
    rows = rows_of(family)
    return LVLMS[family].batch([rows[n] for n in names or rows], padding=padding)


def options_of(family: str, method: str, keep: int | float = 0.5, **more: Any) -> dict[str, Any]:
    """Options of a method on a family: the declared substitute where there is one.

    Skips the test, with the declared reason, where the pair is declared unsupported.
    """
    cell = cells(family)[method]
    if not cell.works:
        pytest.skip(f"declared: {cell.reason}")
    if cell.training:
        pytest.skip("declared: acts in training only; tests/contract/test_bypass.py proves it")
    return {"keep": keep, **cell.options, **more}


@contextmanager
def patched(family: str, method: str, keep: int | float = 0.5, **more: Any) -> Iterator[vtprune.Patch]:
    """A patch of the shared model for the length of a block."""
    options = options_of(family, method, keep, **more)
    with vtprune.patch(subject(family), method, **options) as patch:
        yield patch


def greedy(model: Any, inputs: dict[str, Tensor], steps: int = 8, **options: Any) -> Tensor:
    """Newly generated tokens [B, steps]."""
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=steps, do_sample=False, **options)
    new: Tensor = out[:, inputs["input_ids"].shape[1] :]
    return new
