"""What the tests of everyday use share: the model that is shipped, its processor, and a few questions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtprune.eval.world import Example, examples, reference_dir

TOKENS = 144  # of a picture
KEEP = 16


def load(**options: Any) -> Any:
    """The shipped LLaVA, in evaluation mode."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(reference_dir("llava"), **options).eval()


@functools.cache
def processor() -> Any:
    """Its processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(reference_dir("llava"))


@functools.cache
def questions() -> tuple[Example, ...]:
    """One question of every kind."""
    return tuple(examples("test", 1))


def chat(question: Example) -> list[dict[str, Any]]:
    """A question as a conversation."""
    content = [{"type": "image", "image": question.image}, {"type": "text", "text": question.question}]
    return [{"role": "user", "content": content}]


def prompt(question: Example) -> str:
    """A question as text."""
    return f"USER: <image>\n{question.question} ASSISTANT:"


def inputs_of(some: Sequence[Example], **options: Any) -> dict[str, Tensor]:
    """Model inputs of some questions, padded on the left."""
    found = processor()(
        images=[q.image for q in some],
        text=[prompt(q) for q in some],
        padding=True,
        return_tensors="pt",
        **options,
    )
    return dict(found)


def answers(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> list[str]:
    """What the model says, as text."""
    out = model.generate(**inputs, do_sample=False, **{"max_new_tokens": 8, **options})
    texts = processor().batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def hooks(model: torch.nn.Module) -> int:
    """Forward hooks on all its modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def kept(report: Any) -> list[list[int]]:
    """Indices that the last stage kept of every picture."""
    return [list(image.kept.values())[-1].tolist() for image in report.images]


def cut(model: Any, inputs: Mapping[str, Tensor], row: int, stay: Sequence[int], layer: int = 0) -> Tensor:
    """Logits of one row at the columns that are left, its other visual tokens cut out by hand in front of a decoder layer.

    The model is not patched; its own layers run in a plain loop.

    Args:
        stay: tokens of the row's picture that stay.

    Returns:
        [columns left, V].
    """
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    base, stem = model.model, model.model.language_model
    features = base.get_image_features(inputs["pixel_values"][row : row + 1]).pooler_output
    features = features if isinstance(features, Tensor) else torch.cat(list(features))
    hidden = stem.embed_tokens(ids)
    visual = ids == model.config.image_token_id
    hidden = hidden.masked_scatter(visual[:, None], features.to(hidden.dtype))
    at = visual.nonzero()[:, 0]
    left = ~visual
    left[at[list(stay)]] = True
    hidden, positions = hidden[None], torch.arange(len(ids))[None]
    for i, block in enumerate(stem.layers):
        if i == layer:
            hidden, positions = hidden[:, left], positions[:, left]
        tables = stem.rotary_emb(hidden, positions)
        hidden = block(
            hidden, attention_mask=None, position_embeddings=tables, position_ids=positions, use_cache=False
        )
    logits: Tensor = model.lm_head(stem.norm(hidden))[0]
    return logits
