"""Real vLLM engines, and the same models in transformers under `vtprune.patch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import vtprune
from vtprune.method import Method

OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 32,
    "block_size": 32,
    "limit_mm_per_prompt": {"image": 2},
}


class Engine:
    """A vLLM engine in this process.

    Args:
        folder: checkpoint.
        settings: value of the key `vtprune`; None for stock vLLM.
        **options: further arguments of `vllm.LLM`.
    """

    def __init__(self, folder: Path, settings: object = None, **options: Any) -> None:
        from vllm import LLM

        overrides = {} if settings is None else {"vtprune": settings}
        self.llm = LLM(str(folder), hf_overrides=overrides, **{**OPTIONS, **options})

    def generate(
        self, prompts: Sequence[tuple[str, Sequence[Image.Image]]], tokens: int = 8, **request: Any
    ) -> list[Any]:
        """Greedy outputs of vLLM."""
        from vllm import SamplingParams

        asked = [
            {"prompt": text, "multi_modal_data": {"image": list(images)}, **request}
            for text, images in prompts
        ]
        greedy = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False)
        return list(self.llm.generate(asked, greedy, use_tqdm=False))

    def answers(
        self, prompts: Sequence[tuple[str, Sequence[Image.Image]]], tokens: int = 8
    ) -> list[list[int]]:
        """Greedy answers as token ids."""
        return [list(out.outputs[0].token_ids) for out in self.generate(prompts, tokens)]

    def on_model(self, function: Callable[[Any], Any]) -> Any:
        """Calls a function with the engine's model."""
        return self.llm.apply_model(function)[0]

    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache has answered so far."""
        return int(sum(m.value for m in self.llm.get_metrics() if m.name == "vllm:prefix_cache_hits"))


class Reference:
    """A model in transformers.

    Args:
        folder: checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder)

    def inputs(self, text: str, images: Sequence[Image.Image]) -> Any:
        """What the processor makes of a prompt."""
        return self.processor(text=[text], images=list(images), return_tensors="pt")

    def answer(
        self, text: str, images: Sequence[Image.Image], method: Method | None, tokens: int = 8
    ) -> list[int]:
        """Greedy answer as token ids, pruned without gaps in the positions, as vLLM counts."""
        inputs = self.inputs(text, images)
        patch = None if method is None else vtprune.patch(self.model, method)
        try:
            out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        finally:
            if patch is not None:
                patch.remove()
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def pictures(
        self, text: str, images: Sequence[Image.Image], method: Method
    ) -> tuple[Tensor, list[list[int]]]:
        """What enters the language model of one prompt's pictures, and the kept indices of every encoder image.

        Returns:
            [k, D] rows of all placeholders, and ascending indices.
        """
        inputs = self.inputs(text, images)
        seen: list[Tensor] = []
        layer = self.model.model.language_model.layers[0]

        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args[0] if args else kwargs["hidden_states"]).detach())

        with torch.no_grad(), vtprune.patch(self.model, method) as patch:
            hook = layer.register_forward_pre_hook(look, with_kwargs=True)
            try:
                self.model(**inputs)
            finally:
                hook.remove()
            kept = [list(image.kept.values())[-1].tolist() for image in patch.report().images]
        ids = inputs["input_ids"][0]
        first = int((ids == self.model.config.image_token_id).nonzero()[0])
        removed = len(ids) - seen[0].shape[1]
        total = int((ids == self.model.config.image_token_id).sum()) - removed
        return seen[0][0, first : first + total], kept
