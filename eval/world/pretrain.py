"""Stage 1: the CLIP model, with dense auxiliary supervision of its vision tower.

Answers or captions alone teach a small vision tower hardly anything in minutes. So heads that are thrown away
afterwards ask every patch, at the layer the language model will read, for what a patch of a large vision tower knows:
the class of its sticker, where the sticker's centre is, how many of its kind the picture holds, and the whole string
of its sign. [CLS] names the set of stickers, and the contrastive loss joins pictures and captions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from .batches import CELLS, IGNORE, PAD_ID, SIGN_LENGTH
from .models import pixel_values
from .scenes import MAX_STICKERS, atlas

FEATURE_LAYER = -2


class Heads(nn.Module):
    """Auxiliary heads on the patches of the feature layer and on [CLS]; only used while training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        names, glyphs = len(atlas().names), len(atlas().glyphs)
        self.sizes = (names + 2, 2, MAX_STICKERS, CELLS, SIGN_LENGTH * (glyphs + 1))
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, sum(self.sizes))
        self.present = nn.Linear(width, names)
        self.glyph = nn.Linear(width, glyphs)
        self.name_bias = nn.Parameter(torch.tensor([-4.0, -4.0]))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Label, centre, number, cell and string outputs for patch features (batch, patches, width)."""
        outputs: tuple[Tensor, ...] = self.patch(self.norm(features)).split(self.sizes, dim=-1)
        return outputs


@dataclass(frozen=True)
class VisionOutputs:
    """What a vision tower gives for B pictures.

    Attributes:
        features: (B, 144, width) patches at the layer that the language model reads.
        patches: (B, 144, width) patches after the last layer.
        pooled: (B, width) [CLS] after the last layer and its norm.
    """

    features: Tensor
    patches: Tensor
    pooled: Tensor


def vision_outputs(tower: nn.Module, pixels: Tensor) -> VisionOutputs:
    """Run a vision tower on (B, 96, 96, 3) uint8 pictures."""
    output = tower(pixel_values(pixels), output_hidden_states=True)
    return VisionOutputs(
        output.hidden_states[FEATURE_LAYER][:, 1:], output.last_hidden_state[:, 1:], output.pooler_output
    )


def vision_losses(
    model: CLIPModel, heads: Heads, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch of `VisionBatches`, and figures for the log (accuracies in 0..1)."""
    output = vision_outputs(model.vision_model, batch["pixels"])
    features = output.features
    label, centre, number, cell, string = heads(features)
    target = batch["label"]
    thing = target > 0
    each = F.cross_entropy(label.transpose(1, 2), target, reduction="none")
    losses = {
        "label": each[thing].mean() + 0.5 * each[~thing].mean(),
        "centre": 10 * F.smooth_l1_loss(centre[thing], batch["centre"][thing], beta=0.05),
        "number": F.cross_entropy(number.transpose(1, 2), batch["number"], ignore_index=IGNORE),
        "glyph": F.cross_entropy(
            heads.glyph(heads.norm(features)).transpose(1, 2), batch["glyph"], ignore_index=IGNORE
        ),
        "cell": 0.5 * F.cross_entropy(cell.transpose(1, 2), batch["cell"], ignore_index=IGNORE),
        "string": F.cross_entropy(
            string.reshape(-1, len(atlas().glyphs) + 1), batch["string"].flatten(), ignore_index=IGNORE
        ),
    }
    present = heads.present(output.pooled)
    losses["present"] = 5 * F.binary_cross_entropy_with_logits(present, batch["present"])
    losses |= _text_losses(model, heads, output.patches, output.pooled, batch)
    total = torch.stack(list(losses.values())).sum()
    with torch.no_grad():
        figures = {key: float(value.detach()) for key, value in losses.items()}
        figures["label_accuracy"] = _accuracy(label, target, thing)
        figures["number_accuracy"] = _accuracy(number, batch["number"], batch["number"] != IGNORE)
        figures["string_accuracy"] = _accuracy(
            string.unflatten(-1, (SIGN_LENGTH, -1)), batch["string"], batch["string"] != IGNORE
        )
        figures["set_accuracy"] = float(((present > 0) == (batch["present"] > 0)).all(1).float().mean())
    return total, figures


def _text_losses(
    model: CLIPModel, heads: Heads, patches: Tensor, pooled: Tensor, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Captions against pictures, and the text of each name against whole pictures and against patches."""
    ids = batch["caption"]
    texts = _embed_text(model, ids)
    names = _embed_text(model, batch["names"])
    images = F.normalize(model.visual_projection(pooled), dim=-1)
    scale = model.logit_scale.exp()
    logits = scale * images @ texts.T
    order = torch.arange(len(ids))
    contrastive = (F.cross_entropy(logits, order) + F.cross_entropy(logits.T, order)) / 2
    whole = F.binary_cross_entropy_with_logits(
        scale * images @ names.T + heads.name_bias[0], batch["present"]
    )
    shown = patches[batch["label"] > 0]
    shown_label = batch["label"][batch["label"] > 0]
    local = F.normalize(model.visual_projection(model.vision_model.post_layernorm(shown)), dim=-1)
    target = F.one_hot(shown_label, names.shape[0] + 2)[:, 1:-1].float()
    part = F.binary_cross_entropy_with_logits(scale * local @ names.T + heads.name_bias[1], target)
    return {"contrastive": 0.25 * contrastive, "name": 2 * whole, "name_patch": 2 * part}


def _embed_text(model: CLIPModel, ids: Tensor) -> Tensor:
    pooled = model.text_model(ids, attention_mask=(ids != PAD_ID).long()).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def _accuracy(logits: Tensor, target: Tensor, where: Tensor) -> float:
    return float((logits.argmax(-1) == target)[where].float().mean())
