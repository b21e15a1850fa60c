"""Dense accuracy of a trained checkpoint on the picture world, with its no-image floor.

``python -m vtprune.eval.world.evaluate --model DIR --splits test unseen_style``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from . import Example, examples, reference_dir, score
from .questions import KINDS


@torch.inference_mode()
def answer(model: Any, processor: Any, batch: list[Example]) -> list[str]:
    """Greedy answers of a LLaVA, with its processor, to a batch of examples."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]}],
            add_generation_prompt=True,
        )
        for example in batch
    ]
    inputs = processor(text=prompts, images=[e.image for e in batch], padding=True, return_tensors="pt")
    output = model.generate(**inputs)
    texts: list[str] = processor.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return texts


def accuracies(model: Any, processor: Any, items: list[Example], batch_size: int = 60) -> dict[str, float]:
    """Accuracy in percent for every kind, and "overall".

    Args:
        model: a LLaVA.
        processor: its processor.
        items: the questions.
        batch_size: questions per call of ``generate``.
    """
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        for example, text in zip(batch, answer(model, processor, batch), strict=True):
            right[example.kind].append(score(text, example.answer))
    table = {kind: 100 * sum(values) / len(values) for kind, values in right.items() if values}
    table["overall"] = 100 * sum(map(sum, right.values())) / len(items)
    return {kind: round(value, 1) for kind, value in table.items()}


def blank(example: Example) -> Example:
    """The same question with a mid-grey picture."""
    grey = Image.new("RGB", example.image.size, (128, 128, 128))
    return Example(
        grey, example.question, example.answer, example.kind, example.scene_seed, example.split, example.boxes
    )


def main() -> None:
    """Command line entry point: one JSON line per split, and one for the floor of each split."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: the shipped one")
    parser.add_argument("--splits", nargs="+", default=["val", "test", "unseen_style", "unseen_combination"])
    parser.add_argument("--per-kind", type=int, default=300)
    arguments = parser.parse_args()
    folder = arguments.model or reference_dir("llava")
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder)
    model.eval()
    processor = AutoProcessor.from_pretrained(folder)
    for split in arguments.splits:
        items = examples(split, arguments.per_kind)
        print(json.dumps({"split": split} | accuracies(model, processor, items)), flush=True)
        floor = accuracies(model, processor, [blank(example) for example in items])
        print(json.dumps({"split": f"{split}, no image"} | floor), flush=True)


if __name__ == "__main__":
    main()
