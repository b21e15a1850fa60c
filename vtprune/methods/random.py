"""Control: uniformly random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal
from zlib import crc32

import torch

from vtprune.method import SITE_KINDS, Method, ModelFacts, Site, View, check_choice, resolve_layer
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Keeps k uniformly drawn tokens of each image; the baseline every method has to beat.

    The draw depends on `seed` and the picture alone, not on the batch it is in.

    Attributes:
        seed: changes the draw.
        where: "projector" (default), "encoder", or with `layer` "vit" or "decoder".
        layer: layer index or fraction of the depth for "vit" and "decoder".
    """

    key: ClassVar[str] = "random"

    seed: int = 0
    where: Literal["vit", "encoder", "projector", "decoder"] = "projector"
    layer: int | float = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("where", self.where, SITE_KINDS)

    def site(self, facts: ModelFacts) -> Site:
        return any_site(facts, self.where, self.layer)

    def decide(self, view: View) -> Selection:
        scores = []
        for index, n, image_seed in zip(view.index, view.n_original, view.image_seeds, strict=True):
            # A checksum, since a CPU generator reads only 32 bits of its seed.
            generator = torch.Generator().manual_seed(crc32(f"{self.seed} {image_seed}".encode()))
            scores.append(torch.rand(n, generator=generator).to(index.device)[index])
        return Selection.topk(torch.stack(scores), view.k)


def any_site(
    facts: ModelFacts, where: Literal["vit", "encoder", "projector", "decoder"], layer: int | float
) -> Site:
    """The site a control was asked for; "projector" means the encoder's output where there is no projector."""
    if where == "projector" and "projector" not in facts.sites:
        where = "encoder"
    if where == "vit":
        return Site("vit", resolve_layer(layer, facts.encoder_layers, "layer"))
    if where == "decoder":
        return Site("decoder", resolve_layer(layer, facts.decoder_layers, "layer"))
    return Site(where)
