"""Training of methods with learned parameters: the fading pass, the loop, the files, and the weights that are shipped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_eval import build

import vtprune
from vtprune.eval.accuracy import make_batches
from vtprune.eval.cli import main
from vtprune.eval.prompts import EvaluationError, Prompter, load_model
from vtprune.eval.training import fading as fading_module
from vtprune.eval.training import learner_for, train
from vtprune.eval.training.data import lesson
from vtprune.eval.training.fading import Fading
from vtprune.eval.training.ucofia import Perturbed
from vtprune.eval.world import examples, reference_dir
from vtprune.methods import create, weights
from vtprune.testing import tiny_qwen2_5_vl

METHODS = ("as-vit", "atp-llava", "ucofia")
BUDGETS = (16, 32, 48)
MEETS = 0.15  # of the budget, on the questions below


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build()


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_model(str(reference_dir("llava")), "cpu", "auto")


# The tiny encoder has two layers.
TINY: dict[str, dict[str, Any]] = {"as-vit": {"layers": (0.5,), "thresholds": (0.01,)}}


def short(tiny: Any, key: str, steps: int = 3) -> Any:
    method = create(key, keep=12, **TINY.get(key, {}))
    return train(*tiny, method, steps=steps, batch_size=6, per_kind=2, val_per_kind=1)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# The fading pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("key", METHODS)
def test_masks_of_0_and_1_equal_removal(
    key: str, attention: str, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training forward with hard masks gives the logits of the patched model."""
    monkeypatch.setattr(fading_module, "EPSILON", 1e-30)
    model, processor = reference
    model.set_attn_implementation(attention)
    prompter, fading = Prompter(model, processor), Fading(model)
    batch = lesson(prompter, examples("train", 1))
    learner = learner_for(create(key, keep=48), fading, batch, seed=3)
    learner.hard = True
    with torch.no_grad():
        model(**batch.inputs)  # transformers leaves hooks of its own at the first call
        before = hooks(model)
        faded = fading(batch.inputs, batch.asking, learner.places(fading.facts))
    path = tmp_path / "w.safetensors"
    weights.save(path, learner.tensors(), {})
    # The prompt alone, as inference sees it: nothing of the answer asks.
    length = int(batch.predicting[0].nonzero()[0]) + 1
    prompt = {
        n: v[:, :length] if n in ("input_ids", "attention_mask") else v for n, v in batch.inputs.items()
    }
    with vtprune.patch(model, key, keep=48, weights=path) as patch, torch.no_grad():
        pruned = model(**prompt).logits[:, -1]
        left = [[len(k) for k in image.kept.values()] for image in patch.report().images]
    assert [list(map(int, row)) for row in torch.stack(learner.kept, 1).tolist()] == left
    assert any(1 < row[-1] < 144 for row in left)
    torch.testing.assert_close(faded[:, length - 1], pruned, atol=1e-3, rtol=1e-3)
    assert hooks(model) == before
    model.set_attn_implementation("sdpa")


def test_perturbed_topk_follows_its_definition() -> None:
    """Forward: the mean of top-k indicators; backward: E[<grad, indicator> noise] / sigma, sample by sample."""
    make = torch.Generator().manual_seed(0)
    scores = (torch.randn(2, 7, generator=make) / 10).requires_grad_()
    noise, grad = torch.randn(2, 50, 7, generator=make), torch.randn(2, 7, generator=make)
    share = Perturbed.apply(scores, noise, 3)
    share.backward(grad)
    for b in range(2):
        total, slope = torch.zeros(7), torch.zeros(7)
        for z in noise[b]:
            chosen = torch.zeros(7)
            chosen[(scores[b].detach() + 0.05 * z).topk(3).indices] = 1
            total += chosen
            slope += (grad[b] @ chosen) * z / 0.05
        torch.testing.assert_close(share[b].detach(), total / 50)
        torch.testing.assert_close(scores.grad[b], slope / 50)


def test_lessons_ask_with_the_prompt_and_answer_behind_it(tiny: Any) -> None:
    model, processor = tiny
    prompter, some = Prompter(model, processor), examples("train", 1)
    batch, tokenizer = lesson(prompter, some), processor.tokenizer
    plain = make_batches(prompter, some, 1)
    for row, example in enumerate(some):
        ids = batch.inputs["input_ids"][row]
        answer = tokenizer(" " + example.answer, add_special_tokens=False)["input_ids"]
        first = int(batch.predicting[row].nonzero()[0])
        assert batch.predicting[row].sum() == len(answer) + 1
        assert ids[first + 1 : first + 1 + len(answer)].tolist() == answer
        assert not batch.asking[row, first + 1 :].any()
        alone = next(b.inputs["input_ids"][0] for b in plain if b.numbers == [row])
        behind = alone[int((alone == prompter.placeholder).nonzero()[-1]) + 1 :]
        assert ids[batch.asking[row]].tolist() == behind.tolist()


# The loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", METHODS)
def test_a_few_steps(key: str, tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    first, hooked = short(tiny, key, steps=1), hooks(model)
    longer = short(tiny, key, steps=3)
    assert [step.number for step in longer.steps] == [1, 2, 3]
    assert all(math.isfinite(step.loss) and step.loss >= step.task for step in longer.steps)
    assert longer.steps[-1].agreement is not None
    for tensors in (first.tensors, longer.tensors):
        assert all(t.isfinite().all() for t in tensors.values())
    assert any(not torch.equal(first.tensors[name], t) for name, t in longer.tensors.items())
    again = short(tiny, key, steps=3)
    assert all(torch.equal(again.tensors[name], t) for name, t in longer.tensors.items())
    assert again.steps == longer.steps
    # Nothing of the model has changed, not even a flag, and nothing stays on it.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert hooks(model) == hooked
    path = tmp_path / "w.safetensors"
    longer.write(path)
    assert path.stat().st_size < 200_000
    inputs = Prompter(*tiny).inputs([e.image for e in examples("val", 1)], ["what is it?"] * 6)
    with vtprune.patch(model, key, keep=12, weights=path, **TINY.get(key, {})) as patch, torch.no_grad():
        model(**inputs)
        patch.report()


@pytest.mark.parametrize("key", ["as-vit", "atp-llava"])
def test_the_budget_loss_pulls_to_the_budget(key: str, tiny: Any) -> None:
    """From far too many tokens, on one batch again and again."""
    model, processor = tiny
    prompter, fading = Prompter(model, processor), Fading(model)
    batch = lesson(prompter, examples("train", 1))
    learner = learner_for(create(key, keep=12, **TINY.get(key, {})), fading, batch, seed=0)
    with torch.no_grad():
        for name, value in learner.named_parameters():
            value.sub_(5 if name.endswith("thresholds/bias") else 0)
    model.requires_grad_(False)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.02)
    found = []
    for _ in range(60):
        fading(batch.inputs, batch.asking, learner.places(fading.facts))
        found.append(float(learner.budgeted().detach().mean()))
        optimizer.zero_grad()
        learner.penalty().backward()
        optimizer.step()
    model.requires_grad_(True)
    assert found[0] > 20
    assert min(abs(count - 12) for count in found[-5:]) < 3


# Files and errors ----------------------------------------------------------------------------------------------


def test_weights_beside_the_checkpoint_are_found(tiny: Any, tmp_path: Path) -> None:
    for part in tiny:
        part.save_pretrained(tmp_path)
    short(tiny, "ucofia", steps=1).write(tmp_path / "vtprune" / "ucofia-12.safetensors")
    model, processor = load_model(str(tmp_path), "cpu", "auto")
    inputs = Prompter(model, processor).inputs([e.image for e in examples("val", 1)][:1], ["what is it?"])
    for keep in (12, 1 / 3):
        with vtprune.patch(model, "ucofia", keep=keep) as patch, torch.no_grad():
            model(**inputs)
            assert [len(k) for k in patch.report().images[0].kept.values()] == [12]
    with pytest.raises(vtprune.UnsupportedMethodError) as error:
        vtprune.patch(model, "ucofia", keep=13)
    path = tmp_path / "vtprune" / "ucofia-13.safetensors"
    assert f"vtprune train ucofia --model {tmp_path} --keep 13 --output {path}" in str(error.value)
    assert "keep=12 of 36" in str(error.value)


@pytest.mark.parametrize("key", METHODS)
def test_a_model_without_weights_is_told_how_to_train(key: str, tiny: Any) -> None:
    with pytest.raises(vtprune.UnsupportedMethodError) as error:
        vtprune.patch(tiny[0], key, keep=12)
    said = f"vtprune train {key} --model CHECKPOINT --keep 12 --output {key}-12.safetensors"
    assert said in str(error.value)
    assert ("use threshold=" in str(error.value)) == (key == "atp-llava")


def test_weights_of_something_else_are_refused(tiny: Any, reference: Any, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    short(tiny, "atp-llava", steps=1).write(path)
    with pytest.raises(vtprune.InvalidOptionError, match="trained on another LlavaForConditionalGeneration"):
        vtprune.patch(reference[0], "atp-llava", weights=path)
    with pytest.raises(vtprune.InvalidOptionError, match="trained with strength=3"):
        vtprune.patch(tiny[0], "atp-llava", weights=path, strength=2.0)
    with pytest.raises(vtprune.InvalidOptionError, match=r"lack 0\.weight"):
        vtprune.patch(tiny[0], "ucofia", weights=path)
    for dtype in (torch.bfloat16, torch.float16):
        half = build()[0].to(dtype)
        vtprune.patch(half, "atp-llava", weights=path).remove()


def test_what_cannot_be_trained_is_refused(tiny: Any) -> None:
    for method, said in (
        (create("fastv", keep=12), "nothing to train"),
        (create("atp-llava", keep=12, threshold="quantile"), "nothing to train"),
        (create("as-vit", keep=12, scorer="received"), "encoder with"),
    ):
        with pytest.raises(vtprune.InvalidOptionError, match=said):
            train(*tiny, method)
    with pytest.raises(EvaluationError, match="at least one step"):
        train(*tiny, create("ucofia", keep=12), steps=0)
    with pytest.raises(vtprune.UnsupportedModelError, match="LLaVA"):
        Fading(tiny_qwen2_5_vl())
    with vtprune.patch(tiny[0], "divprune", keep=12), pytest.raises(vtprune.AlreadyPatchedError):
        Fading(tiny[0])


# The command and what is shipped -------------------------------------------------------------------------------


def test_command(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "checkpoint"
    for part in tiny:
        part.save_pretrained(model)
    output = model / "vtprune" / "atp-llava-12.safetensors"
    small = ["--steps", "2", "--batch-size", "6", "--questions", "2", "--keep", "12"]
    assert main(["train", "atp-llava", "--model", str(model), *small, "--output", str(output)]) == 0
    assert "asked for: 12 of 36" in " ".join(capsys.readouterr().out.split())
    metadata = weights.load(output)[1]
    assert metadata["command"] == (
        "vtprune train atp-llava --model checkpoint --keep 12 --steps 2 --batch-size 6 --questions 2 --seed 0"
    )
    assert not any(str(tmp_path) in value for value in metadata.values())
    assert set(json.loads(metadata["versions"])) >= {"torch", "transformers", "vtprune"}
    found, _ = load_model(str(model), "cpu", "auto")
    vtprune.patch(found, "atp-llava", keep=12).remove()
    for wrong, said in (
        (["train", "fastv", "--keep", "12"], "nothing to train"),
        (["train", "ucofia:keep=3", "--keep", "12"], "--keep"),
        (["train", "ucofia", "--keep", "12", "--output", "w.pt"], "must end in"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("keep", BUDGETS)
@pytest.mark.parametrize("key", METHODS)
def test_shipped_weights_meet_their_budgets(key: str, keep: int, reference: Any) -> None:
    model, processor = reference
    some = examples("val", 4)
    inputs = Prompter(model, processor).inputs([e.image for e in some], [e.question for e in some])
    with vtprune.patch(model, key, keep=keep) as patch, torch.no_grad():
        model(**inputs)
        left = [[len(k) for k in image.kept.values()] for image in patch.report().images]
    counts = [sum(row) / len(row) if key == "atp-llava" else row[-1] for row in left]
    assert abs(sum(counts) / len(counts) - keep) <= (0 if key == "ucofia" else MEETS * keep)
    assert (len(set(counts)) > 1) == (key != "ucofia")


def test_shipped_weights_are_small_and_say_where_they_come_from() -> None:
    files = sorted((reference_dir("llava") / weights.FOLDER).glob("*"))
    assert [f.name for f in files] == [f"{key}-{keep}.safetensors" for key in METHODS for keep in BUDGETS]
    assert sum(f.stat().st_size for f in files) < 2**20
    for file in files:
        metadata = weights.load(file)[1]
        assert metadata["command"].startswith(f"vtprune train {metadata['method']} --keep {metadata['keep']}")
        assert not any("/" in value for name, value in metadata.items() if name != "versions")
