"""Parts that the integrations of transformers models share."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.errors import UnsupportedModelError
from vtprune.integrations.base import AttentionTap, Decoder
from vtprune.integrations.towers import BatchedViT


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, L, H d] -> [B, H, L, d]."""
    heads: Tensor = x.unflatten(-1, (-1, head_dim))
    return heads.transpose(1, 2)


def decoder_of(module: nn.Module, name: str, mrope: bool = False) -> Decoder:
    """A Llama-like decoder stack (`layers`, `rotary_emb`, `self_attn.q_proj/k_proj`, optional q/k norms).

    Raises:
        UnsupportedModelError: it has layers that do not attend to everything (sliding window, linear).
    """
    from transformers.masking_utils import create_causal_mask

    config: Any = module.config
    other = {t for t in getattr(config, "layer_types", None) or () if t != "full_attention"}
    if other:
        raise UnsupportedModelError(
            f"{name} has decoder layers of type {', '.join(sorted(other))}; only full attention is supported. "
            "Load the model with a configuration whose `layer_types` are all 'full_attention'."
        )

    def projections(attn: nn.Module) -> tuple[nn.Module, nn.Module]:
        q: nn.Module = attn.get_submodule("q_proj")
        k: nn.Module = attn.get_submodule("k_proj")
        return q, k

    def rotate(attn: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        source = sys.modules[type(attn).__module__]
        multimodal = getattr(source, "apply_multimodal_rotary_pos_emb", None)  # transformers < 5.20
        if multimodal is not None and cos.ndim == 4:
            rotated, _ = multimodal(x, x, cos, sin, attn.config.rope_parameters["mrope_section"])
        else:
            rotated, _ = source.apply_rotary_pos_emb(x, x, cos, sin)
        out: Tensor = rotated
        return out

    def causal_mask(hidden: Tensor, valid: Tensor | None, cache: Any, layer: int) -> Any:
        return create_causal_mask(
            config=config,
            inputs_embeds=hidden,
            attention_mask=valid,
            past_key_values=cache,
            position_ids=None,
            layer_idx=layer,
        )

    def rotary(hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        tables: tuple[Tensor, ...] = module.get_submodule("rotary_emb")(hidden, position_ids)
        return tables

    layers: Sequence[nn.Module] = list(module.get_submodule("layers").children())
    return Decoder(
        module=module,
        layers=layers,
        attention=lambda i: layers[i].get_submodule("self_attn"),
        projections=projections,
        rotate=rotate,
        causal_mask=causal_mask,
        rotary=rotary,
        reads_positions=lambda: "flash" in (config._attn_implementation or ""),
        mrope=mrope,
    )


def clip_like_tower(
    tower: nn.Module,
    projector: nn.Module,
    feature_layers: Sequence[int],
    select_strategy: str,
    name: str,
) -> BatchedViT:
    """A CLIP or SigLIP vision model of transformers 5 (`embeddings`, `encoder.layers`).

    Args:
        feature_layers: indices into `hidden_states` that become the features.
        select_strategy: "default" (token 0 is dropped before the projector) or "full".

    Raises:
        UnsupportedModelError: the feature selection keeps [CLS] among the features, or drops a patch.
    """
    config: Any = tower.config
    embeddings = tower.get_submodule("embeddings")
    has_cls = hasattr(embeddings, "class_embedding")
    if has_cls != (select_strategy == "default"):
        want = "default" if has_cls else "full"
        raise UnsupportedModelError(
            f"{name}: vision_feature_select_strategy={select_strategy!r} with a tower that "
            f"{'has' if has_cls else 'has no'} [CLS] would make "
            f"{'[CLS] a visual token' if has_cls else 'the first patch disappear'}; set it to {want!r}."
        )
    layers = list(tower.get_submodule("encoder.layers").children())
    depths = [h % (len(layers) + 1) for h in feature_layers]
    head_dim = config.hidden_size // config.num_attention_heads

    def tap(layer: int) -> AttentionTap:
        attn = layers[layer].get_submodule("self_attn")

        def heads(outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
            q, k = outputs
            return split_heads(q, head_dim), split_heads(k, head_dim)

        projections = (attn.get_submodule("q_proj"), attn.get_submodule("k_proj"))
        return AttentionTap(attn, projections, heads, head_dim**-0.5)

    patch = config.patch_size
    return BatchedViT(
        module=tower,
        layers=layers,
        used_layers=min(depths),
        projector=projector,
        restores=True,
        has_cls=has_cls,
        prefix=int(has_cls),
        projector_prefix=0,
        grid=lambda h, w: (h // patch, w // patch),
        tap=tap,
        additive_mask=lambda: config._attn_implementation == "eager",
        accepts_ragged=lambda: (
            None
            if config._attn_implementation in ("eager", "sdpa")
            else f"attention {config._attn_implementation!r} of the vision tower takes no padding mask"
        ),
    )


def require_submodules(model: nn.Module, names: Sequence[str], integration: str) -> None:
    """Raises UnsupportedModelError naming the first missing submodule."""
    for name in names:
        try:
            model.get_submodule(name)
        except AttributeError:
            raise UnsupportedModelError(
                f"{type(model).__name__} looks like {integration} but has no submodule {name!r}; this version of "
                "transformers lays the model out differently from 5.16 - 5.23."
            ) from None
