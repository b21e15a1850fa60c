"""Which values of an option are worth trying: what a method may declare for `vtprune search`."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Union

from vtprune.errors import InvalidOptionError, did_you_mean

if TYPE_CHECKING:
    from vtprune.method import Method

Value = int | float | str | bool
# The budget is given, not searched; the others say how to run, not what to keep.
NOT_SEARCHED = ("keep", "positions", "seed")


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included: whole numbers if both are ints.

    Attributes:
        log: whether ratios rather than differences count, for options that span orders of magnitude.

    Raises:
        InvalidOptionError: the bounds are not finite and ascending, or not positive although `log`.
    """

    low: int | float
    high: int | float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InvalidOptionError(f"{self} is no range; give a lower and a higher finite bound.")
        if self.log and self.low <= 0:
            raise InvalidOptionError(f"{self} cannot be logarithmic; give bounds above 0.")

    def __contains__(self, value: object) -> bool:
        kind = int if self.whole else float
        return type(value) is kind and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low}:{self.high}{':log' if self.log else ''}"

    @property
    def whole(self) -> bool:
        """Whether it holds whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Raises:
        InvalidOptionError: fewer than two different values.
    """

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if len({(type(v), v) for v in self.values}) != len(self.values) or len(self.values) < 2:
            raise InvalidOptionError(
                f"{self} leaves no choice; give at least two different values, e.g. cls,received."
            )

    def __contains__(self, value: object) -> bool:
        return any(type(value) is type(v) and value == v for v in self.values)

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


Space = Range | Choice


def searchable(method: type[Method]) -> dict[str, tuple[object, ...]]:
    """Options of a method that a search may vary, with the types (`int`, `float`, `bool`) and literal values they take."""
    hints = typing.get_type_hints(method)
    found = {}
    for field in dataclasses.fields(method):
        hint = hints[field.name]
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
        takes: list[object] = []
        for kind in kinds:
            if typing.get_origin(kind) is Literal:
                takes += typing.get_args(kind)
            elif kind in (int, float, bool):
                takes.append(kind)
        if takes and field.name not in NOT_SEARCHED:
            found[field.name] = tuple(takes)
    return found


def fitted(method: type[Method], option: str, space: Space) -> Space:
    """A space in the types that an option takes: whole bounds become floats where only floats are taken.

    Raises:
        InvalidOptionError: there is no such option, it is not searched, or it does not take these values.
    """
    where = f"option {option!r} of {method.key!r}"
    known = searchable(method)
    if option == "keep":
        raise InvalidOptionError(
            f"{where} is the budget, which is given and not searched; to fix another than --keep for one method write "
            f"{method.key}:keep=..."
        )
    if option not in known:
        why = "is not searched" if option in NOT_SEARCHED else "does not exist or is no number or choice"
        raise InvalidOptionError(
            f"{where} {why}. {did_you_mean(option, known) if known else 'It has no options to search.'}"
        )
    takes = known[option]
    if isinstance(space, Range):
        if int in takes and space.whole:
            return space
        if float in takes:
            return dataclasses.replace(space, low=float(space.low), high=float(space.high))
        if int in takes:
            raise InvalidOptionError(f"{where} takes whole numbers, {space} are none.")
        values = [v for v in takes if not isinstance(v, type)] or [True, False]
        raise InvalidOptionError(
            f"{where} is no number; give a choice such as {option}={','.join(map(str, values))}."
        )
    fitting: list[Value] = []
    for value in space.values:
        if type(value) is int and float in takes and int not in takes:
            value = float(value)
        if value not in [t for t in takes if not isinstance(t, type)] and type(value) not in takes:
            literal = [str(t) for t in takes if not isinstance(t, type)]
            hint = did_you_mean(str(value), literal) if literal else ""
            raise InvalidOptionError(f"{where} does not take {value!r}. {hint}".strip())
        fitting.append(value)
    return Choice(tuple(fitting))
