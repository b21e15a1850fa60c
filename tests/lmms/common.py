"""What the tests of lmms-eval share: the shipped model, conversations, losses, rows of results."""

import importlib.util
import json

import pytest

from vtprune.eval import world
from vtprune.eval.lmms import conversations, likelihood

LIMIT = 5
REFERENCE = str(world.reference_dir("llava"))
needs_lmms = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed; .ci/lmms tests with it"
)


def conversation_of(images, text):
    content = [{"type": "image", "url": image} for image in images]
    return conversations.conversation(
        [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    )


def losses_of(reference, talks, ends):
    model, processor = reference
    prompter = conversations.ChatPrompter(model, processor)
    texts = [prompter.text(talk) for talk in talks]
    return likelihood.continuation_losses(model, processor.tokenizer, prompter.rows(talks), texts, ends)


def row_of(method, keep, task, metric, value, **other):
    return {
        "model": "llava-hf/llava-1.5-7b-hf",
        "method": method,
        "keep": keep,
        "task": task,
        "metric": metric,
        "accuracy": value,
        "mean_tokens_llm": 64.0,
        "mean_layer_average": 64.0,
        "n": 10,
        "limit": None,
        **other,
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
