"""What the key `vtprune` in `hf_overrides` says, checked before anything is loaded."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import vtprune
from vtprune import methods
from vtprune.errors import (
    InvalidOptionError,
    UnsupportedMethodError,
    UnsupportedModelError,
    VTPruneError,
)
from vtprune.integrations.vllm_plugin.families import FAMILIES, ONCE, PREFIX, Family
from vtprune.method import DECODER_SIGNALS, Method, ModelFacts, Sequential, Stage, compose, resolve_keep
from vtprune.methods import files
from vtprune.planning import Support, plan_stages, support

KEY = "vtprune"
EXAMPLE = '{"vtprune": {"method": "vtc-cls", "keep": 64}}'


class VLLMSettingsError(VTPruneError, RuntimeError):
    """Settings of vtprune in `hf_overrides` cannot be followed; says why, in the words of the error behind it.

    vLLM would wrap a ValueError into one of its own; this arrives as it is.
    """


@dataclass(frozen=True)
class Pruning:
    """A method on a model in vLLM.

    Attributes:
        method: the method.
        family: the model's family.
        facts: what the method knows of the model.
        stages: its decisions along the forward pass.
    """

    method: Method
    family: Family
    facts: ModelFacts
    stages: Sequence[Stage]

    def left(self, n: int) -> int:
        """Tokens that stay of an encoder image that shows `n`."""
        budgets = [resolve_keep(stage.keep, n) for stage in self.stages if stage.keep is not None]
        return min([n, *budgets])

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that tell this method with these options, and this vtprune, from all others."""
        said = {"vtprune": vtprune.__version__, "method": self.method.key, "options": self.method.options()}
        text = json.dumps(said, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def asked_for(config: Any) -> bool:
    """Whether a model's configuration holds the key.

    Raises:
        VLLMSettingsError: it holds a key that looks like a misspelt one.
    """
    if getattr(config, KEY, None) is not None:
        return True
    for name, value in vars(config).items():
        near = difflib.SequenceMatcher(None, name.lower(), KEY).ratio() > 0.8
        if near and name != KEY and isinstance(value, Mapping) and "method" in value:
            raise VLLMSettingsError(
                f"hf_overrides has the key {name!r}. Did you mean {KEY!r}? Example: {EXAMPLE}."
            )
    return False


def pruning_of(
    config: Any, folder: str | None, implementation: str = "auto", architectures: Sequence[str] | None = None
) -> Pruning:
    """Reads and checks what a model's configuration asks for.

    Args:
        config: the model's configuration of transformers, with the key `vtprune`.
        folder: where its checkpoint is; learned parameters are looked for there.
        implementation: vLLM's `model_impl`.
        architectures: the model's architectures, if not those of the configuration.

    Raises:
        VLLMSettingsError: the method, an option, the count or the model does not fit.
    """
    try:
        family = _family(list(architectures or config.architectures or []), implementation)
        method = _method(getattr(config, KEY, None))
        return _checked(method, family, family.facts(config, folder), config)
    except VTPruneError as error:
        raise VLLMSettingsError(f"hf_overrides[{KEY!r}]: {error}") from error


def _family(architectures: list[str], implementation: str) -> Family:
    names = [name.removeprefix(PREFIX) for name in architectures]
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        name = names[0] if names else "no architecture"
        why = REFUSED.get(name, "")
        raise UnsupportedModelError(
            f"{name} cannot be pruned in vLLM{why}. Supported: {', '.join(FAMILIES)}."
        )
    if implementation not in ("auto", "vllm"):
        raise UnsupportedModelError(
            f"model_impl={implementation!r} replaces vLLM's own {family.architecture}; leave it at 'auto'."
        )
    return family


_MROPE = ": its M-RoPE positions are made from whole grids, and vLLM puts them right for pruned videos only, not for pictures"
REFUSED = {
    name: _MROPE
    for name in (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    )
}


def _method(value: object) -> Method:
    """The method that the key's value describes."""
    if isinstance(value, (list, tuple)) and value:
        return compose(*(_method(part) for part in value))
    if not isinstance(value, Mapping) or not isinstance(value.get("method"), (str, os.PathLike)):
        raise InvalidOptionError(
            f"{value!r} names no method; give e.g. {EXAMPLE}, or a list of such settings."
        )
    options = {name: _as_tuple(option) for name, option in value.items() if name != "method"}
    name = value["method"]
    if not files.names_file(name):
        return methods.create(str(name), **options)
    if options:
        raise InvalidOptionError(
            f"the file {os.fspath(name)} carries its own options; leave out {', '.join(sorted(options))}."
        )
    return files.load(name).method


def _as_tuple(value: object) -> object:
    """JSON has no tuples, which options of methods are."""
    return tuple(_as_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


def _checked(method: Method, family: Family, facts: ModelFacts, config: Any) -> Pruning:
    for part in _parts(method):
        if part.training_only:
            raise UnsupportedMethodError(
                f"method {part.key!r} acts in training only, and vLLM does not train."
            )
        if part.positions == "original":
            raise InvalidOptionError(
                f"method {part.key!r} with positions='original': vLLM numbers the tokens of a prompt without gaps; use 'auto' or "
                "'dense'."
            )
    stages = _stages(method, facts)
    if stages[-1].keep is None:
        raise UnsupportedMethodError(
            f"the number of tokens that {method.key!r} keeps follows from the picture, but vLLM sizes the placeholders of a "
            "prompt before it has seen it; give keep=N or keep=RATIO."
        )
    rows, cols = family.grid(config)
    for stage in stages:
        if isinstance(stage.keep, int) and stage.keep > rows * cols:
            raise InvalidOptionError(
                f"keep={stage.keep} would remove nothing: a picture (or a tile of one) has {rows * cols} tokens in this "
                f"{family.architecture}; give an int up to {rows * cols}, or a ratio."
            )
    return Pruning(method, family, facts, stages)


def _parts(method: Method) -> Iterable[Method]:
    return [p for m in method.methods for p in _parts(m)] if isinstance(method, Sequential) else [method]


def _stages(method: Method, facts: ModelFacts) -> list[Stage]:
    try:
        stages = plan_stages(method, facts)
        _check_loaded(stages, facts)
    except UnsupportedMethodError as error:
        reason = str(error).rstrip(".")
        own = support(type(method), facts)
        if own.works and own.options:
            reason += f"; use {', '.join(f'{name}={value!r}' for name, value in own.options.items())}"
        elif ONCE not in reason and _reads_prompt(method, facts):
            reason += f": {ONCE}"
        others = ", ".join(str(one) for one in runnable(facts))
        raise UnsupportedMethodError(
            f"method {method.key!r} cannot run on {facts.name}: {reason}. Methods that work there: {others}."
        ) from error
    if not stages:
        raise UnsupportedMethodError(f"method {method.key!r} decides about no tokens on {facts.name}.")
    return stages


def _check_loaded(stages: Sequence[Stage], facts: ModelFacts) -> None:
    """Raises UnsupportedMethodError if a method reads layers behind the one whose output is used, as its authors do."""
    beyond = [s for stage in stages for s in stage.needs if s.layer >= facts.encoder_layers]
    if beyond:
        raise UnsupportedMethodError(
            f"it reads {beyond[0].kind} of encoder layer {beyond[0].layer}, but vLLM loads only the {facts.encoder_layers} layers "
            "whose output is used."
        )


def runnable(facts: ModelFacts) -> list[Support]:
    """Methods that can run on a model in vLLM, with the options that they need there beside their defaults."""
    found = []
    for cls in methods.REGISTRY.values():
        one = support(cls, facts)
        if one.works and not one.training:
            try:
                _check_loaded(plan_stages(methods.create(one.method, keep=0.5, **one.options), facts), facts)
            except UnsupportedMethodError:
                continue
            found.append(one)
    return sorted(found, key=str)


def _reads_prompt(method: Method, facts: ModelFacts) -> bool:
    """Whether a method wants something that only a language model with its prompt has."""
    try:
        stages = method.stages(facts)
    except VTPruneError:
        return False
    return any(s.site.kind == "decoder" or any(n.kind in DECODER_SIGNALS for n in s.needs) for s in stages)
