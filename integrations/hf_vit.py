"""Vision encoders of transformers alone: CLIP, SigLIP, ViT, DINOv2 (with registers) and DINOv3."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.errors import UnsupportedCallError, UnsupportedModelError
from vtprune.integrations.base import AttentionTap, Integration, encoder_facts
from vtprune.integrations.hf import padding_reason, split_heads
from vtprune.integrations.towers import BatchedViT

# Models, and versions of transformers between 5.16 and 5.23, differ in these names.
LAYERS = ("encoder.layers", "encoder.layer", "model.layer", "layers")
ATTENTIONS = ("attention.attention", "self_attn", "attention")
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
OUTPUTS = ("self_attn.out_proj", "attention.o_proj", "attention.output.dense")


def integrate(model: nn.Module) -> Integration:
    """Describes a vision encoder of transformers.

    Site `vit` removes tokens between layers, site `encoder` behind the last layer, so `last_hidden_state` is
    [B, prefix + kept, D] and `pooler_output` is made of survivors. Where images of a batch keep different counts,
    rows behind an image's survivors are padding.

    Raises:
        UnsupportedModelError: the layout is unknown.
    """
    name, net = type(model).__name__, model
    config: Any = model.config
    layers: list[Any] = list(_first(net, LAYERS, name).children())
    attentions = [_first(layer, ATTENTIONS, name) for layer in layers]
    embeddings: Any = _first(net, ("embeddings",), name)
    has_cls = any(hasattr(embeddings, token) for token in ("cls_token", "class_embedding"))
    registers = getattr(embeddings, "register_tokens", None)
    prefix = int(has_cls) + (0 if registers is None else registers.shape[1])
    takes_mask = "attention_mask" in inspect.signature(type(layers[0]).forward).parameters
    mask_reason = padding_reason(config)

    size: Any = config.patch_size
    rows, cols = (size, size) if isinstance(size, int) else size

    def tap(layer: int) -> AttentionTap:
        attn: Any = attentions[layer]
        names = next((three for three in PROJECTIONS if hasattr(attn, three[0])), None)
        if names is None:
            raise UnsupportedModelError(f"{name} has no separate query and key projections in its attention")
        projections: Any = tuple(attn.get_submodule(n) for n in names)
        head_dim = projections[0].out_features // config.num_attention_heads

        def heads(outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (split_heads(x, head_dim) for x in outputs)
            tables = kwargs.get("position_embeddings")
            if tables is not None:
                q, k = sys.modules[type(attn).__module__].apply_rotary_pos_emb(q, k, *tables)
            return q, k, v

        # Where the output projection stands beside the attention proper, it runs behind it, inside the same parent.
        whole = _first(layers[layer], ("self_attn", "attention"), name)
        return AttentionTap(whole, projections, heads, head_dim**-0.5, _first(layers[layer], OUTPUTS, name))

    def visible(kwargs: Mapping[str, Any]) -> None:
        if kwargs.get("attention_mask") is not None:
            raise UnsupportedCallError(
                f"{name} was called with an attention_mask, which neither fits pruned tokens nor reaches the measured "
                "signals; leave it out"
            )

    def accepts_ragged() -> str | None:
        return mask_reason() if takes_mask else f"the layers of {name} take no padding mask"

    def pools() -> str | None:
        return f"the pooling head of {name} would attend to the padding" if hasattr(net, "head") else None

    tower = BatchedViT(
        module=model,
        layers=layers,
        used_layers=len(layers),
        projector=None,
        restores=False,
        has_cls=has_cls,
        prefix=prefix,
        projector_prefix=prefix,
        grid=lambda height, width: (height // rows, width // cols),
        patch=(rows, cols),
        tap=tap,
        additive_mask=lambda: config._attn_implementation == "eager",
        accepts_ragged=accepts_ragged,
        pools=pools,
        visible=visible,
        tables="position_embeddings" if hasattr(net, "rope_embeddings") else None,
    )
    return Integration(
        facts=encoder_facts(name, len(layers), has_cls, values=True, proportional=takes_mask), towers=[tower]
    )


def _first(module: nn.Module, paths: Sequence[str], name: str) -> nn.Module:
    """The first submodule that exists.

    Raises:
        UnsupportedModelError: none does.
    """
    for path in paths:
        try:
            return module.get_submodule(path)
        except AttributeError:
            continue
    raise UnsupportedModelError(
        f"{name} has no submodule {' or '.join(map(repr, paths))}; this version of transformers lays the model out "
        "differently from 5.16 - 5.23."
    )
