"""What a task of lmms-eval asks of generation, in the words of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from vtprune.errors import InvalidOptionError, did_you_mean

NEW_TOKENS = 1024  # where a task says nothing, as lmms-eval's own models have it
# Of the preprocessing of other model classes; with transformers the processor decides.
OF_OTHER_MODELS = ("image_aspect_ratio",)


@dataclass(frozen=True)
class Wanted:
    """Generation settings of a task.

    Attributes:
        options: keyword arguments of `generate`.
        stops: the answer ends before the first of these strings.
        ignored: names that have no meaning here.
    """

    options: dict[str, Any]
    stops: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def cut(self, text: str) -> str:
        """The answer without what follows a stop string."""
        for stop in self.stops:
            text = text.split(stop)[0]
        return text


def wanted(given: Mapping[str, Any]) -> Wanted:
    """Reads `generation_kwargs` of a task.

    Without `do_sample`, a temperature above 0 means sampling, as in lmms-eval's own models. Greedy decoding takes no
    temperature, top_p or top_k.

    Raises:
        InvalidOptionError: a name that transformers does not know, or a value that cannot be.
    """
    rest = dict(given)
    until = rest.pop("until", None) or []
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidOptionError(f"generation_kwargs until={until!r}: give a string or a list of strings.")
    ignored = tuple(name for name in OF_OTHER_MODELS if name in rest)
    for name in ignored:
        del rest[name]
    if "max_gen_toks" in rest:
        rest.setdefault("max_new_tokens", rest.pop("max_gen_toks"))
        rest.pop("max_gen_toks", None)
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in rest:
        if name not in known:
            raise InvalidOptionError(
                f"generation_kwargs of a task has {name!r}, which generate() does not take. {did_you_mean(name, known)}"
            )
    if rest.get("num_return_sequences", 1) != 1:
        raise InvalidOptionError("generation_kwargs num_return_sequences: a request has one answer.")
    temperature = rest.get("temperature")
    hot = temperature is not None and float(temperature) > 0
    sample = bool(rest.get("do_sample", hot)) and (hot or temperature is None)
    options = {"num_beams": 1, "max_new_tokens": NEW_TOKENS, **rest, "do_sample": sample}
    if not sample:
        options.update(temperature=None, top_p=None, top_k=None)
    return Wanted(options, tuple(stop for stop in stops if stop), ignored)


def same(requests: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Numbers of requests with the same settings, each list in order."""
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(requests):
        groups.setdefault(repr(sorted(one.items(), key=lambda item: item[0])), []).append(number)
    return list(groups.values())
