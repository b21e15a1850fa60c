"""Control: the whole machinery, nothing removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.method import Method, ModelFacts, Site, Stage, View
from vtprune.selection import Selection


@dataclass(frozen=True, kw_only=True)
class KeepAll(Method):
    """Keeps every token; outputs must equal the unpatched model's. A control for every table.

    Attributes:
        keep: accepted so that all methods can be called alike, and ignored.
    """

    key: ClassVar[str] = "keep-all"

    keep: int | float = 1.0

    def stages(self, facts: ModelFacts) -> list[Stage]:
        sites = [s for s in (Site("encoder"), Site("projector"), Site("decoder", 1)) if s.kind in facts.sites]
        return [Stage(site, 1.0, self.decide, must_prune=False) for site in sites]

    def decide(self, view: View) -> Selection:
        return Selection.everything(len(view.features), view.n, view.features.device)
