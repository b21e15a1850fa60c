"""Where visual tokens lie in their picture: the same value for every model family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """The token grid of one image or one frame of a video, in the order in which the language model sees it.

    Attributes:
        rows, cols: token grid.
        modality: "image" or "video".
        image: ordinal of the image or video within the encoder call.
        time: frame number within a video, 0 for images.
    """

    rows: int
    cols: int
    modality: str = "image"
    image: int = 0
    time: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of the full grid."""
        return self.rows * self.cols

    def coordinates(self, index: Tensor) -> Tensor:
        """Time, row and column, [3, K] int64, of the tokens with index [K] in the full grid."""
        return torch.stack([torch.full_like(index, self.time), index // self.cols, index % self.cols])
