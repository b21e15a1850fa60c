"""Learned parameters of methods: small safetensors files, given by path or found beside the model's checkpoint.

`vtprune train` writes them. What a file was trained for stands in its metadata and is compared with what it is used for.
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from vtprune.errors import InvalidOptionError, UnsupportedMethodError
from vtprune.method import Method, ModelFacts, resolve_keep

FOLDER, SUFFIX = "vtprune", ".safetensors"
FORMAT = "vtprune-weights 1"
# Options that do not change what the parameters mean, or that they replace.
FREE = ("keep", "positions", "weights", "threshold", "thresholds")

M = TypeVar("M", bound="Trained")


@dataclass(frozen=True, kw_only=True)
class Trained(Method):
    """Base of methods that have learned parameters.

    Attributes:
        weights: path of a file that `vtprune train` wrote; None = `vtprune/<method>-<tokens>.safetensors` in the folder
            of the model's checkpoint, for the budget asked for.
    """

    weights: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:  # a path would not fit into reports
            object.__setattr__(self, "weights", os.fspath(self.weights))

    @property
    @abstractmethod
    def parameters(self) -> Sequence[str]:
        """Names of the tensors that have to be there."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The learned parameters of a method that is located."""
        assert self.weights is not None
        return load(self.weights)[0]


def located(method: M, facts: ModelFacts) -> M:
    """The same method with the path of its weights, checked against its options and the model.

    Raises:
        UnsupportedMethodError: there are none for this model and budget; says how to train them.
        InvalidOptionError: the file is damaged, or of another method, model or set of options.
    """
    if method.weights is None:
        method = replace(method, weights=_beside(method, facts))
    _check(method, facts)
    return method


def load(path: str | os.PathLike[str]) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """Tensors (float32, on CPU) and metadata of a file; read again only when it has changed.

    Raises:
        InvalidOptionError: there is no such file, or it is no safetensors file.
    """
    try:
        return _load(os.fspath(path), os.stat(path).st_mtime_ns)
    except Exception as error:
        raise InvalidOptionError(
            f"weights={os.fspath(path)!r} cannot be read ({type(error).__name__}: {error}); give a file that "
            "`vtprune train` wrote."
        ) from error


@lru_cache(maxsize=16)
def _load(path: str, changed: int) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file; one that is there is replaced at once or not at all."""
    from safetensors.torch import save as packed

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".part")
    draft.write_bytes(
        packed({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, dict(metadata))
    )
    draft.replace(target)


def described(method: Trained) -> dict[str, Any]:
    """Options that decide what learned parameters mean, ready for JSON."""
    options: dict[str, Any] = {f.name: getattr(method, f.name) for f in fields(method) if f.name not in FREE}
    restored: dict[str, Any] = json.loads(json.dumps(options))
    return restored


def beside(folder: str, key: str) -> dict[int, tuple[Path, int]]:
    """Weights of a method in a checkpoint's folder: budget in tokens -> file and tokens of a whole picture."""
    found = {}
    for path in sorted(Path(folder, FOLDER).glob(f"{key}-*{SUFFIX}")):
        metadata = load(path)[1]
        if metadata.get("method") == key:
            found[int(metadata["keep"])] = (path, int(metadata["tokens"]))
    return dict(sorted(found.items()))


def _beside(method: Trained, facts: ModelFacts) -> str:
    keep: int | float | None = getattr(method, "keep", None)
    known = {} if facts.folder is None else beside(facts.folder, method.key)
    if keep is not None:
        for budget, (path, tokens) in known.items():
            if resolve_keep(keep, tokens) == budget:
                return str(path)
    there = ", ".join(f"{budget} of {tokens}" for budget, (_, tokens) in known.items())
    why = (
        f"there are none for keep={keep} beside the checkpoint"
        if facts.folder is not None
        else "the model comes from no local folder in which they could be found"
    )
    wanted = "N" if keep is None else keep
    model, output = facts.folder or "CHECKPOINT", f"{method.key}-{wanted}{SUFFIX}"
    if facts.folder is not None:
        output = str(Path(facts.folder, FOLDER, output))
    raise UnsupportedMethodError(
        f"its parameters are learned and {why}{f' (there are: keep={there} tokens)' if there else ''}. Train them: "
        f"`vtprune train {method.key} --model {model} --keep {wanted} --output {output}`, then give weights={output!r}"
        + (", or leave it out: this file is found by itself." if facts.folder else ".")
    )


def _check(method: Trained, facts: ModelFacts) -> None:
    assert method.weights is not None
    path = os.fspath(method.weights)
    tensors, metadata = load(path)
    again = f"Train others: `vtprune train {method.key} --help`."
    missing = [name for name in method.parameters if name not in tensors]
    if missing:
        raise InvalidOptionError(f"weights={path!r} lack {', '.join(missing)}. {again}")
    if metadata.get("format") != FORMAT:
        return  # made by somebody's own training: tensors only
    if metadata["method"] != method.key:
        raise InvalidOptionError(
            f"weights={path!r} are of {metadata['method']!r}, not of {method.key!r}. {again}"
        )
    for name, value in json.loads(metadata["options"]).items():
        if described(method).get(name) != value:
            raise InvalidOptionError(
                f"weights={path!r} were trained with {name}={value}, not {described(method).get(name)}. {again}"
            )
    if facts.fingerprint is not None and facts.fingerprint() != metadata["fingerprint"]:
        raise InvalidOptionError(
            f"weights={path!r} were trained on another {metadata['model']} (fingerprint {metadata['fingerprint']}; "
            f"this {facts.name} has {facts.fingerprint()}). {again}"
        )
