"""A journal of every change made to a model, and its exact reversal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vtprune.errors import UnsupportedCallError, VTPruneError


class Bound:
    """Base of objects whose methods are hooks: they belong to one model and refuse to be copied with it."""

    def __reduce_ex__(self, protocol: object) -> Any:
        raise VTPruneError(
            "a patched model cannot be deep-copied or pickled, its hooks belong to it alone; remove the patch, copy, "
            "and patch the copy (state_dict() and save_pretrained() work on patched models)"
        )


class Journal:
    """Records hooks and instance attributes so that all of them can be undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Registers a forward pre-hook `(module, args, kwargs) -> None | (args, kwargs)`."""
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def hook(self, module: nn.Module, hook: Callable[..., Any], always: bool = False) -> None:
        """Registers a forward hook `(module, args, kwargs, output) -> None | output`.

        Args:
            always: call it also when the forward raised (then `output` is None).
        """
        self._undo.append(module.register_forward_hook(hook, with_kwargs=True, always_call=always).remove)

    def attribute(self, owner: object, name: str, value: object) -> None:
        """Sets an instance attribute, remembering whether and how it was set before."""
        before = vars(owner).get(name, self)

        def undo() -> None:
            if before is self:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)
        setattr(owner, name, value)

    def refuse(self, owner: object, name: str, reason: str) -> None:
        """Shadows a method of one object by one that raises UnsupportedCallError."""

        def refusal(*args: Any, **kwargs: Any) -> Any:
            raise UnsupportedCallError(
                f"{reason} ({type(owner).__name__}.{name} was called on a patched model)"
            )

        self.attribute(owner, name, refusal)

    def revert(self) -> None:
        """Undoes everything, last change first. Safe to call twice."""
        while self._undo:
            self._undo.pop()()
