"""Searches the options of methods for one model and one budget, without labels.

The objective is that of VFlowOpt (ICCV 2025): the mean cosine between what the last prompt token becomes in the last
layer with and without pruning. Any method and any composition can be searched; Optuna proposes the options.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import vtprune
from vtprune.errors import InvalidOptionError, VTPruneError, did_you_mean
from vtprune.method import Method, check_keep, resolve_keep
from vtprune.methods import files
from vtprune.space import Choice, Range, Space, Value, fitted, searchable

from .prompts import EvaluationError, Prompter
from .results import command_line, versions
from .shrink import Inputs
from .world import KINDS, Example, examples

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study

SAMPLES, TRIALS, BATCH_SIZE = 30, 50, 10  # VFlowOpt: 30 unlabelled samples, 50 trials
SPLIT = "val"
HELD_OUT = (
    "test",
    "final",
    "unseen_style",
    "unseen_combination",
)  # answers there are what evaluations report
TOLERANCE = 0.01  # share of the budget by which the measured tokens may exceed it
WORST = -1.0  # the smallest cosine; what breaks the budget is worth less
INVALID = -3.0  # options that the model refuses: worth less than anything that runs
STUDY = "vtprune"
SamplerName = Literal["tpe", "gp"]
SAMPLERS: tuple[SamplerName, ...] = typing.get_args(SamplerName)


@dataclass(frozen=True)
class Trial:
    """One set of options and what it came to.

    Attributes:
        values: option -> value; options of a composition are called "0.layer", "1.layer", ...
        objective: mean cosine in [-1, 1] over the samples; None where the options did not run.
        layer_average: visual tokens per sample averaged over decoder layers and samples; None likewise.
        excess: by which share of the budget the layer average is above it; negative when below.
        reason: why the options did not run.
    """

    values: Mapping[str, Value]
    objective: float | None
    layer_average: float | None
    excess: float
    reason: str = ""

    @property
    def accepted(self) -> bool:
        """Whether it ran, within the budget and 1 %."""
        return self.objective is not None and self.excess <= TOLERANCE

    @property
    def worth(self) -> float:
        """What the optimiser maximises: the objective, and less than any objective where the budget is broken."""
        if self.objective is None:
            return INVALID
        return self.objective if self.accepted else WORST - min(self.excess, 1.0)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        methods: the methods with the best options.
        keep: the budget.
        best: the best accepted trial.
        baseline: the methods as they were given.
        trials: all trials in order.
        record: what is written beside the methods: samples, seed, sampler, spaces, model, command, versions.
        notes: what a reader of the result has to know.
    """

    methods: tuple[Method, ...]
    keep: int | float
    best: Trial
    baseline: Trial
    trials: tuple[Trial, ...]
    record: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def write(self, path: str | Path) -> None:
        """Writes a file for `vtprune.patch(model, path)` and `vtprune eval --method path`.

        Raises:
            InvalidOptionError: a method is not registered.
        """
        files.dump(
            path,
            self.methods,
            self.keep,
            self.record["model"],
            objective=self.best.objective,
            layer_average=self.best.layer_average,
            baseline={
                "objective": self.baseline.objective,
                "layer_average": self.baseline.layer_average,
                "accepted": self.baseline.accepted,
            },
            trials=len(self.trials),
            accepted=sum(t.accepted for t in self.trials),
            **{k: v for k, v in self.record.items() if k != "model"},
        )


class Objective:
    """Compares a model under a method with the unpatched model, on fixed samples.

    Args:
        model: an unpatched model with a head.
        prompter: made for it.
        samples: pictures and questions; answers are not read.
        keep: the budget.
        batch_size: samples per call.

    Raises:
        EvaluationError: no samples, or a model without a head.
    """

    def __init__(
        self,
        model: nn.Module,
        prompter: Prompter,
        samples: Sequence[Example],
        keep: int | float,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Module):
            raise EvaluationError(
                f"a {type(model).__name__} has no language-model head to compare states at."
            )
        if not samples or batch_size < 1:
            raise EvaluationError("a search needs at least one sample, and one per batch.")
        self.model, self.head, self.keep = model, head, keep
        self.batches: list[Inputs] = [
            prompter.inputs([e.image for e in part], [e.question for e in part])
            for start in range(0, len(samples), batch_size)
            for part in [samples[start : start + batch_size]]
        ]
        self.reference = [self._states(inputs) for inputs in self.batches]

    @torch.no_grad()
    def _states(self, inputs: Inputs) -> Tensor:
        """[B, D] float32: the state of the last prompt token behind the last layer, as the head gets it."""
        seen: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, -1].float()))
        try:
            self.model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        return seen[-1]

    def __call__(self, methods: Sequence[Method], values: Mapping[str, Value]) -> Trial:
        """One pass over all samples.

        Args:
            methods: to patch the model with.
            values: options to change in them, by the names of :func:`check_spaces`.

        Returns:
            A trial; one without an objective where the options do not run on this model.
        """
        cosines: list[Tensor] = []
        tokens: list[float] = []
        allowed: list[int] = []
        try:
            chosen = with_values(methods, values)
            with vtprune.patch(self.model, chosen[0] if len(chosen) == 1 else chosen) as patch:
                for inputs, reference in zip(self.batches, self.reference, strict=True):
                    cosines.append(
                        cosine_similarity(self._states(inputs).double(), reference.double(), dim=-1)
                    )
                    report = patch.report()
                    tokens += report.layer_average_tokens
                    allowed += [resolve_keep(self.keep, image.tokens_in) for image in report.images]
        except VTPruneError as error:
            return Trial(values, None, None, 0.0, str(error))
        value = float(torch.cat(cosines).mean())
        if not math.isfinite(value):
            return Trial(values, None, None, 0.0, "the model's states are not finite")
        return Trial(values, value, math.fsum(tokens) / len(tokens), math.fsum(tokens) / sum(allowed) - 1)


def search(
    model: nn.Module,
    processor: Any,
    methods: Sequence[Method],
    keep: int | float,
    spaces: Mapping[str, Space],
    samples: int | Sequence[Example] = SAMPLES,
    trials: int = TRIALS,
    *,
    seed: int = 0,
    sampler: SamplerName = "tpe",
    batch_size: int = BATCH_SIZE,
    storage: str | Path | None = None,
    name: str = "",
    on_trial: Callable[[int, Trial, Trial | None], None] = lambda number, trial, best: None,
) -> SearchResult:
    """Searches the options with which pruning changes a model's state the least.

    Maximises the mean over samples of cos(h_pruned, h_dense), h the last layer's state (as the head gets it) of the
    last prompt token. Trials whose visual tokens on the layer average exceed `keep` by more than 1 % are worth less
    than any other and are never the result. The given methods themselves are the first trial where they lie in
    `spaces`, so a search rarely ends below them. Every proposal depends on `seed` and on the finished trials alone,
    so a search that was cut off ends as one that was not.

    Source: objective and sizes from VFlowOpt (ICCV 2025; sihany077/VFlowOpt at 129eeef). They fit a Gaussian process
    and solve one ratio from the budget; here the budget is a constraint that is measured.

    Args:
        model: an unpatched model with a head.
        processor: its processor.
        methods: one, or several to apply one after the other, with their budgets and defaults.
        keep: the budget of the layer average: int = tokens per picture, float = ratio.
        spaces: option -> values to try; with several methods "0.option", "1.option".
        samples: questions about pictures, or how many of the picture world's validation questions.
        trials: how many sets of options to try in all, earlier ones in `storage` included.
        seed: of the proposals, and of the validation questions.
        sampler: "tpe" (tree of Parzen estimators), or "gp" (Gaussian process, needs scipy).
        batch_size: samples per call.
        storage: SQLite file that holds the finished trials; the same call goes on where it was cut off. None keeps
            them in memory. Two searches must not share one at the same time.
        name: of the model, noted in the result.
        on_trial: told of every finished trial: its number from 1, the trial, and the best one so far.

    Raises:
        InvalidOptionError: an unknown option, or values that it does not take.
        EvaluationError: optuna is missing, the methods as given do not run on the model, no trial kept the budget, the
            samples belong to a test split, or `storage` holds another search.
    """
    optuna = require_optuna()
    check_keep(keep)
    if trials < 1:
        raise EvaluationError("a search needs at least one trial.")
    methods = tuple(methods)
    spaces = check_spaces(methods, spaces)
    make_sampler = sampler_maker(sampler)
    asked = validation_questions(samples, seed) if isinstance(samples, int) else list(samples)
    if any(e.split in HELD_OUT for e in asked):
        raise EvaluationError(
            f"options must not be searched on the questions they are measured on ({', '.join(HELD_OUT)}); use the "
            f"split {SPLIT!r}."
        )
    configuration = {
        "methods": [{"method": m.key, "options": m.options()} for m in methods],
        "keep": keep,
        "spaces": {option: str(space) for option, space in spaces.items()},
        "samples": len(asked),
        "questions": _checksum(asked),
        "seed": seed,
        "sampler": sampler,
        "model": fingerprint(model),
    }
    with _quiet():
        study = _open(storage, configuration)
        states = optuna.trial.TrialState
        for cut_off in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            study.tell(cut_off.number, state=states.FAIL)
        done = study.get_trials(deepcopy=False, states=(states.COMPLETE,))
        finished = [_unpack(t.user_attrs["trial"]) for t in done]
        objective = Objective(model, Prompter(model, processor), asked, keep, batch_size)
        if "baseline" not in study.user_attrs:
            study.set_user_attr("baseline", _pack(objective(methods, {})))
        baseline = _unpack(study.user_attrs["baseline"])
        if baseline.objective is None:
            raise EvaluationError(
                f"the methods as they were given do not run on this model, so there is nothing to start from: "
                f"{baseline.reason}"
            )
        defaults = _defaults(methods, spaces)
        waiting = study.get_trials(deepcopy=False, states=(states.WAITING,))
        if not finished and not waiting and all(defaults[option] in spaces[option] for option in spaces):
            study.enqueue_trial(defaults)
        distributions = {option: _distribution(space) for option, space in spaces.items()}
        while len(finished) < trials:
            # Made anew, so that a proposal does not depend on how often the search was cut off.
            study.sampler = make_sampler(crc32(f"{seed} {len(finished)}".encode()))
            proposal = study.ask(distributions)
            try:
                values = {option: proposal.params[option] for option in spaces}
                # Whole numbers and choices run out; what has been tried before gives the same again.
                trial = next((t for t in finished if t.values == values), None) or objective(methods, values)
                proposal.set_user_attr("trial", _pack(trial))
            except BaseException:
                study.tell(proposal, state=states.FAIL)
                raise
            study.tell(proposal, trial.worth)
            finished.append(trial)
            on_trial(len(finished), trial, _best(finished))
    best = _best(finished)
    if best is None:
        raise EvaluationError(_nothing_accepted(finished, keep))
    return SearchResult(
        with_values(methods, best.values),
        keep,
        best,
        baseline,
        tuple(finished),
        {
            **{k: v for k, v in configuration.items() if k not in ("methods", "keep")},
            "given": configuration["methods"],
            "model": {"name": name, **fingerprint(model)},
            "command": command_line(),
            "versions": {**versions(), "optuna": optuna.__version__},
        },
        tuple(_notes(baseline, best, finished)),
    )


# What is searched ------------------------------------------------------------------------------------------------


def option_name(methods: Sequence[Method], number: int, option: str) -> str:
    """How an option is called in a search: with the number of its method where there are several."""
    return option if len(methods) == 1 else f"{number}.{option}"


def _split_name(methods: Sequence[Method], name: str) -> tuple[int, str]:
    """Number of the method and the option, from a name.

    Raises:
        InvalidOptionError: the name does not say which of several methods is meant.
    """
    number, _, option = name.rpartition(".")
    if len(methods) == 1:
        number, option = "0", name
    if not number.isdecimal() or int(number) >= len(methods):
        keys = ", ".join(f"{i}. for {m.key}" for i, m in enumerate(methods))
        raise InvalidOptionError(
            f"{name!r} does not say which method it belongs to; put its number in front: {keys}."
        )
    return int(number), option


def declared_spaces(
    methods: Sequence[Method], fixed: Sequence[Sequence[str]] | None = None
) -> dict[str, Space]:
    """What the methods themselves declare to be worth searching.

    Args:
        methods: the methods.
        fixed: per method, options that the user has set and that are not searched.
    """
    return {
        option_name(methods, number, option): space
        for number, method in enumerate(methods)
        for option, space in method.search_space.items()
        if fixed is None or option not in fixed[number]
    }


def left_alone(methods: Sequence[Method], spaces: Mapping[str, Space]) -> dict[str, object]:
    """Options that could be searched but have no values to try, with the values they keep."""
    return {
        name: getattr(method, option)
        for number, method in enumerate(methods)
        for option in searchable(type(method))
        if (name := option_name(methods, number, option)) not in spaces
    }


def check_spaces(methods: Sequence[Method], spaces: Mapping[str, Space]) -> dict[str, Space]:
    """Spaces in the types that the options take, sorted by name.

    Args:
        methods: the methods.
        spaces: option -> values to try; with several methods "0.option", "1.option".

    Raises:
        InvalidOptionError: an unknown option, values that it does not take, no method, or nothing to search.
    """
    if not methods:
        raise InvalidOptionError("a search needs at least one method.")
    idle = [m.key for m in methods if m.training_only]
    if idle:
        raise InvalidOptionError(
            f"{' and '.join(idle)} acts in training only, so no option of it changes what a search measures."
        )
    checked = {}
    for name, space in sorted(spaces.items()):
        number, option = _split_name(methods, name)
        checked[name] = fitted(type(methods[number]), option, space)
    if not checked:
        options = ", ".join(left_alone(methods, {}))
        raise InvalidOptionError(
            f"there is nothing to search: {' and '.join(m.key for m in methods)} "
            + (
                f"declares no ranges. Give some with --range or --choice for: {options}."
                if options
                else "has no numbers or choices among its options."
            )
        )
    return checked


def parse_space(text: str, kind: Literal["range", "choice"]) -> tuple[str, Space]:
    """Name and space from "option=low:high", "option=low:high:log" or "option=value,value".

    Raises:
        InvalidOptionError: it is written otherwise, or is no range or choice.
    """
    name, equals, rest = text.partition("=")
    if not name or not equals:
        form = "t=0:50" if kind == "range" else "scorer=cls,received"
        raise InvalidOptionError(f"{text!r} is no {kind}; write it like {form}.")
    if kind == "choice":
        return name, Choice(tuple(_value(part) for part in rest.split(",") if part))
    low, _, rest = rest.partition(":")
    high, _, scale = rest.partition(":")
    bounds = _value(low), _value(high)
    if scale not in ("", "log") or not all(type(b) in (int, float) for b in bounds):
        raise InvalidOptionError(f"{text!r} is no range; write it like t=0:50, t=0.0:0.9 or t=0.1:100.0:log.")
    return name, Range(typing.cast(float, bounds[0]), typing.cast(float, bounds[1]), scale == "log")


def _value(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)


def with_values(methods: Sequence[Method], values: Mapping[str, Value]) -> tuple[Method, ...]:
    """The methods with some options changed.

    Raises:
        InvalidOptionError: a value that a method does not take.
    """
    changes: list[dict[str, Any]] = [{} for _ in methods]
    for name, value in values.items():
        number, option = _split_name(methods, name)
        changes[number][option] = value
    return tuple(dataclasses.replace(m, **change) for m, change in zip(methods, changes, strict=True))


def _defaults(methods: Sequence[Method], spaces: Mapping[str, Space]) -> dict[str, Any]:
    found = {}
    for name in spaces:
        number, option = _split_name(methods, name)
        found[name] = getattr(methods[number], option)
    return found


# Samples and model -----------------------------------------------------------------------------------------------


def validation_questions(count: int, seed: int = 0) -> list[Example]:
    """Questions of the picture world's validation split, all kinds in turn.

    Raises:
        EvaluationError: fewer than one, or more than there are.
    """
    if count < 1:
        raise EvaluationError("a search needs at least one sample.")
    try:
        return examples(SPLIT, -(-count // len(KINDS)), seed)[:count]
    except ValueError as error:
        raise EvaluationError(f"{error}. Change the seed or the number of samples.") from error


def _checksum(samples: Sequence[Example]) -> str:
    value = 0
    for sample in samples:
        value = crc32(sample.image.tobytes(), crc32(sample.question.encode(), value))
    return f"{value:08x}"


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells a model from others: class, number of parameters, data type, and a checksum of some of its weights."""
    digest = hashlib.sha256()
    parameters = sorted(model.named_parameters())
    for name, value in parameters:
        flat = value.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
        digest.update(f"{name} {tuple(value.shape)}".encode() + some.numpy().tobytes())
    return {
        "class": type(model).__name__,
        "parameters": sum(value.numel() for _, value in parameters),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights": digest.hexdigest()[:16],
    }


# Optuna ----------------------------------------------------------------------------------------------------------


def require_optuna() -> Any:
    """The module.

    Raises:
        EvaluationError: it is not installed; says how to install it.
    """
    try:
        import optuna
    except ImportError as error:
        raise EvaluationError(
            f"a search needs optuna, which cannot be imported ({error}): pip install 'vtprune[search]'"
        ) from error
    return optuna


def sampler_maker(name: str) -> Callable[[int], BaseSampler]:
    """Makes samplers from seeds.

    Raises:
        InvalidOptionError: no such sampler.
        EvaluationError: it needs a package that is not installed.
    """
    optuna = require_optuna()

    def make(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            made: BaseSampler = (
                optuna.samplers.TPESampler(seed=seed, constant_liar=False)
                if name == "tpe"
                else optuna.samplers.GPSampler(seed=seed, deterministic_objective=True)
            )
        return made

    if name not in SAMPLERS:
        raise InvalidOptionError(f"there is no sampler {name!r}. {did_you_mean(name, SAMPLERS)}")
    # Optuna itself would find out in the middle of the search.
    if name == "gp" and importlib.util.find_spec("scipy") is None:
        raise EvaluationError("the sampler 'gp' needs scipy: pip install scipy, or use the sampler 'tpe'.")
    return make


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps optuna from logging every trial."""
    logging = require_optuna().logging
    level = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _distribution(space: Space) -> BaseDistribution:
    distributions = require_optuna().distributions
    made: BaseDistribution
    if isinstance(space, Choice):
        made = distributions.CategoricalDistribution(space.values)
    elif space.whole:
        made = distributions.IntDistribution(space.low, space.high, log=space.log)
    else:
        made = distributions.FloatDistribution(space.low, space.high, log=space.log)
    return made


def _open(storage: str | Path | None, configuration: Mapping[str, Any]) -> Study:
    """The study in a file, new or as it was left.

    Raises:
        EvaluationError: the file holds another search, or none.
    """
    optuna = require_optuna()
    text = json.dumps(configuration, sort_keys=True, default=str)
    if storage is None:
        backend: Any = optuna.storages.InMemoryStorage()
    else:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            backend = optuna.storages.RDBStorage(f"sqlite:///{Path(storage).resolve()}")
        except (SQLAlchemyError, optuna.exceptions.OptunaError, OSError, RuntimeError) as error:
            raise EvaluationError(
                f"{storage} is no file of an earlier search ({type(error).__name__}); delete it, or choose another "
                "output."
            ) from error
    study: Study = optuna.create_study(
        storage=backend, study_name=STUDY, direction="maximize", load_if_exists=True
    )
    if "configuration" not in study.user_attrs:
        study.set_user_attr("configuration", text)
    earlier, now = json.loads(study.user_attrs["configuration"]), json.loads(text)
    changed = [key for key in now if earlier.get(key) != now[key]]
    if changed:
        details = "; ".join(
            f"{key} was {_brief(earlier.get(key))}, now {_brief(now[key])}" for key in changed
        )
        raise EvaluationError(
            f"{storage} holds trials of another search, which cannot be mixed with this one: {details}. Repeat the "
            "earlier command to continue it, choose another output, or start over (--overwrite)."
        )
    return study


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def _pack(trial: Trial) -> str:
    return json.dumps(dataclasses.asdict(trial))


def _unpack(text: str) -> Trial:
    return Trial(**json.loads(text))


# Outcome ---------------------------------------------------------------------------------------------------------


def _best(trials: Sequence[Trial]) -> Trial | None:
    """The accepted trial of the largest objective, the earliest of equal ones."""
    return max((t for t in trials if t.accepted), key=lambda t: t.worth, default=None)


def _nothing_accepted(trials: Sequence[Trial], keep: int | float) -> str:
    ran = [t for t in trials if t.layer_average is not None]
    if not ran:
        return f"none of {len(trials)} trials could run; the first said: {trials[0].reason}"
    least = min(ran, key=lambda t: t.excess)
    return (
        f"none of {len(trials)} trials kept the budget {keep}: on the layer average the leanest left "
        f"{least.layer_average:.1f} visual tokens per sample, {100 * least.excess:.0f} % too many. Methods that prune "
        "between decoder layers leave all tokens to the layers before: give the method a smaller budget of its own "
        "(--method NAME:keep=...), or earlier layers."
    )


def _notes(baseline: Trial, best: Trial, trials: Sequence[Trial]) -> Iterator[str]:
    if not baseline.accepted:
        yield (
            f"the given options are over the budget by {100 * baseline.excess:.0f} %, so their objective is not "
            "comparable"
        )
    elif best.worth < baseline.worth:
        yield "the given options are better than the best of the ranges; use them, or search wider ranges"
    broken = sum(t.objective is not None and not t.accepted for t in trials)
    if broken:
        yield f"{broken} of {len(trials)} trials were over the budget and do not count"
    failed = [t for t in trials if t.objective is None]
    if failed:
        yield f"{len(failed)} of {len(trials)} trials did not run; the first said: {failed[0].reason}"
