"""How likely a model finds a continuation of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..prompts import EvaluationError
from ..shrink import Inputs


@torch.no_grad()
def continuation_losses(
    model: nn.Module, tokenizer: Any, inputs: Inputs, prompts: Sequence[str], ends: Sequence[str]
) -> list[tuple[float, bool]]:
    """Loss of every row's continuation, and whether greedy decoding would give it.

    The prompt is prefilled alone and the continuation follows on its cache, so that a method that asks the prompt's last
    token decides as it does in generation, and never sees the answer.

    Args:
        model: patched or not.
        tokenizer: its tokenizer.
        inputs: prompts, [B, L], padded on the left.
        prompts: their texts, before placeholders are multiplied.
        ends: their continuations.

    Returns:
        Per row the mean negative log-likelihood of the continuation's tokens in nats, and whether each of them is the
        most likely one.

    Raises:
        EvaluationError: a continuation has no tokens.
    """
    targets = [_tokens(tokenizer, prompt, end) for prompt, end in zip(prompts, ends, strict=True)]
    called: Any = model
    first = called(**inputs, use_cache=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    width = max(map(len, targets))
    following = torch.zeros(len(ids), width, dtype=ids.dtype, device=ids.device)
    for row, target in enumerate(targets):
        following[row, : len(target)] = torch.tensor(target, device=ids.device)
    logits = first.logits[:, -1:].float()
    if width > 1:
        # What stands behind a shorter continuation is never looked at: attention is causal.
        rest = called(
            input_ids=following[:, :-1],
            attention_mask=torch.cat([mask, mask.new_ones(len(ids), width - 1)], 1),
            past_key_values=first.past_key_values,
            use_cache=True,
        )
        logits = torch.cat([logits, rest.logits.float()], 1)
    out = []
    for row, target in enumerate(targets):
        scores = logits[row, : len(target)]
        wanted = following[row, : len(target)]
        loss = torch.nn.functional.cross_entropy(scores, wanted)
        out.append((float(loss), bool((scores.argmax(-1) == wanted).all())))
    return out


def _tokens(tokenizer: Any, prompt: str, end: str) -> list[int]:
    """Tokens of a continuation where it stands; on its own where its beginning merges with the prompt's end."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + end, add_special_tokens=False)["input_ids"]
    tokens: list[int] = whole[len(before) :]
    if whole[: len(before)] != before:
        tokens = tokenizer(end, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise EvaluationError(f"a task asks for the likelihood of {end!r}, which has no tokens.")
    return tokens
