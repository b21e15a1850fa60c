"""Quantised models of bitsandbytes and torchao, as `from_pretrained` makes them on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from users.common import KEEP, TOKENS, answers, cut, hooks, inputs_of, kept, load, questions

import vtprune


def bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes accelerate")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def torchao(name: str) -> Any:
    pytest.importorskip("torchao", reason="pip install torchao")
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(torchao.quantization, name)())


# Name -> configuration, and how far equal sequences of different length may be apart in their logits: activations that are
# rounded, too, jump by a step where sums are added up in another order. Dense and pruned logits are far more apart.
KINDS: dict[str, tuple[Callable[[], Any], float]] = {
    "torchao int8 weights": (lambda: torchao("Int8WeightOnlyConfig"), 1e-3),
    "torchao int8": (lambda: torchao("Int8DynamicActivationInt8WeightConfig"), 0.5),
    "bitsandbytes int8": (lambda: bitsandbytes(load_in_8bit=True), 0.5),
    "bitsandbytes fp4": (lambda: bitsandbytes(load_in_4bit=True), 0.1),
    "bitsandbytes nf4": (
        lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        0.1,
    ),
}

ROUNDED = ("torchao int8", "bitsandbytes int8")  # activations, too


@functools.cache
def quantised(kind: str, attention: str = "sdpa") -> Any:
    """A model; shared by tests that leave it as they found it."""
    model = load(quantization_config=KINDS[kind][0](), attn_implementation=attention)
    for stack in (model.model.language_model, model.model.vision_tower.encoder):
        q = stack.layers[0].self_attn.q_proj
        assert "bitsandbytes" in type(q).__module__ or "torchao" in type(q.weight).__module__
    return model


def farthest(features: Tensor, k: int) -> list[int]:
    """DivPrune, literally: the token whose nearest other is farthest away, then always what is farthest from those chosen."""
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    distance = (1 - unit @ unit.T).tolist()
    n = len(distance)
    chosen = [max(range(n), key=lambda i: min(distance[i][j] for j in range(n) if j != i))]
    while len(chosen) < k:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance[i][j] for j in chosen)))
    return sorted(chosen)


@torch.no_grad()
def reference(kind: str, method: str, inputs: dict[str, Tensor]) -> list[list[int]]:
    """The choice of a method from what the stock quantised model, unpatched, gives out itself."""
    if method == "divprune":
        features = quantised(kind).model.get_image_features(inputs["pixel_values"]).pooler_output
        return [farthest(f, KEEP) for f in features]
    slow = quantised(kind, "eager")
    if method == "fastervlm":
        seen = slow.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
        scores = seen[slow.config.vision_feature_layer].mean(1)[:, 0, 1:]
    else:
        assert method == "fastv"
        rows = slow(**inputs, output_attentions=True).attentions[1][:, :, -1].mean(1)
        scores = rows[inputs["input_ids"] == slow.config.image_token_id].view(len(rows), TOKENS)
    return [s.topk(KEEP).indices.sort().values.tolist() for s in scores]


@pytest.mark.parametrize("method", ["divprune", "fastervlm", "fastv"])
@pytest.mark.parametrize("kind", KINDS)
def test_decisions_and_logits(kind: str, method: str) -> None:
    """The choice is the one that the quantised model's own outputs call for; what follows is the pruned sequence."""
    model, inputs = quantised(kind), inputs_of(questions()[:3])
    with torch.no_grad():
        dense = model(**inputs).logits[:, -1]
        with vtprune.patch(model, method, keep=KEEP, positions="original") as patch:
            logits = model(**inputs).logits[:, -1]
            choice = kept(patch.report())
            assert patch.report().visual_tokens_out == [KEEP] * 3
        wanted = reference(kind, method, inputs)
        expected = torch.stack(
            [
                cut(model, inputs, row, stay, 2 if method == "fastv" else 0)[-1]
                for row, stay in enumerate(choice)
            ]
        )
    # Eager attention shifts rounded activations a little, which may swap tokens with nearly equal scores.
    may_swap = 1 if method == "fastv" and kind in ROUNDED else 0
    assert all(len(set(a) & set(b)) >= KEEP - may_swap for a, b in zip(choice, wanted, strict=True))
    apart = (logits - expected).abs().max()
    assert apart < KINDS[kind][1]
    assert apart < (logits - dense).abs().max() / 5


@pytest.mark.parametrize("method", ["vtc-cls", "visionzip", "sparsevlm", "dart", "tome", "vtprune"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_and_undo(kind: str, method: str) -> None:
    model, asked = quantised(kind), questions()[:2]
    inputs = inputs_of(asked)
    before = answers(model, inputs)
    with torch.no_grad():
        dense = model(**inputs).logits
    count = hooks(model)
    with vtprune.patch(model, method, keep=KEEP) as patch:
        together = answers(model, inputs)
        assert patch.report().engaged
        assert max(patch.report().visual_tokens_out) <= KEEP
        if kind not in ROUNDED:
            assert together == [answers(model, inputs_of([q]))[0] for q in asked]
    assert hooks(model) == count
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, dense)
    assert answers(model, inputs) == before


@pytest.mark.parametrize("kind", KINDS)
def test_trained_weights_are_refused(kind: str) -> None:
    """They belong to a model that is known by its parameters."""
    from vtprune.eval.world import reference_dir

    weights = reference_dir("llava") / "vtprune" / "ucofia-16.safetensors"
    with pytest.raises(vtprune.UnsupportedModelError, match=r"quantised .* in floating point"):
        vtprune.patch(quantised(kind), "ucofia", weights=str(weights))


def test_quantising_a_patched_model() -> None:
    """torchao changes weights, no modules, so that the patch reads the quantised ones."""
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    model, inputs = load(), inputs_of(questions()[:2])
    with vtprune.patch(model, "fastv", keep=KEEP) as patch:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        assert answers(model, inputs)
        late = kept(patch.report())
    with vtprune.patch(model, "fastv", keep=KEEP) as patch:
        assert answers(model, inputs)
        assert kept(patch.report()) == late
