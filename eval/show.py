"""One picture, one question: what a method keeps, and what the model answers with and without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from vtprune.errors import VTPruneError

from .accuracy import NEW_TOKENS
from .overlay import comparison
from .prompts import EvaluationError, Prompter, generate
from .settings import Setting


def open_picture(path: Path) -> Image.Image:
    """A picture from a file.

    Raises:
        EvaluationError: there is no such file, or it is no picture.
    """
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise EvaluationError(f"there is no file {str(path)!r}; give the path of a picture.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise EvaluationError(
            f"{str(path)!r} cannot be read as a picture ({type(error).__name__}); give a PNG, JPEG, ..."
        ) from error


@torch.no_grad()
def show(
    model: nn.Module, processor: Any, image: Image.Image, question: str, setting: Setting
) -> tuple[Image.Image, str]:
    """Draws what a setting keeps of a picture.

    Args:
        model: an unpatched model.
        processor: its processor.
        image: any picture.
        question: any question.
        setting: a method with its budget.

    Returns:
        The drawing, and a text with both answers and the engagement report.

    Raises:
        VTPruneError: the setting is a control that prunes nothing, or cannot run on this model.
    """
    prompter = Prompter(model, processor)
    inputs = prompter.inputs([image], [question])
    with setting.applied(model) as patch:
        if patch is None:
            raise VTPruneError(
                f"{setting.method!r} prunes nothing, so there is nothing to show; give a method."
            )
        pruned = prompter.texts(inputs, generate(model, inputs, 4 * NEW_TOKENS))[0]
        report = patch.report()
    dense = prompter.texts(inputs, generate(model, inputs, 4 * NEW_TOKENS))[0]
    rows, cols, kept = report.grid()
    drawing = comparison(
        prompter.seen(inputs, image),
        rows,
        cols,
        kept,
        question,
        dense,
        pruned,
        setting.label,
    )
    return drawing, f"dense:  {dense}\npruned: {pruned}\n\n{report}"
