"""Threads: calls of patched models that run at once do not meet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from contract.common import FAMILIES, options_of
from judge import QWEN
from torch import Tensor

import vtprune
from vtprune.testing.zoo import LVLMS, Image, Video

THREADS = 8
ROUNDS = 3
METHODS = [("fastv", "divprune"), ("vtc-cls", "fastv"), ("random", "visionzip"), ("stride", "fastv")]
# Every family is in one pair.
PAIRS = [(f, FAMILIES[-1 - i], *METHODS[i % len(METHODS)]) for i, f in enumerate(FAMILIES[:-8])]


def in_threads(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of jobs that start together; raises what they raise."""
    results: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        start.wait()
        try:
            results[i] = jobs[i]()
        except BaseException as error:  # noqa: BLE001 - raised again below
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def prompts(family: str, number: int) -> dict[str, Tensor]:
    """Inputs that differ between threads in rows, pictures and lengths."""
    rows: list[list[Any]] = [[20 + number, Image(number, number % 3), 30, 31], [21, 40 + number]]
    if number % 2:
        rows.append([25, Image(number + 9), 26, Image(number + 20, 1)])
    if LVLMS[family].has_video and number % 4 == 3:
        rows.append([20, Video(number), 27])
    return LVLMS[family].batch(rows if number != 4 else rows[1:])


def once(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Forward, greedy, and decoding with a returned cache."""
    # Grad mode belongs to the thread.
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        found = [out.logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)]
        # Stock Qwen keeps the offset of its positions on the model, where threads overwrite it.
        if len(inputs["input_ids"]) == 1 and model.config.model_type not in QWEN:
            found.append(model(input_ids=torch.tensor([[21]]), past_key_values=out.past_key_values).logits)
    return found


def hammer(models: Sequence[tuple[str, Any]], patches: Sequence[vtprune.Patch]) -> None:
    """Thread i works on model i modulo their number; all results are those of one thread."""
    plan = [(*models[i % len(models)], prompts(models[i % len(models)][0], i)) for i in range(THREADS)]
    expected = [once(model, inputs) for _, model, inputs in plan]
    reports = []
    for i, (_, model, inputs) in enumerate(plan):
        once(model, inputs)
        reports.append(kept_of(patches[i % len(models)].report()))
    assert len({str(r) for r in reports}) > 3

    def job(i: int) -> list[list[Tensor]]:
        seen = []
        for _ in range(ROUNDS):
            seen.append(once(*plan[i][1:]))
            # A report is of some complete call of this model, never a mixture.
            assert kept_of(patches[i % len(models)].report()) in reports[i % len(models) :: len(models)]
        return seen

    for found, wanted in zip(in_threads([lambda i=i: job(i) for i in range(THREADS)]), expected, strict=True):
        for results in found:
            for a, b in zip(results, wanted, strict=True):
                assert torch.equal(a, b)


def kept_of(report: vtprune.Report) -> list[Any]:
    return [(i.sample, i.layout, {s: k.tolist() for s, k in i.kept.items()}) for i in report.images]


@pytest.mark.parametrize(("family", "other", "method", "other_method"), PAIRS, ids=lambda v: str(v))
def test_two_models_in_threads(family: str, other: str, method: str, other_method: str) -> None:
    models = [(family, LVLMS[family].build()), (other, LVLMS[other].build())]
    with (
        vtprune.patch(models[0][1], method, **options_of(family, method, 2)) as first,
        vtprune.patch(models[1][1], other_method, **options_of(other, other_method, 2)) as second,
    ):
        hammer(models, [first, second])


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llava", "visionzip"),
        ("llava_next", "vtc-cls"),
        ("qwen3_vl", "fastv"),
        ("gemma3", "divprune"),
        ("smolvlm", "random"),
    ],
)
def test_one_model_in_threads(family: str, method: str) -> None:
    model = LVLMS[family].build()
    with vtprune.patch(model, method, **options_of(family, method, 2)) as patch:
        hammer([(family, model)], [patch])


@pytest.mark.parametrize(("family", "method"), [("qwen2_5_vl", "fastv"), ("llava_onevision", "divprune")])
def test_a_failing_thread_does_not_disturb_others(family: str, method: str) -> None:
    model = LVLMS[family].build()
    inputs = prompts(family, 1)
    n = inputs["input_ids"].shape[1]
    refused = {**inputs, "attention_mask": torch.ones(len(inputs["input_ids"]), 1, n, n).tril().bool()}
    with vtprune.patch(model, method, **options_of(family, method, 2)):
        expected = once(model, inputs)

        def good() -> None:
            for _ in range(2 * ROUNDS):
                assert all(torch.equal(a, b) for a, b in zip(once(model, inputs), expected, strict=True))

        def bad() -> None:
            for _ in range(2 * ROUNDS):
                with torch.no_grad(), pytest.raises(vtprune.UnsupportedCallError):
                    model(**refused)

        in_threads([good, bad] * (THREADS // 2))


def test_patching_in_threads() -> None:
    """Many models are patched and released at once; one model is patched by one thread only."""
    models = [LVLMS[FAMILIES[i]].build() for i in range(4)]
    shared = LVLMS["llava"].build()
    won: list[vtprune.Patch] = []

    def job(i: int) -> None:
        for _ in range(ROUNDS):
            if i % 2:
                with vtprune.patch(models[i // 2], "stride", keep=2) as patch:
                    assert patch.active
        try:
            won.append(vtprune.patch(shared, "fastv", keep=0.5))
        except vtprune.AlreadyPatchedError:
            return

    in_threads([lambda i=i: job(i) for i in range(THREADS)])
    assert len(won) == 1
    assert won[0].active
    won[0].remove()
