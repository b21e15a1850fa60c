"""Undo, exceptions and dtypes of encoders alone, and the calls and models that are refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from encoders.common import (
    ENCODER,
    HF,
    KEEP,
    NAMES,
    NO_CLS,
    TIMM,
    TIMM_OPTIONS,
    Scripted,
    boom,
    build,
    close,
    first_k,
    ids,
    outputs,
    patched,
    pictures,
    snapshot,
    subject,
)
from encoders.stock import stock
from torch import Tensor, nn

import vtprune
from vtprune.testing.zoo import ENCODERS

# ------------------------------------------------------------------------------------ undo, errors, dtypes


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_undo_is_exact(name: str) -> None:
    model, images = subject(name), pictures(name)
    before, dense = snapshot(model), outputs(model, images)
    scorer = "received" if name in NO_CLS else "cls"
    chain = [
        vtprune.methods.create("stride", keep=9, where="vit", layer=1),
        vtprune.methods.create("vtc-cls", keep=KEEP, scorer=scorer),
    ]
    with patched(model, chain):
        outputs(model, images)
        assert list(model.state_dict()) == before["state_dict"]
    assert snapshot(model) == before
    for a, b in zip(outputs(model, images), dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("site", [ENCODER, vtprune.Site("vit", 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_exception_leaves_the_model_clean(name: str, site: vtprune.Site) -> None:
    model, images = subject(name), pictures(name)
    before, dense = snapshot(model), outputs(model, images)
    method = Scripted(where=site, script=[boom])
    with patched(model, method):
        with pytest.raises(RuntimeError, match="boom"):
            model(images)
        method.script[0] = first_k
        features = outputs(model, images)[0]
        assert features.shape[1] == stock(name).prefix + KEEP
        method.script[0] = lambda view: vtprune.Selection.everything(2, view.n, view.features.device)
        with pytest.raises(vtprune.InertPruningError):
            model(images)
    assert snapshot(model) == before
    for a, b in zip(outputs(model, images), dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bfloat16(name: str) -> None:
    model, images = build(name).bfloat16(), pictures(name).bfloat16()
    try:
        outputs(model, images)
    except RuntimeError as error:  # mixed rotary tables in some versions of timm
        pytest.skip(f"the stock model cannot run in bfloat16: {error}")
    scorer = "received" if name in NO_CLS else "cls"
    for method, options in (
        ("stride", {"where": "vit", "layer": 1}),
        ("visionzip", {"contextual": 0.4, "scorer": scorer}),
    ):
        with patched(model, method, keep=KEEP, **options):
            for x in outputs(model, images):
                assert x.dtype == torch.bfloat16
                assert bool(x.isfinite().all())


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", NAMES)
def test_unsupported_methods(name: str) -> None:
    model = subject(name)
    before = snapshot(model)
    with pytest.raises(vtprune.UnsupportedMethodError, match="stride"):
        vtprune.patch(model, "fastv", keep=KEEP)
    for method in ("vtc-cls", "visionzip") if name in NO_CLS else ():
        with pytest.raises(vtprune.UnsupportedMethodError, match=r"scorer='received'.*divprune"):
            vtprune.patch(model, method, keep=KEEP)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", [n for n in ENCODERS if n in HF])
@torch.no_grad()
def test_an_attention_mask_is_refused(name: str) -> None:
    model, images = subject(name), pictures(name)
    with (
        patched(model, "stride", keep=KEEP),
        pytest.raises(vtprune.UnsupportedCallError, match="attention_mask"),
    ):
        model(images, attention_mask=torch.ones(2, model(images[:1]).last_hidden_state.shape[1]))


@pytest.mark.parametrize("name", ["vit reg token", "timm_deit", "eva token"])
@torch.no_grad()
def test_timm_calls_that_are_refused(name: str) -> None:
    model, images = subject(name), pictures(name)
    n = outputs(model, images)[0].shape[1]
    before = snapshot(model)
    mask = torch.ones(1, 1, n, n, dtype=torch.bool)
    with patched(model, "stride", keep=KEEP), pytest.raises(vtprune.UnsupportedCallError, match="full grid"):
        model.forward_intermediates(images)
    takes = inspect.signature(model.forward_features).parameters
    with patched(model, "vtc-cls", keep=KEEP):
        if "attn_mask" in takes:
            with pytest.raises(vtprune.UnsupportedCallError, match="attn_mask"):
                model.forward_features(images, attn_mask=mask)
        if "is_causal" in takes:
            with pytest.raises(vtprune.UnsupportedCallError, match="is_causal"):
                model.forward_features(images, is_causal=True)
    with patched(model, "stride", keep=KEEP, where="vit", layer=1):
        if "attn_mask" in takes:
            with pytest.raises(vtprune.UnsupportedCallError, match="attn_mask"):
                model.forward_features(images, attn_mask=mask)
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["VisionTransformer", "Eva"])
@torch.no_grad()
def test_patch_dropout_in_training_is_refused(kind: str) -> None:
    models = pytest.importorskip("timm.models")
    model: Any = getattr(models.eva if kind == "Eva" else models.vision_transformer, kind)(
        **TIMM_OPTIONS, patch_drop_rate=0.5
    )
    images = pictures("vit reg token")
    with patched(model, "stride", keep=KEEP):
        with pytest.raises(vtprune.UnsupportedCallError, match="patch_drop_rate"):
            model(images)
        assert model.eval()(images).shape == (2, 7)


@pytest.mark.parametrize("where", [{"where": "encoder"}, {"where": "vit", "layer": 1}], ids=ids)
@pytest.mark.parametrize("name", ["timm_vit", "eva token", "hf_clip", "hf_vit", "hf_dinov3"])
def test_gradients_under_checkpointing_are_those_without_it_or_refused(
    name: str, where: dict[str, Any]
) -> None:
    found = []
    for checkpointing in (False, True):
        model = build(name).train()
        if checkpointing and name in HF:
            # The old name warns where the new one exists.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        elif checkpointing:
            model.set_grad_checkpointing()
        layer = type(stock(name).layers[0])
        with patched(model, "stride", keep=KEEP, **where):
            # Where a layer is checkpointed together with its hooks, they would run twice.
            if checkpointing and (name in TIMM or layer.__call__ is not nn.Module.__call__):
                with pytest.raises(vtprune.UnsupportedCallError, match="checkpointing"):
                    model(pictures(name))
                with torch.no_grad():
                    assert outputs(model, pictures(name))[0].shape[1] == stock(name).prefix + KEEP
                return
            torch.manual_seed(0)  # DINOv3 augments positions in training
            outputs(model, pictures(name))[0].square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_attention_that_cannot_be_read_is_refused() -> None:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    model = timm_vit.VisionTransformer(**TIMM_OPTIONS, block_fn=timm_vit.ParallelScalingBlock)
    with pytest.raises(vtprune.UnsupportedModelError, match="ParallelScalingBlock"):
        vtprune.patch(model, "stride", keep=KEEP)
    if hasattr(timm_vit, "DiffAttention"):
        model = timm_vit.VisionTransformer(**TIMM_OPTIONS, attn_layer="diff")
        with pytest.raises(vtprune.UnsupportedModelError, match="DiffAttention"):
            vtprune.patch(model, "stride", keep=KEEP)


def test_encoders_are_listed() -> None:
    listed = {c for m in vtprune.list_models() if m.kind == "encoder" for c in m.classes}
    assert {type(subject(name)).__name__ for name in HF} <= listed


@torch.no_grad()
def test_an_encoder_inside_another_model() -> None:
    """CLIP's vision model is patched where it stands; the whole model is not supported, and says so."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {**vision, "vocab_size": 32, "max_position_embeddings": 8}
    config = CLIPConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8}, text_config=text, projection_dim=16
    )
    model = CLIPModel._from_config(config).eval()
    with pytest.raises(vtprune.UnsupportedModelError, match="vision_model"):
        vtprune.patch(model, "stride", keep=KEEP)
    images = pictures("hf_clip")
    with patched(model.vision_model, "vtc-cls", keep=KEEP, first_layer=-1):
        found = model.get_image_features(images)
        features = found if isinstance(found, Tensor) else found.pooler_output
        assert features.shape == (2, 16)
