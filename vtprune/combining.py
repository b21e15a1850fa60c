"""Any scorer with any transform, budget, selector and reducer, as one method.

    vtprune.combine("rollout", Power(0.5), Farthest(), Merge(0.4), keep=64)
    vtprune.patch(model, "rollout|power:exponent=0.5|farthest|merge:beta=0.4", keep=64)

A part is a small frozen record that can be called; any function of the same form will do instead.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from vtprune.errors import InvalidOptionError, did_you_mean
from vtprune.finite import check_finite
from vtprune.method import Method, ModelFacts, Scored, Signal, Site, Stage, View, check_keep
from vtprune.ops import dpp_map
from vtprune.scoring import by_count, desink, drawn, outliers
from vtprune.selecting import farthest_first, merged_into_closest, unit
from vtprune.selection import Selection, topk

Transform = Callable[[Tensor, View], Tensor]
Budget = Callable[[Tensor, View], Tensor]
Selector = Callable[[Tensor, View], Tensor]
Reducer = Callable[[Tensor, View], Selection]
BETWEEN = "|"
# Not the commas inside (1, 2) or [1, 2].
SEPARATOR = re.compile(r",(?=\w+=|$)|,(?![^(\[]*[)\]])")

# ---------------------------------------------------------------------- transforms: scores [G, N] -> scores [G, N]


@dataclass(frozen=True)
class Desink:
    """Damps attention sinks (ACT, see :func:`vtprune.scoring.desink`), on scores scaled to sum to 1."""

    threshold: float = 0.1
    beta: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1 or self.threshold <= 0:
            raise InvalidOptionError(f"{self}: give a threshold above 0 and a beta in [0, 1].")

    def __call__(self, scores: Tensor, view: View) -> Tensor:
        return desink(scores / scores.sum(-1, keepdim=True), self.threshold, self.beta)


@dataclass(frozen=True)
class Power:
    """Scores below 0 count as 0, the others are raised to a power: below 1 it evens them out, above it sharpens."""

    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.exponent < math.inf:
            raise InvalidOptionError(f"{self}: give a number >= 0.")

    def __call__(self, scores: Tensor, view: View) -> Tensor:
        return scores.clamp(min=0) ** self.exponent


# ---------------------------------------------------------------------- budgets: scores [G, N], view -> counts [G]


@dataclass(frozen=True)
class Outliers:
    """As many tokens as have a score above Q3 + 1.5 (Q3 - Q1) (PruMerge)."""

    def __call__(self, scores: Tensor, view: View) -> Tensor:
        return outliers(scores)


@dataclass(frozen=True)
class Above:
    """As many tokens as have a score above a threshold."""

    threshold: float = 0.0

    def __call__(self, scores: Tensor, view: View) -> Tensor:
        return (scores > self.threshold).sum(-1)


@dataclass(frozen=True)
class Mass:
    """The fewest tokens that hold a share of the sum of all scores, which have to be non-negative (as PrefixKV)."""

    share: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InvalidOptionError(f"{self}: give a share in (0, 1].")

    def __call__(self, scores: Tensor, view: View) -> Tensor:
        mass = scores.double().sort(-1, descending=True).values.cumsum(-1)
        return (mass < self.share * mass[:, -1:]).sum(-1) + 1


@dataclass(frozen=True)
class Quota:
    """Every frame of a video has a number of its own: what a frame selector allots (QuoTA), or you do.

    Attributes:
        tokens: tokens of every frame, in the order of time, each at least 1. A frame never keeps more than it has.
    """

    tokens: Sequence[int]

    def __post_init__(self) -> None:
        if isinstance(self.tokens, str) or not self.tokens or any(int(n) != n or n < 1 for n in self.tokens):
            raise InvalidOptionError(
                f"quota: tokens={self.tokens!r}: give an int >= 1 for every frame, as in (8, 2, 5)."
            )
        object.__setattr__(self, "tokens", tuple(int(n) for n in self.tokens))

    def __call__(self, scores: Tensor, view: View) -> Tensor:
        wrong = [one for one in view.layout if one.modality != "video" or one.time >= len(self.tokens)]
        if wrong:
            what = "a picture" if wrong[0].modality != "video" else f"frame {wrong[0].time}"
            raise InvalidOptionError(
                f"quota: tokens are given for the {len(self.tokens)} frames of a video, and the prompt holds {what}."
            )
        return torch.tensor([self.tokens[one.time] for one in view.layout], device=scores.device)


# ---------------------------------------------------------------------- selectors: scores [G, N] -> indices [G, k]


@dataclass(frozen=True)
class Top:
    """The k largest scores."""

    def __call__(self, scores: Tensor, view: View) -> Tensor:
        return topk(scores, view.k)


@dataclass(frozen=True)
class Farthest:
    """Greedily the largest score times cosine distance to the nearest chosen token (DivPrune with weights)."""

    def __call__(self, scores: Tensor, view: View) -> Tensor:
        vectors = unit(view.features)
        return farthest_first(scores.clamp(min=0), 1 - vectors @ vectors.transpose(1, 2), view.k)


@dataclass(frozen=True)
class Dpp:
    """Greedy MAP of the determinantal point process diag(s) cos diag(s) (CDPruner)."""

    def __call__(self, scores: Tensor, view: View) -> Tensor:
        vectors = unit(view.features)
        s = scores.clamp(min=0).to(vectors)
        kernel = s.unsqueeze(2) * (vectors @ vectors.transpose(1, 2)) * s.unsqueeze(1)
        check_finite(kernel)
        return dpp_map(kernel, view.k)


@dataclass(frozen=True)
class Draw:
    """k tokens drawn without replacement, in proportion to scores >= 0; the same picture gives the same draw."""

    seed: int = 0

    def __call__(self, scores: Tensor, view: View) -> Tensor:
        return topk(drawn(scores.clamp(min=torch.finfo(torch.float32).tiny), view, self.seed), view.k)


# ---------------------------------------------------------------------- reducers: indices [G, k] -> Selection


@dataclass(frozen=True)
class Drop:
    """What was not chosen is gone."""

    def __call__(self, kept: Tensor, view: View) -> Selection:
        return Selection.of(kept)


@dataclass(frozen=True)
class Merge:
    """A dropped token joins the survivor of largest cosine c with weight beta max(c, 0) against the survivor's 1."""

    beta: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise InvalidOptionError(f"{self}: give a number >= 0.")

    def __call__(self, kept: Tensor, view: View) -> Selection:
        return merged_into_closest(view.features, kept, self.beta)


Part = Transform | Budget | Selector | Reducer
KINDS: Mapping[str, tuple[type, ...]] = {
    "transform": (Desink, Power),
    "budget": (Outliers, Above, Mass, Quota),
    "selector": (Top, Farthest, Dpp, Draw),
    "reducer": (Drop, Merge),
}
PARTS: Mapping[str, type] = {cls.__name__.lower(): cls for some in KINDS.values() for cls in some}


@dataclass(frozen=True, kw_only=True)
class Combined(Method):
    """A scorer, transforms of its scores, a budget, a selector and a reducer.

    Attributes:
        keep: tokens per image, int or ratio; not read where there is a `budget`.
        scorer: its site, signals and scores are used, its own decision is not.
        transforms: (scores [G, N], view) -> scores, one after the other.
        budget: (scores [G, N], view) -> how many tokens stay of each image [G]; None for `keep`.
        selector: (scores [G, N], view) -> indices [G, view.k] of survivors.
        reducer: (survivors [G, view.k], view) -> Selection.
        at: where it acts, if not where the scorer does.
    """

    key: ClassVar[str] = "combined"

    keep: int | float = 1.0
    scorer: Scored
    transforms: tuple[Transform, ...] = ()
    budget: Budget | None = None
    selector: Selector = field(default_factory=Top)
    reducer: Reducer = field(default_factory=Drop)
    at: Site | None = None

    def position_policy(self, facts: ModelFacts) -> Literal["original", "dense"]:
        if self.positions == "auto":
            return self.scorer.position_policy(facts)
        return super().position_policy(facts)

    def stages(self, facts: ModelFacts) -> list[Stage]:
        own = self.scorer.stages(facts)
        if len(own) != 1:
            raise InvalidOptionError(
                f"{self.scorer.key!r} decides at {len(own)} places; a combination takes scorers that decide once."
            )
        return [
            dataclasses.replace(
                own[0],
                site=self.at or own[0].site,
                keep=self.keep if self.budget is None else None,
                decide=self.decide,
                must_prune=self.budget is None,
                positions=self.position_policy(facts),
            )
        ]

    def scores(self, view: View) -> Tensor:
        """[G, N], transformed."""
        scores = self.scorer.scores(view)
        for transform in self.transforms:
            scores = transform(scores, view)
        check_finite(scores)
        return scores

    def decide(self, view: View) -> Selection:
        if self.budget is None:
            return self._choose(view)
        counts = self.budget(self.scores(view), view).clamp(1, view.n).tolist()
        return by_count(view, counts, self._choose)

    def _choose(self, view: View) -> Selection:
        return self.reducer(self.selector(self.scores(view), view), view)

    def options(self) -> dict[str, object]:
        parts = [
            *self.transforms,
            *([] if self.budget is None else [self.budget]),
            self.selector,
            self.reducer,
        ]
        return {
            "keep": self.keep if self.budget is None else None,
            "positions": self.positions,
            "scorer": {"method": self.scorer.key, **self.scorer.options()},
            "parts": [getattr(part, "__name__", None) or str(part) for part in parts],
            "at": None if self.at is None else str(self.at),
        }


def combine(
    scorer: str | Scored | Callable[[View], Tensor],
    *parts: Part | str,
    keep: int | float | None = None,
    at: Site | None = None,
    positions: Literal["auto", "original", "dense"] = "auto",
) -> Method:
    """One method out of parts.

    Args:
        scorer: a registry key, a method that scores, or a function view -> scores [G, N] (read at the language model's
            input).
        *parts: of this module, or their names as in "merge:beta=0.4"; in any order, transforms in that in which they
            are to be applied. At most one budget, selector and reducer; without them `keep`, :class:`Top` and
            :class:`Drop`. Functions of your own go into :class:`Combined` by name.
        keep: the budget where no part is one: an int (tokens per image) or a ratio.
        at: where it acts, if not where the scorer does.
        positions: as in :class:`~vtprune.method.Method`; "auto" does as the scorer.

    Raises:
        InvalidOptionError: a method that has no scores, an unknown part, two of one kind, no budget or two.
        UnknownMethodError: no such scorer.
    """
    chosen: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for one in parts:
        part = parse_part(one) if isinstance(one, str) else one
        chosen[_kind(part)].append(part)
    for kind, some in chosen.items():
        if kind != "transform" and len(some) > 1:
            raise InvalidOptionError(
                f"{len(some)} parts are a {kind}: {', '.join(map(str, some))}; give one."
            )
    if (keep is None) != bool(chosen["budget"]):
        raise InvalidOptionError("give keep=..., or a part that is a budget, and not both.")
    if keep is not None:
        check_keep(keep)
    options: dict[str, Any] = {kind: some[0] for kind, some in chosen.items() if kind != "transform" and some}
    return Combined(
        scorer=_scorer(scorer),
        transforms=tuple(chosen["transform"]),
        keep=1.0 if keep is None else keep,
        at=at,
        positions=positions,
        **options,
    )


def with_budget(method: Method, budget: Budget) -> Method:
    """A method's scores, or a combination, with another budget.

    Args:
        method: one that scores: its highest scores are kept, whatever else its own decision does; or what :func:`combine`
            gave, whose other parts stay.
        budget: such as :class:`Quota`.

    Raises:
        InvalidOptionError: the method has no scores.
    """
    if isinstance(method, Combined):
        return dataclasses.replace(method, keep=1.0, budget=budget)
    return Combined(scorer=_scorer(cast(Any, method)), budget=budget, positions=method.positions)


@dataclass(frozen=True, kw_only=True)
class _Function(Scored):
    """A scorer made of a function."""

    key: ClassVar[str] = "function"

    keep: int | float = 1.0
    function: Callable[[View], Tensor]

    def site(self, facts: ModelFacts) -> Site:
        return Site("projector") if "projector" in facts.sites else facts.behind_encoder()

    def needs(self, facts: ModelFacts) -> tuple[Signal, ...]:
        return ()

    def scores(self, view: View) -> Tensor:
        return self.function(view)

    def options(self) -> dict[str, object]:
        return {"function": getattr(self.function, "__qualname__", str(self.function))}


def _scorer(scorer: str | Scored | Callable[[View], Tensor], **options: object) -> Scored:
    if isinstance(scorer, str):
        from vtprune import methods

        cls = methods.method_class(scorer)
        if not issubclass(cls, Scored):
            scorers = [key for key, other in methods.REGISTRY.items() if issubclass(other, Scored)]
            raise InvalidOptionError(
                f"method {scorer!r} has no scores of its own; scorers: {', '.join(scorers)}."
            )
        needs_budget = (
            next(f for f in dataclasses.fields(cls) if f.name == "keep").default is dataclasses.MISSING
        )
        return cast(Scored, methods.create(scorer, **{**({"keep": 1.0} if needs_budget else {}), **options}))
    if isinstance(scorer, Scored):
        return scorer
    if isinstance(scorer, Method):
        raise InvalidOptionError(f"method {scorer.key!r} has no scores of its own.")
    return _Function(function=scorer)


def _kind(part: object) -> str:
    for kind, classes in KINDS.items():
        if isinstance(part, classes):
            return kind
    raise InvalidOptionError(
        f"{part!r} is no part of vtprune.combining; functions of your own go into Combined(scorer=.., selector=.., ..)."
    )


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """Splits "name:option=value,option=value"; values are Python literals, anything else is a string.

    Raises:
        InvalidOptionError: something after the colon is not option=value.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, SEPARATOR.split(rest)):
        option, equals, value = part.partition("=")
        if not equals:
            raise InvalidOptionError(f"{part!r} in {text!r} is no option; write it as name:option=value.")
        try:
            options[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[option] = value
    return name, options


def parse_part(text: str) -> Part:
    """A part from its name, with options as in "merge:beta=0.4".

    Raises:
        InvalidOptionError: no such part, or it has no such option.
    """
    name, options = split_options(text)
    if name not in PARTS:
        raise InvalidOptionError(f"there is no part {name!r}. {did_you_mean(name, PARTS)}")
    try:
        part: Part = PARTS[name](**options)
    except TypeError as error:
        known = [f.name for f in dataclasses.fields(PARTS[name])]
        raise InvalidOptionError(f"{text!r}: {error}. Options: {', '.join(known) or 'none'}.") from error
    return part


def has_budget(text: str) -> bool:
    """Whether one of the parts of "scorer|part|part" is a budget.

    Raises:
        InvalidOptionError: one of the parts is unknown.
    """
    return any(_kind(parse_part(part)) == "budget" for part in text.split(BETWEEN)[1:])


def parse(text: str, keep: int | float | None, positions: Any = "auto", **options: object) -> Method:
    """A combination from "scorer|part|part", each with options as in "merge:beta=0.4"; `options` are the scorer's too.

    Raises:
        InvalidOptionError: see :func:`combine`.
        UnknownMethodError: no such scorer.
    """
    head, *parts = text.split(BETWEEN)
    name, own = split_options(head)
    return combine(_scorer(name, **own, **options), *parts, keep=keep, positions=positions)
