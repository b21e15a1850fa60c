"""From pictures and questions to model inputs, and from model outputs to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vtprune.errors import VTPruneError

from .shrink import Inputs

GREY = (128, 128, 128)


class EvaluationError(VTPruneError):
    """The evaluation cannot be done as asked for."""


def load_model(path: str, device: str, dtype: str) -> tuple[nn.Module, Any]:
    """A model in evaluation mode and its processor.

    Args:
        path: a folder or a hub id.
        device: e.g. "cpu" or "cuda".
        dtype: "auto" (float32 on CPU, the checkpoint's own elsewhere), or a torch dtype by name.

    Raises:
        EvaluationError: it cannot be loaded; says why.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EvaluationError(
            f"device {device!r} was asked for, but torch sees no CUDA device; use --device cpu."
        )
    kind = "float32" if dtype == "auto" and device == "cpu" else dtype
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=kind if kind == "auto" else getattr(torch, kind)
        )
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise EvaluationError(
            f"cannot load {path!r}: {reason} Give a folder with a checkpoint and its processor, or a hub id."
        ) from error
    return model.to(device).eval(), processor


class Prompter:
    """Builds inputs in a model's own prompt format.

    Args:
        model: an image-text-to-text model of transformers.
        processor: its processor, with a chat template.

    Raises:
        EvaluationError: the processor has no chat template.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.processor = processor
        if getattr(processor, "chat_template", None) is None:
            raise EvaluationError(
                f"the {type(processor).__name__} has no chat template, so prompts cannot be built; set "
                "`processor.chat_template` or use a checkpoint that has one."
            )
        processor.tokenizer.padding_side = "left"
        config: Any = model.config
        self.placeholder: int = config.image_token_id
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        image_processor = processor.image_processor
        self._fixed: int | None = None
        if getattr(image_processor, "do_resize", True) is False:
            self._fixed = config.vision_config.image_size

    def fit(self, image: Image.Image) -> Image.Image:
        """RGB; cropped to the middle square and resized where the processor itself does not resize."""
        image = image.convert("RGB")
        side = self._fixed
        if side is None or image.size == (side, side):
            return image
        shorter = min(image.size)
        left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
        box = (left, top, left + shorter, top + shorter)
        return image.resize((side, side), Image.Resampling.BICUBIC, box=box)

    def inputs(self, images: Sequence[Image.Image], questions: Sequence[str], blank: bool = False) -> Inputs:
        """One row per question with one picture each, padded on the left, on the model's device.

        Args:
            images: pictures of any size.
            questions: one per picture.
            blank: replaces every picture by a mid-grey one of its size.
        """
        pictures = [self.fit(image) for image in images]
        if blank:
            pictures = [Image.new("RGB", picture.size, GREY) for picture in pictures]
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            for question in questions
        ]
        batch = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }

    def tokens(self, inputs: Inputs) -> list[int]:
        """Visual tokens of every row."""
        counts: list[int] = (inputs["input_ids"] == self.placeholder).sum(1).tolist()
        return counts

    def texts(self, inputs: Inputs, output: Tensor) -> list[str]:
        """What was generated behind the prompts, [B, L + new] token ids to one text per row."""
        new = output[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def seen(self, inputs: Inputs, image: Image.Image) -> Image.Image:
        """The part of a picture that the model sees, from inputs with that one picture.

        Where pixels come as [1, 3, H, W] they are turned back into a picture, so that crops of the processor show;
        packed patches (Qwen2.5-VL) always hold the whole picture.
        """
        pixels = inputs["pixel_values"]
        if pixels.ndim != 4:
            return self.fit(image)
        settings = self.processor.image_processor
        mean, std = (
            torch.tensor(value if value is not None else default).view(3, 1, 1)
            for value, default in ((settings.image_mean, [0.0] * 3), (settings.image_std, [1.0] * 3))
        )
        values = (pixels[0].float().cpu() * std + mean).clamp(0, 1) * 255
        return Image.fromarray(values.round().byte().permute(1, 2, 0).numpy(), "RGB")


def generate(model: nn.Module, inputs: Inputs, new_tokens: int, forced: bool = False) -> Tensor:
    """Greedy generation, [B, L + new] token ids.

    Args:
        model: patched or not.
        inputs: as from :class:`Prompter`.
        new_tokens: the most tokens to generate.
        forced: generate exactly that many.
    """
    plain: Any = model
    extra = {"min_new_tokens": new_tokens} if forced else {}
    output: Tensor = plain.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=new_tokens,
        **extra,
    )
    return output
