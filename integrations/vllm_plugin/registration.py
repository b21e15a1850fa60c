"""Makes vLLM load our classes for models whose configuration asks for pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vtprune.errors import VTPruneError
from vtprune.integrations.vllm_plugin.families import FAMILIES, PREFIX
from vtprune.integrations.vllm_plugin.settings import asked_for, pruning_of

MODELS = "vtprune.integrations.vllm_plugin.models"
LOOKUPS = ("inspect_model_cls", "resolve_model_cls")
_MARK = "_vtprune_redirects"


def register() -> None:
    """Registers the pruned architectures with vLLM; safe to call again.

    They have names of their own. So that the key `vtprune` in `hf_overrides` is enough, and can never be ignored in
    silence, lookups in vLLM's registry are redirected to them for a configuration that holds it.

    Raises:
        VTPruneError: this version of vLLM has no such registry.
    """
    from vllm import ModelRegistry

    for family in FAMILIES.values():
        if family.pruned not in ModelRegistry.models:
            ModelRegistry.register_model(family.pruned, f"{MODELS}:{family.model}")
    if getattr(ModelRegistry, _MARK, False):
        return
    missing = [name for name in LOOKUPS if not hasattr(ModelRegistry, name)]
    if missing:
        raise VTPruneError(
            f"vLLM's model registry has no {', '.join(missing)}, so this version of vLLM cannot be told to prune; use vllm "
            "0.32, or leave the plugin out with VLLM_PLUGINS=''."
        )
    for name in LOOKUPS:
        setattr(ModelRegistry, name, _redirected(getattr(ModelRegistry, name)))
    setattr(ModelRegistry, _MARK, True)


def _redirected(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A lookup by architectures that sees ours where a configuration asks for pruning."""

    @functools.wraps(stock)
    def lookup(architectures: str | list[str], model_config: Any) -> Any:
        given = [architectures] if isinstance(architectures, str) else list(architectures)
        config = model_config.hf_config
        if asked_for(config) or any(a.startswith(PREFIX) for a in given):
            architectures = [
                pruning_of(config, model_config.model, model_config.model_impl, given).family.pruned
            ]
            # vLLM caches classes by these names; under the stock one a pruned and a dense engine would share a class.
            config.architectures = list(architectures)
            model_config.model_arch_config.architectures = list(architectures)
        return stock(architectures, model_config)

    return lookup
