"""Where visual tokens lie in their picture: the same value for every model family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """The token grid of one image, one tile of an image, or one frame of a video, as the language model sees it.

    It holds content only. Newline and separator tokens that a model puts between rows or tiles belong to no grid,
    are never scored and never removed.

    Attributes:
        rows, cols: token grid.
        modality: "image" or "video".
        image: ordinal of the image or video within the encoder call.
        time: frame number within a video, 0 for images.
        tile: ordinal of the tile where a model cuts an image into several; 0 is the image as a whole.
        top, left: where the grid begins in the grid of the whole picture (the composite of all its tiles).
    """

    rows: int
    cols: int
    modality: str = "image"
    image: int = 0
    time: int = 0
    tile: int = 0
    top: int = 0
    left: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of the full grid."""
        return self.rows * self.cols

    def coordinates(self, index: Tensor) -> Tensor:
        """Time, row and column in the whole picture, [3, K] int64, of the tokens with index [K] in the grid."""
        return torch.stack(
            [torch.full_like(index, self.time), index // self.cols + self.top, index % self.cols + self.left]
        )
