"""What is compared: one setting is one way to run the model, a pruning method with its budget or a control."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

import vtprune
from vtprune import methods
from vtprune.combining import BETWEEN, has_budget, split_options
from vtprune.errors import InvalidOptionError, UnknownMethodError, UnsupportedMethodError, did_you_mean
from vtprune.method import check_keep, resolve_keep
from vtprune.methods import files
from vtprune.patch import Patch

from .shrink import interpolated

DENSE = "dense"
NO_IMAGE = "no-image"
DOWNSAMPLE = "downsample"
CONTROLS = {
    DENSE: "the unpatched model: the ceiling",
    NO_IMAGE: "the unpatched model with a mid-grey picture: what the question alone gives away",
    DOWNSAMPLE: "the unpatched model with a smaller picture of at most as many tokens as the budget, in the largest square; pruning has to beat it",
}
WITHOUT_BUDGET = (DENSE, NO_IMAGE, "keep-all")
BUDGETS = (1 / 3, 2 / 9, 1 / 9)  # 192, 128 and 64 of LLaVA-1.5's 576 tokens
DRAWS = 3
EVERY = "all"
# What a comparison without further wishes runs: a few minutes on two cores.
DEFAULT_METHODS = ("vtprune", "divprune", "fastv", "visionzip", "vtc-cls")


@dataclass(frozen=True)
class Setting:
    """One way to run the model.

    Attributes:
        method: a key of the method registry or of `CONTROLS`, or a file that `vtprune search` wrote.
        keep: the budget; None for settings that have none. A file's own is used whatever stands here.
        options: further options of the method.
        draws: seeds over which `random` is averaged; empty for everything else.
    """

    method: str
    keep: int | float | None = None
    options: tuple[tuple[str, Any], ...] = ()
    draws: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """Method and options, without the budget; one label is one line in a plot."""
        return self.method + "".join(f" {name}={value}" for name, value in self.options)

    @property
    def all_options(self) -> dict[str, Any]:
        """Options as they are written to the results."""
        options: dict[str, Any] = dict(self.options)
        if self.draws:
            options["seeds"] = list(self.draws)
        return options

    @property
    def runs(self) -> int:
        """How often every question is asked."""
        return max(1, len(self.draws))

    @contextmanager
    def applied(self, model: nn.Module, run: int = 0) -> Iterator[Patch | None]:
        """Runs the model this way inside the context; gives the patch where there is one.

        Args:
            model: an unpatched model.
            run: which of `runs`.

        Raises:
            VTPruneError: the model cannot be run this way.
        """
        if self.method in (DENSE, NO_IMAGE):
            yield None
        elif self.method == DOWNSAMPLE:
            with interpolated(model):
                yield None
        elif files.names_file(self.method):
            with vtprune.patch(model, self.method) as patch:
                yield patch
        elif self.method in methods.REGISTRY and methods.REGISTRY[self.method].training_only:
            raise UnsupportedMethodError(
                f"{self.method!r} acts in training only: in evaluation the model is dense and costs what it costs unpatched"
            )
        else:
            options = dict(self.options)
            if self.draws:
                options["seed"] = self.draws[run]
            if self.keep is not None:
                options["keep"] = self.keep
            with vtprune.patch(model, self.method, **options) as patch:
                yield patch


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Splits "name" or "name:option=value,option=value"; values are Python literals, anything else is a string.

    The name may also be a file that `vtprune search` wrote, which has its own options, or a combination
    "scorer|part|part" (:mod:`vtprune.combining`), whose parts have theirs.

    Raises:
        UnknownMethodError: no such method and no such control.
        InvalidOptionError: something after the colon is not option=value, or the file cannot be read.
    """
    if files.names_file(text):
        files.load(text)
        return text, {}
    if BETWEEN in text:
        methods.create(text, **({} if has_budget(text) else {"keep": 1.0}))
        return text, {}
    name, options = split_options(text)
    known = [*vtprune.list_methods(), *CONTROLS]
    if name not in known:
        raise UnknownMethodError(f"there is no method {name!r}. {did_you_mean(name, known)}")
    if options and name in CONTROLS:
        raise InvalidOptionError(f"the control {name!r} takes no options, got {json.dumps(options)}.")
    return name, options


def plan_settings(
    methods: Sequence[str] | None, budgets: Sequence[int | float] | None, tokens: Sequence[int]
) -> list[Setting]:
    """The settings of a comparison, dense first.

    Args:
        methods: as for :func:`parse_method`; "all" among them stands for all registered methods, None for
            `DEFAULT_METHODS`. Both come with all controls. The dense model always runs, because every other number is compared with it.
        budgets: ints or floats as for `vtprune.patch`; None for a third, two ninths and a ninth of the tokens.
        tokens: visual tokens of some representative pictures.

    Raises:
        VTPruneError: unknown method, malformed option, budget out of range.
    """
    if budgets is None:
        same = len(set(tokens)) == 1
        budgets = [resolve_keep(b, tokens[0]) if same else round(b, 2) for b in BUDGETS]
    for budget in budgets:
        check_keep(budget)
    budgets = list(dict.fromkeys(budgets))
    if methods is None or EVERY in methods:
        chosen = DEFAULT_METHODS if methods is None else vtprune.list_methods()
        registered = [m for m in chosen if m not in ("keep-all", "random", "stride")]
        others = [m for m in methods or () if m != EVERY]
        methods = [NO_IMAGE, "keep-all", *registered, *others, "random", "stride", DOWNSAMPLE]
    settings = [Setting(DENSE)]
    for name, options in map(parse_method, methods):
        settings += _settings_of(name, options, budgets)
    return list(dict.fromkeys(settings))


def _settings_of(name: str, options: Mapping[str, Any], budgets: Sequence[int | float]) -> list[Setting]:
    given = tuple(options.items())
    if files.names_file(name):
        return [Setting(name, files.load(name).keep)]
    if BETWEEN in name and has_budget(name):
        return [Setting(name, None, given)]
    if name in WITHOUT_BUDGET or (name in methods.REGISTRY and methods.REGISTRY[name].training_only):
        return [Setting(name, None, given)]
    if "keep" in options:
        rest = tuple((k, v) for k, v in given if k != "keep")
        check_keep(options["keep"])
        return [Setting(name, options["keep"], rest, _draws(name, options))]
    return [Setting(name, budget, given, _draws(name, options)) for budget in budgets]


def _draws(name: str, options: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(range(DRAWS)) if name == "random" and "seed" not in options else ()
