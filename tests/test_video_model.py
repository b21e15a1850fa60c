"""The video reference model: what it is trained on and how, against the stock model and the ground truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, Qwen2VLForConditionalGeneration

from vtprune.eval.world import reference_dir, score
from vtprune.eval.world.batches import IGNORE
from vtprune.eval.world.scenes import atlas
from vtprune.eval.world.video import KINDS, QUARTERS, examples
from vtprune.eval.world.video import model as video_model
from vtprune.eval.world.video.batches import ALL_KINDS, Bucket, FrameBatches, VideoBatches
from vtprune.eval.world.video.learning import (
    FactHeads,
    FrameHeads,
    answer_losses,
    encode,
    frame_losses,
    new_model,
)
from vtprune.eval.world.video.timeline import WAYS
from vtprune.video.positions import frame_positions

IDS = video_model.vocabulary()
WORDS = {index: word for word, index in IDS.items()}


def batch_of(frames: int, rows: int, first: int = 0) -> dict[str, Tensor]:
    return next(iter(VideoBatches(first, (Bucket(frames, rows, 1.0),))))


def random_model() -> Any:
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(video_model.config()).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def test_frames_are_encoded_as_by_the_stock_processor_and_tower() -> None:
    model, processor = random_model(), video_model.processor()
    frames = torch.from_numpy(np.stack([e.scene.frame(3) for e in examples("train", 3, ["needle"])]))
    inputs = processor(
        text=["<|vision_start|><|video_pad|><|vision_end|>"],
        videos=[frames.permute(0, 3, 1, 2)],
        return_tensors="pt",
    )
    torch.testing.assert_close(video_model.patches(frames).flatten(0, 1), inputs["pixel_values_videos"])
    with torch.no_grad():
        stock = model.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
        patches, tokens = encode(model.model.visual, frames)
    torch.testing.assert_close(patches.flatten(0, 1), stock.last_hidden_state)
    torch.testing.assert_close(tokens.flatten(0, 1), stock.pooler_output)


def test_a_question_of_a_row_is_the_only_one_to_the_stock_model() -> None:
    model = random_model()
    language, batch = model.model.language_model, batch_of(8, 2)
    with torch.no_grad():
        visual = encode(model.model.visual, batch["pixels"])[1].view(2, -1, 128)
        states = language.embed_tokens(batch["ids"])
        states = torch.cat([states[:, :4], visual, states[:, 4 + visual.shape[1] :]], 1)
        rotary = language.rotary_emb(states, batch["positions"])
        for layer in language.layers:
            states = layer(states, attention_mask=batch["mask"], position_embeddings=rotary)
        logits = model.lm_head(language.norm(states))
        for row, place in batch["look"][:: len(batch["look"]) // 3].tolist():
            seen = batch["mask"][row, 0, place].nonzero()[:, 0]
            ids = batch["ids"][row, seen][None]
            alone = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=torch.where(ids == IDS[video_model.VIDEO_PAD], 2, 0),
                pixel_values_videos=video_model.patches(batch["pixels"].view(2, -1, 96, 96, 3)[row]).flatten(
                    0, 1
                ),
                video_grid_thw=video_model.grid(8),
                position_ids=batch["positions"][:, row, seen][:, None],
            ).logits
            torch.testing.assert_close(logits[row, place], alone[0, -1], rtol=1e-4, atol=1e-5)


def asked(batch: dict[str, Tensor], row: int, place: int) -> tuple[str, str, str]:
    """Kind, question and answer whose last prompt token stands at a place."""
    first = place
    while (
        batch["mask"][row, 0, place, first - 1]
        and WORDS[int(batch["ids"][row, first - 1])] != "<|vision_end|>"
    ):
        first -= 1
    said = []
    at = place
    while WORDS.get(int(batch["target"][row, at]), "</s>") != "</s>":
        said.append(WORDS[int(batch["target"][row, at])])
        at += 1
    text = " ".join(WORDS[i] for i in batch["ids"][row, first : place + 1].tolist())
    return ALL_KINDS[int(batch["kind"][row, place])], text, " ".join(said)


@pytest.mark.parametrize("frames", [8, 20])
def test_what_tokens_know_gives_the_answers(frames: int) -> None:
    names, met = atlas().names, set()
    for step in range(2):
        batch = batch_of(frames, 24, step)
        assert IDS["<unk>"] not in batch["ids"]
        for (row, place), wanted in zip(batch["look"].tolist(), batch["wanted"], strict=True):
            kind, text, answer = asked(batch, row, place)
            at = wanted.nonzero()[:, 0]
            if kind == "known" or (kind == "exists" and answer == "no"):
                assert not len(at)
                continue
            assert len(at), (kind, text)
            facts = {
                key: batch[key][row, at].tolist()
                for key in ("label", "moves", "ordinal", "company", "before")
            }
            labels = [names[label - 1] for label in facts["label"]]
            if kind in ("needle", "order", "still"):
                assert set(labels) == {answer}
            if kind == "order" and " after the " in text:
                assert {names[b - 1] for b in facts["before"]} == {text.split(" after the ")[1].split()[0]}
            if kind == "moment":
                pairs = {frozenset((a, names[b - 1])) for a, b in zip(labels, facts["company"], strict=True)}
                assert pairs == {frozenset((answer, text.split("with the ")[1].split()[0]))}
            if kind == "often":
                assert set(facts["ordinal"]) == {int(answer) - 1}
            if kind == "motion":
                assert set(facts["moves"]) <= {IGNORE, WAYS.index(answer)}
            if kind == "when":
                assert answer in QUARTERS
            met.add(kind)
    assert met == set(KINDS) - {"known"}


def test_positions_are_those_of_the_grid() -> None:
    batch = batch_of(12, 6)
    visual = batch["ids"] == IDS[video_model.VIDEO_PAD]
    time, height, width = (axis[visual].view(6, 12, 16) for axis in batch["positions"])
    assert (time == time[..., :1]).all()
    assert (time[:, 1:, 0] > time[:, :-1, 0]).all()
    assert (height == 4 + torch.arange(16) // 4).all()
    assert (width == 4 + torch.arange(16) % 4).all()


@pytest.mark.parametrize("frames", [1, 8])
def test_training_lowers_the_loss(frames: int) -> None:
    torch.manual_seed(0)
    pictures = LlavaForConditionalGeneration.from_pretrained(reference_dir("llava"))
    model: Any = new_model(video_model.config(), pictures)
    source, own = pictures.model.language_model.layers[3], model.model.language_model.layers[3]
    assert torch.equal(own.self_attn.q_proj.weight, source.self_attn.q_proj.weight)
    model.model.visual.requires_grad_(False)
    heads, batch = FactHeads(128), batch_of(frames, 2)
    weights = [p for p in (*model.parameters(), *heads.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(1)
        loss, figures = answer_losses(model, heads, batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert np.isfinite(figures["answer"])


def test_training_the_tower_lowers_the_loss() -> None:
    torch.manual_seed(0)
    tower, heads = Qwen2VLForConditionalGeneration(video_model.config()).model.visual, FrameHeads(128)
    batch = next(iter(FrameBatches(0, 6)))
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=1e-4)
    losses = []
    for _ in range(4):
        loss, _ = frame_losses(tower, heads, batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_the_shipped_model_answers() -> None:
    folder: Path = reference_dir("qwen2-vl")
    assert (folder / "model.safetensors").stat().st_size < 16 * 2**20
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    right = []
    for example in examples("val", 18, ("when", "exists", "order"), frames=24):
        content = [{"type": "video"}, {"type": "text", "text": example.question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        frames = torch.from_numpy(np.stack([example.scene.frame(i) for i in range(24)]))
        inputs = processor(text=[text], videos=[frames.permute(0, 3, 1, 2)], return_tensors="pt")
        positions = frame_positions(model, inputs, [list(range(24))], 24)
        output = model.generate(**inputs, position_ids=positions, max_new_tokens=4)
        said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right.append(score(said, example.answer))
    assert sum(right) >= 14
