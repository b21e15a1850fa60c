"""What methods share whose number of tokens follows from the picture unless a budget is given."""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.method import POSITION_POLICIES, Method, check_choice


@dataclass(frozen=True, kw_only=True)
class Emergent(Method):
    """Base of methods that need no budget.

    Attributes:
        keep: None = the count emerges from each picture; an int or a ratio overrides it.
    """

    keep: int | float | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.keep is None:
            check_choice("positions", self.positions, POSITION_POLICIES)
        else:
            super().__post_init__()
