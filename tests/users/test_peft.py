"""PEFT adapters on patched models, and patches on models with adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from users.common import cut, hooks, kept

import vtprune
from vtprune.testing.zoo import LVLMS, Image

peft = pytest.importorskip("peft", reason="pip install peft")

KEEP = 5
TARGETS = {
    "language model": r".*language_model.*\.(q_proj|k_proj|v_proj|up_proj)",
    "vision tower": r".*vision_tower.*\.(q_proj|k_proj|fc1)",
    "projector": r".*multi_modal_projector\.linear_.",
    "everywhere": ["q_proj", "k_proj", "v_proj", "linear_1"],
}
METHODS = ("divprune", "vtc-cls", "fastv")
LAYERS = {"divprune": 0, "vtc-cls": 0, "fastv": 2}  # where these remove tokens on a model of 4 layers
POSITIONS = {"positions": "original"}


def build() -> Any:
    return LVLMS["llava"].build()


def inputs() -> dict[str, Tensor]:
    return LVLMS["llava"].batch([[20, 21, Image(1), 22, 23, 24], [20, Image(2, 1), 21, 22, 25, 26, 27]])


def adapted(model: Any, targets: str, seed: int = 0) -> Any:
    """A PEFT model whose adapters change what it says."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[targets], init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs()).logits
    return out


def spoken(model: Any) -> Tensor:
    out: Tensor = model.generate(**inputs(), max_new_tokens=4, do_sample=False)
    return out


@torch.no_grad()
def expect_cut(model: Any, logits: Tensor, choice: list[list[int]], layer: int) -> None:
    """The last logits of every row are those of the unpatched model on the sequence cut by hand."""
    for row, stay in enumerate(choice):
        expected = cut(model, inputs(), row, stay, layer)[-1]
        torch.testing.assert_close(logits[row, -1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", TARGETS)
def test_a_patch_on_a_peft_model(targets: str, method: str) -> None:
    """Decisions see the adapters: they are those of a stock model that the adapters were merged into."""
    model = adapted(build(), targets)
    stock = copy.deepcopy(model).merge_and_unload()
    plain = build()
    dense = logits_of(model)
    with vtprune.patch(plain, method, keep=KEEP, **POSITIONS) as patch:
        without = logits_of(plain)
    with vtprune.patch(stock, method, keep=KEEP, **POSITIONS) as patch:
        expected, words = logits_of(stock), spoken(stock)
        choice = kept(patch.report())
    for given in (model, model.get_base_model()):
        with vtprune.patch(given, method, keep=KEEP, **POSITIONS) as patch:
            logits = logits_of(model)
            assert kept(patch.report()) == choice
            assert patch.report().visual_tokens_out == [KEEP, KEEP]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(spoken(model), words)
            assert not torch.allclose(logits, without, atol=1e-2)
            with model.disable_adapter():
                torch.testing.assert_close(logits_of(model), without, atol=1e-5, rtol=1e-5)
            assert torch.equal(logits_of(model), logits)
        assert torch.equal(logits_of(model), dense)
    expect_cut(model.get_base_model(), logits, choice, LAYERS[method])


def test_wrappers_are_one_model() -> None:
    model = adapted(build(), "language model")
    vtprune.patch(model.get_base_model(), "divprune", keep=KEEP)
    with pytest.raises(vtprune.AlreadyPatchedError):
        vtprune.patch(model, "divprune", keep=KEEP)
    vtprune.unpatch(model)
    with pytest.raises(vtprune.VTPruneError, match="carries no patch"):
        vtprune.unpatch(model.get_base_model())


# Whether adapters replace modules that a method reads, or that hold hooks.
READS = {
    ("language model", "fastv"),
    ("everywhere", "fastv"),
    ("vision tower", "vtc-cls"),
    ("everywhere", "vtc-cls"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_on_a_patched_model(targets: str, method: str) -> None:
    """They go where no hook is, or calls say that the hooks are astray; removal works either way."""
    reference = adapted(build(), targets)
    dense, count = logits_of(reference), hooks(reference)
    with vtprune.patch(reference, method, keep=KEEP):
        expected = logits_of(reference)
    base = build()
    patch = vtprune.patch(base, method, keep=KEEP)
    model = adapted(base, targets)
    if (targets, method) in READS:
        for call in (logits_of, spoken):
            with pytest.raises(vtprune.InertPruningError, match=r"_proj' .*peft\.tuners\.lora.* patch again"):
                call(model)
        with pytest.raises(vtprune.InertPruningError):
            patch.report()
    else:
        assert torch.equal(logits_of(model), expected)
    patch.remove()
    assert torch.equal(logits_of(model), dense)
    with vtprune.patch(model, method, keep=KEEP):
        assert torch.equal(logits_of(model), expected)
    assert hooks(model) == count


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unload", ["merge_and_unload", "unload"])
def test_unloading_while_patched(unload: str, method: str) -> None:
    model = adapted(build(), "everywhere")
    logits_of(model)
    stock = getattr(copy.deepcopy(model), unload)()
    dense = logits_of(stock)
    with vtprune.patch(stock, method, keep=KEEP):
        expected = logits_of(stock)
    patch = vtprune.patch(model, method, keep=KEEP)
    logits_of(model)
    bare = getattr(model, unload)()
    if ("everywhere", method) in READS:
        with pytest.raises(vtprune.InertPruningError, match="replaced"):
            logits_of(bare)
        with pytest.raises(vtprune.InertPruningError, match="replaced"):
            patch.report()
    else:
        assert torch.equal(logits_of(bare), expected)
    patch.remove()
    assert hooks(bare) == hooks(stock)
    assert torch.equal(logits_of(bare), dense)
    with vtprune.patch(bare, method, keep=KEEP):
        assert torch.equal(logits_of(bare), expected)


@pytest.mark.parametrize("method", METHODS)
def test_merging_in_place(method: str) -> None:
    """merge_adapter changes weights, no modules."""
    model = adapted(build(), "everywhere")
    with vtprune.patch(model, method, keep=KEEP) as patch:
        apart, choice = logits_of(model), kept(patch.report())
        model.merge_adapter()
        torch.testing.assert_close(logits_of(model), apart, atol=1e-4, rtol=1e-4)
        assert kept(patch.report()) == choice
        model.unmerge_adapter()
        torch.testing.assert_close(logits_of(model), apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_several_adapters(method: str) -> None:
    """Switching adapters under one patch; the second is added while it is in force, beside the first."""
    model = adapted(build(), "language model")
    other = adapted(build(), "language model", seed=1)
    with vtprune.patch(other, method, keep=KEEP):
        second = logits_of(other)
    with vtprune.patch(model, method, keep=KEEP):
        first = logits_of(model)
        model.add_adapter("more", other.peft_config["default"])
        state = {
            k.replace(".default.", ".more."): v for k, v in other.state_dict().items() if ".default." in k
        }
        assert not model.load_state_dict(state, strict=False).unexpected_keys
        model.set_adapter("more")
        torch.testing.assert_close(logits_of(model), second, atol=1e-5, rtol=1e-5)
        model.set_adapter("default")
        assert torch.equal(logits_of(model), first)
    assert not torch.allclose(first, second, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", ["everywhere", "projector"])
def test_training(targets: str, method: str) -> None:
    """A step through the pruned model: loss and gradients of the adapters are those of sequences cut by hand."""
    model = adapted(build(), targets)
    batch = inputs()
    image = model.config.image_token_id
    labels = batch["input_ids"].masked_fill(
        (batch["attention_mask"] == 0) | (batch["input_ids"] == image), -100
    )
    first = (batch["attention_mask"].cumsum(1) == 1) & (batch["attention_mask"] == 1)
    labels = labels.masked_fill(first, -100)
    with vtprune.patch(model, method, keep=KEEP, **POSITIONS) as patch:
        loss = model(**batch, labels=labels).loss
        loss.backward()
        choice = kept(patch.report())
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert parameters
    assert all("lora" in n for n in parameters)
    grads = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    assert any(bool(g.any()) for g in grads.values())
    model.zero_grad()
    losses = []
    for row, stay in enumerate(choice):
        logits = cut(model.get_base_model(), batch, row, stay, LAYERS[method])
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        wanted = labels[row][batch["attention_mask"][row].bool()]
        left = ids != image
        left[(ids == image).nonzero()[:, 0][stay]] = True
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], wanted[left][1:], reduction="none"))
    expected = torch.cat(losses).sum() / (labels != -100).sum()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, parameters[name].grad, atol=1e-4, rtol=1e-3)


def test_a_step_makes_the_loss_smaller() -> None:
    model = adapted(build(), "everywhere").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = inputs()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with vtprune.patch(model, "fastv", keep=KEEP):
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_a_saved_adapter_holds_nothing_of_a_patch(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = adapted(build(), "everywhere")
    model.save_pretrained(tmp_path / "before")
    with vtprune.patch(model, "vtc-cls", keep=KEEP):
        logits = logits_of(model)
        model.save_pretrained(tmp_path / "patched")
    names = sorted(p.name for p in (tmp_path / "before").iterdir())
    assert sorted(p.name for p in (tmp_path / "patched").iterdir()) == names
    for name in names:
        one, two = (tmp_path / folder / name for folder in ("before", "patched"))
        if name.endswith(".safetensors"):
            a, b = load_file(one), load_file(two)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a)
        else:
            assert one.read_text() == two.read_text()
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "patched").eval()
    with vtprune.patch(again, "vtc-cls", keep=KEEP):
        assert torch.equal(logits_of(again), logits)


def test_adapters_that_change_the_prompt_are_refused() -> None:
    """Prompt tuning hands embeddings to the model, so that it cannot be told where pictures are."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=4, token_dim=32)
    base = build()
    base.config.hidden_size = base.config.text_config.hidden_size
    base.config.num_attention_heads = base.config.text_config.num_attention_heads
    model = peft.get_peft_model(base, config).eval()
    with (
        vtprune.patch(model, "divprune", keep=KEEP),
        pytest.raises(vtprune.UnsupportedCallError, match="input_ids"),
    ):
        logits_of(model)


def test_the_original_llava_package() -> None:
    """The way LLaVA is fine-tuned: adapters on the language model, a step through the pruned model."""
    pytest.importorskip("llava", reason="pip install --no-deps llava-torch==1.2.2.post1")
    from test_llava_original import ROWS, batch
    from test_llava_original import build as original

    base = original("right")
    config = peft.LoraConfig(r=4, target_modules=r"model\.layers.*(q_proj|v_proj)", init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    ids, mask, images = batch(ROWS, "right")
    call = {
        "input_ids": ids,
        "attention_mask": mask,
        "images": images,
        "labels": ids.masked_fill(~mask, -100),
    }
    with vtprune.patch(model, "fastv", keep=4) as patch:
        loss = model(**call).loss
        loss.backward()
        assert patch.report().visual_tokens_out == [4, 0, 8]
        choice = kept(patch.report())
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if "lora_B" in n)
    merged = model.merge_and_unload()
    with vtprune.patch(merged, "fastv", keep=4) as patch, torch.no_grad():
        torch.testing.assert_close(merged(**call).loss, loss.detach(), atol=1e-4, rtol=1e-4)
        assert kept(patch.report()) == choice
