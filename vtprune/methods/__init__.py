"""Published methods, one file each. Adding a line here registers a method everywhere."""

from __future__ import annotations

import dataclasses

from vtprune.errors import InvalidOptionError, UnknownMethodError, did_you_mean
from vtprune.method import Method, Sequential
from vtprune.methods.divprune import DivPrune as DivPrune
from vtprune.methods.fastv import FastV as FastV
from vtprune.methods.keep_all import KeepAll as KeepAll
from vtprune.methods.random import Random as Random
from vtprune.methods.stride import Stride as Stride
from vtprune.methods.visionzip import VisionZip as VisionZip
from vtprune.methods.vtc_cls import VTCCls as VTCCls

REGISTRY: dict[str, type[Method]] = {
    cls.key: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, Method) and cls not in (Method, Sequential)
}


def method_class(name: str) -> type[Method]:
    """The class registered under a key.

    Raises:
        UnknownMethodError: no such key; names the nearest ones.
    """
    try:
        return REGISTRY[name]
    except KeyError:
        raise UnknownMethodError(f"there is no method {name!r}. {did_you_mean(name, REGISTRY)}") from None


def create(name: str, **options: object) -> Method:
    """A method from its registry key and options.

    Raises:
        UnknownMethodError: no such key.
        InvalidOptionError: unknown, missing or out-of-range option.
    """
    cls = method_class(name)
    known = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise InvalidOptionError(
                f"method {name!r} has no option {option!r}. {did_you_mean(option, known)}"
            )
    try:
        return cls(**options)  # type: ignore[arg-type]
    except TypeError as error:
        raise InvalidOptionError(f"method {name!r}: {error}. Options: {', '.join(known)}.") from error
