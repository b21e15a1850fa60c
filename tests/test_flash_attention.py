"""transformers' own FlashAttention path, with the two kernels of flash-attn replaced by plain torch.

Only `flash_attn_func` and `flash_attn_varlen_func` are emulated (bottom-right causal masks, [B, L, H, d]); the
2D masks, un-padding and packed-sequence detection are transformers' code. That is where pruning goes wrong under
FlashAttention: masks are sliced from the right, and gaps in position ids are read as packed sequences.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils as flash_utils

import vtprune
from vtprune.testing import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl

NAME = "flash_attention_2"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(logits.shape[-1] - logits.shape[-2] + 1)
        logits = logits.masked_fill(hidden, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    parts = [
        x.split(cu.diff().tolist()) for x, cu in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    ]
    out = [
        flash_attn_func(a[None], b[None], c[None], dropout_p, softmax_scale, causal)[0]
        for a, b, c in zip(*parts, strict=True)
    ]
    return torch.cat(out)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Installs the emulated kernels; the list records which of them ran."""
    calls: list[str] = []

    @functools.wraps(flash_attn_func)
    def dense(*args: Any, **kwargs: Any) -> Tensor:
        calls.append("dense")
        return flash_attn_func(*args, **kwargs)

    @functools.wraps(flash_attn_varlen_func)
    def varlen(*args: Any, **kwargs: Any) -> Tensor:
        calls.append("varlen")
        return flash_attn_varlen_func(*args, **kwargs)

    kernels = (dense, varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: kernels)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    return calls


def flash(model: nn.Module) -> nn.Module:
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation = NAME
    return model


LLAVA = [
    [[1, 10, 11, "image", 12, 13]],
    [[1, 10, 11, "image", 12, 13], [1, 10, "image", 11, "image", 12, 13, 14], [1, 20, 21]],
]
QWEN = [[[1, 10, (4, 6), 12]], [[1, 10, (4, 6), 12], [1, (2, 4), 11, (6, 6), 12], [1, 20, 21]]]
METHODS = [
    ("vtc-cls", {"keep": 5}),
    ("visionzip", {"keep": 6, "contextual": 0.3}),
    ("divprune", {"keep": 5}),
    ("divprune", {"keep": 5, "positions": "original"}),
    ("fastv", {"keep": 5}),
    ("random", {"keep": 5, "where": "decoder", "layer": 1, "positions": "dense"}),
]


def name(value: object) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("batch", [0, 1], ids=["one", "ragged"])
@pytest.mark.parametrize(("method", "options"), METHODS, ids=name)
def test_flash_equals_sdpa(
    emulated: list[str], family: str, batch: int, method: str, options: dict[str, object]
) -> None:
    if family == "llava":
        make, inputs = tiny_llava, llava_inputs(LLAVA[batch])
    else:
        make, inputs = tiny_qwen2_5_vl, qwen_inputs(QWEN[batch])
        if options.get("positions") == "dense":
            pytest.skip("positions='dense' is declared meaningless on M-RoPE models")
        if method in ("vtc-cls", "visionzip"):
            options = {**options, "scorer": "received"}
    results = []
    for model in (make(), flash(make())):
        with torch.no_grad(), vtprune.patch(model, method, **options) as patch:
            logits = model(**inputs).logits
            first = model.generate(
                **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            turn = torch.cat([first.sequences, torch.full((len(logits), 3), 20)], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones(len(turn), 9, dtype=torch.long)], 1)
            second = model.generate(
                input_ids=turn,
                attention_mask=mask,
                past_key_values=first.past_key_values,
                max_new_tokens=4,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            assert patch.report().engaged
            assert bool(emulated) == (model.config.text_config._attn_implementation == NAME)
        real = inputs["attention_mask"].bool()
        results.append((logits[real], *first.logits, *second.logits))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("method", "options"), METHODS, ids=name)
def test_second_turn_with_another_picture(
    emulated: list[str], method: str, options: dict[str, object]
) -> None:
    """Gaps in the positions of a continued prefill must not be read as packed sequences."""
    first_inputs = llava_inputs([[1, 10, 11, "image", 12, 13]])
    more = llava_inputs([[20, "image", 21, 22]], seed=7)
    results = []
    for model in (tiny_llava(), flash(tiny_llava())):
        with torch.no_grad(), vtprune.patch(model, method, **options):
            first = model.generate(
                **first_inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
            )
            ids = torch.cat([first.sequences, more["input_ids"]], 1)
            second = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=more["pixel_values"],
                past_key_values=first.past_key_values,
                max_new_tokens=4,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        results.append(second.logits)
    assert emulated
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", ["all", "visual"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("batch", [0, 1], ids=["one", "ragged"])
def test_a_training_step_that_bypasses_layers(
    emulated: list[str], family: str, batch: int, tokens: str
) -> None:
    """Gaps in the positions of the tokens that go through must not be read as packed sequences either."""
    make, inputs = (
        (tiny_llava, llava_inputs(LLAVA[batch]))
        if family == "llava"
        else (tiny_qwen2_5_vl, qwen_inputs(QWEN[batch]))
    )
    real = inputs["attention_mask"].bool()
    results = []
    for model in (make(), flash(make())):
        with vtprune.patch(model.train(), "random-ltd", keep=0.4, increase=1, tokens=tokens) as patch:
            logits = model(**inputs).logits[real]
            logits.square().mean().backward()
            assert patch.report().engaged
        results.append((logits, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert emulated
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
