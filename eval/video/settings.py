"""What the video suite compares: which frames the model sees, and how their tokens are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

import vtprune
from vtprune import methods
from vtprune.combining import split_options
from vtprune.errors import InvalidOptionError, UnknownMethodError, did_you_mean
from vtprune.method import check_keep
from vtprune.patch import Patch
from vtprune.video.selection import SELECTORS, FrameSelector, create_selector

from ..settings import DENSE, DOWNSAMPLE, DRAWS, EVERY, NO_IMAGE, Setting, plan_settings

ALL_FRAMES = "all"
NO_VIDEO = "no-video"
CONTROLS = {
    DENSE: "the unpatched model with every candidate frame: the ceiling",
    NO_VIDEO: "the unpatched model with mid-grey frames: what the question alone gives away",
}
CHAT, EMBEDDER = "chat", "embedder"
QUOTA = "quota"
CAPTIONS, RELEVANCE = (
    "captions",
    "relevance",
)  # options of a selection that are the suite's, not the selector's
FRAMES = (0.1, 0.05)
KEEP = (0.1,)


@dataclass(frozen=True)
class Selection:
    """Which frames of a clip the model sees.

    Attributes:
        name: a key of the selector registry, or "all" for every candidate.
        options: of the selector.
        frames: how many; None for "all".
        captions: whether the selector is given the clip's caption, which may name the answer.
        relevance: for quota, whom it asks: "chat" (the model that is measured says yes or no frame by frame) or "embedder"
            (the declared substitute); None for the others.
    """

    name: str = ALL_FRAMES
    options: tuple[tuple[str, Any], ...] = ()
    frames: int | None = None
    captions: bool = False
    relevance: str | None = None

    @property
    def label(self) -> str:
        """Name and options, without the number of frames."""
        extra = [f"{key}={value}" for key, value in self.options]
        if self.relevance is not None:
            extra.append(f"{RELEVANCE}={self.relevance}")
        return " ".join([self.name, *extra]) + (" + caption" if self.captions else "")

    @property
    def draws(self) -> tuple[int, ...]:
        """Seeds over which random selection is averaged; empty for everything else."""
        return tuple(range(DRAWS)) if self.name == "random" and "seed" not in dict(self.options) else ()

    def selector(self, run: int, relevance: Any = None) -> FrameSelector:
        """The selector of a draw; `relevance` is handed to it if it is not None."""
        options = dict(self.options)
        if self.draws:
            options["seed"] = self.draws[run]
        if relevance is not None:
            options[RELEVANCE] = relevance
        return create_selector(self.name, **options)


WHOLE = Setting(DENSE)
EVERY_FRAME = Selection()


@dataclass(frozen=True)
class VideoSetting:
    """One way to run the model on a clip.

    Attributes:
        tokens: how tokens are pruned; "dense" for not at all.
        selection: the frames.
        blank: mid-grey frames in place of them.
    """

    tokens: Setting = WHOLE
    selection: Selection = EVERY_FRAME
    blank: bool = False

    @property
    def method(self) -> str:
        """Method or control, as it is written to the results."""
        return NO_VIDEO if self.blank else self.tokens.method

    @property
    def name(self) -> str:
        """Everything that tells it from other settings, for people."""
        if self.blank:
            return NO_VIDEO
        parts = []
        if self.selection.frames is not None:
            parts.append(f"{self.selection.label} {self.selection.frames}")
        if self.tokens.method != DENSE or not parts:
            keep = "" if self.tokens.keep is None else f" keep={self.tokens.keep}"
            parts.append(self.tokens.label + keep)
        return ", ".join(parts)

    @property
    def runs(self) -> int:
        """How often every question is asked."""
        return max(self.tokens.runs, len(self.selection.draws))

    @contextmanager
    def applied(self, model: nn.Module, run: int = 0) -> Iterator[Patch | None]:
        """As :meth:`vtprune.eval.settings.Setting.applied`."""
        with self.tokens.applied(model, run % self.tokens.runs) as patch:
            yield patch


def parse_selection(text: str, frames: int | None) -> Selection:
    """A selection from "name" or "name:option=value,...".

    Besides the selector's own options there are `captions=True` and, for quota, `relevance=chat` (the default) or
    `relevance=embedder`.

    Raises:
        UnknownMethodError: no such selector.
        InvalidOptionError: a malformed, unknown or out-of-range option.
    """
    name, options = split_options(text)
    if name == ALL_FRAMES:
        if options:
            raise InvalidOptionError(f"{ALL_FRAMES!r} takes no options, got {options}.")
        return Selection()
    if name not in SELECTORS:
        known = [ALL_FRAMES, *SELECTORS]
        raise UnknownMethodError(f"there is no frame selector {name!r}. {did_you_mean(name, known)}")
    captions = options.pop(CAPTIONS, False)
    if not isinstance(captions, bool):
        raise InvalidOptionError(f"captions={captions!r}: give True or False.")
    relevance = None
    if name == QUOTA:
        relevance = options.pop(RELEVANCE, CHAT)
        if relevance not in (CHAT, EMBEDDER):
            raise InvalidOptionError(f"relevance={relevance!r}: give {CHAT!r} or {EMBEDDER!r}.")
    create_selector(name, **options)
    return Selection(name, tuple(options.items()), frames, captions, relevance)


def frame_budget(budget: int | float, candidates: int) -> int:
    """Frames to keep: an int as it is, a float as a share of the candidates, at least 1.

    Raises:
        InvalidOptionError: out of range.
    """
    check_keep(budget)
    frames = budget if isinstance(budget, int) else max(1, round(budget * candidates))
    if frames > candidates:
        raise InvalidOptionError(f"{frames} frames of {candidates} candidates: give fewer --frames.")
    return frames


def plan(
    selectors: Sequence[str] | None,
    frames: Sequence[int | float] | None,
    token_methods: Sequence[str] | None,
    keeps: Sequence[int | float] | None,
    candidates: int,
) -> list[VideoSetting]:
    """The settings of a comparison, the dense model and the one without video first.

    Nothing given stands for :func:`default_plan`. Selectors alone are compared at every number of frames with all their
    tokens; methods alone on every candidate frame; both together in all combinations. Several selections of the same frames
    and their methods always stand beside the dense model and the floor.

    Args:
        selectors: as for :func:`parse_selection`.
        frames: numbers of frames, or shares of the candidates; default a tenth and a twentieth.
        token_methods: as for :func:`vtprune.eval.settings.parse_method`; "all" for every registered one.
        keeps: tokens per frame or shares of them; default a tenth.
        candidates: frames there are.

    Raises:
        VTPruneError: unknown name, malformed option, budget out of range.
    """
    if keeps is not None and token_methods is None:
        raise InvalidOptionError(
            "--keep is a budget of a --method; give both (frames are chosen by --frames)."
        )
    if selectors is None and frames is None and token_methods is None:
        return default_plan(candidates)
    if selectors is None:
        selectors = [ALL_FRAMES] if frames is None else ["uniform"]
    counts = [frame_budget(budget, candidates) for budget in (FRAMES if frames is None else frames)]
    chosen = [
        parse_selection(text, count)
        for text in selectors
        for count in ([None] if split_options(text)[0] == ALL_FRAMES else counts)
    ]
    tokens = [Setting(DENSE)]
    if token_methods is not None:
        tokens = [one for text in token_methods for one in _tokens(text, KEEP if keeps is None else keeps)]
    settings = [VideoSetting(one, selection) for selection in chosen for one in tokens]
    return _with_controls(settings, counts[0])


def default_plan(candidates: int) -> list[VideoSetting]:
    """Every selector at a tenth and a twentieth of the frames; every way to a tenth of the tokens.

    A tenth of 120 frames of 16 tokens are 192 tokens: 12 whole frames, 24 frames with 8 tokens on average each, or 96 with 2.
    """
    tenth, twentieth = (frame_budget(share, candidates) for share in FRAMES)
    selectors = (
        "uniform",
        "random",
        "shots",
        "motion",
        "stacfp",
        "keyscore",
        "quota",
        "mllm-select",
        "keyscore:captions=True",
    )
    settings = [
        VideoSetting(selection=parse_selection(text, count))
        for count in (tenth, twentieth)
        for text in selectors
    ]
    settings.append(VideoSetting(Setting("keep-all"), parse_selection("uniform", tenth)))
    many, some = 8 * tenth, 2 * tenth
    wide = ("evs", "dycoke", "fastvid", "llava-scissor", "divprune", "vtprune", "random", "stride")
    for text in wide:
        settings += [VideoSetting(one, parse_selection("uniform", many)) for one in _tokens(text, [0.125])]
    for chooser in ("uniform", "quota"):
        for text in ("evs", "vtprune"):
            settings += [VideoSetting(one, parse_selection(chooser, some)) for one in _tokens(text, [0.5])]
    return _with_controls(settings, tenth)


def _with_controls(settings: Sequence[VideoSetting], frames: int) -> list[VideoSetting]:
    floor = VideoSetting(selection=Selection("uniform", (), frames), blank=True)
    return list(dict.fromkeys([VideoSetting(), floor, *settings]))


def _tokens(text: str, keeps: Sequence[int | float]) -> list[Setting]:
    if text == EVERY:
        names = [key for key in vtprune.list_methods() if not methods.REGISTRY[key].training_only]
        return [one for key in names for one in _tokens(key, keeps)]
    if text in (NO_IMAGE, DOWNSAMPLE):
        raise InvalidOptionError(
            f"{text!r} is a control of the picture suite; {NO_VIDEO!r} always runs here."
        )
    return plan_settings([text], list(keeps), [])[0 if text == DENSE else 1 :]
