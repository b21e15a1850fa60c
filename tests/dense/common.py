"""What the tests of the older judge share: tiny models, prompts, methods that do as told, and how a report becomes the judge's input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import dense_reference as ref
import pytest
import torch
from torch import Tensor, nn

import vtprune
from vtprune import methods as registry
from vtprune.testing import IMAGE_TOKEN, VIDEO_TOKEN, llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl

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
