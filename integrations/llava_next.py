"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision of transformers: pictures cut into tiles, newline tokens."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.integrations.base import FeatureCall, Integration, Packing, Unit
from vtprune.integrations.hf import assemble, base_of, decoder_of, llava_tower
from vtprune.layout import TokenLayout

PATHS = ("vision_tower", "multi_modal_projector", "language_model.layers")
CALLS = {"image": "get_image_features", "video": "get_video_features"}


class TilePacking:
    """Learns from a model's own `pack_image_features` what each placeholder shows.

    Args:
        base: the model that owns `pack_image_features`.
        resamples: whether it may resize the composite of the tiles, so that a placeholder shows no single token.
        options: call -> further keyword arguments of `pack_image_features`.
    """

    def __init__(
        self,
        base: nn.Module,
        resamples: bool,
        options: Callable[[FeatureCall], Mapping[str, Any]],
    ) -> None:
        self.base: Any = base
        self.resamples, self.options = resamples, options
        self.source: Any = sys.modules[type(base).__module__]

    def __call__(self, call: FeatureCall, layouts: Sequence[TokenLayout]) -> Packing:
        sizes = call.arguments["image_sizes"]
        config = self.base.config
        counts = [
            self.source.image_size_to_num_patches(
                image_size=size,
                grid_pinpoints=config.image_grid_pinpoints,
                patch_size=config.vision_config.image_size,
            )
            for size in sizes
        ]
        together = call.arguments.get("batch_num_images")
        if together is not None:  # only pictures that are alone in their row are cut
            alone = [int(n) == 1 for n in together for _ in range(int(n))]
            counts = [count if cut else 1 for count, cut in zip(counts, alone, strict=True)]
        options = dict(self.options(call))

        def pack(values: Tensor, newline: Tensor | None = None) -> Sequence[Tensor]:
            newline = values.new_zeros(values.shape[-1]) if newline is None else newline
            runs, _ = self.base.pack_image_features(
                values.split(counts), sizes, image_newline=newline, **options
            )
            packed: list[Tensor] = list(runs)
            return packed

        side, n = layouts[0].cols, layouts[0].n_tokens
        units: list[Unit] = []
        lengths: list[int] = []
        token = torch.arange(n, dtype=torch.float64)
        probe = torch.stack([token // side, token % side, token * 0], -1)  # row, column, newline
        shapes = [
            (1, 1)
            if count == 1
            else self.source.get_anyres_image_grid_shape(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            for size, count in zip(sizes, counts, strict=True)
        ]
        planes = [probe]
        for (high, wide), count in zip(shapes, counts, strict=True):
            if count > 1:
                for tile in range(high * wide):
                    planes.append(probe + torch.tensor([tile // wide * side, tile % wide * side, 0]))
            planes.append(probe)
        packed = pack(torch.stack(planes[:-1]), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
        first = 0
        for image, (run, (_, wide), count) in enumerate(zip(packed, shapes, counts, strict=True)):
            everything = torch.arange(n)
            base = TokenLayout(layouts[0].rows, side, image=image)
            source = None if self.resamples else everything
            units.append(Unit(base, first, image, everything, source, everything))
            if count > 1:
                units += self._tiles(run[n:], image, first + 1, wide, side, n)
            first += count
            lengths.append(len(run))
        return Packing(units, lengths, pack)

    def _tiles(self, cells: Tensor, image: int, first: int, wide: int, side: int, n: int) -> list[Unit]:
        """Units of the tiles of one image, from the probed composite [rows (cols + 1), 3]."""
        width = int(cells[:, 2].argmax()) + 1
        grid = cells.view(-1, width, 3)[:, :-1, :2]  # without the newline that ends each row
        tile = ((grid[..., 0] + 0.5) // side * wide + (grid[..., 1] + 0.5) // side).long()
        units = []
        for number in tile.unique().tolist():
            rows, cols = (tile == number).nonzero().unbind(1)
            layout = TokenLayout(
                rows=int(rows.max() - rows.min()) + 1,
                cols=int(cols.max() - cols.min()) + 1,
                image=image,
                tile=number + 1,
                top=int(rows.min()),
                left=int(cols.min()),
            )
            place = grid[rows, cols].round().long() % side
            nearest = place[:, 0] * side + place[:, 1]
            source = None if self.resamples else nearest
            units.append(Unit(layout, first + number, image, n + rows * width + cols, source, nearest))
        return units


def llava_next(model: Any) -> Integration:
    """Describes a `LlavaNextForConditionalGeneration` or `LlavaNextModel`.

    Raises:
        UnsupportedModelError: the vision tower is neither CLIP nor SigLIP, or the layout is unknown.
    """
    base = base_of(model, PATHS, "llava_next")
    strategy = {"vision_feature_select_strategy": model.config.vision_feature_select_strategy}
    packing = TilePacking(base, resamples=False, options=lambda call: strategy)
    tower = llava_tower(model, base, "vision_tower", "multi_modal_projector", pack=packing)
    decoder = decoder_of(base.get_submodule("language_model"), type(model).__name__)
    return assemble(model, base, [tower], decoder, calls={"image": CALLS["image"]})


def llava_next_video(model: Any) -> Integration:
    """Describes a `LlavaNextVideoForConditionalGeneration` or `LlavaNextVideoModel`.

    Frames are pooled between encoder and projector, so patches cannot be removed inside the encoder.

    Raises:
        UnsupportedModelError: the vision tower is neither CLIP nor SigLIP, or the layout is unknown.
    """
    base = base_of(model, PATHS, "llava_next_video")
    config = model.config
    strategy = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    images = TilePacking(base, resamples=False, options=lambda call: strategy)

    def tokens(grid: tuple[int, int], call: FeatureCall | None) -> tuple[int, int]:
        factor = config.spatial_pool_stride if call is not None and call.modality == "video" else 1
        return grid[0] // factor, grid[1] // factor

    tower = llava_tower(
        model,
        base,
        "vision_tower",
        "multi_modal_projector",
        tokens=tokens,
        pack=lambda call, layouts: images(call, layouts) if call.modality == "image" else None,
    )
    decoder = decoder_of(base.get_submodule("language_model"), type(model).__name__)
    sites = ("encoder", "projector", "decoder")
    return assemble(model, base, [tower], decoder, sites=sites, video=True, calls=CALLS)


def llava_onevision(model: Any) -> Integration:
    """Describes a `LlavaOnevisionForConditionalGeneration` or `LlavaOnevisionModel`.

    Frames, and pictures of many tiles, are resized behind the projector, so tokens can be removed behind that only.

    Raises:
        UnsupportedModelError: the vision tower is neither CLIP nor SigLIP, or the layout is unknown.
    """
    base = base_of(model, PATHS, "llava_onevision")

    def options(call: FeatureCall) -> dict[str, Any]:
        ratio = call.arguments.get("vision_aspect_ratio")
        return {"vision_aspect_ratio": ratio or model.config.vision_aspect_ratio}

    images = TilePacking(base, resamples=True, options=options)

    def tokens(grid: tuple[int, int], call: FeatureCall | None) -> tuple[int, int]:
        if call is None or call.modality == "image":
            return grid
        return math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)

    def pack(call: FeatureCall, layouts: Sequence[TokenLayout]) -> Packing:
        if call.modality == "image":
            return images(call, layouts)
        n = layouts[0].n_tokens
        everything = torch.arange(n)
        units = [
            Unit(layout, i, layout.image, everything + layout.time * n, everything)
            for i, layout in enumerate(layouts)
        ]
        frames = layouts[-1].time + 1
        return Packing(units, [frames * n + 1] * (len(layouts) // frames))  # one newline ends a video

    tower = llava_tower(model, base, "vision_tower", "multi_modal_projector", tokens=tokens, pack=pack)
    decoder = decoder_of(base.get_submodule("language_model"), type(model).__name__)
    missing = {
        "patch_pixels": f"{type(model).__name__} resizes features, so that its tokens show no pixels of their own"
    }
    return assemble(
        model,
        base,
        [tower],
        decoder,
        sites=("projector", "decoder"),
        video=True,
        calls=CALLS,
        missing=missing,
    )
