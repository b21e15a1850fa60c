"""Shapes of published models: right sizes, inputs that the models and every kind of patch take, memory estimates."""

import pytest
import torch

import vtprune
from vtprune.errors import InvalidOptionError
from vtprune.eval.bench.shapes import (
    FEWEST_LAYERS,
    SHAPES,
    bytes_needed,
    counted,
    fitting_layers,
    parameters,
)

# Billions of parameters of the published checkpoints; the encoder alone and the invented model as counted by hand.
PUBLISHED = {
    "llava-1.5-7b": 7.06,
    "llava-1.5-1b": 1.41,
    "llava-onevision-7b": 8.03,
    "qwen2.5-vl-7b": 8.29,
    "qwen2.5-vl-7b-video": 8.29,
    "qwen3-vl-8b": 8.77,
    "vit-l": 0.30,
}
FEW = {"llava-onevision-7b": 1, "qwen2.5-vl-7b-video": 1}  # 32 frames take long enough


@pytest.fixture(scope="module")
def narrow():
    """Narrow models by name, made once."""
    models = {}

    def get(name):
        if name not in models:
            layers = None if SHAPES[name].encoder_only else FEW.get(name, FEWEST_LAYERS)
            models[name] = SHAPES[name].build("cpu", torch.float32, layers, narrow=True)
        return models[name]

    return get


def test_every_shape_is_known():
    assert set(SHAPES) == set(PUBLISHED)
    assert all(name == shape.name for name, shape in SHAPES.items())


@pytest.mark.parametrize("name", SHAPES)
def test_has_as_many_parameters_as_the_published_model(name):
    assert sum(counted(name)) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.011)


def test_the_small_language_model_has_a_billion_parameters():
    assert counted("llava-1.5-1b").language >= 1.0e9


@pytest.mark.parametrize("name", SHAPES)
def test_patterns_of_the_vision_tower_survive(name):
    # what is not visible in parameter counts
    config = SHAPES[name].build("meta", torch.bfloat16, None if SHAPES[name].encoder_only else 1).config
    vision = getattr(config, "vision_config", config)
    if name == "qwen2.5-vl-7b":
        assert (vision.window_size, list(vision.fullatt_block_indexes)) == (112, [7, 15, 23, 31])
        assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    if name == "qwen3-vl-8b":
        assert list(vision.deepstack_visual_indexes) == [8, 16, 24]
        assert config.text_config.rope_parameters["mrope_interleaved"]
    if name.startswith("llava-1.5"):
        assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert vision._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", SHAPES)
def test_build(narrow, name):
    model = narrow(name)
    assert not model.training
    for parameter_name, p in model.named_parameters():
        assert not p.requires_grad
        assert p.dtype == torch.float32
        assert p.isfinite().all()
        if p.numel() > 1000 and p.ndim > 1:
            assert p.std() == pytest.approx(0.02, rel=0.1), parameter_name
    for buffer_name, b in model.named_buffers():
        assert b.device.type == "cpu", buffer_name
        assert b.isfinite().all(), buffer_name
    shape, layers = SHAPES[name], None if SHAPES[name].encoder_only else FEW.get(name, FEWEST_LAYERS)
    again = shape.build("cpu", torch.float32, layers, narrow=True)
    other = shape.build("cpu", torch.float32, layers, seed=1, narrow=True)
    mine, same, different = (next(p for p in m.parameters() if p.ndim > 1) for m in (model, again, other))
    assert torch.equal(mine, same)
    assert not torch.equal(mine, different)
    for a, b in zip(model.buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b)


def test_rotary_tables_are_those_of_a_model_built_in_the_ordinary_way(narrow):
    from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

    for name, cls in (
        ("llava-1.5-7b", LlavaForConditionalGeneration),
        ("qwen2.5-vl-7b", Qwen2_5_VLForConditionalGeneration),
    ):
        ordinary = dict(cls(narrow(name).config).named_buffers())
        mine = dict(narrow(name).named_buffers())
        assert set(mine) == set(ordinary)
        assert any("inv_freq" in buffer for buffer in mine)
        for buffer, value in ordinary.items():
            assert torch.equal(mine[buffer], value), buffer


@pytest.mark.parametrize("name", SHAPES)
def test_inputs_go_through_the_model_and_a_patch(narrow, name):
    shape, model = SHAPES[name], narrow(name)
    batch = 1 if name in FEW else 2
    text = [20, 31]
    inputs = shape.inputs(model, batch, text)
    if shape.encoder_only:
        model(**inputs)
        with vtprune.patch(model, "random", keep=64) as patch:
            model(**inputs)
            report = patch.report()
    else:
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=1).logits
        assert logits.isfinite().all()
        length = shape.tokens + shape.newline + max(text[:batch])
        assert inputs["input_ids"].shape == (batch, length)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=2)
        assert output.shape == (batch, length + 2)
        with vtprune.patch(model, "random", keep=64) as patch:
            assert model.generate(**inputs, do_sample=False, max_new_tokens=2).shape == (batch, length + 2)
            report = patch.report()
    assert report.visual_tokens_in == [shape.tokens] * batch
    assert report.visual_tokens_out == [64 * shape.grid[0]] * batch


@pytest.mark.parametrize("name", [name for name in SHAPES if not SHAPES[name].encoder_only])
def test_prompts_are_a_processors(narrow, name):
    shape, model = SHAPES[name], narrow(name)
    config = model.config
    inputs = shape.inputs(model, 2, [22, 30])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert mask.sum(1).tolist() == [shape.tokens + shape.newline + n for n in (22, 30)]
    assert (ids[mask == 0] == shape.pad).all()
    assert mask[:, 0].tolist() == [0, 1]
    assert mask[:, -1].all()
    placeholder = config.video_token_id if shape.grid[0] > 1 else config.image_token_id
    row = ids[1].tolist()
    start = row.index(placeholder)
    end = start + shape.tokens + shape.newline
    assert row[start:end] == [placeholder] * (shape.tokens + shape.newline)
    assert row.count(placeholder) == shape.tokens + shape.newline
    if shape.pixels == "patches":
        assert (row[start - 1], row[end]) == (config.vision_start_token_id, config.vision_end_token_id)
        assert torch.equal(inputs["mm_token_type_ids"] != 0, ids == placeholder)
        kind, suffix = ("video", "_videos") if shape.grid[0] > 1 else ("image", "")
        assert len(inputs[f"pixel_values{suffix}"]) == inputs[f"{kind}_grid_thw"].prod(1).sum()
    assert tuple(row[: len(shape.lead)]) == shape.lead
    assert ids.max() < config.text_config.vocab_size
    with pytest.raises(InvalidOptionError, match="too few"):
        shape.inputs(model, 1, [len(shape.lead)])


@pytest.mark.parametrize("name", ["llava-1.5-1b", "qwen3-vl-8b"])
def test_inputs_are_a_function_of_the_seed(narrow, name):
    shape, model = SHAPES[name], narrow(name)
    one, again, other = (shape.inputs(model, 3, [22, 30], seed) for seed in (0, 0, 1))
    assert one["attention_mask"].sum(1).diff().tolist() == [8, -8]  # lengths are taken in turns
    assert all(torch.equal(again[key], one[key]) for key in one)
    assert not torch.equal(other["input_ids"], one["input_ids"])
    assert not torch.equal(other["pixel_values"], one["pixel_values"])


@pytest.mark.parametrize("name", SHAPES)
def test_layers_that_fit(name):
    shape, dtype = SHAPES[name], torch.bfloat16
    model = shape.build("meta", dtype, None if shape.encoder_only else FEWEST_LAYERS)
    layers = None if shape.encoder_only else FEWEST_LAYERS
    assert parameters(model) == counted(name, layers)
    assert bytes_needed(shape, dtype, layers) == sum(p.nbytes for p in model.parameters())
    fits = [fitting_layers(shape, dtype, size * 2**28) for size in range(80)]
    known = [layers for layers in fits if layers is not None]
    assert fits == [None] * (len(fits) - len(known)) + sorted(known)
    assert known[-1] == shape.layers
    if shape.encoder_only:
        return
    assert known[0] >= FEWEST_LAYERS
    for layers in (FEWEST_LAYERS, 7, shape.layers):
        exact = bytes_needed(shape, dtype, layers)
        assert fitting_layers(shape, dtype, exact) == layers
        assert fitting_layers(shape, dtype, exact - 1) == (layers - 1 if layers > FEWEST_LAYERS else None)
    assert bytes_needed(shape, torch.float32) == 2 * bytes_needed(shape, dtype)


def test_refuses_layers_that_do_not_exist():
    for name, layers in (("llava-1.5-7b", 0), ("llava-1.5-7b", 33), ("vit-l", 1)):
        with pytest.raises(InvalidOptionError, match="layers"):
            SHAPES[name].build("meta", torch.float32, layers)
    SHAPES["vit-l"].build("meta", torch.float32, 0)
