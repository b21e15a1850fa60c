"""Frames and texts as unit vectors in one space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vtprune.errors import InvalidOptionError, UnsupportedModelError

Array = npt.NDArray[Any]


class Embedder(ABC):
    """Turns frames and texts into unit vectors whose dot product says how well they fit."""

    @abstractmethod
    def frames(self, frames: Array) -> Array:
        """[N, h, w, 3] uint8 RGB -> [N, D] float, each of length 1."""

    @abstractmethod
    def text(self, texts: Sequence[str]) -> Array:
        """T texts -> [T, D] float, each of length 1."""


class CLIPEmbedder(Embedder):
    """A `CLIPModel` checkpoint of transformers with its processor; loaded when it is first asked.

    Frames go through the checkpoint's own processor. Where that does not resize (the reference CLIP), frames are
    first resized to the model's square picture, their aspect ratio not kept.

    Attributes:
        folder: folder of the checkpoint; the reference CLIP that comes with the package if not given.
        device: where the model runs, as torch names it.
        batch_size: frames or texts per forward pass.
    """

    def __init__(self, folder: str | Path | None = None, device: str = "cpu", batch_size: int = 32) -> None:
        """
        Raises:
            InvalidOptionError: there is no such folder, or `batch_size` is below 1.
        """
        if folder is None:
            from vtprune.eval.world import reference_dir

            folder = reference_dir("clip")
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise InvalidOptionError(
                f"folder={str(folder)!r} holds no config.json; give the folder of a CLIPModel checkpoint."
            )
        if batch_size < 1:
            raise InvalidOptionError(f"batch_size={batch_size}: give an int >= 1.")
        self.device = device
        self.batch_size = batch_size

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoConfig, AutoProcessor, CLIPModel

        kind = AutoConfig.from_pretrained(self.folder).model_type
        if kind != "clip":
            raise UnsupportedModelError(
                f"{str(self.folder)!r} holds a {kind!r} checkpoint; give one of a CLIPModel ('clip')."
            )
        model: Any = CLIPModel.from_pretrained(self.folder)
        return model.to(self.device).eval(), AutoProcessor.from_pretrained(self.folder)

    def frames(self, frames: Array) -> Array:
        """[N, h, w, 3] uint8 RGB -> [N, D] float32, each of length 1."""
        import torch
        from PIL import Image

        model, processor = self._loaded
        side = model.config.vision_config.image_size
        rows = []
        for start in range(0, len(frames), self.batch_size):
            images = [Image.fromarray(frame) for frame in frames[start : start + self.batch_size]]
            if not processor.image_processor.do_resize:
                images = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
            pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                seen = model.vision_model(pixel_values=pixels.to(self.device, model.dtype)).pooler_output
                rows.append(_unit(model.visual_projection(seen)))
        return np.concatenate(rows) if rows else np.zeros((0, model.config.projection_dim), np.float32)

    def text(self, texts: Sequence[str]) -> Array:
        """T texts -> [T, D] float32, each of length 1; what does not fit into the text tower is cut off."""
        import torch

        model, processor = self._loaded
        length = model.config.text_config.max_position_embeddings
        rows = []
        for start in range(0, len(texts), self.batch_size):
            inputs = processor.tokenizer(
                list(texts[start : start + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                read = model.text_model(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
                ).pooler_output
                rows.append(_unit(model.text_projection(read)))
        return np.concatenate(rows) if rows else np.zeros((0, model.config.projection_dim), np.float32)


def _unit(x: Any) -> Array:
    from torch.nn.functional import normalize

    vectors: Array = normalize(x.float(), dim=-1).cpu().numpy()
    return vectors
