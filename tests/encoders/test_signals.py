"""Signals are those of the stock layers, and recorded hidden states have the lengths that the layers saw."""

from __future__ import annotations

import pytest
import torch
from encoders.common import (
    HF,
    KEEP,
    NAMES,
    NO_CLS,
    Scripted,
    build,
    close,
    first_k,
    patched,
    pictures,
    subject,
)
from encoders.stock import stock
from torch import Tensor

import vtprune


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_signals_of_every_layer(name: str) -> None:
    model, judge, images = subject(name), stock(name), pictures(name)
    names = {"received_attention": "received", "encoder_keys": "keys"}
    if name not in NO_CLS:
        names["cls_attention"] = "cls"
    reads = tuple(vtprune.Signal(kind, layer) for kind in names for layer in range(4))  # type: ignore[arg-type]
    views: list[vtprune.View] = []

    def keep(view: vtprune.View) -> vtprune.Selection:
        views.append(view)
        return first_k(view)

    with patched(model, Scripted(reads=reads, script=[keep])) as patch:
        model(images)
        assert set(names) <= set(patch.facts.signals)
    for i, image in enumerate(images):
        judge.run(image)
        for signal in reads:
            expected = torch.from_numpy(judge.signals[signal.layer][names[signal.kind]])
            close(views[0][signal][i].double(), expected, 1e-5)


@pytest.mark.parametrize("name", [n for n in HF if n not in NO_CLS])
@torch.no_grad()
def test_vtc_cls_ranks_by_the_attention_that_the_stock_model_returns(name: str) -> None:
    model, images = subject(name), pictures(name, 3)
    weights = build(name, "eager")(images, output_attentions=True).attentions
    votes = sum(w[:, :, 0, stock(name).prefix :].mean(1) for w in weights[2:])
    assert isinstance(votes, Tensor)
    with patched(model, "vtc-cls", keep=KEEP) as patch:
        model(images)
        for i, image in enumerate(patch.report().images):
            assert image.kept["encoder"].tolist() == votes[i].topk(KEEP).indices.sort().values.tolist()


@pytest.mark.parametrize("name", ["hf_clip", "hf_vit", "hf_dinov3"])
@torch.no_grad()
def test_recorded_hidden_states_have_the_lengths_that_the_layers_saw(name: str) -> None:
    model, images = subject(name), pictures(name)
    prefix = stock(name).prefix
    with patched(model, "stride", keep=KEEP, where="vit", layer=2):
        out = model(images, output_hidden_states=True)
    lengths = [h.shape[1] - prefix for h in out.hidden_states]
    assert lengths[3:] == [KEEP, KEEP]
    assert lengths[0] == lengths[1] > KEEP
