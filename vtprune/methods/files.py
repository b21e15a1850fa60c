"""Methods as files: what `vtprune search` writes, and `vtprune.patch(model, "found.json")` reads."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from vtprune import methods
from vtprune.errors import InvalidOptionError, VTPruneError
from vtprune.method import Method, check_keep, compose

FORMAT, VERSION = "vtprune-method", 1
SUFFIX = ".json"


@dataclass(frozen=True)
class MethodFile:
    """Methods with their options, and where they come from.

    Attributes:
        path: the file.
        methods: in the order in which they were given.
        keep: the budget that they were chosen for.
        model_class: class of the model that they were chosen on.
        record: everything in the file.
    """

    path: str
    methods: tuple[Method, ...]
    keep: int | float
    model_class: str
    record: Mapping[str, Any]

    @property
    def method(self) -> Method:
        """All methods as one."""
        return self.methods[0] if len(self.methods) == 1 else compose(*self.methods)

    def note(self, model_class: str) -> str | None:
        """What a user of another model has to know; None on a model of the same class."""
        if model_class == self.model_class:
            return None
        return (
            f"the options in {self.path} were searched on a {self.model_class}; this is a {model_class}, for which "
            "others may be better"
        )


def names_file(method: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether this says where a file is: a path, or text that ends in ".json"."""
    return isinstance(method, os.PathLike) or (isinstance(method, str) and method.endswith(SUFFIX))


def load(path: str | os.PathLike[str]) -> MethodFile:
    """Reads a file that :func:`dump` or `vtprune search` wrote.

    Raises:
        InvalidOptionError: there is no such file, it is none of vtprune's, of another version, or damaged.
    """
    name = os.fspath(path)
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InvalidOptionError(
            f"cannot read the method file {name!r}: {reason}. Give a file that `vtprune search` wrote."
        ) from error
    except json.JSONDecodeError as error:
        raise InvalidOptionError(
            f"the method file {name!r} is damaged: no JSON at line {error.lineno}, column {error.colno}. Run "
            "`vtprune search` again."
        ) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InvalidOptionError(
            f"{name!r} is no method file of vtprune (no format {FORMAT!r}). Give a file that `vtprune search` wrote."
        )
    if record.get("version") != VERSION:
        raise InvalidOptionError(
            f"the method file {name!r} has format version {record.get('version')!r}; this vtprune reads version "
            f"{VERSION}. Use the vtprune that wrote it, or run `vtprune search` again."
        )
    try:
        parts = tuple(methods.create(part["method"], **part["options"]) for part in record["methods"])
        check_keep(record["keep"])
        if not parts:
            raise InvalidOptionError("it holds no method")
        return MethodFile(name, parts, record["keep"], str(record["model"]["class"]), record)
    except VTPruneError as error:
        raise InvalidOptionError(f"the method file {name!r}: {error}") from error
    except (KeyError, TypeError) as error:
        raise InvalidOptionError(
            f"the method file {name!r} is damaged: {type(error).__name__} {error}. Run `vtprune search` again."
        ) from error


def dump(
    path: str | os.PathLike[str],
    chosen: Sequence[Method],
    keep: int | float,
    model: Mapping[str, Any],
    **more: Any,
) -> None:
    """Writes a file; one that is there is replaced at once or not at all.

    Args:
        path: its name should end in ".json".
        chosen: registered methods.
        keep: the budget that they were chosen for.
        model: at least its "class".
        **more: anything else worth knowing, ready for JSON.

    Raises:
        InvalidOptionError: a method is not registered, so that no other program could make it from its key.
    """
    record = {
        "format": FORMAT,
        "version": VERSION,
        "methods": [describe(method) for method in chosen],
        "keep": keep,
        "model": dict(model),
        **more,
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".part")
    draft.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(target)


def describe(method: Method) -> dict[str, Any]:
    """Key and options of a registered method, ready for JSON.

    Raises:
        InvalidOptionError: it is not registered.
    """
    if methods.REGISTRY.get(method.key) is not type(method):
        raise InvalidOptionError(
            f"{type(method).__name__} is not registered, so a file cannot name it; add it to vtprune.methods.REGISTRY."
        )
    return {
        "method": method.key,
        "options": {f.name: getattr(method, f.name) for f in dataclasses.fields(method)},
    }
