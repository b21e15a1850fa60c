"""Stages 2 and 3: projector and language model on a frozen vision tower, then everything together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, LlavaForConditionalGeneration

from .batches import IGNORE
from .models import llava_config
from .pretrain import Heads, vision_losses_from, vision_outputs
from .questions import KINDS


def join(clip: CLIPModel) -> LlavaForConditionalGeneration:
    """A new LLaVA whose vision tower *is* that of ``clip``: the same module, as the two are trained together."""
    model = LlavaForConditionalGeneration(llava_config())
    model.model.vision_tower = clip.vision_model
    return model


def answer_losses(
    model: LlavaForConditionalGeneration, features: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers of a `DialogueBatches` batch, and per kind the share of right tokens.

    Args:
        model: the LLaVA.
        features: (B, 144, width) patch features of the vision tower.
        batch: see `DialogueBatches`.
    """
    images = model.model.multi_modal_projector(features)
    embeddings = model.get_input_embeddings()(batch["ids"])
    first = int((batch["ids"][0] == model.config.image_token_id).nonzero()[0])
    embeddings = torch.cat([embeddings[:, :first], images, embeddings[:, first + images.shape[1] :]], 1)
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=batch["mask"],
        position_ids=batch["positions"],
        use_cache=False,
    ).last_hidden_state
    asked = batch["target"] != IGNORE
    logits, target = model.lm_head(hidden[asked]), batch["target"][asked]
    weight, kind = batch["weight"][asked], batch["kind"][asked]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    right = (logits.argmax(-1) == target).float()
    figures = {"answer": float(loss.detach())}
    figures |= {name: float(right[kind == index].mean()) for index, name in enumerate(KINDS)}
    return loss, figures


def frozen_losses(
    model: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Stage 2: the answers alone, the vision tower frozen."""
    with torch.no_grad():
        output = vision_outputs(model.model.vision_tower, batch["pixels"])
    return answer_losses(model, output.features, batch)


def joint_losses(
    model: LlavaForConditionalGeneration, clip: CLIPModel, heads: Heads, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Stage 3: the answers, and stage 1's losses beside them so that vision and text tower stay in step."""
    output = vision_outputs(clip.vision_model, batch["pixels"])
    loss, figures = answer_losses(model, output.features, batch)
    vision, vision_figures = vision_losses_from(output, clip, heads, batch)
    keep = ("label_accuracy", "number_accuracy", "string_accuracy", "set_accuracy", "contrastive")
    return loss + 0.3 * vision, figures | {key: vision_figures[key] for key in keep}
