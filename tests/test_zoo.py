"""The tiny models: batches are laid out as the models expect; the stock models are invariant to padding."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from vtprune.testing.zoo import ENCODERS, LVLMS, Image, Prompt, Video


@functools.cache
def model_of(name: str, attention: str = "sdpa") -> Any:
    return LVLMS[name].build(attention=attention)


def prompts_of(name: str) -> list[Prompt]:
    """Ragged rows: text alone, one picture, several pictures, other sizes, videos."""
    family = LVLMS[name]
    prompts: list[Prompt] = [
        [20, 21, Image(1), 22, 23, 24],
        [25, 26, 27],
        [28, Image(2), 29, Image(3, 1), Image(1), 30],
    ]
    if family.variable_size:
        prompts += [[31, Image(4, 1), 32], [Image(5, 2), 33, 34]]
    if family.has_video:
        frames = 3 if family.ragged_videos else 2
        prompts += [[35, Video(1), 36, 37], [Video(2, frames), Image(6), 38, Video(3)]]
    return prompts


@torch.no_grad()
def last_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[rows, vocabulary] after the last token that is no padding."""
    mask = batch["attention_mask"]
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    logits: torch.Tensor = model(**batch).logits
    return logits[torch.arange(len(mask)), last]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", LVLMS)
def test_rows_of_a_batch_equal_rows_alone(name: str, padding: str) -> None:
    family, model = LVLMS[name], model_of(name)
    prompts = prompts_of(name)
    together = last_logits(model, family.batch(prompts, padding=padding))
    alone = torch.cat([last_logits(model, family.batch([p])) for p in prompts])
    assert torch.isfinite(together).all()
    assert together.abs().max() < 1e4
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    # The rows are all different, so that the comparison says something.
    assert torch.pdist(alone).min() > 1e-2


def generated(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Four greedy tokens, [rows, 4], and their logits, [rows, 4, vocabulary]."""
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**batch, max_new_tokens=4, **settings)
    return out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", LVLMS)
def test_greedy_generation_of_a_batch_equals_rows_alone(name: str) -> None:
    family, model = LVLMS[name], model_of(name)
    prompts = prompts_of(name)
    tokens, logits = generated(model, family.batch(prompts))
    assert tokens.shape == (len(prompts), 4)
    assert ((tokens >= family.text_ids[0]) & (tokens < family.text_ids[1])).all()
    for i, prompt in enumerate(prompts):
        alone, alone_logits = generated(model, family.batch([prompt]))
        assert torch.equal(tokens[i], alone[0])
        torch.testing.assert_close(logits[i], alone_logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LVLMS)
def test_text_alone(name: str) -> None:
    family, model = LVLMS[name], model_of(name)
    batch = family.batch([[20, 21, 22], [23, 24]])
    assert not any("pixel" in key for key in batch)
    alone = torch.cat([last_logits(model, family.batch([p])) for p in ([20, 21, 22], [23, 24])])
    torch.testing.assert_close(last_logits(model, batch), alone, rtol=1e-4, atol=1e-4)
    assert generated(model, batch)[0].shape == (2, 4)


@pytest.mark.parametrize("name", LVLMS)
def test_pixels_matter_and_eager_attention_agrees(name: str) -> None:
    family, model = LVLMS[name], model_of(name)
    row: Prompt = [20, Image(1), 21, 22]
    first = last_logits(model, family.batch([row]))
    other = last_logits(model, family.batch([[20, Image(2), 21, 22]]))
    assert (first - other).abs().max() > 1e-2
    eager = last_logits(family.build(attention="eager"), family.batch([row]))
    torch.testing.assert_close(first, eager, rtol=1e-4, atol=1e-4)


def test_items_decide_their_pixels() -> None:
    batch = LVLMS["llava"].batch
    pixels = batch([[20, Image(7)], [Image(8), Image(7)]])["pixel_values"]
    assert torch.equal(pixels[0], pixels[2])
    assert not torch.equal(pixels[0], pixels[1])


def test_layers_and_seed() -> None:
    family = LVLMS["llava_next"]
    a, b, c = (family.build(layers=2, seed=seed) for seed in (0, 0, 1))
    assert len(a.model.language_model.layers) == 2
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_parts_that_make_a_family_special_matter() -> None:
    """The window of Gemma 3, the deepstack features of Qwen3-VL, the mask of padded patches."""
    gemma = LVLMS["gemma3"].build()
    batch = LVLMS["gemma3"].batch([[20, Image(1), *range(21, 33)]])
    before = last_logits(gemma, batch)
    gemma.config.text_config.sliding_window = 64
    assert (last_logits(gemma, batch) - before).abs().max() > 1e-2

    batch = LVLMS["gemma3"].batch([[20, Image(1), 21]])
    causal = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
    gemma = model_of("gemma3")
    assert (last_logits(gemma, batch) - last_logits(gemma, causal)).abs().max() > 1e-2

    qwen = LVLMS["qwen3_vl"].build()
    batch = LVLMS["qwen3_vl"].batch([[20, Image(1), 21]])
    before = last_logits(qwen, batch)
    for merger in qwen.model.visual.deepstack_merger_list:
        torch.nn.init.zeros_(merger.linear_fc2.weight)
    assert (last_logits(qwen, batch) - before).abs().max() > 1e-2

    for name, mask in (
        ("idefics3", "pixel_attention_mask"),
        ("smolvlm", "pixel_attention_mask"),
        ("aria", "pixel_mask"),
    ):
        batch = LVLMS[name].batch([[20, Image(1, 2), 21]])
        full = {**batch, mask: torch.ones_like(batch[mask])}
        model = model_of(name)
        assert (last_logits(model, batch) - last_logits(model, full)).abs().max() > 1e-3


def test_onevision_shapes() -> None:
    """Token counts of the branches: cut rows, cut columns, resized, several pictures in a row, video."""
    batch = LVLMS["llava_onevision"].batch
    counts = [
        (batch([row])["input_ids"] < 20).sum().item()
        for row in ([Image()], [Image(0, 1)], [Image(0, 2)], [Image(), Image(0, 2)], [Video(frames=2)])
    ]
    assert counts == [25 + 3 * 11, 25 + 10 * 4, 25 + 7 * 8, 2 * 26, 2 * 9 + 1]


def test_llava_next_shapes() -> None:
    batch = LVLMS["llava_next"].batch
    tiles = [batch([[Image(0, shape)]])["pixel_values"].shape[1] for shape in range(3)]
    tokens = [batch([[Image(0, shape)]])["input_ids"].shape[1] for shape in range(3)]
    assert tiles == [3, 4, 5]
    assert tokens == [16 + 2 * 9, 16 + 12 * 3, 16 + 6 * 9]


def test_videos_of_one_batch_have_one_length() -> None:
    with pytest.raises(ValueError, match="one number of frames"):
        LVLMS["video_llava"].batch([[Video(frames=2)], [Video(frames=3)]])
    with pytest.raises(ValueError, match="no video"):
        LVLMS["llava"].batch([[Video()]])


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    encoder = ENCODERS[name]
    model, pixels = encoder.build(), encoder.pixels(3)
    assert pixels.shape[:2] == (3, 3)
    with torch.no_grad():
        outputs = [model(pixels), model(pixels)]
        single = model(pixels[:1])
    if not name.startswith("timm"):
        outputs, single = [o.last_hidden_state for o in outputs], single.last_hidden_state
    else:
        assert outputs[0].shape == (3, 10)
    assert len(outputs[0]) == 3
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0][:1], single, rtol=1e-4, atol=1e-4)
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-2
