"""The reference LLaVA in real vLLM on CPU against `vtprune.patch` on transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip(
    "vllm", reason="vLLM is not installed; `bash .ci/vllm` makes an environment for these tests"
)

from in_vllm.engines import Engine, Reference

from vtprune import methods
from vtprune.errors import InertPruningError, UnsupportedCallError, VTPruneError
from vtprune.eval.world import examples, reference_dir
from vtprune.integrations.vllm_plugin.families import FAMILIES
from vtprune.integrations.vllm_plugin.settings import pruning_of
from vtprune.integrations.vllm_plugin.settings import runnable as runnable_on
from vtprune.method import Method, Signal, Stage
from vtprune.selection import Selection

FOLDER, TOKENS = reference_dir("llava"), 144
ITEMS = examples("test", 3)
PROMPTS = [(f"USER: <image>\n{item.question} ASSISTANT:", [item.image]) for item in ITEMS]
SETTINGS = {
    "third": {"method": "vtc-cls", "keep": 36},
    "half": {"method": "vtc-cls", "keep": 0.5},
    "merging": {"method": "visionzip", "keep": 36},
}


def created(settings: dict[str, Any]) -> Method:
    """The method of the transformers path: positions as vLLM has them."""
    return methods.create(
        **{"name": settings["method"], **{k: v for k, v in settings.items() if k != "method"}},
        positions="dense",
    )


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(FOLDER)


@pytest.fixture(scope="module")
def dense() -> Engine:
    return Engine(FOLDER)


@pytest.fixture(scope="module")
def pruned(dense: Engine) -> dict[str, Engine]:
    """All of them live in one process with the dense engine and with each other."""
    return {name: Engine(FOLDER, settings) for name, settings in SETTINGS.items()}


def test_a_model_without_the_key_is_vllms_own(
    dense: Engine, pruned: dict[str, Engine], reference: Reference
) -> None:
    assert dense.on_model(lambda m: f"{type(m).__module__}.{type(m).__name__}") == (
        "vllm.model_executor.models.llava.LlavaForConditionalGeneration"
    )
    assert {e.on_model(lambda m: type(m).__name__) for e in pruned.values()} == {"PrunedLlava"}
    outputs = dense.generate(PROMPTS[:6])
    for out, (text, images) in zip(outputs, PROMPTS, strict=False):
        assert len(out.prompt_token_ids) == reference.inputs(text, images)["input_ids"].shape[1]
        assert list(out.outputs[0].token_ids) == reference.answer(text, images, None)


@pytest.mark.parametrize("name", SETTINGS)
def test_answers_and_prompts_equal_transformers(
    pruned: dict[str, Engine], reference: Reference, name: str
) -> None:
    method = created(SETTINGS[name])
    left = 36 if isinstance(method.keep, int) else TOKENS // 2
    for out, (text, images) in zip(pruned[name].generate(PROMPTS), PROMPTS, strict=True):
        whole = reference.inputs(text, images)["input_ids"][0].tolist()
        first = whole.index(4)
        assert out.prompt_token_ids == whole[:first] + [4] * left + whole[first + TOKENS :]
        assert list(out.outputs[0].token_ids) == reference.answer(text, images, method)


def test_pruning_changes_some_answer(dense: Engine, pruned: dict[str, Engine]) -> None:
    """Else equal answers would prove nothing."""
    assert dense.answers(PROMPTS) != pruned["merging"].answers(PROMPTS)


def test_two_pictures_in_a_prompt(pruned: dict[str, Engine], reference: Reference) -> None:
    prompts = [
        (f"USER: <image>\n<image>\n{a.question} ASSISTANT:", [a.image, b.image])
        for a, b in zip(ITEMS[::2], ITEMS[1::2], strict=False)
    ]
    for name, engine in pruned.items():
        method = created(SETTINGS[name])
        left = 36 if isinstance(method.keep, int) else TOKENS // 2
        for out, (text, images) in zip(engine.generate(prompts), prompts, strict=True):
            assert out.prompt_token_ids.count(4) == 2 * left
            assert list(out.outputs[0].token_ids) == reference.answer(text, images, method)


def test_prefix_caching_gives_the_same_answers(pruned: dict[str, Engine], reference: Reference) -> None:
    engine, method = pruned["half"], created(SETTINGS["half"])
    picture, others = ITEMS[0].image, [item.image for item in ITEMS[1:5]]
    prompts = [(f"USER: <image>\n{item.question} ASSISTANT:", [picture]) for item in ITEMS[:8]]
    first = engine.answers(prompts[:1])
    outputs = engine.generate(prompts)
    assert first == [list(outputs[0].outputs[0].token_ids)]
    # [begin] user : 72 tokens: two blocks of 32 hold nothing that differs between the questions.
    assert min(out.num_cached_tokens for out in outputs) >= 64
    assert [list(o.outputs[0].token_ids) for o in outputs] == [
        reference.answer(t, i, method) for t, i in prompts
    ]
    # The same words about other pictures must not be answered from that cache.
    same_words = [(prompts[0][0], [other]) for other in others]
    assert engine.answers(same_words) == [reference.answer(t, i, method) for t, i in same_words]


def test_cache_keys_tell_methods_and_budgets_apart(dense: Engine, pruned: dict[str, Engine]) -> None:
    """Also where engines share a store of encoder outputs or of the KV cache, and for names that clients give."""
    engines = [dense, *pruned.values()]
    for given in (None, {"image": ["a-picture"]}):
        keys = []
        for engine in engines:
            renderer = engine.llm.llm_engine.renderer
            request = {"prompt": PROMPTS[0][0], "multi_modal_data": {"image": PROMPTS[0][1]}}
            if given is not None:
                request["multi_modal_uuids"] = given
            keys.append(tuple(renderer.render_cmpl([request])[0]["mm_hashes"]["image"]))
        assert len(set(keys)) == len(engines), keys


def test_engines_in_one_process_do_not_mix_up(dense: Engine, pruned: dict[str, Engine]) -> None:
    engines = [dense, *pruned.values()]
    before = [engine.answers(PROMPTS[:6]) for engine in engines]
    assert [engine.answers(PROMPTS[:6]) for engine in reversed(engines)] == before[::-1]
    counts = [engine.generate(PROMPTS[:1])[0].prompt_token_ids.count(4) for engine in engines]
    assert counts == [TOKENS, 36, TOKENS // 2, 36]


def test_prompts_cut_in_the_middle_of_a_picture(reference: Reference) -> None:
    """Chunked prefill: 72 tokens of a picture in steps of 40."""
    engine = Engine(
        FOLDER, SETTINGS["half"], max_num_batched_tokens=40, max_num_seqs=4, enable_chunked_prefill=True
    )
    method = created(SETTINGS["half"])
    assert engine.answers(PROMPTS[:6]) == [
        reference.answer(text, images, method) for text, images in PROMPTS[:6]
    ]


def test_the_encoder_budget_shrinks(dense: Engine, pruned: dict[str, Engine]) -> None:
    def most(engine: Engine) -> int:
        runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        return int(runner.mm_budget.mm_max_toks_per_item["image"])

    assert [most(e) for e in (dense, pruned["third"], pruned["half"])] == [TOKENS, 36, TOKENS // 2]


def runnable() -> list[tuple[str, dict[str, Any]]]:
    """All methods of the registry that can run here, with the options that they need."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(FOLDER)
    facts = FAMILIES["LlavaForConditionalGeneration"].facts(config, str(FOLDER))
    return [(one.method, dict(one.options)) for one in runnable_on(facts)]


@pytest.mark.parametrize(
    ("method", "options"), runnable(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_method_keeps_the_same_tokens(
    pruned: dict[str, Engine], reference: Reference, method: str, options: dict[str, Any]
) -> None:
    from vtprune.integrations.vllm_plugin.pruning import Pruner

    chosen = methods.create(method, keep=0.3, positions="dense", **options)
    expected = [reference.pictures(text, images, chosen) for text, images in PROMPTS[:4]]
    pixels = torch.cat([reference.inputs(text, images)["pixel_values"] for text, images in PROMPTS[:4]])

    def run(model: Any) -> tuple[list[torch.Tensor], list[list[int]]]:
        config = model.config
        asked = {"method": method, "keep": 0.3, **options}
        with_key = type(config).from_dict({**config.to_dict(), "vtprune": asked})
        model.pruner.journal.revert()
        old, model.pruner = model.pruner, Pruner(model._tower(config), pruning_of(with_key, str(FOLDER)))
        try:
            with torch.inference_mode():
                return model.embed_multimodal(pixel_values=pixels), [
                    alive.tolist() for alive in model.pruner.kept
                ]
        finally:
            model.pruner.journal.revert()
            model.pruner = Pruner(model._tower(config), old.pruning)

    rows, kept = pruned["third"].on_model(run)
    assert kept == [one for _, all_kept in expected for one in all_kept]
    left = TOKENS if method == "keep-all" else 43
    for mine, (theirs, _) in zip(rows, expected, strict=True):
        assert mine.shape == theirs.shape == (left, 128)
        torch.testing.assert_close(mine.clone(), theirs, atol=2e-5, rtol=1e-4)


@pytest.fixture
def pruner(pruned: dict[str, Engine]) -> Any:
    found: list[Any] = []
    pruned["third"].on_model(lambda model: found.append(model))
    return found[0].pruner


def test_hooks_that_are_gone_are_noticed(pruned: dict[str, Engine], pruner: Any) -> None:
    def run(model: Any) -> None:
        attention = model.vision_tower.vision_model.encoder.layers[4].self_attn
        hooks, saved = attention._forward_hooks, dict(attention._forward_hooks)
        hooks.clear()
        try:
            with pytest.raises(InertPruningError, match="removed by other code"):
                model.embed_multimodal(pixel_values=torch.zeros(1, 3, 96, 96))
        finally:
            hooks.update(saved)

    pruned["third"].on_model(run)


def test_another_count_than_announced_is_refused(pruner: Any) -> None:
    stage = pruner.pruning.stages[0]
    fewer = dataclasses.replace(stage, decide=lambda view: Selection.topk(view.features.sum(-1), view.k - 1))
    stages, pruner.engine.stages = pruner.engine.stages, [fewer]
    try:
        with pytest.raises(UnsupportedCallError, match=r"kept \[35\] tokens where \[36\] were announced"):
            pruner(lambda: pruner_embed(pruner), None)
    finally:
        pruner.engine.stages = stages


def pruner_embed(pruner: Any) -> Any:
    """Runs the encoder and projector that a pruner is attached to."""
    tower = pruner.engine.towers[0]
    features = tower.module(torch.zeros(1, 3, 96, 96), feature_select_strategy="default")
    return tower.projector(features)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "vtc-cl", "keep": 36}, "no method 'vtc-cl'. Did you mean 'vtc-cls'"),
        ({"method": "vtc-cls", "keep": 145}, "keep=145 would remove nothing: a picture .* has 144 tokens"),
        ({"method": "fastv", "keep": 36}, "vLLM encodes a picture once for all prompts"),
    ],
)
def test_wrong_settings_end_the_start_of_an_engine(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(VTPruneError, match=says):
        Engine(FOLDER, settings)


def test_embeddings_of_pictures_are_refused_at_the_start() -> None:
    with pytest.raises(VTPruneError, match="enable_mm_embeds"):
        Engine(FOLDER, SETTINGS["third"], enable_mm_embeds=True)


def test_stage_and_signal_names_are_those_of_the_engine(pruner: Any) -> None:
    stage: Stage = pruner.pruning.stages[0]
    assert str(stage.site) == "encoder"
    assert all(isinstance(s, Signal) and s.kind == "cls_attention" for s in stage.needs)
