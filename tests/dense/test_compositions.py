"""Methods one after the other, at all sites and with either position policy, equal the dense reference."""

from __future__ import annotations

from typing import Any

import dense_reference as ref
import pytest
import torch
from dense.common import PAIRS, assert_logits, batch, greedy, how, judge, kept_of, patched, subject

import vtprune
from vtprune import methods as registry


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
