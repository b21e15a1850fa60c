"""Image-token pruning in stock vLLM, as a plugin that vLLM finds by itself.

vLLM calls :func:`register` in each of its processes. A model is pruned if its `hf_overrides` hold the key `vtprune`::

    LLM(model, hf_overrides={"vtprune": {"method": "vtc-cls", "keep": 64}})

All other models are vLLM's own classes, untouched. See `docs/vllm.md`.
"""

from vtprune.integrations.vllm_plugin.registration import register

__all__ = ["register"]
