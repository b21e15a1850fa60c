"""Questions with answers in a model's own prompt format, for teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prompts import Prompter
from ..shrink import Inputs
from ..world import Example


@dataclass(frozen=True)
class Lesson:
    """Prompts with their answers behind them.

    Attributes:
        inputs: of the model; padded on the left and behind the answers.
        asking: [B, L] bool, text of the prompt behind the picture.
        predicting: [B, L] bool, where the next token belongs to the answer.
    """

    inputs: Inputs
    asking: Tensor
    predicting: Tensor


def lesson(prompter: Prompter, examples: Sequence[Example]) -> Lesson:
    """A batch of some examples."""
    inputs = prompter.inputs([e.image for e in examples], [e.question for e in examples])
    tokenizer = prompter.processor.tokenizer
    answers = [tokenizer(" " + e.answer, add_special_tokens=False)["input_ids"] for e in examples]
    ids, valid = inputs["input_ids"], inputs["attention_mask"]
    rows, length = ids.shape
    most = max(map(len, answers))
    new = ids.new_full((rows, most), tokenizer.pad_token_id or 0)
    real = valid.new_zeros(rows, most)
    for i, answer in enumerate(answers):
        new[i, : len(answer)], real[i, : len(answer)] = ids.new_tensor(answer), 1
    shown = (ids == prompter.placeholder).long()
    # The last visual token is the first from which all have been seen.
    behind = (shown.cumsum(1) == shown.sum(1, keepdim=True)) & (shown == 0) & (valid > 0)
    # The last prompt token predicts the first of the answer, the answer's last one predicts its end.
    predicting = torch.cat([torch.zeros_like(behind), real.bool()], 1)
    predicting[:, length - 1] = True
    return Lesson(
        {**inputs, "input_ids": torch.cat([ids, new], 1), "attention_mask": torch.cat([valid, real], 1)}
        | {n: torch.nn.functional.pad(v, (0, most)) for n, v in inputs.items() if n == "token_type_ids"},
        torch.cat([behind, torch.zeros_like(real, dtype=torch.bool)], 1),
        predicting,
    )
