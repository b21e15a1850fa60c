"""A journal of every change made to a model, and its exact reversal."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vtprune.errors import InertPruningError, UnsupportedCallError, VTPruneError


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
        self._hooks: list[tuple[weakref.ref[nn.Module], RemovableHandle]] = []
        self._places: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Registers a forward pre-hook `(module, args, kwargs) -> None | (args, kwargs)`."""
        self._add(module, module.register_forward_pre_hook(hook, with_kwargs=True))

    def hook(
        self, module: nn.Module, hook: Callable[..., Any], always: bool = False, first: bool = False
    ) -> None:
        """Registers a forward hook `(module, args, kwargs, output) -> None | output`.

        Args:
            always: call it also when the forward raised (then `output` is None).
            first: call it before the hooks that the module has already.
        """
        handle = module.register_forward_hook(hook, with_kwargs=True, always_call=always, prepend=first)
        self._add(module, handle)

    def _add(self, module: nn.Module, handle: RemovableHandle) -> None:
        self._undo.append(handle.remove)
        self._hooks.append((weakref.ref(module), handle))

    def lost(self) -> list[str]:
        """Classes of modules whose hooks somebody else has removed."""
        gone = []
        for module, handle in self._hooks:
            hooks = handle.hooks_dict_ref()
            if hooks is None or handle.id not in hooks:
                gone.append(type(module()).__name__)
        return sorted(set(gone))

    def settle(self, model: nn.Module) -> None:
        """Remembers where in a model the hooked modules stand, for :meth:`check`; to be called after the last hook."""
        hooked = {id(module()) for module, _ in self._hooks}
        places: dict[tuple[int, str], tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        for path, module in model.named_modules():
            if id(module) not in hooked:
                continue
            parent = model
            for name in path.split(".") if path else ():
                children = parent._modules  # not the parent, lest a model be kept alive by its patch
                parent = parent.get_submodule(name)
                places[id(children), name] = (children, name, parent)
        self._places = list(places.values())

    def moved(self) -> list[str]:
        """Names and classes of hooked modules, or of what holds them, that somebody else has replaced."""
        return [
            f"{name!r} ({_kind(module)}, now {_kind(children.get(name))})"
            for children, name, module in self._places
            if children.get(name) is not module
        ]

    def check(self) -> None:
        """Raises InertPruningError if hooks were removed, or hooked modules replaced, behind the journal's back."""
        moved = self.moved()
        if moved:
            more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
            raise InertPruningError(
                f"other code replaced {', '.join(moved[:3])}{more} after patching (adding, merging or unloading an adapter, "
                "or quantising, does so), so vtprune would read or prune the wrong tokens. Remove the patch and patch again; "
                "change the modules of a model before patching it."
            )
        gone = self.lost()
        if gone:
            raise InertPruningError(
                f"hooks on {', '.join(gone)} were removed by other code, so tokens would not be pruned as they have "
                "to be. Remove the patch and patch again."
            )

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
        self._hooks.clear()
        self._places.clear()
        while self._undo:
            self._undo.pop()()


def _kind(module: nn.Module | None) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def refuse_rerun(layers: Sequence[nn.Module]) -> None:
    """Raises UnsupportedCallError if gradient checkpointing would run hooks of these layers again in the backward pass.

    Until transformers 5.20 it wraps a layer's `__call__`, hooks included, rather than its `forward`. To be called
    before the first layer: an exception inside a checkpoint leaves it open.
    """
    for layer in layers:
        wrapped = type(layer).__call__ is not nn.Module.__call__
        if (
            wrapped
            and layer.training
            and getattr(layer, "gradient_checkpointing", False)
            and torch.is_grad_enabled()
        ):
            raise UnsupportedCallError(
                f"gradient checkpointing of {type(layer).__name__} in this version of transformers runs layers again "
                "together with their hooks in the backward pass, where tokens cannot be removed a second time; update "
                "transformers to 5.23, call gradient_checkpointing_disable(), or prune outside these layers"
            )


COMPILED = (
    "torch.compile cannot run a patched model: token counts are data, and compiled code does not notice that hooks come and "
    "go. Call the model that is not compiled, or remove the patch"
)


def refuse_compiled(*hooked: Any) -> None:
    """Raises UnsupportedCallError in code that torch.compile runs; a forward pre-hook, if called with its arguments."""
    if "torch._dynamo" not in sys.modules:
        return
    if torch.compiler.is_compiling():
        raise UnsupportedCallError(COMPILED)
    # An error ends the tracing only; what could not be traced runs as it is, but still under this callback.
    frames: Any = getattr(torch._C, "_dynamo", None)
    if getattr(getattr(frames, "eval_frame", None), "get_eval_frame_callback", lambda: None)():
        raise UnsupportedCallError(COMPILED)
