"""Parts that the integrations of transformers models share."""

from __future__ import annotations

import inspect
import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.errors import UnsupportedModelError
from vtprune.integrations.base import AttentionTap, Decoder, Integration, VisionTower
from vtprune.integrations.towers import BatchedViT
from vtprune.method import CLS_SIGNALS, DECODER_SIGNALS, ENCODER_SIGNALS, HEAD_SIGNALS, SITE_KINDS, ModelFacts


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, L, H d] -> [B, H, L, d]."""
    heads: Tensor = x.unflatten(-1, (-1, head_dim))
    return heads.transpose(1, 2)


def layer_kinds(config: Any) -> tuple[list[str], dict[str, int]]:
    """Kind of every decoder layer, and the windows of kinds that have one."""
    window: int | None = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    everywhere = "full_attention" if window is None else "sliding_attention"
    kinds = list(getattr(config, "layer_types", None) or [everywhere] * config.num_hidden_layers)
    if window is None or "sliding_attention" not in kinds:
        return kinds, {}
    return kinds, {"sliding_attention": window}


def decoder_of(
    module: nn.Module,
    name: str,
    mrope: bool = False,
    prepares_masks: bool = False,
    inject: str | None = None,
) -> Decoder:
    """A Llama-like decoder stack (`layers`, `rotary_emb`, `self_attn.q_proj/k_proj`, optional q/k norms).

    Args:
        module: the stack.
        name: of the whole model, for messages.
        mrope, prepares_masks, inject: see :class:`~vtprune.integrations.base.Decoder`.

    Raises:
        UnsupportedModelError: it has layers that attend neither to everything nor within a sliding window.
    """
    from transformers.masking_utils import create_causal_mask

    config: Any = module.config
    kinds, windows = layer_kinds(config)
    other = set(kinds) - {"full_attention", "sliding_attention"}
    if other:
        raise UnsupportedModelError(
            f"{name} has decoder layers of type {', '.join(sorted(other))}; only full and sliding attention are "
            "supported. Load the model with a configuration whose `layer_types` are all 'full_attention'."
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

    rotary_module = module.get_submodule("rotary_emb")
    by_kind = "layer_type" in inspect.signature(rotary_module.forward).parameters

    def rotary(hidden: Tensor, position_ids: Tensor, kind: str) -> tuple[Tensor, ...]:
        tables: tuple[Tensor, ...] = rotary_module(hidden, position_ids, *([kind] if by_kind else []))
        return tables

    layers: Sequence[nn.Module] = list(module.get_submodule("layers").children())
    return Decoder(
        module=module,
        layers=layers,
        attention=lambda i: layers[i].get_submodule("self_attn"),
        projections=projections,
        output=lambda attn: attn.get_submodule("o_proj"),
        rotate=rotate,
        causal_mask=causal_mask,
        rotary=rotary,
        reads_positions=lambda: "flash" in (config._attn_implementation or ""),
        additive_mask=lambda: config._attn_implementation == "eager",
        kinds=kinds,
        windows=windows,
        mrope=mrope,
        prepares_masks=prepares_masks,
        inject=inject,
    )


def self_attention_tap(attn: nn.Module, head_dim: int, output: str = "out_proj") -> AttentionTap:
    """Tap of an attention module with `q_proj`, `k_proj` and `v_proj` and without rotary embedding."""

    def heads(outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = outputs
        return split_heads(q, head_dim), split_heads(k, head_dim), split_heads(v, head_dim)

    projections = tuple(attn.get_submodule(n) for n in ("q_proj", "k_proj", "v_proj"))
    return AttentionTap(attn, projections, heads, head_dim**-0.5, attn.get_submodule(output))


def padding_reason(config: Any) -> Callable[[], str | None]:
    """Why a tower cannot take rows of different length under its present attention, or None."""
    return lambda: (
        None
        if config._attn_implementation in ("eager", "sdpa")
        else f"attention {config._attn_implementation!r} of the vision tower takes no padding mask"
    )


def clip_like_tower(
    tower: nn.Module,
    projector: nn.Module | None,
    feature_layers: Sequence[int],
    **options: Any,
) -> BatchedViT:
    """A CLIP or SigLIP vision model of transformers 5 (`embeddings`, `encoder.layers`).

    Args:
        tower: the model.
        projector: see :class:`~vtprune.integrations.base.VisionTower`.
        feature_layers: indices into `hidden_states` that become the features.
        **options: further arguments of :class:`~vtprune.integrations.towers.BatchedViT`.
    """
    config: Any = tower.config
    has_cls = hasattr(tower.get_submodule("embeddings"), "class_embedding")
    layers = list(tower.get_submodule("encoder.layers").children())
    depths = [h % (len(layers) + 1) for h in feature_layers]
    head_dim = config.hidden_size // config.num_attention_heads
    patch = config.patch_size
    arguments: dict[str, Any] = {
        "module": tower,
        "layers": layers,
        "used_layers": min(depths),
        "projector": projector,
        "restores": True,
        "has_cls": has_cls,
        "prefix": int(has_cls),
        "projector_prefix": 0,
        "grid": lambda h, w: (h // patch, w // patch),
        "patch": (patch, patch),
        "tap": lambda i: self_attention_tap(layers[i].get_submodule("self_attn"), head_dim),
        "additive_mask": lambda: config._attn_implementation == "eager",
        "accepts_ragged": padding_reason(config),
    }
    return BatchedViT(**(arguments | options))


def llava_tower(model: Any, base: nn.Module, path: str, projector: str, **options: Any) -> BatchedViT:
    """The CLIP or SigLIP tower of a LLaVA-like model, with the feature selection of its configuration.

    Args:
        model: the whole model; its `config` says which features are used.
        base, path, projector: where the tower and the projector are.
        **options: see :func:`clip_like_tower`.

    Raises:
        UnsupportedModelError: another tower, or a selection that keeps [CLS] among the features or drops a patch.
    """
    name, config = type(model).__name__, model.config
    tower = base.get_submodule(path)
    vision: Any = tower.config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise UnsupportedModelError(
            f"{name} with a {vision.model_type!r} vision tower is not supported; towers: clip_vision_model, "
            "siglip_vision_model."
        )
    has_cls = hasattr(tower.get_submodule("embeddings"), "class_embedding")
    strategy = config.vision_feature_select_strategy
    if has_cls != (strategy == "default"):
        want = "default" if has_cls else "full"
        raise UnsupportedModelError(
            f"{name}: vision_feature_select_strategy={strategy!r} with a tower that "
            f"{'has' if has_cls else 'has no'} [CLS] would make "
            f"{'[CLS] a visual token' if has_cls else 'the first patch disappear'}; set it to {want!r}."
        )
    layers = config.vision_feature_layer
    return clip_like_tower(
        tower,
        base.get_submodule(projector),
        [layers] if isinstance(layers, int) else list(layers),
        **options,
    )


def base_of(model: nn.Module, paths: Sequence[str], family: str) -> nn.Module:
    """The module that merges features into embeddings: the model itself, or what stands below its head.

    Raises:
        UnsupportedModelError: it lacks one of the submodules `paths`.
    """
    base = model.model if hasattr(model, "model") else model
    assert isinstance(base, nn.Module)
    require_submodules(base, paths, family)
    return base


def assemble(
    model: Any,
    base: nn.Module,
    towers: Sequence[VisionTower],
    decoder: Decoder,
    sites: Sequence[str] = SITE_KINDS,
    video: bool = False,
    calls: Mapping[str, str] | None = None,
    missing: Mapping[str, str] | None = None,
    image_token: int | None = None,
) -> Integration:
    """An integration from its parts.

    Args:
        sites: kinds of sites where tokens can be removed.
        video: whether there are video placeholders.
        calls: see :class:`~vtprune.integrations.base.Integration`.
        missing: signals that cannot be had, with reasons, beside [CLS] attention where there is no [CLS].
        image_token: id of the image placeholder, if it is not `config.image_token_id`.
    """
    name, tower = type(model).__name__, towers[0]
    missing = dict(missing or {})
    if not tower.has_cls:
        reason = f"the vision encoder of {name} has no [CLS] token"
        missing = dict.fromkeys(CLS_SIGNALS, reason) | missing
    layers = frozenset(range(len(tower.layers)))
    text_layers = frozenset(range(len(decoder.layers)))
    signals: dict[str, frozenset[int]] = dict.fromkeys(ENCODER_SIGNALS, layers)
    signals |= dict.fromkeys((*DECODER_SIGNALS, *HEAD_SIGNALS), text_layers)
    placeholders = {"image": model.config.image_token_id if image_token is None else image_token}
    if video:
        placeholders["video"] = model.config.video_token_id
    return Integration(
        facts=ModelFacts(
            name=name,
            encoder_layers=tower.used_layers,
            decoder_layers=len(decoder.layers),
            sites=frozenset(sites),
            signals={kind: where for kind, where in signals.items() if kind not in missing},
            missing=missing,
            mrope=decoder.mrope,
            proportional="vit" in sites and isinstance(tower, BatchedViT),
            folder=checkpoint_folder(model),
            fingerprint=lambda: fingerprint(base),
        ),
        towers=towers,
        decoder=decoder,
        base=base,
        placeholders=placeholders,
        feature_calls=calls or {},
    )


def checkpoint_folder(model: Any) -> str | None:
    """The local folder that a model was loaded from, or None."""
    path = getattr(model, "name_or_path", None) or getattr(model.config, "_name_or_path", None)
    return path if path and os.path.isdir(path) else None


def fingerprint(base: nn.Module) -> str:
    """Eight hexadecimal digits from names, shapes and the first signs of all parameters.

    Signs survive a change of floating-point precision.

    Raises:
        UnsupportedModelError: parameters are quantised, which changes signs, or not in memory.
    """
    digest = 0
    for name, parameter in base.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.is_meta:
            state = "offloaded" if parameter.is_meta else f"quantised ({type(parameter).__name__})"
            raise UnsupportedModelError(
                f"{name!r} is {state}, so it cannot be told whether this is the model that the weights of a trained method "
                "belong to. Load the model in floating point and in memory, or use a method without weights."
            )
        signs = (parameter.detach().flatten()[:32] < 0).tolist()
        digest = zlib.crc32(f"{name} {tuple(parameter.shape)} {signs}".encode(), digest)
    return f"{digest:08x}"


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
