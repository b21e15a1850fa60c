"""The same methods done the usual way on LLaVA, as their authors' repositories do them: the baseline of the benchmark.

Written from the formulas, with the costs of the published code: attention that is read is eager attention whose N x N
maps are written out, rows of a batch are looped over in Python, shortened prompts are put together by hand and padded. Where
the repositories leave a choice, it is made in favour of the baseline: attention that no method reads stays what the
model uses (their pinned transformers, 4.31 to 4.39, knew only eager attention in CLIP), and the language model's cut happens
once, with a cache.

| method | eager, and why | source |
|---|---|---|
| vtc-cls | the tower, `output_attentions=True`: maps of all layers, head means of whole maps | THU-MIG/VTC-CLS at e41ac9b, `CLIPVisionTower.cls_token_only` |
| visionzip | the same; keys of one layer are kept on the way | dvlab-research/VisionZip at 3151f6d, `clip_encoder.py` |
| fastv | the language model, all layers; the map of layer K - 1 is kept, its head mean taken whole | pkunlp-icler/FastV at d165972, README (`attn_implementation="eager"`) and `fastv_forward` of its fork for transformers' LLaVA |
| stride | nothing; no tokens are scored: what the stock model takes for a prompt that short | none, a control |
| divprune | nothing; every step of the greedy choice looks again at the distances to all chosen tokens | vbdi/divprune at 799e2d9, `DivPrune` (read, not copied: non-commercial licence) |

The same tokens are kept as by vtprune's methods of these names, in raster order (VisionZip's own order is by kind), so
that the logits agree too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vtprune.errors import InvalidOptionError, UnsupportedModelError
from vtprune.method import resolve_layer
from vtprune.methods.fastv import FastV
from vtprune.methods.visionzip import VisionZip
from vtprune.methods.vtc_cls import VTCCls


@dataclass(frozen=True)
class First:
    """The first token of every row.

    Attributes:
        logits: [B, vocabulary].
        kept: per picture, ascending indices of its tokens that are left.
    """

    logits: Tensor
    kept: list[Tensor]


@contextmanager
def eager(model: nn.Module, method: str) -> Iterator[None]:
    """Eager attention in the part of a LLaVA whose attention the method reads, and the former one at the end.

    Args:
        model: as for :func:`usual`.
        method: key in `USUAL`.

    Raises:
        InvalidOptionError: unknown method.
        UnsupportedModelError: another model.
    """
    part = _known(method)[1]
    if part is None:
        yield
        return
    module = getattr(_LLaVA(model), part)
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


def usual(model: nn.Module, method: str, keep: int, inputs: Mapping[str, Tensor]) -> Callable[[], First]:
    """What leads to the first token the usual way, as a function to call, within :func:`eager`, as often as wanted.

    A call includes the vision encoder and fills a cache, but does not go through `generate`.

    Args:
        model: an unpatched LLaVA with a CLIP tower.
        method: key in `USUAL`.
        keep: tokens per picture.
        inputs: one picture per row, rows padded on the left.

    Raises:
        InvalidOptionError: unknown method, or no such number of tokens.
        UnsupportedModelError: another model, or not one picture per row. The function: called outside :func:`eager`.
    """
    run, part = _known(method)
    llava = _LLaVA(model)
    ids, pixels = inputs["input_ids"], inputs.get("pixel_values")
    if pixels is None or len(pixels) != len(ids):
        raise UnsupportedModelError("the usual way is written for one picture per row")
    is_image = ids == llava.placeholder
    tokens = int(is_image[0].sum())
    if not 1 <= keep <= tokens:
        raise InvalidOptionError(f"keep={keep} is outside 1 to {tokens}, the tokens of a picture")
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    batch = _Batch(ids, mask, pixels, is_image.int().argmax(1).tolist(), tokens)

    @torch.no_grad()
    def call() -> First:
        if part is not None and getattr(llava, part).config._attn_implementation != "eager":
            raise UnsupportedModelError(
                f"the usual {method} reads attention maps; call it within eager(model, {method!r})"
            )
        return run(llava, batch, keep)

    return call


def _known(method: str) -> tuple[_Way, str | None]:
    if method not in USUAL:
        raise InvalidOptionError(f"{method!r} has no usual way here; those that have: {', '.join(USUAL)}")
    return USUAL[method]


@dataclass(frozen=True)
class _Batch:
    """Rows with a picture each.

    Attributes:
        ids, mask: [B, L].
        pixels: [B, 3, H, W].
        starts: column of each row's first placeholder; users of FastV give it as a constant.
        tokens: placeholders of a row.
    """

    ids: Tensor
    mask: Tensor
    pixels: Tensor
    starts: list[int]
    tokens: int


class _LLaVA:
    """The parts of a LLaVA."""

    def __init__(self, model: nn.Module) -> None:
        whole: Any = model
        self.base: Any = getattr(whole, "model", whole)
        self.tower: Any = getattr(self.base, "vision_tower", whole)
        embeddings = getattr(self.tower, "embeddings", None)
        self.feature_layer: Any = getattr(whole.config, "vision_feature_layer", None)
        if not hasattr(embeddings, "class_embedding") or not isinstance(self.feature_layer, int):
            raise UnsupportedModelError(
                f"the usual way is written for LLaVA with a CLIP tower and one feature layer, not for this {type(model).__name__}"
            )
        self.projector: Any = self.base.multi_modal_projector
        self.decoder: Any = self.base.language_model
        self.head: Any = whole.lm_head
        self.placeholder: int = whole.config.image_token_id
        depth = len(self.tower.encoder.layers)
        # hidden_states holds the embeddings first
        self.used = self.feature_layer + (depth + 1 if self.feature_layer < 0 else 0)

    def features(self, pixels: Tensor) -> Tensor:
        """[B, N, D] projected features of the dense encoder."""
        return torch.stack(
            list(self.base.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)
        )

    def with_maps(self, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[B, 1 + N, D] hidden states in front of the projector, and the maps [B, H, 1 + N, 1 + N] up to them."""
        out = self.tower(pixels, output_hidden_states=True, output_attentions=True)
        return out.hidden_states[self.used], out.attentions[: self.used]

    def prefill(self, batch: _Batch, features: Tensor) -> Tensor:
        """Logits behind prompts whose placeholders are replaced by fewer features [B, K, D]; positions count anew."""
        embed = self.decoder.get_input_embeddings()
        rows = []
        for row, there, image in zip(batch.ids, batch.mask, features, strict=True):
            text = row[there.bool()]
            (at,) = torch.where(text == self.placeholder)
            before, behind = text[: int(at[0])], text[int(at[-1]) + 1 :]
            words = embed(torch.cat([before, behind]))
            rows.append(torch.cat([words[: len(before)], image.to(words.dtype), words[len(before) :]]))
        width = max(map(len, rows))
        embeds = torch.stack([pad(row, (0, 0, width - len(row), 0)) for row in rows])
        shown = torch.stack([pad(batch.mask.new_ones(len(row)), (width - len(row), 0)) for row in rows])
        padded = any(len(row) < width for row in rows)
        out = self.decoder(
            inputs_embeds=embeds,
            attention_mask=shown if padded else None,
            position_ids=_positions(shown),
            use_cache=True,
        )
        logits: Tensor = self.head(out.last_hidden_state[:, -1])
        return logits


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _vtc_cls(llava: _LLaVA, batch: _Batch, keep: int) -> _Kept:
    hidden, maps = llava.with_maps(batch.pixels)
    first = resolve_layer(VTCCls.first_layer, llava.used, "first_layer")
    kept = []
    for image in range(len(hidden)):
        rows = [attention[image].mean(0)[0, 1:] for attention in maps[first:]]
        kept.append(torch.stack(rows).sum(0).topk(keep).indices.sort().values)
    features = torch.stack([tokens[1:][index] for tokens, index in zip(hidden, kept, strict=True)])
    return llava.projector(features), kept


def _visionzip(llava: _LLaVA, batch: _Batch, keep: int) -> _Kept:
    found: list[Tensor] = []
    layer = llava.tower.encoder.layers[llava.used - 1].self_attn
    hook = layer.k_proj.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        hidden, maps = llava.with_maps(batch.pixels)
    finally:
        hook.remove()
    images, n, features = len(hidden), hidden.shape[1] - 1, hidden[:, 1:]
    keys = found[0][:, 1:].unflatten(-1, (-1, layer.head_dim)).mean(2)
    contextual = min(round(VisionZip.contextual * keep), n - keep)
    everyone = torch.arange(n, device=hidden.device).expand(images, -1)
    dominant = maps[-1][:, :, 0, 1:].sum(1).topk(keep - contextual).indices
    left = torch.ones_like(everyone, dtype=torch.bool).scatter_(1, dominant, False)
    rest = everyone[left].view(images, -1)
    targets = joined = rest[:, :0]
    merged = features
    if contextual:
        place = torch.arange(0, rest.shape[1], rest.shape[1] // contextual, device=hidden.device)[:contextual]
        is_target = torch.isin(torch.arange(rest.shape[1], device=hidden.device), place)
        targets, joined = rest[:, is_target], rest[:, ~is_target]
        unit = keys / keys.norm(dim=-1, keepdim=True)
        similarity = torch.bmm(_take(unit, joined), _take(unit, targets).transpose(1, 2))
        member = torch.zeros_like(similarity, dtype=features.dtype).scatter_(
            2, similarity.argmax(-1, keepdim=True), 1.0
        )
        count = member.sum(1).clamp(min=1).unsqueeze(-1)
        mean = torch.bmm(member.transpose(1, 2), _take(features, joined)) / count
        merged = features.scatter_add(1, targets.unsqueeze(-1).expand_as(mean), mean)
    kept = torch.cat([dominant, targets], 1).sort(-1).values
    return llava.projector(_take(merged, kept)), list(kept)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _divprune(llava: _LLaVA, batch: _Batch, keep: int) -> _Kept:
    features = llava.features(batch.pixels)
    kept = []
    for tokens in features:
        unit = tokens / tokens.norm(dim=-1, keepdim=True)
        distance = 1 - unit @ unit.t()
        chosen = torch.empty(keep, dtype=torch.long, device=tokens.device)
        for step in range(keep):
            if step == 0:  # the nearest other token; the nearest of all is the token itself
                score = distance.topk(2, dim=0, largest=False).values[1]
            else:
                score = distance[chosen[:step]].amin(0)
            chosen[step] = score.argmax()
        kept.append(chosen.sort().values)
    return torch.stack([tokens[index] for tokens, index in zip(features, kept, strict=True)]), kept


def _stride(llava: _LLaVA, batch: _Batch, keep: int) -> _Kept:
    features = llava.features(batch.pixels)
    n = features.shape[1]
    index = torch.tensor([((2 * i + 1) * n) // (2 * keep) for i in range(keep)], device=features.device)
    return features[:, index], [index] * len(features)


def _fastv(llava: _LLaVA, batch: _Batch, keep: int) -> First:
    from transformers import DynamicCache

    decoder = llava.decoder
    cut = resolve_layer(FastV.layer, len(decoder.layers), "layer", first=1)
    images = llava.features(batch.pixels)
    hidden = decoder.get_input_embeddings()(batch.ids)
    hidden = hidden.masked_scatter((batch.ids == llava.placeholder).unsqueeze(-1), images.to(hidden.dtype))
    positions, shown, cache = _positions(batch.mask), batch.mask.bool(), DynamicCache(config=decoder.config)
    causal, tables = _causal(shown, hidden.dtype), decoder.rotary_emb(hidden, position_ids=positions)
    maps: list[Tensor] = []
    hook = decoder.layers[cut - 1].self_attn.register_forward_hook(
        lambda module, args, out: maps.append(out[1])
    )
    kept: list[Tensor] = []
    try:
        for number, layer in enumerate(decoder.layers):
            if number == cut:
                stays = []
                columns = torch.arange(hidden.shape[1], device=hidden.device)
                for start, attention in zip(batch.starts, maps.pop(), strict=True):
                    end = start + batch.tokens
                    best = attention.mean(0)[-1][start:end].topk(keep).indices.sort().values
                    kept.append(best)
                    stays.append(torch.cat([columns[:start], best + start, columns[end:]]))
                slots = torch.stack(stays)
                hidden = torch.stack([states[index] for states, index in zip(hidden, slots, strict=True)])
                positions, shown = positions.gather(1, slots), shown.gather(1, slots)
                causal = _causal(shown, hidden.dtype)
                tables = decoder.rotary_emb(hidden, position_ids=positions)
            hidden = layer(
                hidden,
                attention_mask=causal,
                position_embeddings=tables,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
    finally:
        hook.remove()
    return First(llava.head(decoder.norm(hidden)[:, -1]), kept)


def _causal(shown: Tensor, dtype: torch.dtype) -> Tensor:
    """Float mask [B, 1, L, L] that is added to the logits, from [B, L] bool, False for padding."""
    length = shown.shape[1]
    may = torch.ones(length, length, dtype=torch.bool, device=shown.device).tril() & shown[:, None, None]
    return torch.zeros(may.shape, dtype=dtype, device=shown.device).masked_fill(~may, torch.finfo(dtype).min)


def _before(select: Callable[[_LLaVA, _Batch, int], _Kept]) -> _Way:
    """A method that chooses features in front of the language model; its maps are freed by then."""

    def run(llava: _LLaVA, batch: _Batch, keep: int) -> First:
        features, kept = select(llava, batch, keep)
        return First(llava.prefill(batch, features), kept)

    return run


# Projected features [B, K, D] and their indices per picture.
_Kept = tuple[Tensor, list[Tensor]]
_Way = Callable[[_LLaVA, _Batch, int], First]
# How a method runs, and which part of the model it needs in eager attention.
USUAL: Mapping[str, tuple[_Way, str | None]] = {
    "vtc-cls": (_before(_vtc_cls), "tower"),
    "visionzip": (_before(_visionzip), "tower"),
    "fastv": (_fastv, "decoder"),
    "divprune": (_before(_divprune), None),
    "stride": (_before(_stride), None),
}
