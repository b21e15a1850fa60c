"""What the controls share: they can act at any site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vtprune.method import SITE_KINDS, Method, ModelFacts, Site, check_choice, resolve_layer


@dataclass(frozen=True, kw_only=True)
class Anywhere(Method):
    """Base of methods whose site is an option.

    Attributes:
        where: "projector" (default; the encoder's output where there is no projector), "encoder", or with `layer`
            "vit" or "decoder".
        layer: layer index or fraction of the depth for "vit" and "decoder".
    """

    where: Literal["vit", "encoder", "projector", "decoder"] = "projector"
    layer: int | float = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("where", self.where, SITE_KINDS)

    def site(self, facts: ModelFacts) -> Site:
        if self.where == "vit":
            return Site("vit", resolve_layer(self.layer, facts.encoder_layers, "layer"))
        if self.where == "decoder":
            return Site("decoder", resolve_layer(self.layer, facts.decoder_layers, "layer"))
        if self.where == "projector" and "projector" not in facts.sites:
            return facts.behind_encoder()
        return Site(self.where)
