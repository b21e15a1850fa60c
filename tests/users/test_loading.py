"""Compiled, offloaded, converted and copied models: a patch works on them, or says that it does not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from users.common import KEEP, answers, hooks, inputs_of, kept, load, questions

import vtprune
from vtprune.testing.zoo import LVLMS, Image

METHODS = ("vtc-cls", "fastv", "divprune", "visionzip")


def tiny() -> Any:
    return LVLMS["llava"].build()


def inputs() -> dict[str, Tensor]:
    return LVLMS["llava"].batch([[20, 21, Image(1), 22, 23, 24], [20, Image(2, 1), 21, 22]])


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs()).logits
    return out


def spoken(model: Any) -> Tensor:
    out: Tensor = model.generate(**inputs(), max_new_tokens=2, do_sample=False)
    return out


# --------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wrapped(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def stepped(model: Any) -> Any:
    """A compiled function that calls the model."""

    class Step:
        call = staticmethod(torch.compile(lambda **given: model(**given), backend="eager"))

        def __call__(self, **given: Any) -> Any:
            return self.call(**given)

    return Step()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("warm", [False, True], ids=["compiled under the patch", "compiled before"])
@pytest.mark.parametrize("compiled", [wrapped, stepped], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", ["divprune", "vtc-cls"])
def test_compiled_code_around_a_patched_model(
    method: str, compiled: Callable[[Any], Any], warm: bool
) -> None:
    """Refused, and neither dense in silence nor pruned after removal."""
    model = tiny()
    dense, fast = logits_of(model), compiled(model)
    if warm:
        assert torch.equal(logits_of(fast), dense)
    with vtprune.patch(model, method, keep=4) as patch:
        with pytest.raises(vtprune.UnsupportedCallError, match=r"torch\.compile cannot run a patched model"):
            logits_of(fast)
        with pytest.raises(vtprune.VTPruneError, match="not been called"):
            patch.report()
        pruned = logits_of(model)
        assert not torch.equal(pruned, dense)
    assert torch.equal(logits_of(fast), dense)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_models_are_refused() -> None:
    model = tiny()
    for given in (wrapped(model), in_place(tiny())):
        with pytest.raises(vtprune.UnsupportedModelError, match=r"this model is compiled by torch\.compile"):
            vtprune.patch(given, "divprune", keep=4)
    part = tiny()
    part.model.vision_tower.compile(backend="eager")
    with pytest.raises(vtprune.UnsupportedModelError, match=r"'model\.vision_tower' of this Llava"):
        vtprune.patch(part, "divprune", keep=4)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("method", ["divprune", "vtc-cls"])
def test_compiling_a_patched_model_in_place(method: str) -> None:
    model = tiny()
    dense = logits_of(model)
    vtprune.patch(model, method, keep=4)
    in_place(model)
    for call in (logits_of, spoken):
        with pytest.raises(vtprune.UnsupportedCallError, match=r"torch\.compile cannot run"):
            call(model)
    vtprune.unpatch(model)
    assert torch.equal(logits_of(model), dense)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_encoder_is_refused() -> None:
    model = tiny().model.vision_tower
    pixels = inputs()["pixel_values"]
    fast = wrapped(model)
    dense = fast(pixel_values=pixels).last_hidden_state
    with (
        vtprune.patch(model, "random", keep=4, where="vit", layer=1),
        pytest.raises(vtprune.UnsupportedCallError, match=r"torch\.compile cannot run"),
    ):
        fast(pixel_values=pixels)
    assert torch.equal(fast(pixel_values=pixels).last_hidden_state, dense)


# ------------------------------------------------------------------------------------------------------ accelerate


def to_disk(model: Any, folder: Path) -> Any:
    from accelerate import disk_offload

    return disk_offload(model, str(folder), execution_device=torch.device("cpu"), offload_buffers=True)


def to_host(model: Any, folder: Path) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def dispatched(model: Any, folder: Path) -> Any:
    """Half of the decoder layers on disk, as device_map="auto" does where memory is short."""
    from accelerate import dispatch_model

    names = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    names += [f"model.language_model.{n}" for n in ("embed_tokens", "norm", "rotary_emb")]
    layers = {f"model.language_model.layers.{i}": "disk" if i >= 2 else "cpu" for i in range(4)}
    return dispatch_model(
        model,
        dict.fromkeys(names, "cpu") | layers,
        main_device="cpu",
        offload_dir=str(folder),
        force_hooks=True,
    )


@pytest.mark.parametrize("offload", [to_disk, to_host, dispatched], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_offloaded_models(method: str, offload: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    """Weights that accelerate brings for each call, by hooks of its own, are those that a method reads."""
    pytest.importorskip("accelerate", reason="pip install accelerate")
    plain = tiny()
    dense = logits_of(plain)
    with vtprune.patch(plain, method, keep=4) as patch:
        expected, words, choice = logits_of(plain), spoken(plain), kept(patch.report())
    model = offload(tiny(), tmp_path)
    assert any(p.is_meta for p in model.parameters())
    count = hooks(model)
    with vtprune.patch(model, method, keep=4) as patch:
        assert torch.equal(logits_of(model), expected)
        assert kept(patch.report()) == choice
        assert torch.equal(spoken(model), words)
    assert torch.equal(logits_of(model), dense)
    assert count <= hooks(model) <= count + hooks(plain)  # transformers adds some at the first call
    assert any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_offloading_a_patched_model(method: str, tmp_path: Path) -> None:
    """Hooks of accelerate on a model that has ours; each set goes without the other."""
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from accelerate.hooks import remove_hook_from_submodules

    model = tiny()
    dense = logits_of(model)
    patch = vtprune.patch(model, method, keep=4)
    expected, words = logits_of(model), spoken(model)
    to_disk(model, tmp_path)
    assert torch.equal(logits_of(model), expected)
    assert torch.equal(spoken(model), words)
    patch.remove()
    assert torch.equal(logits_of(model), dense)
    with vtprune.patch(model, method, keep=4):
        assert torch.equal(logits_of(model), expected)
    remove_hook_from_submodules(model)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_device_maps(device_map: Any) -> None:
    pytest.importorskip("accelerate", reason="pip install accelerate")
    asked = inputs_of(questions()[:2])
    plain, model = load(), load(device_map=device_map)
    with vtprune.patch(plain, "fastv", keep=KEEP), vtprune.patch(model, "fastv", keep=KEEP) as patch:
        asked_there = {k: v.to(model.device) for k, v in asked.items()}
        assert answers(model, asked_there) == answers(plain, asked)
        assert patch.report().visual_tokens_out == [KEEP, KEEP]


def test_trained_weights_and_offloading(tmp_path: Path) -> None:
    """What a trained method belongs to is told by parameters, which must be there."""
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from vtprune.eval.world import reference_dir

    weights = str(reference_dir("llava") / "vtprune" / "ucofia-16.safetensors")
    with pytest.raises(vtprune.UnsupportedModelError, match="is offloaded"):
        vtprune.patch(to_host(load(), tmp_path), "ucofia", weights=weights)


# ------------------------------------------------------------------------------------------ precision and copies


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_patched_model_changes_its_precision(dtype: torch.dtype, method: str) -> None:
    """The same as converting first and patching then; and back in float32 nothing but rounding is left."""
    converted = load().to(dtype)
    asked = inputs_of(questions()[:2])
    there = {**asked, "pixel_values": asked["pixel_values"].to(dtype)}
    with vtprune.patch(converted, method, keep=KEEP) as patch, torch.no_grad():
        expected, choice = converted(**there).logits, kept(patch.report())
    model = load()
    with vtprune.patch(model, method, keep=KEEP) as patch, torch.no_grad():
        model(**asked)
        model.to(dtype)
        assert torch.equal(model(**there).logits, expected)
        assert kept(patch.report()) == choice
    with torch.no_grad():
        assert torch.equal(model(**there).logits, load().to(dtype)(**there).logits)


@pytest.mark.parametrize("method", METHODS)
def test_copies(method: str) -> None:
    """A patched model is not copied, with its wrapper or without; saved weights are the stock ones."""
    model = tiny()
    vtprune.patch(model, method, keep=4)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(vtprune.VTPruneError, match="cannot be deep-copied or pickled"):
            copied(model)
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    vtprune.unpatch(model)
    assert torch.equal(logits_of(twin), logits_of(copy.deepcopy(model)))
