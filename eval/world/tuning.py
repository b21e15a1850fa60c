"""Stage 2: projector and language model on the frozen vision tower of stage 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .batches import CELLS, IGNORE
from .models import llava_config, vocabulary
from .pretrain import vision_outputs
from .questions import KINDS
from .scenes import atlas

LOOK_UP_LAYER = 2


class Finder(nn.Module):
    """Says where the thing is that a name's token has looked up; only used while training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.place = nn.Linear(width, CELLS + 2)

    def forward(self, states: Tensor) -> Tensor:
        """Logits of the 9 positions, and the centre in 0..1: (n, width) -> (n, 11)."""
        place: Tensor = self.place(self.norm(states))
        return place


def join(clip: CLIPModel) -> LlavaForConditionalGeneration:
    """A new LLaVA with the vision tower of ``clip``, frozen."""
    model = LlavaForConditionalGeneration(llava_config())
    model.model.vision_tower = clip.vision_model.requires_grad_(False)
    return model


def answer_losses(
    model: LlavaForConditionalGeneration, finder: Finder, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers of a `DialogueBatches` batch, and per kind the share of right tokens.

    Added to it are two auxiliary losses: the alignment of projected patches with the words for them, and one
    attention head's look-up of a name with what it finds.

    Args:
        model: the LLaVA.
        finder: auxiliary head.
        batch: see `DialogueBatches`.
    """
    with torch.no_grad():
        features = vision_outputs(model.model.vision_tower, batch["pixels"]).features
    images = model.model.multi_modal_projector(features)
    embeddings = model.get_input_embeddings()(batch["ids"])
    first = int((batch["ids"][0] == model.config.image_token_id).nonzero()[0])
    embeddings = torch.cat([embeddings[:, :first], images, embeddings[:, first + images.shape[1] :]], 1)
    output = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=batch["mask"],
        position_ids=batch["positions"],
        use_cache=False,
        output_hidden_states=True,
    )
    hidden = output.last_hidden_state
    asked = batch["target"] != IGNORE
    logits, target = model.lm_head(hidden[asked]), batch["target"][asked]
    weight, kind = batch["weight"][asked], batch["kind"][asked]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    alignment = _alignment(images, model.model.language_model.embed_tokens.weight, batch["label"])
    look_up, found = _look_up(model, finder, output.hidden_states, batch)
    right = (logits.argmax(-1) == target).float()
    figures = {
        "answer": float(loss.detach()),
        "alignment": float(alignment.detach()),
        "look_up": float(look_up.detach()),
        "found": float(found.detach()),
    }
    figures |= {name: float(right[kind == index].mean()) for index, name in enumerate(KINDS)}
    return loss + 0.3 * (alignment + look_up + found), figures


def _alignment(images: Tensor, words: Tensor, label: Tensor) -> Tensor:
    """Draw each projected sticker patch towards the word for it.

    Finding the patch that a word names is what "exists", "locate" and "relation" need and what small decoders learn
    last; large ones come with the two aligned by pretraining on captions.
    """
    ids = vocabulary()
    names = words[[ids[name] for name in atlas().names]]
    shown = (label > 0) & (label <= len(names))
    similarity = F.normalize(images[shown], dim=-1) @ F.normalize(names, dim=-1).T
    return F.cross_entropy(10 * similarity, label[shown] - 1)


def _look_up(
    model: LlavaForConditionalGeneration, finder: Finder, states: tuple[Tensor, ...], batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Draw one attention head from each name in a question to the patches that show it, or to ``<s>`` if none does.

    Args:
        model: the LLaVA.
        finder: the head that says where the thing is.
        states: (B, T, width) inputs of the decoder's layers.
        batch: see `DialogueBatches`.

    Returns:
        Mean negative logarithm of the share of attention that goes there, and the loss of what the name's token says
        about the place of a thing that is there once.
    """
    language = model.model.language_model
    layer = language.layers[LOOK_UP_LAYER]
    ids = vocabulary()
    names = torch.tensor([ids[name] for name in atlas().names])
    answers = F.pad(batch["target"] != IGNORE, (1, -1))
    row, place = (torch.isin(batch["ids"], names) & ~answers).nonzero(as_tuple=True)
    number = (batch["ids"][row, place][:, None] == names).long().argmax(1)
    shown = batch["label"][row] == number[:, None] + 1
    first = int((batch["ids"][0] == model.config.image_token_id).nonzero()[0])
    wanted = F.pad(shown, (first, batch["ids"].shape[1] - first - shown.shape[1]))
    wanted[:, 0] = ~shown.any(1)
    state = layer.input_layernorm(states[LOOK_UP_LAYER])
    size = layer.self_attn.head_dim
    query = layer.self_attn.q_proj(state)[:, None, :, :size]
    key = layer.self_attn.k_proj(state)[:, None, :, :size]
    query, key = apply_rotary_pos_emb(query, key, *language.rotary_emb(state, batch["positions"]))
    scores = (query[row, 0, place][:, None] @ key[row, 0].transpose(1, 2)).squeeze(1) / size**0.5
    scores = scores.masked_fill(~batch["mask"][row, 0, place], -torch.inf)
    share = scores.masked_fill(~wanted, -torch.inf).logsumexp(1) - scores.logsumexp(1)
    patch = shown.long().argmax(1)
    once = shown.any(1) & (batch["number"][row, patch] == 0)
    found = finder(states[LOOK_UP_LAYER + 1][row[once], place[once]])
    row, patch = row[once], patch[once]
    where = F.cross_entropy(found[:, :CELLS], batch["cell"][row, patch])
    where = where + 10 * F.smooth_l1_loss(found[:, CELLS:], batch["centre"][row, patch], beta=0.05)
    return -share.mean(), where
