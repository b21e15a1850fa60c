"""Features and pooled outputs of every encoder, alone, in chains and in batches, are those of a shorter sequence."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import dense_reference as ref
import pytest
import torch
from encoders.common import (
    ENCODER,
    HF,
    KEEP,
    NAMES,
    NO_CLS,
    TIMM,
    build,
    close,
    ids,
    outputs,
    patched,
    pictures,
    subject,
)
from encoders.stock import stock
from torch import Tensor

import vtprune
from vtprune.methods import REGISTRY

# ------------------------------------------------------------------------------------ the judge judges itself


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_judge_without_pruning_is_the_stock_model(name: str) -> None:
    judge, images = stock(name), pictures(name)
    features, pooled = outputs(judge.model, images)
    for i, image in enumerate(images):
        by_hand = judge.run(image)
        close(by_hand[0], features[i], 1e-5)
        close(by_hand[1], pooled[i], 1e-5)


# ------------------------------------------------------------------------------------ features


CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("random", {"where": "vit", "layer": 0}),
    ("random", {"where": "vit", "layer": 1}),
    ("random", {"where": "vit", "layer": 3}),
    ("random", {"where": "encoder"}),
    ("stride", {"where": "vit", "layer": 1}),
    ("stride", {}),
    ("divprune", {}),
    ("keep-all", {}),
    ("vtc-cls", {}),
    ("vtc-cls", {"first_layer": -1}),
    ("vtc-cls", {"scorer": "received"}),
    ("visionzip", {"contextual": 0.4}),
    ("visionzip", {"contextual": 0.4, "scorer": "received"}),
)


def applies(name: str, method: str, options: dict[str, Any]) -> bool:
    return name not in NO_CLS or method not in ("vtc-cls", "visionzip") or "scorer" in options


PAIRS = [(n, m, o) for n in NAMES for m, o in CASES if applies(n, m, o)]


def test_every_method_is_tried() -> None:
    """Methods without a literal plan here are tried by tests/contract/test_encoder_methods.py."""
    assert {m for m, _ in CASES} <= set(REGISTRY)


@pytest.mark.parametrize(("name", "method", "options"), PAIRS, ids=ids)
@torch.no_grad()
def test_keeping_everything_is_dense(name: str, method: str, options: dict[str, Any]) -> None:
    model, images = subject(name), pictures(name)
    dense = outputs(model, images)
    with patched(model, method, **({} if method == "keep-all" else {"keep": 1.0}), **options) as patch:
        found = outputs(model, images)
        assert not patch.report().engaged
    for a, b in zip(found, dense, strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize(("name", "method", "options"), PAIRS, ids=ids)
@torch.no_grad()
def test_features_are_those_of_a_shorter_sequence(name: str, method: str, options: dict[str, Any]) -> None:
    model, judge, images = subject(name), stock(name), pictures(name)
    n = outputs(model, images)[0].shape[1] - judge.prefix
    keep = n if method == "keep-all" else KEEP
    with patched(model, method, **({} if method == "keep-all" else {"keep": keep}), **options) as patch:
        features, pooled = outputs(model, images)
        report = patch.report()
    assert features.shape[1] == judge.prefix + keep
    scorer = options.get("scorer", "cls")
    for i, image in enumerate(images):
        ((site, tensor),) = report.images[i].kept.items()
        kept, merge = tensor.tolist(), None
        assert len(kept) == keep
        assert report.images[i].tokens_in == n
        at = int(site[4:-1]) if site.startswith("vit") else 4

        def decision(kept: list[int] = kept) -> list[int]:
            if method == "vtc-cls":
                first = options.get("first_layer", 2) % 4
                votes = [judge.signals[layer][scorer].mean(0) for layer in range(first, 4)]
                assert ref.best(sum(votes), keep) == kept
            if method == "stride":
                assert ref.stride_decision(n, keep) == kept
            return kept

        if method == "visionzip":

            def merge(tokens: Tensor, kept: list[int] = kept) -> Tensor:
                last = judge.signals[-1]
                plan = ref.visionzip_from(last[scorer], last["keys"], keep, options["contextual"])
                assert sorted(plan) == kept
                merged: Tensor = ref.merge_by_plan(tokens, plan)
                return merged

        expected = judge.run(image, {at: decision}, merge)
        close(features[i], expected[0])
        close(pooled[i], expected[1])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_chain_measures_the_survivors(name: str) -> None:
    """Two removals between layers and one behind them, from attention on the shortened sequence."""
    model, judge, images = subject(name), stock(name), pictures(name)
    scorer = "received" if name in NO_CLS else "cls"
    chain = [
        vtprune.methods.create("random", keep=14, where="vit", layer=0),
        vtprune.methods.create("stride", keep=11, where="vit", layer=2),
        vtprune.methods.create("visionzip", keep=KEEP, contextual=0.4, scorer=scorer),
    ]
    with patched(model, chain) as patch:
        features, pooled = outputs(model, images)
        report = patch.report()
    for i, image in enumerate(images):
        first, second, third = (k.tolist() for k in report.images[i].kept.values())

        def merge(tokens: Tensor, second: list[int] = second, third: list[int] = third) -> Tensor:
            last = judge.signals[-1]
            plan = ref.visionzip_from(last[scorer], last["keys"], KEEP, 0.4)
            assert sorted(second[i] for i in plan) == third
            merged: Tensor = ref.merge_by_plan(tokens, plan)
            return merged

        drops = {at: lambda kept=kept: kept for at, kept in ((0, first), (2, second), (4, third))}
        expected = judge.run(image, drops, merge)
        close(features[i], expected[0])
        close(pooled[i], expected[1])


# ------------------------------------------------------------------------------------ batches


@dataclass(frozen=True, kw_only=True)
class Adaptive(vtprune.Method):
    """Keeps tokens whose norm is above the picture's mean: the count depends on the picture."""

    key: ClassVar[str] = "test-adaptive"
    keep: int | float = 1.0
    where: vtprune.Site = ENCODER

    def stages(self, facts: vtprune.ModelFacts) -> list[vtprune.Stage]:
        return [vtprune.Stage(self.where, None, self.decide)]

    def decide(self, view: vtprune.View) -> vtprune.Selection:
        size = view.features.norm(dim=-1)
        return vtprune.Selection.where(size >= size.mean(-1, keepdim=True))


def refuses_ragged(name: str, site: vtprune.Site) -> bool:
    """Whether something would average padding, or no mask can hide it."""
    model = subject(name)
    layer = stock(name).layers[0]
    masks = {"attention_mask", "attn_mask"} & set(inspect.signature(type(layer).forward).parameters)
    pools = hasattr(model, "head") if name in HF else model.global_pool in ("avg", "map")
    return pools or (site.kind == "vit" and not masks)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("site", [ENCODER, vtprune.Site("vit", 0), vtprune.Site("vit", 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_different_counts_in_a_batch(name: str, site: vtprune.Site, attention: str) -> None:
    images, judge = pictures(name, 6, seed=3), stock(name)
    model = subject(name, attention) if name in HF else build(name)
    if name in TIMM and attention == "eager":
        for block in model.blocks:
            block.attn.fused_attn = False
    with patched(model, Adaptive(where=site)) as patch:
        alone = []
        for image in images:
            features, pooled = outputs(model, image[None])
            (kept,) = patch.report().images[0].kept.values()
            at = 4 if site.layer is None else site.layer
            close(features[0], judge.run(image, {at: kept.tolist})[0])
            alone.append((features[0], pooled[0]))
        lengths = {len(f) for f, _ in alone}
        assert len(lengths) > 1
        if refuses_ragged(name, site):
            with pytest.raises(vtprune.UnsupportedCallError, match="different numbers"):
                model(images)
            return
        features, pooled = outputs(model, images)
    assert features.shape[1] == max(lengths)
    for i, (one, head) in enumerate(alone):
        close(features[i, : len(one)], one)
        close(pooled[i], head)


@pytest.mark.parametrize("where", [{"where": "encoder"}, {"where": "vit", "layer": 1}], ids=ids)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_batch_is_its_pictures(name: str, where: dict[str, Any]) -> None:
    model, images = subject(name), pictures(name)
    with patched(model, "random", keep=KEEP, **where) as patch:
        together = outputs(model, images)
        kept = [next(iter(i.kept.values())).tolist() for i in patch.report().images]
        assert kept[0] != kept[1]
        for i, image in enumerate(images):
            alone = outputs(model, image[None])
            assert next(iter(patch.report().images[0].kept.values())).tolist() == kept[i]
            for a, b in zip(alone, together, strict=True):
                close(a[0], b[i])
