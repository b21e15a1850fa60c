"""Undo is exact, also behind exceptions, and patched models do not meet, in threads either."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from dense.common import (
    ALL_SITES,
    EVERY_PAIR,
    FAMILIES,
    METHODS,
    SITES,
    TOLERANCE,
    Scripted,
    assert_logits,
    batch,
    boom,
    build,
    first_k,
    greedy,
    judge,
    options_of,
    patched,
    snapshot,
)
from torch import Tensor

import vtprune

# ------------------------------------------------------------------------------------ undo


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


# ------------------------------------------------------------------------------------ isolation


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
