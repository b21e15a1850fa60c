"""What `--model_args` of lmms-eval may say, and the setting that it means."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vtprune import methods
from vtprune.combining import BETWEEN, has_budget
from vtprune.errors import InvalidOptionError, UnsupportedMethodError, did_you_mean
from vtprune.method import check_keep
from vtprune.methods import files

from ..settings import CONTROLS, DENSE, DOWNSAMPLE, WITHOUT_BUDGET, Setting, parse_method

VIDEO_AS = ("video", "pictures")


@dataclass(frozen=True)
class ModelArguments:
    """The arguments of the model `vtprune` that do not concern the method.

    Attributes:
        pretrained: checkpoint folder or hub id.
        device: e.g. "cpu" or "cuda:1"; None: what accelerate gives each process, else CUDA where there is a device.
        dtype: as for :func:`~vtprune.eval.prompts.load_model`.
        attn_implementation: of the language model and the encoder; None: the checkpoint's.
        batch_size: requests per call of the model.
        max_num_frames: frames of a video, at the centres of so many equal parts of it.
        video_as: "video", or "pictures" for models that take none: one picture per frame, in the order of time.
    """

    pretrained: str
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    batch_size: int = 1
    max_num_frames: int = 32
    video_as: str = "video"

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_num_frames"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidOptionError(
                    f"{name}={value!r} of model 'vtprune' must be a whole number of at least 1; 'auto' is not supported."
                )
        if self.video_as not in VIDEO_AS:
            raise InvalidOptionError(
                f"video_as={self.video_as!r} of model 'vtprune': choose {' or '.join(VIDEO_AS)}."
            )


def parse(given: Mapping[str, Any]) -> tuple[ModelArguments, Setting]:
    """Splits the keyword arguments that lmms-eval makes of `--model_args` and its own options.

    `method` is a name, "name:option=value", a file of `vtprune search`, or a control of `vtprune eval`; `keep` is the
    budget; whatever is no argument of the model is an option of the method.

    Args:
        given: names and values; values of method options may be Python literals in strings.

    Raises:
        InvalidOptionError: an unknown name, a value out of range, or `pretrained` or `keep` is missing.
        UnknownMethodError: no such method.
    """
    known = {f.name for f in dataclasses.fields(ModelArguments)}
    values = {name: value for name, value in given.items() if name in known and value is not None}
    rest = {name: value for name, value in given.items() if name not in known}
    if rest.pop("max_batch_size", None) is not None:  # lmms-eval always names it
        raise InvalidOptionError(
            "model 'vtprune' does not search for a batch size; leave max_batch_size out."
        )
    method, keep = rest.pop("method", None), rest.pop("keep", None)
    if "pretrained" not in values:
        near = [name for name in rest if did_you_mean(name, ["pretrained"]).startswith("Did")]
        raise InvalidOptionError(
            "model 'vtprune' needs pretrained=FOLDER or pretrained=HUB_ID in --model_args"
            + (f", not {near[0]!r}." if near else ".")
        )
    if isinstance(values.get("batch_size"), str) and values["batch_size"].isdigit():
        values["batch_size"] = int(values["batch_size"])
    return ModelArguments(**values), setting(method, keep, rest, sorted(known | {"method", "keep"}))


def setting(
    method: str | None,
    keep: int | float | None = None,
    options: Mapping[str, Any] | None = None,
    others: list[str] | None = None,
) -> Setting:
    """The setting of a method's name, budget and options, all of them checked.

    Args:
        method: see :func:`parse`; None for the dense model.
        keep: budget; may also be among the options behind the method's colon.
        options: further options.
        others: names that an unknown option may have meant as well.

    Raises:
        VTPruneError: anything that cannot be right.
    """
    rest = dict(options or {})
    if method is None or method == DENSE:
        if keep is not None or rest:
            wrong = "keep" if keep is not None else next(iter(rest))
            hint = "" if keep is not None else f" {did_you_mean(wrong, others or [])}"
            raise InvalidOptionError(
                f"{wrong!r} is given to model 'vtprune' without a method to take it; add method=NAME "
                f"(`vtprune methods` lists them).{hint}"
            )
        return Setting(DENSE)
    name, own = parse_method(str(method))
    rest = {option: _literal(value) for option, value in rest.items()}
    twice = [option for option in own if option in rest or (option == "keep" and keep is not None)]
    if twice:
        raise InvalidOptionError(f"{twice[0]!r} of method {name!r} is given twice; give it once.")
    rest = {**own, **rest}
    keep = rest.pop("keep", keep)
    if keep is not None:
        check_keep(keep)
    if files.names_file(name):
        if keep is not None or rest:
            raise InvalidOptionError(f"{name} has its own options and budget; leave keep and options out.")
        return Setting(name, files.load(name).keep)
    budgetless = name in WITHOUT_BUDGET or (BETWEEN in name and has_budget(name))
    if budgetless and keep is not None:
        raise InvalidOptionError(f"{name!r} takes no keep; leave it out.")
    if name in CONTROLS:
        if rest:
            raise InvalidOptionError(f"the control {name!r} takes no options, got {', '.join(rest)}.")
        if name == DOWNSAMPLE and keep is None:
            raise InvalidOptionError("the control 'downsample' needs keep=N.")
        return Setting(name, keep)
    _check_method(name, keep, rest, others or [])
    return Setting(name, keep, tuple(rest.items()))


def _check_method(name: str, keep: int | float | None, options: Mapping[str, Any], others: list[str]) -> None:
    if name in methods.REGISTRY:
        cls = methods.REGISTRY[name]
        known = [f.name for f in dataclasses.fields(cls)]
        for option in options:
            if option not in known:
                raise InvalidOptionError(
                    f"{option!r} is neither an option of method {name!r} nor an argument of model 'vtprune'. "
                    f"{did_you_mean(option, [*known, *others])}"
                )
        if cls.training_only:
            raise UnsupportedMethodError(
                f"{name!r} acts in training only: in evaluation the model is dense, so there is nothing to evaluate."
            )
    methods.create(name, **options, **({} if keep is None else {"keep": keep}))


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
