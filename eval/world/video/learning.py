"""Losses of the two stages: the vision tower with dense supervision, then the decoder on answers.

As in the picture world, answers alone teach small models hardly anything in minutes. So heads that are thrown away
ask every patch and token what it shows, and every visual token inside the decoder what it can know from the frames so
far: which way its thing moves, how often it appeared, what is there with it, what was there before.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb, apply_rotary_pos_emb_vision

from ..batches import IGNORE
from ..models import vocabulary as picture_vocabulary
from ..scenes import atlas
from .batches import ALL_KINDS, STILL
from .model import PATCHES, TOKENS, grid, patches, vocabulary
from .questions import MOST_OFTEN

NAMES = len(atlas().names)
FACTS = {
    "label": NAMES + 1,
    "moves": STILL + 1,
    "ordinal": MOST_OFTEN,
    "company": NAMES + 1,
    "before": NAMES + 1,
    "gone": NAMES + 1,
    "brief": 2,
    "restless": 2,
}
FACT_WEIGHTS = {"ordinal": 3}
KNOWING_LAYER = 5  # its input must know the facts
# Attention heads that are drawn to something: layer and head.
LOOKS = {"name": (2, 0), "mate": (3, 2), "past": (3, 0), "again": (4, 0), "answer": (5, 0)}
SINK = 2.0  # weight of ``<s>`` beside one appearance, for the head that counts them


class FrameHeads(nn.Module):
    """Auxiliary heads of stage 1, on patches and on tokens: class and centre of what they show."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NAMES + 4))
        self.token = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NAMES + 4))


class FactHeads(nn.Module):
    """Auxiliary heads of stage 2, on the decoder's states of visual tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.facts = nn.ModuleDict({key: nn.Linear(width, size) for key, size in FACTS.items()})
        self.places = nn.Linear(width, 4)


def encode(tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """All frames at once, which the stock forward takes one by one under SDPA.

    Args:
        tower: Qwen2-VL's vision tower.
        pixels: [N, 96, 96, 3] uint8.

    Returns:
        Patches [N, 64, width] and tokens [N, 16, width].
    """
    from transformers.vision_utils import get_vision_position_ids

    states = tower.patch_embed(patches(pixels).flatten(0, 1)).view(len(pixels), PATCHES * PATCHES, -1)
    places = get_vision_position_ids(grid(1), tower.spatial_merge_size)
    cos, sin = tower.rotary_pos_emb(states[0], places)
    for block in tower.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(states)).unflatten(-1, (3, attention.num_heads, -1))
        query, key, value = qkv.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        states = states + attention.proj(mixed.transpose(1, 2).flatten(2))
        states = states + block.mlp(block.norm2(states))
    return states, tower.merger(states).view(len(pixels), TOKENS, -1)


def frame_losses(tower: nn.Module, heads: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch of `FrameBatches`, and figures for the log."""
    states, tokens = encode(tower, batch["pixels"])
    total = torch.zeros(())
    figures: dict[str, float] = {}
    parts = {"patch": (states, "label", "centre"), "token": (tokens, "token_label", "token_centre")}
    for name, (values, label, centre) in parts.items():
        said = getattr(heads, name)(values)
        target = batch[label]
        thing = target > 0
        each = F.cross_entropy(said[..., : NAMES + 2].transpose(1, 2), target, reduction="none")
        classes = each[thing].mean() + 0.5 * each[~thing].mean()
        middle = 10 * F.smooth_l1_loss(said[..., NAMES + 2 :][thing], batch[centre][thing], beta=0.05)
        total = total + classes + middle
        right = said[..., : NAMES + 2].argmax(-1) == target
        figures |= {
            name: float(classes.detach()),
            f"{name} centre": float(middle.detach()),
            f"{name} right": float(right[thing].float().mean()),
        }
    return total, figures


def new_model(
    config: Qwen2VLConfig, pictures: LlavaForConditionalGeneration
) -> Qwen2VLForConditionalGeneration:
    """A model whose decoder starts with the weights of the picture world's decoder; all else is new."""
    model = Qwen2VLForConditionalGeneration(config)
    source, target = pictures.model.language_model.state_dict(), model.model.language_model.state_dict()
    known = len(picture_vocabulary())
    for name, value in source.items():
        if name != "embed_tokens.weight":
            target[name].copy_(value)
    target["embed_tokens.weight"][:known].copy_(source["embed_tokens.weight"])
    model.lm_head.weight.data[:known].copy_(pictures.lm_head.weight.data)
    return model


def answer_losses(
    model: Qwen2VLForConditionalGeneration, heads: Any, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers of a `VideoBatches` batch, auxiliary losses, and figures for the log."""
    inner = model.model
    rows = batch["ids"].shape[0]
    with torch.no_grad():
        parts = [encode(inner.visual, part)[1] for part in batch["pixels"].split(128)]
    visual = torch.cat(parts).view(rows, -1, inner.config.text_config.hidden_size)
    embeddings = inner.language_model.embed_tokens(batch["ids"])
    first = int((batch["ids"][0] == model.config.video_token_id).nonzero()[0])
    span = slice(first, first + visual.shape[1])
    embeddings = torch.cat([embeddings[:, :first], visual, embeddings[:, span.stop :]], 1)
    language = inner.language_model
    rotary = language.rotary_emb(embeddings, batch["positions"])
    hidden, look = embeddings, {}
    knowing = hidden
    for number, layer in enumerate(language.layers):
        for key, (at, head) in LOOKS.items():
            if at == number:
                guided = {"name": _named, "answer": _asked}.get(key, partial(_guided, key=key))(batch, span)
                look[key] = _look_up(layer, head, hidden, rotary, *guided, batch["mask"])
        if number == KNOWING_LAYER:
            knowing = heads.norm(hidden[:, span])
        hidden = layer(hidden, attention_mask=batch["mask"], position_embeddings=rotary)
    hidden = language.norm(hidden)
    asked = batch["target"] != IGNORE
    logits, target = model.lm_head(hidden[asked]), batch["target"][asked]
    weight, kind = batch["weight"][asked], batch["kind"][asked]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    facts, figures = _facts(heads, knowing, batch)
    alignment = _alignment(visual, language.embed_tokens.weight, batch["label"])
    right = (logits.argmax(-1) == target).float()
    figures |= {"answer": float(loss.detach()), "alignment": float(alignment.detach())}
    figures |= {f"look {key}": float(value.detach()) for key, value in look.items()}
    figures |= {name: float(right[kind == index].mean()) for index, name in enumerate(ALL_KINDS)}
    return loss + 0.3 * alignment + 0.2 * torch.stack(list(look.values())).sum() + 0.3 * facts, figures


def _facts(heads: Any, states: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Losses of what tokens know, and the share that is right, of the tokens of things and a sample of the others."""
    total, figures = torch.zeros(()), {}
    pick = torch.rand(batch["label"].shape) < 0.15
    pick |= batch["label"] > 0
    for key, head in heads.facts.items():
        where = (batch[key] != IGNORE) & pick
        if not where.any():
            continue
        said, target = head(states[where]), batch[key][where]
        loss = F.cross_entropy(said, target, weight=_rarity(key, said.shape[-1]))
        total = total + FACT_WEIGHTS.get(key, 1) * loss
        figures[f"knows {key}"] = float((said.argmax(-1) == target).float().mean())
    thing = batch["label"] > 0
    places = heads.places(states[thing])
    centre = F.smooth_l1_loss(places[:, :2], batch["centre"][thing], beta=0.05)
    shift = batch["shift"][thing]
    moved = shift.abs().amax(-1) > 0  # false for NaN: seen for the first time
    still = shift.abs().amax(-1) == 0
    figures["centre"] = float(centre.detach())
    total = total + 10 * centre
    for key, where, weight in (("moved", moved, 30), ("still", still, 5)):
        if where.any():
            away = F.smooth_l1_loss(places[where, 2:], shift[where], beta=0.05)
            figures[f"shift {key}"] = float(away.detach())
            total = total + weight * away
    return total, figures


def _rarity(key: str, classes: int) -> Tensor | None:
    """Weights of a fact's classes where one is much more frequent than the others: standing still, the first time."""
    frequent = {"moves": STILL, "ordinal": 0, "company": 0, "before": 0, "gone": 0}
    if key not in frequent:
        return None
    weight = torch.ones(classes)
    weight[frequent[key]] = 0.25
    return weight


def _alignment(visual: Tensor, words: Tensor, label: Tensor) -> Tensor:
    """Draw each visual token of a thing towards the word for it."""
    ids = vocabulary()
    names = words[[ids[name] for name in atlas().names]]
    shown = label > 0
    similarity = F.normalize(visual[shown], dim=-1) @ F.normalize(names, dim=-1).T
    return F.cross_entropy(10 * similarity, label[shown] - 1)


def _named(batch: dict[str, Tensor], span: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Row and place of every name in a question, and what it should look at: its tokens, or ``<s>`` if there are none."""
    ids = vocabulary()
    names = torch.tensor([ids[name] for name in atlas().names])
    answers = F.pad(batch["target"] != IGNORE, (1, -1))
    row, place = (torch.isin(batch["ids"], names) & ~answers).nonzero(as_tuple=True)
    number = (batch["ids"][row, place][:, None] == names).long().argmax(1)
    shown = batch["label"][row] == number[:, None] + 1
    wanted = F.pad(shown, (span.start, batch["ids"].shape[1] - span.stop))
    wanted[:, 0] = ~shown.any(1)
    return row, place, wanted


def _asked(batch: dict[str, Tensor], span: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Row and place of every question's last token, and the visual tokens that hold its answer."""
    some = batch["wanted"].any(1)
    row, place = batch["look"][some].unbind(1)
    wanted = F.pad(batch["wanted"][some], (span.start, batch["ids"].shape[1] - span.stop))
    return row, place, wanted


def _guided(batch: dict[str, Tensor], span: slice, key: str) -> tuple[Tensor, Tensor, Tensor]:
    """Row and place of some visual tokens, and the visual tokens before them that are of use to them."""
    row, token = batch[key].unbind(1)
    wanted = F.pad(batch[f"{key}_wanted"], (span.start, batch["ids"].shape[1] - span.stop))
    if key == "again":
        wanted[:, 0] = SINK
        wanted = wanted / wanted.sum(1, keepdim=True)
    return row, span.start + token, wanted


def _look_up(
    layer: Any,
    head: int,
    states: Tensor,
    rotary: tuple[Tensor, Tensor],
    row: Tensor,
    place: Tensor,
    wanted: Tensor,
    mask: Tensor,
) -> Tensor:
    """Mean negative logarithm of the share of attention that a layer's head gives to what is wanted.

    Where ``wanted`` holds shares, not booleans: the mean divergence of the head's attention from them.
    """
    if not len(row):
        return torch.zeros(())
    attention, size = layer.self_attn, layer.self_attn.head_dim
    state = layer.input_layernorm(states)
    group = head // attention.num_key_value_groups
    of_key, of_query = (slice(number * size, (number + 1) * size) for number in (group, head))
    key = F.linear(state, attention.k_proj.weight[of_key], attention.k_proj.bias[of_key])
    query = F.linear(state[row, place], attention.q_proj.weight[of_query], attention.q_proj.bias[of_query])
    cos, sin = rotary
    _, key = apply_rotary_pos_emb(key[:, None], key[:, None], cos, sin)
    query, _ = apply_rotary_pos_emb(query[:, None], query[:, None], cos[row, place], sin[row, place])
    scores = torch.einsum("qd,qtd->qt", query[:, 0], key[:, 0][row]) / size**0.5
    scores = scores.masked_fill(~mask[row, 0, place], -torch.inf)
    if wanted.is_floating_point():
        log = (scores.log_softmax(1) - wanted.log()).masked_fill(wanted == 0, 0)
        closeness = (wanted * log).sum(1)
    else:
        closeness = scores.masked_fill(~wanted, -torch.inf).logsumexp(1) - scores.logsumexp(1)
    loss: Tensor = -closeness.mean()
    return loss
