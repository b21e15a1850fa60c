"""Exceptions. Everything vtprune raises on purpose derives from :class:`VTPruneError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VTPruneError(Exception):
    """Base class of all errors raised by vtprune."""


class UnknownMethodError(VTPruneError, KeyError):
    """No method is registered under the given name."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class InvalidOptionError(VTPruneError, ValueError):
    """An option has an unknown name, or a value outside its range."""


class UnsupportedModelError(VTPruneError, TypeError):
    """No integration knows this model."""


class UnsupportedMethodError(VTPruneError, TypeError):
    """The model cannot provide what the method needs (a site, a signal, a position policy)."""


class AlreadyPatchedError(VTPruneError, RuntimeError):
    """The model already carries a patch."""


class UnsupportedCallError(VTPruneError, RuntimeError):
    """This call cannot be pruned correctly (static cache, 4D mask, cut-up image, ...)."""


class NonFiniteScoresError(VTPruneError, FloatingPointError):
    """A method produced NaN scores, so no selection can be trusted."""


class InertPruningError(VTPruneError, RuntimeError):
    """The call held visual tokens and the method had to prune some, but none was removed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The sentence that ends an unknown-name message: the nearest names, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    return f"Known: {', '.join(known)}."
