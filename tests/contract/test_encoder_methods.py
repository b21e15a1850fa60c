"""Every method on every encoder alone: nothing removed is dense, batches are single pictures, nothing stays behind."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from contract.common import METHODS
from torch import Tensor, nn

import vtprune
from vtprune.testing.matrix import cells
from vtprune.testing.zoo import ENCODERS

ENCODER_CELLS = [pytest.param(e, m, id=f"{e}-{m}") for e in ENCODERS for m in METHODS]


@functools.cache
def model_of(encoder: str) -> Any:
    if encoder.startswith("timm"):
        pytest.importorskip("timm")
    return ENCODERS[encoder].build()


def options_of(encoder: str, method: str, keep: float) -> dict[str, Any]:
    cell = cells(encoder)[method]
    if not cell.works:
        pytest.skip(f"declared: {cell.reason}")
    return {"keep": keep, **cell.options}


def features(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        if hasattr(model, "forward_features"):
            return model.forward_features(images)
        out: Tensor = model(images).last_hidden_state
    return out


@pytest.mark.parametrize(("encoder", "method"), ENCODER_CELLS)
def test_nothing_removed_is_dense(encoder: str, method: str) -> None:
    model, images = model_of(encoder), ENCODERS[encoder].pixels(2, 5)
    dense = features(model, images)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with vtprune.patch(model, method, **options_of(encoder, method, 1.0)) as patch:
        found = features(model, images)
        assert not patch.report().engaged
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-5)
    assert torch.equal(features(model, images), dense)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize(("encoder", "method"), ENCODER_CELLS)
def test_a_batch_is_its_pictures(encoder: str, method: str) -> None:
    model, images = model_of(encoder), ENCODERS[encoder].pixels(3, 6)
    dense = features(model, images)
    with vtprune.patch(model, method, **options_of(encoder, method, 0.4)) as patch:
        if method == "flowcut":
            # Its cuts differ between pictures, which not every encoder takes in one batch.
            images = images[:1]
        together, report = features(model, images), patch.report()
        assert report.engaged == (method != "keep-all")
        prefix = dense.shape[1] - report.images[0].tokens_in
        for i, entry in enumerate(report.images):
            alone = features(model, images[i : i + 1])
            again = patch.report().images[0]
            assert [k.tolist() for k in again.kept.values()] == [k.tolist() for k in entry.kept.values()]
            n = prefix + entry.tokens_out
            torch.testing.assert_close(together[i, :n], alone[0, :n], atol=1e-4, rtol=1e-4)
    assert torch.isfinite(together).all()
