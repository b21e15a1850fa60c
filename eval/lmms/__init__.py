"""lmms-eval: vtprune as a model of it, the picture world as tasks of it, and its results in our format.

The model id `vtprune` reaches lmms-eval by the entry point group `lmms_eval.models`; nothing here is imported before
lmms-eval asks for it, and nothing in lmms-eval is changed.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "vtprune"


def manifest() -> Any:
    """What lmms-eval registers: a ``ModelManifest`` with a class for chat tasks, and one for ``--force_simple``.

    Log-likelihood tasks (`multiple_choice`) exist in lmms-eval for the simple kind only.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        MODEL_ID,
        simple_class_path="vtprune.eval.lmms.model.VTPruneSimple",
        chat_class_path="vtprune.eval.lmms.model.VTPruneChat",
    )
