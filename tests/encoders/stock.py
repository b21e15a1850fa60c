"""The judge of encoders alone: stock modules of a model that is never patched, run by hand on a shorter sequence."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from encoders.common import TIMM, build
from torch import Tensor, nn


def _path(module: nn.Module, *names: str) -> Any:
    for name in names:
        try:
            return module.get_submodule(name)
        except AttributeError:
            continue
    raise AttributeError(f"{type(module).__name__} has none of {names}")


def _turn(x: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """Rotary embedding of x [..., n, d], pairs being halves or neighbours."""
    if half:
        a, b = x.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


class Stock:
    """Stock modules of a model that is never patched, called by hand on one picture.

    Attributes:
        signals: per layer of the last run, of the patches alive there: "cls" and "received" [heads, n], "keys"
            [n, d]; attention comes from the eager implementation of the stock model (timm: from its weights).
    """

    def __init__(self, name: str) -> None:
        self.model: Any = build(name, "eager")
        self.timm = name in TIMM
        self.layers = list(
            _path(self.model, "blocks", "encoder.layers", "encoder.layer", "model.layer", "layers")
        )
        m = self.model
        if self.timm:
            self.prefix = m.num_prefix_tokens
        else:
            tokens = getattr(m.embeddings, "register_tokens", torch.zeros(1, 0, 1))
            has_cls = hasattr(m.embeddings, "cls_token") or hasattr(m.embeddings, "class_embedding")
            self.prefix = int(has_cls) + tokens.shape[1]
        self.signals: list[dict[str, Any]] = []

    def embed(self, image: Tensor) -> tuple[Tensor, Any]:
        """[1, prefix + n, D] at the input of layer 0, and rotary tables of all patches."""
        m = self.model
        if self.timm:
            x = m._pos_embed(m.patch_embed(image[None]))
            x, tables = x if isinstance(x, tuple) else (x, None)
            return m.norm_pre(x), tables
        x = m.embeddings(image[None])
        if hasattr(m, "pre_layrnorm"):
            x = m.pre_layrnorm(x)
        return x, m.rope_embeddings(image[None]) if hasattr(m, "rope_embeddings") else None

    def layer(self, number: int, x: Tensor, tables: Any, alive: list[int]) -> Tensor:
        layer = self.layers[number]
        seen: dict[str, Any] = {}
        if self.timm:
            attention = layer.attn
            handles = [attention.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))]
            if tables is None:
                rope, out = None, layer(x)
            else:
                rope = (tables[number] if self.model.__dict__.get("rope_mixed") else tables)[..., alive, :]
                out = layer(x, rope=rope)
        else:
            attention = _path(layer, "attention.attention", "self_attn", "attention")
            key = _path(attention, "k_proj", "key")
            handles = [
                attention.register_forward_hook(lambda _, args, output: seen.update(weights=output[1])),
                key.register_forward_hook(lambda _, args, output: seen.update(key=output)),
            ]
            rope = None if tables is None else tuple(t[alive] for t in tables)
            if rope is not None:
                out = layer(x, position_embeddings=rope)
            elif "attention_mask" in inspect.signature(type(layer).forward).parameters:
                out = layer(x, None)
            else:
                out = layer(x)
        for handle in handles:
            handle.remove()
        weights, keys = (
            self._timm_attention(attention, seen["x"], rope) if self.timm else self._hf(seen, rope)
        )
        p = self.prefix
        self.signals.append(
            {
                "cls": weights[:, 0, p:].double().numpy(),
                "received": weights.mean(1)[:, p:].double().numpy(),
                "keys": keys[:, p:].mean(0).double().numpy(),
            }
        )
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def _hf(self, seen: dict[str, Any], rope: Any) -> tuple[Tensor, Tensor]:
        weights = seen["weights"][0]
        keys = seen["key"][0].unflatten(-1, (len(weights), -1)).transpose(0, 1)
        if rope is not None:
            keys = torch.cat(
                [keys[:, : self.prefix], _turn(keys[:, self.prefix :], rope[0], rope[1], True)], 1
            )
        return weights, keys

    def _timm_attention(self, attn: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        if attn.qkv is None:
            q, k = attn.q_proj(x[0]), attn.k_proj(x[0])
        else:
            bias = attn.qkv.bias
            if getattr(attn, "q_bias", None) is not None:
                bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            q, k, _ = nn.functional.linear(x[0], attn.qkv.weight, bias).chunk(3, -1)
        q, k = (t.unflatten(-1, (attn.num_heads, -1)).transpose(0, 1) for t in (q, k))
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            sin, cos = rope.chunk(2, -1)
            p = self.prefix
            q, k = (
                torch.cat([t[:, :p], _turn(t[:, p:], cos, sin, getattr(attn, "rotate_half", False))], 1)
                for t in (q, k)
            )
        weights = (q.double() @ k.double().transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        return weights, k

    def finish(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = self.model
        if self.timm:
            x = m.norm(x)
            return x[0], m.forward_head(x)[0]
        if hasattr(m, "pre_layrnorm"):
            return x[0], m.post_layernorm(x[:, 0])[0]
        x = _path(m, "post_layernorm", "layernorm", "norm")(x)
        pool = next((getattr(m, name) for name in ("pooler", "head") if hasattr(m, name)), None)
        if pool is not None:
            return x[0], pool(x)[0]
        return x[0], x[0, 0] if self.prefix else x[0, :1]

    def run(
        self,
        image: Tensor,
        drops: Mapping[int, Callable[[], list[int]]] | None = None,
        merge: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features [prefix + kept, D] and what is pooled from them.

        Args:
            drops: layer -> surviving patches at its input, asked for when the run is there; 4 is behind the last.
            merge: maps all patches behind the last layer to the kept ones.
        """
        drops = drops or {}
        self.signals = []
        x, tables = self.embed(image)
        p = self.prefix
        alive = list(range(x.shape[1] - p))
        for number in range(len(self.layers) + 1):
            if number in drops:
                kept = drops[number]()
                if number == len(self.layers) and merge is not None:
                    x = torch.cat([x[:, :p], merge(x[0, p:])[None]], 1)
                else:
                    x = x[:, [*range(p), *(p + alive.index(i) for i in kept)]]
                alive = kept
            if number < len(self.layers):
                x = self.layer(number, x, tables, alive)
        return self.finish(x)


@functools.cache
def stock(name: str) -> Stock:
    return Stock(name)
