"""The contract of a patched model, judged by an implementation that shares no code with the engine."""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from versions import ENCODES_BEFOREHAND

import vtprune
from vtprune import methods as registry
from vtprune.testing import IMAGE_TOKEN, VIDEO_TOKEN, llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl


def _load(name: str) -> ModuleType:
    """A helper module that lies beside this file."""
    spec = importlib.util.spec_from_file_location(f"vtprune_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ref = _load("dense_reference")

TOLERANCE = 1e-4
FAMILIES = ("clip", "siglip", "qwen")
# Methods that this older judge knows; tests/contract has all.
METHODS = ("divprune", "fastv", "keep-all", "random", "stride", "visionzip", "vtc-cls")
DENSE_ON_LLAVA = ("vtc-cls", "visionzip", "divprune")
PAIRS = [(family, attention) for family in ("clip", "qwen") for attention in ("sdpa", "eager")]
EVERY_PAIR = [*PAIRS, ("siglip", "sdpa")]
# Methods of the one decoder or vision site each, for the tests whose cost does not allow all methods.
SITES: dict[str, dict[str, Any]] = {
    "vit": {"where": "vit", "layer": 1},
    "encoder": {"where": "encoder"},
    "projector": {"where": "projector"},
    "decoder": {"where": "decoder", "layer": 2},
}


# ------------------------------------------------------------------------------------------ helpers


def build(family: str, attention: str = "sdpa", **options: Any) -> Any:
    """A fresh tiny model."""
    if family == "qwen":
        return tiny_qwen2_5_vl(attention, **options)
    return tiny_llava(attention, family, **options)


@functools.cache
def subject(family: str, attention: str = "sdpa") -> Any:
    """The model that is patched; shared by tests that leave it as they found it."""
    return build(family, attention)


@functools.cache
def judge(family: str, attention: str = "sdpa") -> Any:
    """The reference on a twin that is never patched."""
    return ref.Reference(build(family, attention))


def batch(family: str, kind: str = "ragged", padding: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Prompts: one picture, two pictures, a row of text, or all of them in one ragged batch."""
    if family == "qwen":
        rows: dict[str, list[list[Any]]] = {
            "one": [[1, 10, 11, (4, 6), 12, 13]],
            "two": [[1, 10, (2, 4), 11, (6, 5), 12, 13, 14, 15]],
            "text": [[1, 20, 21, 22, 23]],
            "video": [[1, 30, (2, 3, 4), 31, (4, 4), 32, 33]],
        }
    else:
        rows = {
            "one": [[1, 10, 11, "image", 12, 13]],
            "two": [[1, 10, "image", 11, "image", 12, 13, 14, 15]],
            "text": [[1, 20, 21, 22, 23]],
            "adjacent": [[1, "image", "image", 33]],
        }
    prompts = [row for part in rows.values() for row in part] if kind == "ragged" else rows[kind]
    return qwen_inputs(prompts, seed, padding) if family == "qwen" else llava_inputs(prompts, seed, padding)


def options_of(method: str, family: str, keep: float = 5) -> dict[str, Any]:
    """Default options and a budget; encoders without [CLS] get the declared substitute score."""
    options: dict[str, Any] = {"keep": keep}
    names = {f.name for f in fields(registry.method_class(method))}
    if family != "clip" and "scorer" in names:
        options["scorer"] = "received"
    # Merging between decoder layers is judged in contract/; here it is off.
    options |= {
        "sparsevlm": {"recycle": 0.0},
        "atp-llava": {"threshold": "quantile"},
        "as-vit": {"threshold": "topk"},
    }.get(method, {})
    return options


@contextmanager
def patched(model: Any, method: Any, **options: Any) -> Iterator[vtprune.Patch]:
    """A patch for the length of a block; skips pairs that the library declares unsupported."""
    try:
        patch = vtprune.patch(model, method, **options)
    except vtprune.UnsupportedMethodError as error:
        pytest.skip(f"declared unsupported: {error}")
    try:
        yield patch
    finally:
        patch.remove()


def merge_of(reference: Any, method: str, options: dict[str, Any]) -> Any:
    """How a merging method's features come about, recomputed literally; None for methods that only drop."""
    if method != "visionzip":
        return None
    share, scorer = options.get("contextual", 10 / 64), options.get("scorer", "cls")

    def merge(frame: Any, features: Tensor, kept: list[int]) -> Tensor:
        plan = ref.visionzip_plan(reference, frame, ref.budget(options["keep"], frame.n), share, scorer)
        assert sorted(plan) == kept
        return ref.merge_by_plan(features, plan)

    return merge


def kept_of(
    report: vtprune.Report, sample: int, row: dict[str, Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """The report's survivors of one row's pictures; with the row, in the order of its placeholders."""
    images = [image for image in report.images if image.sample == sample]
    if row is None:
        return [image.kept for image in images]
    queues = {
        IMAGE_TOKEN: [i for i in images if i.layout.modality == "image"],
        VIDEO_TOKEN: [i for i in images if i.layout.modality == "video"],
    }
    visual = [t for t in row["input_ids"][0].tolist() if t in queues]
    found, column = [], 0
    while column < len(visual):
        found.append(queues[visual[column]].pop(0))
        column += found[-1].layout.n_tokens
    assert not any(queues.values()), "the report lists more pictures than the row holds"
    return [image.kept for image in found]


def how(row: dict[str, Tensor], report: vtprune.Report, sample: int, merge: Any = None) -> dict[str, Any]:
    """Arguments of the reference that tell it what was pruned."""
    dense = [site for site, policy in report.positions.items() if policy == "dense"]
    return {"kept": kept_of(report, sample, row), "dense_sites": dense, "merge": merge}


def assert_logits(
    reference: Any, inputs: dict[str, Tensor], logits: Tensor, report: vtprune.Report, merge: Any = None
) -> None:
    """All unpadded columns of all rows show what the reference computes."""
    assert logits.shape[:2] == inputs["input_ids"].shape
    for sample, row in enumerate(reference.split(inputs)):
        expected = reference.row_logits(row, **how(row, report, sample, merge))
        shown = logits[sample][inputs["attention_mask"][sample].bool()]
        torch.testing.assert_close(shown, expected, atol=TOLERANCE, rtol=0, equal_nan=False)


def greedy(model: Any, inputs: dict[str, Tensor], steps: int = 16, **options: Any) -> Tensor:
    """New tokens of a greedy generation."""
    out = model.generate(**inputs, max_new_tokens=steps, do_sample=False, **options)
    return out[:, inputs["input_ids"].shape[1] :]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name}: attributes"] = sorted(
            set(module.__dict__) - {"_previous_max_cache_length"}
        )  # by generate()
        state[f"{name}: class"] = type(module)
        for key, value in module.__dict__.items():
            if "hooks" in key and hasattr(value, "items"):
                state[f"{name}: {key}"] = dict(value)
    state["state_dict"] = list(model.state_dict())
    if hasattr(model, "config") and hasattr(model.config, "to_dict"):
        state["config"] = model.config.to_dict()
        state["generation"] = model.generation_config.to_dict()
    return state


PROJECTOR = vtprune.Site("projector")


@dataclass(frozen=True, kw_only=True)
class Adaptive(vtprune.Method):
    """Keeps tokens whose norm is above the picture's mean: the count depends on the picture."""

    key: ClassVar[str] = "test-adaptive"
    keep: int | float = 1.0
    where: vtprune.Site = PROJECTOR

    def stages(self, facts: vtprune.ModelFacts) -> list[vtprune.Stage]:
        return [vtprune.Stage(self.where, None, self.decide, positions=self.position_policy(facts))]

    def decide(self, view: vtprune.View) -> vtprune.Selection:
        size = view.features.float().norm(dim=-1)
        return vtprune.Selection.where(size >= size.mean(-1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class Scripted(vtprune.Method):
    """Does what the test says at one site."""

    key: ClassVar[str] = "test-scripted"
    keep: int | float = 5
    where: vtprune.Site = PROJECTOR
    script: list[Callable[[vtprune.View], vtprune.Selection]] = field(default_factory=list)

    def site(self, facts: vtprune.ModelFacts) -> vtprune.Site:
        return self.where

    def decide(self, view: vtprune.View) -> vtprune.Selection:
        return self.script[0](view)


def first_k(view: vtprune.View) -> vtprune.Selection:
    """Keeps the first k tokens."""
    return vtprune.Selection.of(torch.arange(view.k).expand(len(view.features), -1))


def boom(view: vtprune.View) -> vtprune.Selection:
    """A bug in a method."""
    raise RuntimeError("boom")


ALL_SITES = [
    vtprune.Site("vit", 1),
    vtprune.Site("encoder"),
    vtprune.Site("projector"),
    vtprune.Site("decoder", 0),
    vtprune.Site("decoder", 2),
]


# ------------------------------------------------------------------------------- the judge judges itself


@pytest.mark.parametrize(("family", "attention"), EVERY_PAIR)
@torch.no_grad()
def test_reference_without_pruning_is_the_stock_model(family: str, attention: str) -> None:
    reference, inputs = judge(family, attention), batch(family)
    stock = reference.model(**inputs).logits
    for sample, row in enumerate(reference.split(inputs)):
        frames = reference.frames(row)
        for frame in frames:
            by_hand = (
                reference.qwen_run(frame)[0] if family == "qwen" else reference.clip_run(frame.pixels)[0]
            )
            torch.testing.assert_close(reference.project(by_hand), frame.projected, atol=1e-5, rtol=0)
        keep_all = [{"decoder[2]": range(f.n)} for f in frames]
        for kept in ([{} for _ in frames], keep_all):
            shown = stock[sample][inputs["attention_mask"][sample].bool()]
            torch.testing.assert_close(reference.row_logits(row, kept), shown, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["clip", "qwen"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "keep-all"])
@torch.no_grad()
def test_judge_notices_a_wrong_index(family: str, method: str) -> None:
    """One swapped survivor, one missing survivor, or the wrong position policy must not pass."""
    model, reference, inputs = subject(family), judge(family), batch(family, "one")
    options = options_of(method, family)
    with patched(model, method, **options) as patch:
        logits = model(**inputs).logits
        report = patch.report()
    row = reference.split(inputs)[0]
    true = how(row, report, 0)
    if method == "visionzip":
        del true["merge"]
        assert (reference.row_logits(row, **true) - logits[0]).abs().max() > 1e-3  # merging matters
        return
    # The last site that removed something; those behind it kept what there was.
    sites, before = {}, list(range(report.images[0].layout.n_tokens))
    for site, index in true["kept"][0].items():
        if len(index) < len(before):
            free = next(i for i in before if i not in index.tolist())
            sites, last, before = {**sites, site: index.tolist()}, site, index.tolist()
    for wrong in (sorted([*before[1:], free]), before[1:]):
        if not wrong:
            continue
        logits_wrong = reference.row_logits(row, **{**true, "kept": [{**sites, last: wrong}]})
        assert (logits_wrong[-1] - logits[0, -1]).abs().max() > 1e-3
    other = () if true["dense_sites"] else tuple(sites)
    logits_wrong = reference.row_logits(row, **{**true, "dense_sites": other})
    assert (logits_wrong[-1] - logits[0, -1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------ 1, 2: logits


@pytest.mark.parametrize(("family", "attention"), EVERY_PAIR)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_keep_everything_changes_nothing(method: str, family: str, attention: str) -> None:
    model, inputs = subject(family, attention), batch(family)
    stock, text = model(**inputs).logits, greedy(model, inputs, 4)
    with patched(model, method, **options_of(method, family, keep=1.0)) as patch:
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(model(**inputs).logits[real], stock[real], atol=TOLERANCE, rtol=0)
        assert not patch.report().engaged
        assert torch.equal(greedy(model, inputs, 4), text)


@pytest.mark.parametrize(("family", "attention"), EVERY_PAIR)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_logits_equal_the_dense_reference(method: str, family: str, attention: str) -> None:
    model, reference = subject(family, attention), judge(family, attention)
    options = options_of(method, family)
    merge = merge_of(reference, method, options)
    with patched(model, method, **options) as patch:
        for kind in ("one", "two", "text", "ragged"):
            inputs = batch(family, kind)
            logits = model(**inputs).logits
            report = patch.report()
            assert_logits(reference, inputs, logits, report, merge)
            if method in ("keep-all",) or kind == "text":
                continue
            stock = reference.model(**inputs).logits
            assert (stock[0, -1] - logits[0, -1]).abs().max() > 1e-2, "this test could not fail"
            policy = "dense" if method in DENSE_ON_LLAVA and family != "qwen" else "original"
            if method in (*DENSE_ON_LLAVA, "fastv", "random", "stride"):
                assert set(report.positions.values()) == {policy}
                assert all(len(list(i.kept.values())[-1]) == 5 for i in report.images)


@pytest.mark.parametrize("positions", ["original", "dense"])
@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_site_and_position_policy(family: str, where: str, positions: str) -> None:
    if family == "qwen" and positions == "dense":
        with pytest.raises(vtprune.VTPruneError, match="M-RoPE"):
            vtprune.patch(subject(family), "random", keep=5, positions="dense", **SITES[where])
        return
    model, inputs = subject(family), batch(family)
    with patched(model, "random", keep=0.3, positions=positions, **SITES[where]) as patch:
        logits = model(**inputs).logits
        report = patch.report()
        assert set(report.positions.values()) == {positions}
        assert_logits(judge(family), inputs, logits, report)
        text = greedy(model, inputs, 1)
        for sample, row in enumerate(judge(family).split(inputs)):
            assert text[sample].tolist() == judge(family).greedy(row, 1, **how(row, report, sample))


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("where", ["vit", "decoder"])
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_other_layers(family: str, where: str, layer: int) -> None:
    if family == "clip" and (where, layer) == ("vit", 3):
        # Its output does not reach the features of a model that uses hidden_states[-2].
        with pytest.raises(vtprune.VTPruneError):
            vtprune.patch(subject(family), "random", keep=5, where=where, layer=layer)
        return
    model, inputs = subject(family), batch(family)
    with patched(model, "stride", keep=5, where=where, layer=layer) as patch:
        assert_logits(judge(family), inputs, model(**inputs).logits, patch.report())


@torch.no_grad()
def test_report_lists_pictures_in_reading_order() -> None:
    """Also where a video stands before a picture, whose features the model computes first."""
    with patched(subject("qwen"), "stride", keep=5) as patch:
        subject("qwen")(**qwen_inputs([[1, 10, (4, 6), 11], [1, (2, 3, 4), 31, (4, 4), (3, 2, 2), 33]]))
        grids = [
            (i.sample, i.layout.modality, i.layout.rows, i.layout.cols, i.layout.time)
            for i in patch.report().images
        ]
    assert grids == [
        (0, "image", 4, 6, 0),
        (1, "video", 3, 4, 0),
        (1, "video", 3, 4, 1),
        (1, "image", 4, 4, 0),
        (1, "video", 2, 2, 0),
        (1, "video", 2, 2, 1),
        (1, "video", 2, 2, 2),
    ]


@pytest.mark.parametrize("contextual", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_visionzip_merging(family: str, contextual: float) -> None:
    model, inputs = subject(family), batch(family)
    options = {**options_of("visionzip", family), "contextual": contextual}
    with patched(model, "visionzip", **options) as patch:
        merge = merge_of(judge(family), "visionzip", options)
        assert_logits(judge(family), inputs, model(**inputs).logits, patch.report(), merge)


# ------------------------------------------------------------------------------------ decisions


@pytest.mark.parametrize("keep", [3, 0.5])
@pytest.mark.parametrize(("family", "attention"), EVERY_PAIR)
@pytest.mark.parametrize("method", ["divprune", "fastv", "stride", "visionzip", "vtc-cls"])
@torch.no_grad()
def test_decisions_equal_a_literal_recomputation(
    method: str, family: str, attention: str, keep: float
) -> None:
    model, reference, inputs = subject(family, attention), judge(family, attention), batch(family)
    options = options_of(method, family, keep)
    scorer = options.get("scorer", "cls")
    with patched(model, method, **options) as patch:
        model(**inputs)
        report = patch.report()
    half = round(0.5 * reference.used_vit_layers)
    for sample, row in enumerate(reference.split(inputs)):
        found = [list(kept.values())[-1].tolist() for kept in kept_of(report, sample, row)]
        frames = reference.frames(row)
        counts = [ref.budget(keep, f.n) for f in frames]
        if method == "fastv":
            expected = ref.fastv_decisions(reference, row, keep, 2) if frames else []
        elif method == "stride":
            expected = [ref.stride_decision(f.n, k) for f, k in zip(frames, counts, strict=True)]
        elif method == "divprune":
            expected = [ref.divprune_decision(f.projected, k) for f, k in zip(frames, counts, strict=True)]
        elif method == "vtc-cls":
            expected = [
                ref.vtc_cls_decision(reference, f, k, half, scorer)
                for f, k in zip(frames, counts, strict=True)
            ]
        else:
            expected = [
                sorted(ref.visionzip_plan(reference, f, k, 10 / 64, scorer))
                for f, k in zip(frames, counts, strict=True)
            ]
        assert found == expected


@torch.no_grad()
def test_random_draws() -> None:
    """Another seed or picture draws other tokens; the same picture draws the same ones."""
    model, drawn = subject("clip"), []
    for seed, picture in ((0, 0), (0, 0), (1, 0), (0, 1)):
        with patched(model, "random", keep=6, seed=seed) as patch:
            model(**batch("clip", "one", seed=picture))
            drawn.append(patch.report().images[0].kept["projector"].tolist())
    assert drawn[0] == drawn[1]
    assert drawn[0] not in drawn[2:]
    assert all(len(set(d)) == 6 and d == sorted(d) for d in drawn)


# ------------------------------------------------------------------------------------ 3: batches


def assert_batch_equals_rows(
    family: str, attention: str, make: Callable[[], Any], **options: Any
) -> set[int]:
    """A left-padded, a right-padded and single runs agree; returns the numbers of survivors."""
    model, left, right = subject(family, attention), batch(family), batch(family, padding="right")
    counts = set()
    with patched(model, make(), **options) as patch:
        out = model(**left).logits
        report = patch.report()
        mirrored = model(**right).logits
        text = greedy(model, left, 6)
        for sample, row in enumerate(judge(family, attention).split(left)):
            alone = model(**row).logits[0]
            kept = [{s: k.tolist() for s, k in kept.items()} for kept in kept_of(patch.report(), 0)]
            assert kept == [{s: k.tolist() for s, k in kept.items()} for kept in kept_of(report, sample)]
            counts |= {len(list(k.values())[-1]) for k in kept}
            for padded, mask in ((out, left), (mirrored, right)):
                shown = padded[sample][mask["attention_mask"][sample].bool()]
                torch.testing.assert_close(shown, alone, atol=TOLERANCE, rtol=0)
            assert text[sample].tolist() == greedy(model, row, 6)[0].tolist()
    return counts


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_ragged_batch_equals_single_runs(method: str, family: str, attention: str) -> None:
    assert_batch_equals_rows(family, attention, lambda: method, **options_of(method, family, 0.3))


@pytest.mark.parametrize("site", ALL_SITES, ids=str)
@pytest.mark.parametrize(("family", "attention"), PAIRS)
@torch.no_grad()
def test_adaptive_counts_in_a_ragged_batch(family: str, attention: str, site: vtprune.Site) -> None:
    counts = assert_batch_equals_rows(family, attention, lambda: Adaptive(where=site))
    assert len(counts) > 1, "the counts must differ for this test to mean anything"
    model, inputs = subject(family, attention), batch(family)
    with patched(model, Adaptive(where=site)) as patch:
        assert_logits(judge(family, attention), inputs, model(**inputs).logits, patch.report())


# ------------------------------------------------------------------------------------ 4: generation


@pytest.mark.parametrize(("family", "attention"), EVERY_PAIR)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_greedy_generation_equals_the_cache_free_loop(method: str, family: str, attention: str) -> None:
    model, reference, inputs = subject(family, attention), judge(family, attention), batch(family)
    options = options_of(method, family)
    merge = merge_of(reference, method, options)
    with patched(model, method, **options) as patch:
        text = greedy(model, inputs)
        report = patch.report()
        assert report.decode_steps == 15
        uncached = greedy(model, inputs, 6, use_cache=False)
    for sample, row in enumerate(reference.split(inputs)):
        expected = reference.greedy(row, 16, **how(row, report, sample, merge))
        assert text[sample].tolist() == expected
        assert uncached[sample].tolist() == expected[:6]


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_beam_search_and_sampling(method: str, family: str, attention: str) -> None:
    model, reference = subject(family, attention), judge(family, attention)
    inputs = batch(family) if ENCODES_BEFOREHAND else batch(family, "one")
    n = inputs["input_ids"].shape[1]
    options = options_of(method, family)
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    scored = {"return_dict_in_generate": True, "output_scores": True}
    sample = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6, "top_k": 20}
    with patched(model, method, **options) as patch:
        best = model.generate(**inputs, **beams, **scored)
        report = patch.report()
        assert torch.equal(best.sequences, model.generate(**inputs, **beams, use_cache=False))
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            drawn.append(model.generate(**inputs, **sample, use_cache=use_cache))
        assert drawn[0].shape[0] == 2 * len(inputs["input_ids"])
        assert torch.equal(*drawn)
    merge = merge_of(reference, method, options)
    for r, row in enumerate(reference.split(inputs)):
        text = best.sequences[r, n:].tolist()
        logits = reference.row_logits(row, more=text, **how(row, report, 3 * r, merge))
        steps = logits[-len(text) - 1 : -1].log_softmax(-1)
        score = sum(step[token] for step, token in zip(steps, text, strict=True)) / len(text)
        torch.testing.assert_close(score, best.sequences_scores[r], atol=TOLERANCE, rtol=0)


# ------------------------------------------------------------------------------------ 5: labels


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_equal_the_shortened_sequence(method: str, family: str, attention: str) -> None:
    model, reference = build(family, attention), ref.Reference(build(family, attention))
    inputs = batch(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[(labels == IMAGE_TOKEN) | (labels == VIDEO_TOKEN)] = -100
    for row, mask in zip(labels, inputs["attention_mask"], strict=True):
        row[int(mask.argmax())] = -100  # the first token has nothing before it
    options = options_of(method, family)
    with patched(model, method, **options) as patch:
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        report = patch.report()
    merge = merge_of(reference, method, options)
    logits, targets = [], []
    for r, row in enumerate(reference.split(inputs)):
        shown = reference.row_logits(row, **how(row, report, r, merge))
        target = labels[r][inputs["attention_mask"][r].bool()][1:]
        logits.append(shown[:-1][target != -100])
        targets.append(target[target != -100])
    expected = cross_entropy(torch.cat(logits), torch.cat(targets))
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    wanted = {name: p.grad for name, p in reference.model.named_parameters() if p.grad is not None}
    names = [n for n in wanted if "projector" in n or "merger" in n or "embed_tokens" in n]
    assert len(names) > 3
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-3, msg=name)


# ------------------------------------------------------------------------------------ 6: undo


@pytest.mark.parametrize(("family", "attention"), EVERY_PAIR)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_undo_is_exact(method: str, family: str, attention: str) -> None:
    model, inputs = build(family, attention), batch(family)
    stock = model(**inputs).logits
    text = greedy(model, inputs, 3)
    before = snapshot(model)
    with patched(model, method, **options_of(method, family)) as patch:
        model(**inputs)
        greedy(model, inputs, 3)
        assert patch.active
        assert snapshot(model) != before
    assert not patch.active
    patch.remove()  # harmless
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, stock)
    assert torch.equal(greedy(model, inputs, 3), text)
    assert snapshot(model) == before


@pytest.mark.parametrize("site", ALL_SITES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_exception_inside_a_decision(family: str, site: vtprune.Site) -> None:
    """The patched model works after it, and undo is exact at once or later."""
    model, inputs = build(family), batch(family)
    stock = model(**inputs).logits
    before = snapshot(model)
    method = Scripted(where=site, script=[boom])
    with pytest.raises(RuntimeError, match="boom"), patched(model, method):
        model(**inputs)
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, stock)
    with patched(model, method) as patch:
        for call in (lambda: model(**inputs), lambda: greedy(model, inputs, 3)):
            with pytest.raises(RuntimeError, match="boom"):
                call()
        method.script[0] = first_k
        assert_logits(judge(family), inputs, model(**inputs).logits, patch.report())
        text = batch(family, "text")
        assert_logits(judge(family), text, model(**text).logits, patch.report())
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("where", SITES)
@torch.no_grad()
def test_exception_inside_the_model(where: str) -> None:
    """An error in a layer of the model itself leaves nothing behind either."""
    model, inputs = build("clip"), batch("clip")
    stock = model(**inputs).logits
    with patched(model, "stride", keep=5, **SITES[where]) as patch:

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        handle = model.model.language_model.layers[3].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**inputs)
        handle.remove()
        assert_logits(judge("clip"), inputs, model(**inputs).logits, patch.report())
    assert torch.equal(model(**inputs).logits, stock)


# ------------------------------------------------------------------------------------ 7: isolation


@torch.no_grad()
def test_two_patched_models_do_not_meet() -> None:
    first, second, plain = build("clip"), build("clip"), build("clip")
    inputs, other = batch("clip"), batch("clip", "two", seed=3)
    stock = plain(**inputs).logits
    with patched(first, "vtc-cls", keep=4) as a, patched(second, "fastv", keep=7) as b:
        for _ in range(2):
            assert_logits(judge("clip"), inputs, first(**inputs).logits, a.report())
            assert_logits(judge("clip"), other, second(**other).logits, b.report())
            assert torch.equal(plain(**inputs).logits, stock)
        one = first(**batch("clip", "one"), use_cache=True)
        two = second(**batch("clip", "one"), use_cache=True)
        for _ in range(3):  # interleaved decoding
            one = first(input_ids=one.logits[:, -1:].argmax(-1), past_key_values=one.past_key_values)
            two = second(input_ids=two.logits[:, -1:].argmax(-1), past_key_values=two.past_key_values)
        a.remove()
        assert_logits(judge("clip"), other, second(**other).logits, b.report())


def in_threads(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of jobs that run at once."""
    results: list[Any] = [None] * len(jobs)

    def work(i: int) -> None:
        try:
            results[i] = jobs[i]()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("shared", [False, True], ids=["two models", "one model"])
def test_threads(shared: bool) -> None:
    first = build("clip")
    second = first if shared else build("clip")
    inputs = [batch("clip"), batch("clip", "two", seed=3)]
    with patched(first, "fastv", keep=4):
        other = None if shared else vtprune.patch(second, "vtc-cls", keep=7)

        def run(model: Any, x: dict[str, Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return [
                    torch.cat([model(**x).logits.flatten(), greedy(model, x, 3).flatten()]) for _ in range(6)
                ]

        jobs = [functools.partial(run, m, x) for m, x in zip((first, second), inputs, strict=True)]
        expected = [job()[0] for job in jobs]
        for found, wanted in zip(in_threads(jobs), expected, strict=True):
            for value in found:
                torch.testing.assert_close(value, wanted, atol=TOLERANCE, rtol=0)
        if other is not None:
            other.remove()


# ------------------------------------------------------------------------------------ 8: conversations

TURN = [40, 41, 42]


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_second_turn_with_the_returned_cache(method: str, family: str, attention: str) -> None:
    model, reference = subject(family, attention), judge(family, attention)
    options = options_of(method, family)
    merge = merge_of(reference, method, options)
    for kind in ("one", "two"):
        inputs = batch(family, kind)
        with patched(model, method, **options) as patch:
            first = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
            row = reference.split(inputs)[0]
            told = how(row, patch.report(), 0, merge)
            ids = torch.cat([first.sequences, torch.tensor([TURN])], 1)
            second = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=first.past_key_values,
                max_new_tokens=6,
                do_sample=False,
            )
        answer = first.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer == reference.greedy(row, 6, **told)
        assert second[0, ids.shape[1] :].tolist() == reference.greedy(row, 6, start=answer + TURN, **told)


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_manual_decoding_loop(method: str, family: str, attention: str) -> None:
    """No position_ids, no attention_mask for a single row; one token, then three tokens at once."""
    model, reference, inputs = subject(family, attention), judge(family, attention), batch(family, "two")
    options = options_of(method, family)
    row = reference.split(inputs)[0]
    with patched(model, method, **options) as patch:
        out = model(**inputs, use_cache=True)
        told = how(row, patch.report(), 0, merge_of(reference, method, options))
        text: list[int] = []
        for chunk in ([21], [22], [23, 24, 25], [26]):
            text += chunk
            out = model(input_ids=torch.tensor([chunk]), past_key_values=out.past_key_values)
            expected = reference.row_logits(row, more=text, **told)[-len(chunk) :]
            torch.testing.assert_close(out.logits[0], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", ["vtc-cls", "fastv", "visionzip", "stride"])
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_manual_decoding_of_a_padded_batch(method: str, family: str) -> None:
    """The caller goes on with the mask of the unpruned prompt (Qwen2.5-VL: with its positions)."""
    model, reference, inputs = subject(family), judge(family), batch(family)
    options = options_of(method, family)
    rows = reference.split(inputs)
    with patched(model, method, **options) as patch:
        out = model(**inputs, use_cache=True)
        merge = merge_of(reference, method, options)
        told = [how(row, patch.report(), r, merge) for r, row in enumerate(rows)]
        mask, text = inputs["attention_mask"], []
        for token in (21, 22, 23):
            text.append(token)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            call = {"input_ids": torch.full((len(rows), 1), token), "attention_mask": mask}
            if family == "qwen":  # the stock model cannot derive positions of padded rows from the mask
                last = [reference.positions(row, row["input_ids"].shape[1]).max() for row in rows]
                call["position_ids"] = (torch.stack(last) + len(text))[:, None].expand(3, -1, 1)
            out = model(**call, past_key_values=out.past_key_values)
            for r, row in enumerate(rows):
                expected = reference.row_logits(row, more=text, **told[r])[-1]
                torch.testing.assert_close(out.logits[r, -1], expected, atol=TOLERANCE, rtol=0)


# ------------------------------------------------------------------------------------ 9: refusals


def refused_calls(model: Any, family: str) -> dict[str, Callable[[], Any]]:
    """Calls that cannot be pruned correctly."""
    inputs = batch(family, "one")
    n = inputs["input_ids"].shape[1]
    greedy_options = {"max_new_tokens": 3, "do_sample": False}
    square = torch.ones(1, 1, n, n).tril().bool()
    embeds = judge(family).decoder.embed_tokens(inputs["input_ids"])
    return {
        "static cache": lambda: model.generate(**inputs, cache_implementation="static", **greedy_options),
        "chunked prefill": lambda: model.generate(**inputs, prefill_chunk_size=7, **greedy_options),
        "4D mask": lambda: model(**{**inputs, "attention_mask": square}),
        "embeddings": lambda: model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]),
    }


@pytest.mark.parametrize("where", ["encoder", "decoder"])
@pytest.mark.parametrize("call", ["static cache", "chunked prefill", "4D mask", "embeddings"])
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_refused_before_any_damage(family: str, call: str, where: str) -> None:
    model, inputs = build(family), batch(family)
    stock = model(**inputs).logits
    before = snapshot(model)
    with patched(model, "stride", keep=5, **SITES[where]) as patch:
        armed = snapshot(model)
        with pytest.raises(vtprune.VTPruneError) as caught:
            refused_calls(model, family)[call]()
        assert len(str(caught.value)) > 30
        assert snapshot(model) == armed
        assert_logits(judge(family), inputs, model(**inputs).logits, patch.report())
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("method", ["vtc-cls", "fastv"])
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_unpatched_continuation_is_refused(family: str, method: str) -> None:
    model, inputs = build(family), batch(family, "one")
    with patched(model, method, **options_of(method, family)):
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(vtprune.VTPruneError):
        model(input_ids=torch.tensor([[21]]), past_key_values=cache)
    other = build(family)
    with pytest.raises(vtprune.VTPruneError):
        other(input_ids=torch.tensor([[21]]), past_key_values=cache)


# ------------------------------------------------------------------------------------ 10: errors


def refused_patches() -> dict[str, tuple[Any, dict[str, Any], str, str]]:
    """id -> model family, options, method, pattern of the message."""
    return {
        "option": ("clip", {"kepe": 0.5}, "fastv", "'keep'"),
        "method": ("clip", {"keep": 0.5}, "fastvv", "'fastv'"),
        "method far off": ("clip", {"keep": 0.5}, "qqq", "vtc-cls"),
        "keep=0": ("clip", {"keep": 0}, "fastv", "keep=1"),
        "keep=0.0": ("clip", {"keep": 0.0}, "fastv", "0.05"),
        "keep=1.5": ("clip", {"keep": 1.5}, "fastv", "1.0|keep=2"),
        "keep=-3": ("clip", {"keep": -3}, "fastv", "keep=1"),
        "keep=True": ("clip", {"keep": True}, "fastv", "int"),
        "keep=nan": ("clip", {"keep": float("nan")}, "fastv", "ratio"),
        "layer": ("clip", {"keep": 5, "layer": 9}, "fastv", "1 to 3"),
        "positions": ("clip", {"keep": 5, "positions": "densee"}, "fastv", "'dense'"),
        "cls": ("siglip", {"keep": 5}, "vtc-cls", "received"),
        "cls qwen": ("qwen", {"keep": 5}, "visionzip", "received"),
        "linear": ("linear", {"keep": 5}, "fastv", "(?i)llava"),
        "text model": ("llama", {"keep": 5}, "fastv", "(?i)llava"),
    }


@pytest.mark.parametrize("case", refused_patches())
@torch.no_grad()
def test_refused_patches_name_the_right_thing(case: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    family, options, method, pattern = refused_patches()[case]
    model: Any
    if family == "linear":
        model = nn.Linear(3, 3)
    elif family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    else:
        model = build(family)
        model(**batch(family))
    before = snapshot(model)
    with pytest.raises(vtprune.VTPruneError, match=pattern):
        vtprune.patch(model, method, **options)
    assert snapshot(model) == before


@torch.no_grad()
def test_patching_twice_is_refused() -> None:
    model = build("clip")
    with patched(model, "stride", keep=5), pytest.raises(vtprune.VTPruneError):
        vtprune.patch(model, "fastv", keep=5)
    with pytest.raises(vtprune.VTPruneError):
        vtprune.unpatch(model)
    vtprune.patch(model, "fastv", keep=5)
    vtprune.unpatch(model)


@torch.no_grad()
def test_nan_scores() -> None:
    def nan(view: vtprune.View) -> vtprune.Selection:
        return vtprune.Selection.topk(view.features.sum(-1) * float("nan"), view.k)

    model, inputs = build("clip"), batch("clip")
    for site in ALL_SITES:
        with patched(model, Scripted(where=site, script=[nan])), pytest.raises(vtprune.NonFiniteScoresError):
            model(**inputs)


@pytest.mark.parametrize("method", ["divprune", "fastv", "visionzip", "vtc-cls"])
@torch.no_grad()
def test_nan_weights(method: str) -> None:
    model = build("clip")
    model.model.vision_tower.encoder.layers[0].mlp.fc2.weight.fill_(float("nan"))
    with patched(model, method, keep=5), pytest.raises(vtprune.NonFiniteScoresError, match="NaN"):
        model(**batch("clip"))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_small_pictures_are_kept_whole_with_a_note(method: str) -> None:
    """Qwen: 8 and 24 tokens with a budget of 12."""
    model = subject("qwen")
    inputs = qwen_inputs([[1, 10, (2, 4), 12], [1, 10, (4, 6), 12]])
    options = options_of(method, "qwen", 12)
    with patched(model, method, **options) as patch:
        logits = model(**inputs).logits
        report = patch.report()
    merge = merge_of(judge("qwen"), method, options)
    assert_logits(judge("qwen"), inputs, logits, report, merge)
    assert report.images[0].tokens_out == 8
    if method != "keep-all":
        assert report.images[1].tokens_out < 24
        assert any("8" in note and "12" in note for note in report.notes)


@pytest.mark.parametrize("site", ALL_SITES, ids=str)
@torch.no_grad()
def test_returning_everything_is_inert(site: vtprune.Site) -> None:
    def everything(view: vtprune.View) -> vtprune.Selection:
        return vtprune.Selection.everything(len(view.features), view.n, view.features.device)

    for family in ("clip", "qwen"):
        method = Scripted(where=site, script=[everything])
        with patched(subject(family), method), pytest.raises(vtprune.InertPruningError):
            subject(family)(**batch(family))


def clear_hooks(module: nn.Module) -> int:
    """Forgets all forward hooks of a module, as foreign code might; returns how many there were."""
    lost = 0
    for key, value in module.__dict__.items():
        if key.startswith("_forward") and "hooks" in key and hasattr(value, "clear"):
            lost += len(value)
            value.clear()
    return lost


@pytest.mark.parametrize("method", ["vtc-cls", "fastv", "stride", "divprune"])
@pytest.mark.parametrize("part", ["language_model", "language_model.layers"])
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_lost_decoder_hooks_are_inert_pruning(family: str, part: str, method: str) -> None:
    model, inputs = build(family), batch(family)
    patch = vtprune.patch(model, method, **options_of(method, family))
    if sum(clear_hooks(module) for module in model.model.get_submodule(part).modules()):
        with pytest.raises(vtprune.InertPruningError):
            model(**inputs)
    else:
        assert_logits(judge(family), inputs, model(**inputs).logits, patch.report())


LOSABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("random", {"where": "vit", "layer": 1}),
    "vtc-cls": ("vtc-cls", {}),
    "encoder": ("stride", {"where": "encoder"}),
    "projector": ("stride", {}),
    "fastv": ("fastv", {}),
}


@pytest.mark.parametrize("case", LOSABLE)
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_no_lost_hook_passes_silently(family: str, case: str) -> None:
    """Whichever module loses its hooks: the next call is right, or an error."""
    inputs = batch(family)
    model = build(family)
    model(**inputs)
    method, options = LOSABLE[case]
    options = {**options_of(method, family), **options}

    def hooked() -> dict[str, Any]:
        return {k: v for k, v in snapshot(model).items() if "_forward" in k and "hooks" in k}

    before = hooked()
    with patched(model, method, **options):
        names = {key.split(":")[0] for key, hooks in hooked().items() if hooks != before[key]}
    assert len(names) >= 2
    for name in names:
        model = build(family)
        patch = vtprune.patch(model, method, **options)
        assert clear_hooks(model.get_submodule(name))
        try:
            logits = model(**inputs).logits
        except (vtprune.VTPruneError, RuntimeError, ValueError, LookupError):
            continue
        assert patch.report().engaged, f"silently unpruned without the hooks of {name}"
        assert_logits(judge(family), inputs, logits, patch.report())


# ------------------------------------------------------------------------------------ 11: physical


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_tokens_are_gone_from_the_cache(method: str, family: str, attention: str) -> None:
    model = subject(family, attention)
    with patched(model, method, **options_of(method, family)) as patch:
        for kind in ("one", "two", "ragged"):
            inputs = batch(family, kind)
            layers = model(**inputs, use_cache=True).past_key_values.layers
            report = patch.report()
            assert len(layers) == len(report.layers) == 4
            lengths = [layer.keys.shape[-2] for layer in layers]
            assert lengths == [max(entry.tokens) for entry in report.layers]
            nbytes = [layer.keys.nbytes + layer.values.nbytes for layer in layers]
            assert [entry.kv_bytes for entry in report.layers] == nbytes
            assert report.kv_bytes == sum(nbytes)
            for number, entry in enumerate(report.layers):
                for sample in range(len(inputs["input_ids"])):
                    visual = 0
                    for image in (i for i in report.images if i.sample == sample):
                        passed = [
                            k
                            for site, k in image.kept.items()
                            if not site.startswith("decoder") or int(site[8:-1]) <= number
                        ]
                        visual += len(passed[-1]) if passed else image.layout.n_tokens
                    is_visual = inputs["input_ids"][sample]
                    text = int(inputs["attention_mask"][sample].sum())
                    text -= int(((is_visual == IMAGE_TOKEN) | (is_visual == VIDEO_TOKEN)).sum())
                    assert entry.visual_tokens[sample] == visual
                    assert entry.tokens[sample] == visual + text
            if method != "keep-all":
                assert lengths[-1] < inputs["attention_mask"].sum(1).max()


# ------------------------------------------------------------------------------------ 12: arithmetic


@functools.cache
def bigger_llava() -> Any:
    """Hidden 128, 8 layers, 144 tokens, eager attention (all products are visible to the counter)."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    heads = {"hidden_size": 128, "num_attention_heads": 4}
    vision = CLIPVisionConfig(
        **heads, intermediate_size=256, num_hidden_layers=3, image_size=96, patch_size=8
    )
    text = LlamaConfig(
        **heads,
        intermediate_size=344,
        num_hidden_layers=8,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=144,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("keep", [72, 16])
@pytest.mark.parametrize("where", ["projector", "decoder", "fastv"])
@torch.no_grad()
def test_floating_point_operations_fall_by_the_analytic_count(where: str, keep: int) -> None:
    model = bigger_llava()
    inputs = llava_inputs([[1, 10, 11, "image", 12, 13, 14]], n_tokens=144, size=96)
    n, removed = inputs["input_ids"].shape[1], 144 - keep

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        return counter.get_total_flops()

    stock = count()
    with patched(
        model,
        *(("fastv",) if where == "fastv" else ("stride",)),
        keep=keep,
        **(SITES[where] if where != "fastv" else {}),
    ):
        pruned = count()
    d, kv, inner = 128, 64, 344
    per_token = 2 * (d * d + 2 * d * kv + d * d + 3 * d * inner)
    products = 2 * 2 * d * (n**2 - (n - removed) ** 2)  # query x key and weights x value, all heads
    depth = 8 if where == "projector" else 6
    saved = depth * (removed * per_token + products)
    assert abs(stock - pruned - saved) < 0.02 * min(saved, pruned)


# ------------------------------------------------------------------------------------ 13: composition


def compositions(family: str) -> dict[str, list[vtprune.Method]]:
    """Methods that work one after the other."""
    scorer: dict[str, Any] = {} if family == "clip" else {"scorer": "received"}
    make = registry.create
    return {
        "vtc-cls, fastv": [make("vtc-cls", keep=10, **scorer), make("fastv", keep=4, layer=2)],
        "vit, fastv": [make("random", where="vit", layer=2, keep=9), make("fastv", keep=4, layer=2)],
        "two in the decoder": [
            make("random", where="decoder", layer=1, keep=9),
            make("fastv", keep=4, layer=3),
        ],
        "all": [
            make("random", where="vit", layer=1, keep=14),
            make("stride", where="encoder", keep=12),
            make("divprune", keep=10),
            make("random", where="decoder", layer=1, keep=8),
            make("fastv", keep=6, layer=2),
            make("stride", where="decoder", layer=3, keep=4),
        ],
    }


@pytest.mark.parametrize(("family", "attention"), PAIRS)
@pytest.mark.parametrize("case", compositions("clip"))
@torch.no_grad()
def test_compositions(case: str, family: str, attention: str) -> None:
    model, reference = subject(family, attention), judge(family, attention)
    inputs = batch(family)
    chain = compositions(family)[case]
    with patched(model, chain) as patch:
        logits = model(**inputs).logits
        report = patch.report()
        assert len(report.positions) == len(chain)
        if case == "all":
            assert list(report.images[0].kept) == [
                "vit[1]",
                "encoder",
                "projector",
                "decoder[1]",
                "decoder[2]",
                "decoder[3]",
            ]
        assert_logits(reference, inputs, logits, report)
        text = greedy(model, inputs, 6)
        for sample, row in enumerate(reference.split(inputs)):
            assert text[sample].tolist() == reference.greedy(row, 6, **how(row, report, sample))
    with patched(model, vtprune.compose(*chain)) as patch:
        assert torch.equal(model(**inputs).logits, logits)
    assert all(len(list(i.kept.values())[-1]) == 4 for i in report.images)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["clip", "qwen"])
@torch.no_grad()
def test_fastv_reads_the_attention_of_the_pruned_sequence(family: str, attention: str) -> None:
    """Behind other stages, of both position policies, the decision is that of an eager run of what is left."""
    make, reference = registry.create, judge(family, "eager")
    model, inputs = subject(family, attention), batch(family)
    policies = ["original"] if family == "qwen" else ["original", "dense"]
    for policy in policies:
        for first, layer in (
            (make("stride", keep=10, positions=policy), 2),
            (make("stride", where="vit", layer=1, keep=10, positions=policy), 1),
            (make("stride", where="decoder", layer=1, keep=10, positions=policy), 2),
            (make("stride", where="decoder", layer=2, keep=10, positions=policy), 3),
        ):
            with patched(model, [first, make("fastv", keep=4, layer=layer)]) as patch:
                model(**inputs)
                report = patch.report()
            for sample, row in enumerate(reference.split(inputs)):
                told = how(row, report, sample)
                if not told["kept"]:
                    continue
                before = [
                    {s: k for s, k in kept.items() if s != f"decoder[{layer}]"} for kept in told["kept"]
                ]
                scores = ref.text_attention(reference, row, layer - 1, **{**told, "kept": before})
                late = next(iter(before[0])).startswith("decoder")
                frames = reference.frames(row)
                alive = [list(kept.values())[-1].tolist() for kept in before]
                gone = {
                    f.columns[i]
                    for f, a in zip(frames, alive, strict=True)
                    for i in range(f.n)
                    if i not in a and not late
                }
                columns = [c for c in range(row["input_ids"].shape[1]) if c not in gone]
                assert len(columns) == len(scores)
                for frame, index, kept in zip(frames, alive, told["kept"], strict=True):
                    picked = ref.best(scores[[columns.index(frame.columns[i]) for i in index]], 4)
                    assert kept[f"decoder[{layer}]"].tolist() == [index[i] for i in picked]


@torch.no_grad()
def test_votes_of_a_tower_that_drops_tokens() -> None:
    """vtc-cls behind pruning inside the ViT: survivors are scored in all layers, others not at all."""
    make, reference, inputs = registry.create, judge("clip"), batch("clip")
    chain = [make("stride", where="vit", layer=1, keep=9), make("vtc-cls", first_layer=0, keep=4)]
    with patched(subject("clip"), chain) as patch:
        subject("clip")(**inputs)
        report = patch.report()
    for sample, row in enumerate(reference.split(inputs)):
        for frame, kept in zip(reference.frames(row), kept_of(report, sample), strict=True):
            drops = {1: kept["vit[1]"].tolist()}
            scores = ref.clip_votes(reference, frame, drops, range(3))
            assert kept["encoder"].tolist() == ref.best(scores, 4)


@torch.no_grad()
def test_composition_of_dense_and_original_stages() -> None:
    """Every stage shifts positions by its own policy, in its own layers."""
    make = registry.create
    model, inputs = subject("clip"), batch("clip")
    for first, second in (("dense", "original"), ("original", "dense"), ("dense", "dense")):
        chain = [
            make("stride", where="projector", keep=10, positions=first),
            make("stride", where="decoder", layer=2, keep=4, positions=second),
        ]
        with patched(model, chain) as patch:
            logits = model(**inputs).logits
            assert_logits(judge("clip"), inputs, logits, patch.report())
            text = greedy(model, inputs, 5)
            for sample, row in enumerate(judge("clip").split(inputs)):
                told = how(row, patch.report(), sample)
                assert text[sample].tolist() == judge("clip").greedy(row, 5, **told)


# ------------------------------------------------------------------------------------ 14: anything goes

prompt = st.lists(st.one_of(st.just("image"), st.integers(10, 60)), min_size=1, max_size=6)


@pytest.mark.parametrize("where", SITES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    prompts=st.lists(prompt, min_size=1, max_size=3),
    keep=st.one_of(st.integers(1, 15), st.floats(0.05, 0.95)),
    padding=st.sampled_from(["left", "right"]),
    positions=st.sampled_from(["original", "dense"]),
)
@torch.no_grad()
def test_any_prompt(where: str, prompts: list[list[Any]], keep: float, padding: str, positions: str) -> None:
    model, reference = subject("clip"), judge("clip")
    inputs = llava_inputs([[1, *p, 7] for p in prompts], padding=padding)
    with patched(model, "random", keep=keep, positions=positions, **SITES[where]) as patch:
        logits = model(**inputs).logits
        report = patch.report()
        assert_logits(reference, inputs, logits, report)
        if padding == "left":
            text = greedy(model, inputs, 2)
            for sample, row in enumerate(reference.split(inputs)):
                assert text[sample].tolist() == reference.greedy(row, 2, **how(row, report, sample))
