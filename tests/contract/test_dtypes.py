"""Half precision: nothing overflows or changes type, decisions hold in a batch, values are those of float32."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from contract.common import FAMILIES, KEY_CELLS, batch_of, greedy, options_of, rows_of
from judge import Judge
from torch import Tensor

import vtprune
from vtprune.testing.zoo import LVLMS, Image

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()}
EXPERTS = ("qwen3_vl_moe",)
# Controls, since their choice does not hang on rounding.
CONTROLS = ("random", "stride")
CONTROL_CELLS = [pytest.param(f, m, id=f"{f}-{m}") for f in FAMILIES for m in CONTROLS]


@functools.cache
def half(family: str, dtype: str) -> Any:
    return LVLMS[family].build().to(DTYPES[dtype])


@functools.cache
def judge_of(family: str, dtype: str) -> Judge:
    """In float32, with the rounded weights."""
    return Judge(half(family, dtype))


def cast(inputs: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """As `BatchFeature.to(dtype)` does: the pixels."""
    return {
        k: v.to(DTYPES[dtype]) if v.is_floating_point() and "pixel" in k else v for k, v in inputs.items()
    }


def floats(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}


def kept_of(report: vtprune.Report, sample: int) -> list[dict[str, list[int]]]:
    return [{s: k.tolist() for s, k in i.kept.items()} for i in report.images if i.sample == sample]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
@torch.no_grad()
def test_half_precision_runs(family: str, method: str, dtype: str) -> None:
    """Forward and generate: finite, in the model's type, pruned to the budget."""
    options = options_of(family, method, 2)
    model, inputs = half(family, dtype), cast(batch_of(family), dtype)
    stock = model(**inputs)
    with vtprune.patch(model, method, **options) as patch:
        out = model(**inputs, use_cache=True)
        report = patch.report()
        assert report.images
        assert all(image.tokens_out == min(2, image.tokens_in) for image in report.images)
        assert out.logits.dtype == stock.logits.dtype == DTYPES[dtype]
        assert out.logits.shape == stock.logits.shape
        assert out.logits[inputs["attention_mask"].bool()].isfinite().all()
        assert not torch.equal(out.logits, stock.logits)
        assert {layer.keys.dtype for layer in out.past_key_values.layers} == {DTYPES[dtype]}
        text = greedy(model, inputs, 3)
        assert text.shape == (len(inputs["input_ids"]), 3)
        # The first token follows from the forward call, placeholders apart.
        first = out.logits[:, -1].float()
        first[:, model.generation_config.suppress_tokens] = -torch.inf
        best = first.max(-1).values
        # The head rounds differently for one column and for all.
        assert (best - first.gather(1, text[:, :1])[:, 0] <= 4 * EPS[dtype] * best.abs()).all()
    assert torch.equal(model(**inputs).logits, stock.logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
@torch.no_grad()
def test_choice_alone_and_in_a_batch(family: str, method: str, dtype: str) -> None:
    """Identical; the padding that FastV's attention runs over may round two tokens past each other."""
    options = options_of(family, method, 3)
    model = half(family, dtype)
    rows = [rows_of(family)["one"], rows_of(family)["two"], [20, Image(1), 30]]
    with vtprune.patch(model, method, **options) as patch:
        model(**cast(LVLMS[family].batch(rows), dtype))
        together = patch.report()
        same = total = 0
        for i, row in enumerate(rows):
            model(**cast(LVLMS[family].batch([row]), dtype))
            alone, batched = kept_of(patch.report(), 0), kept_of(together, i)
            assert len(alone) == len(batched)
            for a, b in zip(alone, batched, strict=True):
                assert list(a) == list(b)
                for site in a:
                    assert len(a[site]) == len(b[site])
                    same += len({*a[site]} & {*b[site]})
                    total += len(a[site])
    assert total >= 12
    assert total - same <= (method == "fastv")


@functools.cache
def stock_error(family: str, dtype: str) -> tuple[Tensor, float]:
    """Logits in float32, and the relative error of the stock model in its type."""
    inputs = cast(batch_of(family, "two"), dtype)
    exact = judge_of(family, dtype).logits(floats(inputs))
    found = half(family, dtype)(**inputs).logits[0].float()
    return exact, float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", ["projector", "decoder[2]"])
@pytest.mark.parametrize(("family", "method"), CONTROL_CELLS)
@torch.no_grad()
def test_values_are_those_of_float32(family: str, method: str, site: str, dtype: str) -> None:
    """The judge removes the same tokens in float32; the error is of the size that the stock model has."""
    where: dict[str, Any] = (
        {"where": "projector"} if site == "projector" else {"where": "decoder", "layer": 2}
    )
    model, judge = half(family, dtype), judge_of(family, dtype)
    inputs = cast(batch_of(family, "two"), dtype)
    row = floats(inputs)
    exact, rounding = stock_error(family, dtype)
    with vtprune.patch(model, method, **options_of(family, method, 2, **where)) as patch:
        logits = model(**inputs).logits[0].float()
        report = patch.report()
    layer = 0 if site == "projector" else 2
    gone = {
        unit.columns[i]
        for unit, image in zip(judge.prompt(row).units, report.images, strict=True)
        for i in set(range(len(unit.columns))) - set(image.kept[site].tolist())
    }
    expected = Judge.shown(judge.logits(row, {layer: gone}))
    error = (logits - expected).norm() / expected.norm()
    other = (logits - exact).norm() / exact.norm()
    # Rounding may send a token to another expert.
    limit = max((5 if family in EXPERTS else 2) * rounding, 4 * EPS[dtype])
    assert error < limit, (error, rounding)
    assert other > 1.5 * limit, "this test could not fail"
