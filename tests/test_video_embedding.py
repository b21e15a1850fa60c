"""The CLIP embedder and the vision-language relevance on the reference models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from vtprune.errors import InvalidOptionError, UnsupportedModelError
from vtprune.eval import world
from vtprune.eval.world.scenes import make_scene
from vtprune.video.relevance import ChatDecoupling, ChatRelevance, keywords
from vtprune.video.selection import Clip, CLIPEmbedder, create_selector

NEEDLE = 7


@pytest.fixture(scope="module")
def needle() -> tuple[Clip, str]:
    """Twelve pictures of which only number 7 shows the thing that the question names."""
    asked = [e for e in world.examples("val", 40) if e.kind == "exists"]
    found = next(e for e in asked if e.answer == "yes")
    without = [e for e in asked if e.answer == "no" and e.scene_seed != found.scene_seed]
    thing = found.question.removeprefix("is there ").removesuffix("?").split(maxsplit=1)[1].strip()
    images = [
        np.asarray(e.image)
        for e in without
        if all(s.name != thing for s in make_scene(e.scene_seed).stickers)
    ]
    frames = np.stack([*images[:NEEDLE], np.asarray(found.image), *images[NEEDLE:11]])
    return Clip(np.arange(12), frames, 12, f"a {thing}", found.question, CLIPEmbedder()), thing


def test_embeddings_are_those_of_the_stock_model(needle: tuple[Clip, str]) -> None:
    clip, thing = needle
    folder = world.reference_dir("clip")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=[thing, f"a {thing}"], images=list(clip.frames), padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        output = model(**inputs)
    small = CLIPEmbedder(batch_size=5)
    assert np.allclose(small.frames(clip.frames), output.image_embeds.numpy(), atol=1e-5)
    assert np.allclose(small.text([thing, f"a {thing}"]), output.text_embeds.numpy(), atol=1e-5)
    assert small.frames(clip.frames[:0]).shape == (0, output.image_embeds.shape[1])


@pytest.mark.parametrize("size", [(30, 50), (96, 96), (200, 100)])
def test_frames_of_any_size_and_texts_of_any_length(size: tuple[int, int]) -> None:
    embedder = CLIPEmbedder()
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.uint8)
    assert np.allclose(np.linalg.norm(embedder.frames(frames), axis=1), 1, atol=1e-5)
    assert np.allclose(np.linalg.norm(embedder.text(["a dog " * 100, ""]), axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "options"),
    [("keyscore", {"proposals": "all"}), ("quota", {}), ("mllm-select", {})],
)
def test_selectors_find_the_frame_that_shows_it(
    needle: tuple[Clip, str], key: str, options: dict[str, Any]
) -> None:
    assert NEEDLE in create_selector(key, **options).select(needle[0], 2).indices.tolist()


def test_chat_relevance_is_the_probability_of_yes(needle: tuple[Clip, str]) -> None:
    clip, thing = needle
    folder = world.reference_dir("llava")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    question = f"when does the {thing} appear?"
    relevance = ChatRelevance(
        model, processor, keywords, with_objects="is there a {objects}?", yes="yes", batch_size=5
    )
    assert relevance.prompt(question) == f"is there a {thing}?"
    scores = relevance(clip.frames, question)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"is there a {thing}?"}]}],
        add_generation_prompt=True,
    )
    for i in (0, NEEDLE):
        inputs = processor(text=text, images=clip.frames[i], return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1]
        yes = processor.tokenizer.convert_tokens_to_ids("yes")
        assert scores[i] == pytest.approx(float(logits.softmax(-1)[yes]), abs=1e-5)
    assert scores.argmax() == NEEDLE
    asked = Clip(clip.times, clip.frames, clip.duration, question=question)
    chosen = create_selector("quota", relevance=relevance).select(asked, 3)
    assert NEEDLE in chosen.indices
    assert chosen.tokens is not None
    assert chosen.tokens.argmax() == chosen.indices.tolist().index(NEEDLE)
    assert ChatRelevance(model, processor, yes="yes", without_objects="{question}").prompt("why ?") == "why ?"
    with pytest.raises(InvalidOptionError, match="one token"):
        ChatRelevance(model, processor, yes="yes no")
    assert isinstance(ChatDecoupling(model, processor, max_new_tokens=4)(question), list)


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"config\.json"):
        CLIPEmbedder(tmp_path)
    with pytest.raises(InvalidOptionError, match="batch_size"):
        CLIPEmbedder(batch_size=0)
    with pytest.raises(UnsupportedModelError, match="llava"):
        CLIPEmbedder(world.reference_dir("llava")).text(["a dog"])
