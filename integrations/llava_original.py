"""LLaVA of the original `llava` package (PyPI llava-torch): pictures become embeddings before the model is called."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.errors import UnsupportedCallError, UnsupportedModelError
from vtprune.integrations.base import FeatureCall, Integration, MergeCall, Merged, Packing, Unit
from vtprune.integrations.hf import assemble, clip_like_tower, decoder_of, require_submodules
from vtprune.layout import TokenLayout

IMAGE = -200  # llava.constants.IMAGE_TOKEN_INDEX
MERGE = "prepare_inputs_labels_for_multimodal"


class Pictures:
    """How one call of the package's merging method puts pictures, and the tiles they were cut into, into the prompt.

    Pictures given as a list or as one 5D tensor are merged as `mm_patch_merge_type` says: "flat" puts the tiles one
    behind the other, "spatial" lays them out as rows of the whole picture behind the small one, "spatial_unpad" cuts
    the padding off that and ends every row with a newline token.

    Args:
        model: the whole model.
        side: rows, and columns, of tokens of a tile.
    """

    def __init__(self, model: Any, side: int) -> None:
        self.model, self.side = model, side
        owner = next(c for c in type(model).__mro__ if MERGE in vars(c))
        self.source: Any = sys.modules[owner.__module__]

    def pack(self, call: FeatureCall, layouts: Sequence[TokenLayout]) -> Packing | None:
        """The packing of a call; None where every picture is one tile, which is a run of its own."""
        images, sizes = call.arguments["images"], call.arguments.get("image_sizes")
        if not isinstance(images, list) and images.ndim == 4:
            return None
        units: list[Unit] = []
        lengths: list[int] = []
        first = 0
        for image, tiles in enumerate(1 if x.ndim == 3 else len(x) for x in images):
            some, length = self._picture(image, first, tiles, None if sizes is None else sizes[image])
            units += some
            lengths.append(length)
            first += tiles
        return Packing(units, lengths)

    def _picture(self, image: int, first: int, tiles: int, size: Any) -> tuple[list[Unit], int]:
        """Units of a picture whose first tile has the number `first`, and its placeholders."""
        config, side = self.model.config, self.side
        n, everything = side**2, torch.arange(side**2)
        merge = getattr(config, "mm_patch_merge_type", "flat")
        newline = "unpad" in merge
        whole = Unit(TokenLayout(side, side, image=image), first, image, everything, everything)
        if tiles == 1:
            return [whole], n + newline
        if merge == "flat":
            units = [
                Unit(
                    TokenLayout(side, side, image=image, tile=t),
                    first + t,
                    image,
                    everything + t * n,
                    everything,
                )
                for t in range(tiles)
            ]
            return units, tiles * n
        # The package means (columns, rows).
        wide, high = self.source.get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, self.model.get_vision_tower().config.image_size
        )
        rows, cols = torch.meshgrid(torch.arange(high * side), torch.arange(wide * side), indexing="ij")
        cells = torch.stack([rows, cols])
        if newline:
            cells = self.source.unpad_image(cells, size)
        width = cells.shape[2] + newline
        tile = cells[0] // side * wide + cells[1] // side
        units = [whole]
        for number in tile.unique().tolist():  # a tile of padding alone is encoded, but not shown
            row, col = (tile == number).nonzero().unbind(1)
            layout = TokenLayout(
                rows=int(row[-1] - row[0]) + 1,
                cols=int(col.max() - col.min()) + 1,
                image=image,
                tile=number + 1,
                top=int(row[0]),
                left=int(col.min()),
            )
            shown = cells[:, row, col] % side
            units.append(
                Unit(layout, first + 1 + number, image, n + row * width + col, shown[0] * side + shown[1])
            )
        return units, n + cells.shape[1] * width

    def merged(self, arguments: Mapping[str, Any], result: Any) -> Merged | None:
        """What a call of the merging method merged; None without pictures.

        Raises:
            UnsupportedCallError: the pictures of a row were cut off by `tokenizer_model_max_length`.
        """
        embeds: Tensor | None = result[4]
        if embeds is None:
            return None
        images, given, mask = arguments["images"], arguments["input_ids"], arguments.get("attention_mask")
        packing = self.pack(FeatureCall("image", arguments), [])
        sizes = [self.side**2] * len(images) if packing is None else list(packing.sizes)
        rows: list[Tensor] = []
        used: list[int] = []
        number = 0
        for row, ids in enumerate(given):
            ids = ids if mask is None else ids[mask[row].bool()]
            here = ids == IMAGE
            n = int(here.sum())
            shown = range(number, number + n)
            used += shown
            number += max(n, 1)  # a row without pictures takes one from the list all the same
            times = torch.ones_like(ids)
            times[here] = torch.tensor([sizes[i] for i in shown], dtype=ids.dtype, device=ids.device)
            rows.append(ids.repeat_interleave(times))
        length = embeds.shape[1]
        left = getattr(self.model.config, "tokenizer_padding_side", "right") == "left"
        whole = torch.zeros(len(rows), length, dtype=given.dtype, device=given.device)
        valid = torch.zeros_like(whole)
        for row, ids in enumerate(rows):
            if bool((ids[length:] == IMAGE).any()):
                raise UnsupportedCallError(
                    f"row {row} has {len(ids)} tokens, of which tokenizer_model_max_length={length} cuts off some of a "
                    "picture; give fewer or smaller pictures, or raise the limit"
                )
            ids = ids[:length]
            where = slice(length - len(ids), length) if left else slice(0, len(ids))
            whole[row, where] = ids
            valid[row, where] = 1
        key = images[0] if isinstance(images, list) else images
        return Merged(whole, None if mask is None else valid, used, key) if used else None


def integrate(model: Any) -> Integration:
    """Describes a `LlavaLlamaForCausalLM` or `LlavaMistralForCausalLM` of llava 1.2.2 with its tower loaded.

    Raises:
        UnsupportedModelError: the tower is not loaded or not CLIP, its [CLS] is kept among the features, or the
            package is a fork with another merging method.
    """
    name = type(model).__name__
    stem = model.get_model()
    require_submodules(stem, ("layers", "mm_projector"), "llava (original)")
    if not isinstance(getattr(model.get_vision_tower(), "vision_tower", None), nn.Module):
        raise UnsupportedModelError(
            f"the vision tower of this {name} is not loaded; call model.get_vision_tower().load_model() first."
        )
    if "modalities" in inspect.signature(getattr(model, MERGE)).parameters:
        raise UnsupportedModelError(
            f"this {name} is of the LLaVA-NeXT fork of the package; load its weights with transformers instead."
        )
    wrapper = model.get_vision_tower()
    if wrapper.select_feature != "patch":
        raise UnsupportedModelError(
            f"mm_vision_select_feature={wrapper.select_feature!r} makes [CLS] a visual token; set it to 'patch'."
        )
    config = wrapper.vision_tower.config
    pictures = Pictures(model, config.image_size // config.patch_size)
    tower = clip_like_tower(
        wrapper.vision_tower, stem.mm_projector, [wrapper.select_layer], pack=pictures.pack
    )
    integration = assemble(
        model, model, [tower], decoder_of(stem, name), image_token=IMAGE, calls={"image": MERGE}
    )
    integration.merge_call = MergeCall(model, MERGE, pictures.merged)
    return integration
