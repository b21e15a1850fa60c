"""Training under a patch: loss and gradients are those of the shortened sequence."""

from __future__ import annotations

import functools
from typing import Any

import judge as judge_module
import pytest
import torch
from contract.common import KEY_CELLS, batch_of, options_of, rows_of
from judge import Judge
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from versions import HOOKS_INSIDE_CHECKPOINTS

import vtprune
from vtprune.testing.zoo import LVLMS
from vtprune.testing.zoo_base import FIRST_TEXT

IGNORED = -100


class _TorchWithGradients:
    """What the judge sees as torch: its `no_grad` does nothing."""

    no_grad = staticmethod(torch.enable_grad)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@functools.cache
def pair(family: str) -> tuple[Any, Judge]:
    """A model in training mode and a judge of it in training mode too; neither has dropout."""
    model = LVLMS[family].build().train()
    judge = Judge(model)
    judge.model.train()
    for module in model.modules():
        assert not isinstance(module, nn.Dropout) or module.p == 0
    return model, judge


def training_rows(family: str) -> list[dict[str, Tensor]]:
    """Every row alone, with labels: text that follows some text, and no placeholder."""
    return [with_labels(family, LVLMS[family].batch([row])) for row in rows_of(family).values()]


def with_labels(family: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids < FIRST_TEXT, IGNORED)
    if family == "paligemma":
        # Its labels belong to a suffix that is causal.
        inputs["token_type_ids"] = torch.zeros_like(ids)
        inputs["token_type_ids"][:, -3:] = 1
        labels[:, :-3] = IGNORED
    # The first token of a row has nothing before it, padding counts not.
    labels[torch.arange(len(labels)), inputs["attention_mask"].argmax(1)] = IGNORED
    return {**inputs, "labels": labels}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """All of them; a parameter without gradient counts as zero."""
    assert len(wanted) > 20
    for name in {*found, *wanted}:
        if name not in wanted:
            assert not found[name].any(), name
        elif name not in found:
            assert not wanted[name].any(), name
        else:
            worst = (found[name] - wanted[name]).abs().max()
            assert worst <= 1e-4 * (1 + wanted[name].abs().max()), f"{name}: {worst}"


def removed_of(
    judge: Judge, report: vtprune.Report, sample: int, row: dict[str, Tensor]
) -> dict[int, set[int]]:
    """Decoder layer -> prompt columns that vanish there."""
    units = judge.prompt({k: v for k, v in row.items() if k != "labels"}).units
    images = [i for i in report.images if i.sample == sample]
    removed: dict[int, set[int]] = {}
    for unit, image in zip(units, images, strict=True):
        alive = set(range(len(unit.columns)))
        for site, kept in image.kept.items():
            layer = int(site[8:-1]) if site.startswith("decoder") else 0
            gone = alive - set(kept.tolist())
            removed.setdefault(layer, set()).update(unit.columns[i] for i in gone)
            alive &= set(kept.tolist())
    return removed


def judged_terms(
    judge: Judge, row: dict[str, Tensor], removed: dict[int, set[int]], report: vtprune.Report
) -> tuple[Tensor, Tensor]:
    """Logits with gradients and targets of all labelled columns of a row."""
    dense = "dense" in report.positions.values()
    logits = Judge.shown(judge.logits(row, removed, positions="dense" if dense else "original"))
    labels = row["labels"][0, 1:]
    return logits[:-1][labels != IGNORED], labels[labels != IGNORED]


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
def test_loss_and_gradients_of_the_shortened_sequence(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch of all rows, padded on the left, against every row alone."""
    options = options_of(family, method)
    model, judge = pair(family)
    inputs = with_labels(family, batch_of(family))
    stock = model(**inputs).loss.detach()
    rows = training_rows(family)
    with vtprune.patch(model, method, **options) as patch:
        loss = model(**inputs).loss
        loss.backward()
        report = patch.report()
    found = gradients(model)
    removed = [removed_of(judge, report, i, row) for i, row in enumerate(rows)]
    assert any(r for plan in removed for r in plan.values())
    monkeypatch.setattr(judge_module, "torch", _TorchWithGradients())
    terms = [judged_terms(judge, row, gone, report) for row, gone in zip(rows, removed, strict=True)]
    expected = cross_entropy(torch.cat([t[0] for t in terms]), torch.cat([t[1] for t in terms]))
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    assert (loss - stock).abs() > 1e-3, "this test could not fail"
    assert_gradients(found, gradients(judge.model))


def accepted(model: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether a call with checkpoints is not refused; older transformers make some impossible."""
    try:
        model(**inputs)
    except vtprune.UnsupportedCallError:
        return False
    return True


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
def test_gradient_checkpointing(family: str, method: str) -> None:
    options = options_of(family, method)
    # A new model, since transformers leaves a hook on the embeddings when checkpointing ends.
    model = LVLMS[family].build().train()
    inputs = with_labels(family, batch_of(family))
    with vtprune.patch(model, method, **options) as patch:
        plain = model(**inputs).loss
        plain.backward()
        kept = patch.report().to_dict()["images"]
        wanted = gradients(model)
        for reentrant in (False, True):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            try:
                assert model.is_gradient_checkpointing
                if HOOKS_INSIDE_CHECKPOINTS and not accepted(model, inputs):
                    continue
                for _ in range(2):
                    loss = model(**inputs).loss
                    loss.backward()
                    assert patch.report().to_dict()["images"] == kept
                    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=0)
                    found = gradients(model)
                    if reentrant:
                        # Reentrant checkpoints give no gradients below inputs that need none: stock behaviour.
                        found = {**{n: g for n, g in wanted.items() if n not in found}, **found}
                    assert_gradients(found, wanted)
            finally:
                model.gradient_checkpointing_disable()


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
def test_frozen_parameters_stay_without_gradients(family: str, method: str) -> None:
    """The usual recipe: only the projector learns. Its gradient is that of full training."""
    options = options_of(family, method)
    model, _ = pair(family)
    inputs = with_labels(family, batch_of(family))
    # Found by name: what stands neither in the language model nor in the tower proper.
    learning = {
        n
        for n, _ in model.named_parameters()
        if any(part in n for part in ("projector", "merger", "connector")) and "deepstack" not in n
    }
    assert learning
    with vtprune.patch(model, method, **options):
        model(**inputs).loss.backward()
        wanted = gradients(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learning)
        try:
            model(**inputs).loss.backward()
            found = gradients(model)
        finally:
            model.requires_grad_(True)
    assert set(found) == learning & set(wanted)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
def test_everything_frozen_gives_no_graph(family: str, method: str) -> None:
    options = options_of(family, method)
    model, _ = pair(family)
    inputs = with_labels(family, batch_of(family))
    with vtprune.patch(model, method, **options):
        loss = model(**inputs).loss
        assert loss.requires_grad
        model.requires_grad_(False)
        try:
            frozen = model(**inputs).loss
        finally:
            model.requires_grad_(True)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, loss.detach(), atol=1e-5, rtol=0)
