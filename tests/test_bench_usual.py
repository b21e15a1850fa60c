"""The benchmark's baseline keeps the tokens, and gives the logits, of vtprune's methods of the same names."""

import pytest
import torch

import vtprune
from vtprune.errors import InvalidOptionError, UnsupportedModelError
from vtprune.eval.bench.shapes import SHAPES
from vtprune.eval.bench.usual import USUAL, eager, usual

KEEP = 64


@pytest.fixture(scope="module")
def shape():
    return SHAPES["llava-1.5-1b"]


@pytest.fixture(scope="module")
def model(shape):
    model = shape.build("cpu", torch.float32, layers=4, narrow=True)
    for p in model.parameters():
        if p.ndim > 1:
            p.mul_(10)  # attention far from uniform, though layers are narrow
    return model


def attentions(model):
    return [
        getattr(model.model, part).config._attn_implementation for part in ("vision_tower", "language_model")
    ]


@pytest.mark.parametrize("text", [[30], [21, 34]], ids=["alone", "padded"])
@pytest.mark.parametrize("method", USUAL)
def test_keeps_the_same_tokens_and_gives_the_same_logits(shape, model, method, text):
    inputs = shape.inputs(model, len(text), text, seed=1)
    with eager(model, method):
        first = usual(model, method, KEEP, inputs)()
    with (
        torch.no_grad(),
        vtprune.patch(
            model, method, keep=KEEP, **({"positions": "dense"} if method == "stride" else {})
        ) as patch,
    ):
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
        kept = [next(reversed(image.kept.values())).tolist() for image in patch.report().images]
    assert [index.tolist() for index in first.kept] == kept
    assert all(len(index) == KEEP for index in kept)
    torch.testing.assert_close(first.logits, logits, atol=1e-4, rtol=1e-4)
    dense = model(**inputs, logits_to_keep=1).logits[:, -1]
    assert (first.logits - dense).abs().max() > 1e-2  # nothing pruned would be noticed
    assert attentions(model) == ["sdpa", "sdpa"]


@pytest.mark.parametrize("method", USUAL)
def test_is_a_function_of_its_inputs(shape, model, method):
    call = usual(model, method, KEEP, shape.inputs(model, 2, [21, 34]))
    with eager(model, method):
        first = call().logits  # the first call of all leaves transformers' own idle hooks behind
        hooks = [len(m._forward_hooks) for m in model.modules()]
        assert torch.equal(first, call().logits)
    assert hooks == [len(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize(
    ("method", "maps"),
    [("vtc-cls", {"tower"}), ("visionzip", {"tower"}), ("fastv", {"decoder"}), ("divprune", set())],
)
def test_only_what_is_read_is_eager(shape, model, method, maps):
    seen = {"tower": set(), "decoder": set()}
    hooks = [
        module.self_attn.register_forward_hook(
            lambda m, a, out, part=part: seen[part].add(out[1] is not None)
        )
        for part, stack in (
            ("tower", model.model.vision_tower.encoder.layers),
            ("decoder", model.model.language_model.layers),
        )
        for module in stack
    ]
    try:
        with eager(model, method):
            usual(model, method, KEEP, shape.inputs(model, 1, [30]))()
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == {part: {part in maps} for part in seen}


def test_all_tokens_and_one(shape, model):
    inputs = shape.inputs(model, 1, [30])
    dense = model(**inputs, logits_to_keep=1).logits[:, -1]
    for method in USUAL:
        with eager(model, method):
            everything = usual(model, method, shape.tokens, inputs)()
            assert len(usual(model, method, 1, inputs)().kept[0]) == 1
        torch.testing.assert_close(everything.logits, dense, atol=1e-4, rtol=1e-4)


def test_refusals(shape, model):
    inputs = shape.inputs(model, 1, [30])
    with pytest.raises(InvalidOptionError, match="no usual way"):
        usual(model, "tome", KEEP, inputs)
    with pytest.raises(InvalidOptionError, match="no usual way"), eager(model, "tome"):
        pass
    with pytest.raises(UnsupportedModelError, match="within eager"):
        usual(model, "fastv", KEEP, inputs)()
    for keep in (0, 577):
        with pytest.raises(InvalidOptionError, match="outside 1 to 576"):
            usual(model, "fastv", keep, inputs)
    with pytest.raises(UnsupportedModelError, match="one picture per row"):
        usual(model, "fastv", KEEP, {name: x for name, x in inputs.items() if name != "pixel_values"})
    qwen = SHAPES["qwen2.5-vl-7b"].build("meta", torch.float32, layers=4, narrow=True)
    with pytest.raises(UnsupportedModelError, match="CLIP tower"):
        usual(qwen, "fastv", KEEP, inputs)
