"""Patching and undoing: nothing is left behind, whatever happened in between, and no lost hook passes silently."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.common import (
    CELLS,
    FAMILIES,
    KEY_CELLS,
    METHODS,
    batch_of,
    cells,
    greedy,
    judge_of,
    options_of,
    patched,
    rows_of,
    subject,
)
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import vtprune
from vtprune import methods
from vtprune.testing.zoo import LVLMS

TOWERS = ("vision_tower", "video_tower", "image_tower", "visual", "vision_model")


def one_cell_each() -> Iterator[Any]:
    """Every family once, with the methods in turn."""
    for i, family in enumerate(FAMILIES):
        working = [m for m in METHODS if cells(family)[m].works and not cells(family)[m].training]
        yield pytest.param(family, working[i % len(working)], id=f"{family}-{working[i % len(working)]}")


ONE_EACH = list(one_cell_each())


class BoomError(Exception):
    """Raised by these tests only."""


def fresh(family: str) -> Any:
    return LVLMS[family].build()


def decoder_of(model: Any) -> Any:
    return model.model.get_submodule(
        "language_model" if hasattr(model.model, "language_model") else "text_model"
    )


def towers_of(model: Any) -> list[Any]:
    return [getattr(model.model, name) for name in TOWERS if hasattr(model.model, name)]


def layers_of(tower: nn.Module) -> nn.ModuleList:
    """The longest list of layers in a tower."""
    return max((m for m in tower.modules() if isinstance(m, nn.ModuleList)), key=len)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything beside tensors that a patch could leave behind, on modules, configs, classes and torch itself."""
    state: dict[str, Any] = {}
    owners: dict[str, Any] = dict(model.named_modules())
    # Layers share configs.
    configs = {id(m.config): m.config for m in owners.values() if hasattr(m, "config")}
    owners.update({f"config {i}": config for i, config in enumerate(configs.values())})
    for cls in {type(owner) for owner in owners.values()}:
        state[f"class {cls.__qualname__}"] = dict(vars(cls))
    for name, owner in {**owners, "generation": model.generation_config}.items():
        # generate() keeps the last cache length itself.
        found = {k: v for k, v in vars(owner).items() if k != "_previous_max_cache_length"}
        state[f"{name}: attributes"] = sorted(found)
        state[f"{name}: class"] = type(owner)
        for key, value in found.items():
            if "hooks" in key and hasattr(value, "items"):
                state[f"{name}: {key}"] = dict(value)
            elif isinstance(value, (bool, int, float, str, type(None))) or callable(value):
                state[f"{name}: {key}"] = value
    for key, value in vars(torch_module).items():
        if key.startswith("_global") and hasattr(value, "items"):
            state[f"torch: {key}"] = dict(value)
    return state


def hook_count(model: nn.Module) -> int:
    return sum(
        len(value)
        for module in model.modules()
        for key, value in vars(module).items()
        if "hooks" in key and hasattr(value, "items")
    )


def assert_same_tensors(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def sabotaged(family: str, method: str, **more: Any) -> tuple[vtprune.Method, list[int]]:
    """The method, and a counter: while it is above zero, every decision takes one off and fails at zero."""
    cls = methods.REGISTRY[method]
    bomb = [0]

    def decide(self: Any, view: vtprune.View) -> vtprune.Selection:
        if bomb[0]:
            bomb[0] -= 1
            if not bomb[0]:
                raise BoomError
        return cls.decide(self, view)

    saboteur = type(f"Sabotaged{cls.__name__}", (cls,), {"decide": decide})
    return saboteur(**options_of(family, method, **more)), bomb


@contextmanager
def failing(module: nn.Module, call: int = 1) -> Iterator[None]:
    """A module that fails in its n-th call."""
    calls = [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise BoomError

    handle = module.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def forward(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


@dataclass(frozen=True)
class Answers:
    """Of a stock model and of the same model under a patch: logits, three new tokens, what was kept."""

    stock: Tensor
    stock_text: Tensor
    logits: Tensor
    text: Tensor
    kept: list[dict[str, Any]]


@functools.cache
def answers(family: str, method: str) -> Answers:
    model, inputs = subject(family), batch_of(family)
    stock, stock_text = forward(model, inputs), greedy(model, inputs, 3)
    with patched(family, method) as patch:
        logits, kept = forward(model, inputs), patch.report().to_dict()["images"]
        return Answers(stock, stock_text, logits, greedy(model, inputs, 3), kept)


@functools.cache
def spare(family: str) -> Any:
    """A second model, for tests that damage a patched one; they check that removal heals it."""
    model = fresh(family)
    forward(model, batch_of(family))
    return model


# ---------------------------------------------------------------------------------------------- undo


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_undo_is_exact(family: str, method: str) -> None:
    options = options_of(family, method)
    model, inputs, right = subject(family), batch_of(family), answers(family, method)
    before, tensors, hooks = snapshot(model), clone_state(model), hook_count(model)
    patch = vtprune.patch(model, method, **options)
    try:
        assert patch.active
        assert list(model.state_dict()) == list(tensors)
        assert snapshot(model) != before
        assert torch.equal(forward(model, inputs), right.logits)
        assert torch.equal(greedy(model, inputs, 3), right.text)
        if method != "keep-all":
            assert not torch.equal(right.logits, right.stock)
    finally:
        patch.remove()
    assert not patch.active
    patch.remove()  # harmless
    assert snapshot(model) == before
    assert hook_count(model) == hooks
    assert_same_tensors(model, tensors)
    assert torch.equal(forward(model, inputs), right.stock)
    assert torch.equal(greedy(model, inputs, 3), right.stock_text)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_patching_alone_changes_no_tensor_and_removing_needs_no_call(family: str, method: str) -> None:
    options = options_of(family, method)
    model = subject(family)
    before, tensors = snapshot(model), clone_state(model)
    with vtprune.patch(model, method, **options) as patch:
        assert_same_tensors(model, tensors)
        assert patch.active
    assert not patch.active
    assert snapshot(model) == before
    vtprune.patch(model, method, **options)
    vtprune.unpatch(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_exception_inside_a_decision(family: str, method: str) -> None:
    """In every decision of a call in turn; the patch works after it, and undo is exact at once."""
    saboteur, bomb = sabotaged(family, method)
    model, inputs, right = subject(family), batch_of(family), answers(family, method)
    before = snapshot(model)
    with vtprune.patch(model, saboteur) as patch:
        armed = snapshot(model)
        bomb[0] = 1000
        forward(model, inputs)
        decisions = 1000 - bomb[0]
        assert decisions >= 1
        for number in range(1, decisions + 1):
            bomb[0] = number
            with pytest.raises(BoomError):
                forward(model, inputs)
            assert bomb[0] == 0
        assert snapshot(model) == armed
        assert torch.equal(forward(model, inputs), right.logits)
        assert patch.report().to_dict()["images"] == right.kept
        bomb[0] = 1
        with pytest.raises(BoomError):
            greedy(model, inputs, 3)
        assert torch.equal(greedy(model, inputs, 3), right.text)
        # A failed call with pictures must not leak into one without.
        bomb[0] = 1
        with pytest.raises(BoomError):
            forward(model, inputs)
        forward(model, batch_of(family, "text"))
        assert patch.report().images == []
        bomb[0] = 1
        with pytest.raises(BoomError):
            forward(model, inputs)
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs), right.stock)


def sites_of(family: str) -> list[vtprune.Site]:
    with patched(family, "stride") as patch:
        kinds = patch.facts.sites
    every = [
        vtprune.Site("vit", 1),
        vtprune.Site("encoder"),
        vtprune.Site("projector"),
        vtprune.Site("decoder", 0),
        vtprune.Site("decoder", 2),
    ]
    return [s for s in every if s.kind in kinds]


@pytest.mark.parametrize(
    ("family", "method"), [pytest.param(f, "stride", id=f"{f}-stride") for f in FAMILIES]
)
def test_exception_inside_the_decision_of_every_site(family: str, method: str) -> None:
    model, inputs = subject(family), batch_of(family)
    stock, before = forward(model, inputs), snapshot(model)
    for site in sites_of(family):
        more: dict[str, Any] = {"where": site.kind}
        if site.layer is not None:
            more["layer"] = site.layer
        with patched(family, method, **more):
            expected = forward(model, inputs)
            text = greedy(model, inputs, 3)
        saboteur, bomb = sabotaged(family, method, **more)
        with vtprune.patch(model, saboteur):
            for call in (forward, greedy):
                bomb[0] = 1
                with pytest.raises(BoomError):
                    call(model, inputs)
                assert torch.equal(forward(model, inputs), expected), site
            assert torch.equal(greedy(model, inputs, 3), text), site
        assert snapshot(model) == before, site
        assert torch.equal(forward(model, inputs), stock), site


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
def test_exception_inside_the_model(family: str, method: str) -> None:
    """In a decoder layer, in a layer of the vision tower, in the head, and in the middle of generate()."""
    options = options_of(family, method)
    model, inputs, right = subject(family), batch_of(family), answers(family, method)
    before = snapshot(model)
    decoder = decoder_of(model).layers
    places: list[tuple[Callable[..., Tensor], nn.Module, int]] = [
        (forward, decoder[0], 1),
        (forward, decoder[1].self_attn, 1),
        (forward, model.lm_head, 1),
        (greedy, decoder[-1], 1),
        (greedy, decoder[1], 2),
        (greedy, model.lm_head, 2),
    ]
    for tower in towers_of(model):
        layers = layers_of(tower)
        places.append((forward, layers[len(layers) // 2], 1))
    with vtprune.patch(model, method, **options) as patch:
        armed = snapshot(model)
        for call, module, number in places:
            with failing(module, number), pytest.raises(BoomError):
                call(model, inputs)
            assert torch.equal(forward(model, inputs), right.logits)
        assert snapshot(model) == armed
        with failing(decoder[-1], 3), pytest.raises(BoomError):
            greedy(model, inputs, 3)
        assert torch.equal(greedy(model, inputs, 3), right.text)
        with failing(decoder[-1]), pytest.raises(BoomError):
            forward(model, inputs)
        forward(model, batch_of(family, "text"))
        assert patch.report().images == []
        with failing(decoder[2], 2), pytest.raises(BoomError):
            greedy(model, inputs, 3)
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs), right.stock)


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
def test_exception_leaves_the_with_block_unpatched(family: str, method: str) -> None:
    options = options_of(family, method)
    model, before = subject(family), snapshot(subject(family))
    with pytest.raises(BoomError), vtprune.patch(model, method, **options) as patch:
        raise BoomError
    assert not patch.active
    assert snapshot(model) == before


# ---------------------------------------------------------------------------------------------- double patches


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
def test_patching_twice_is_refused(family: str, method: str) -> None:
    options = options_of(family, method)
    model, inputs = subject(family), batch_of(family)
    before = snapshot(model)
    with pytest.raises(vtprune.VTPruneError):
        vtprune.unpatch(model)
    with vtprune.patch(model, method, **options) as patch:
        armed, expected = snapshot(model), forward(model, inputs)
        for again in (method, "stride"):
            with pytest.raises(vtprune.AlreadyPatchedError, match="unpatch"):
                vtprune.patch(model, again, **options_of(family, again))
        with pytest.raises(vtprune.AlreadyPatchedError):
            vtprune.patch(model.model, "stride", keep=2)
        for tower in towers_of(model):
            with pytest.raises(vtprune.VTPruneError):
                vtprune.patch(tower, "stride", keep=2)
        with pytest.raises(vtprune.VTPruneError):
            vtprune.patch(decoder_of(model), "stride", keep=2)
        assert snapshot(model) == armed
        assert patch.active
        assert torch.equal(forward(model, inputs), expected)
    assert snapshot(model) == before


@pytest.mark.parametrize(("family", "method"), ONE_EACH)
def test_a_model_around_a_patched_one_is_refused(family: str, method: str) -> None:
    options = options_of(family, method)
    model = subject(family)
    before = snapshot(model)
    with vtprune.patch(model.model, method, **options):
        with pytest.raises(vtprune.AlreadyPatchedError):
            vtprune.patch(model, method, **options)
        # The base prunes below the head too.
        patched_logits = forward(model, batch_of(family))
    with vtprune.patch(model, method, **options):
        torch.testing.assert_close(forward(model, batch_of(family)), patched_logits, atol=1e-5, rtol=0)
    assert snapshot(model) == before


@pytest.mark.parametrize(("family", "method"), ONE_EACH)
def test_two_patched_models_alternate(family: str, method: str) -> None:
    """A model, a twin of it with another method, and one of the next family; prefill and decoding interleaved."""
    other = FAMILIES[(FAMILIES.index(family) + 1) % len(FAMILIES)]
    jobs = [
        (fresh(family), family, method),
        (fresh(family), family, "stride"),
        (fresh(other), other, "fastv"),
    ]
    plain, inputs = fresh(family), batch_of(family)
    stock = forward(plain, inputs)

    def steps(model: Any, name: str) -> Iterator[Tensor]:
        out = model(**batch_of(name, "two"), use_cache=True)
        yield out.logits
        for token in (21, 22, 23):
            out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values)
            yield out.logits
        yield model(**batch_of(name)).logits

    with torch.no_grad():
        patches = [vtprune.patch(m, method, **options_of(name, method)) for m, name, method in jobs]
        alone = [list(steps(m, name)) for m, name, _ in jobs]
        reports = [p.report().to_dict()["images"] for p in patches]
        for found in zip(*(steps(m, name) for m, name, _ in jobs), strict=True):
            for mine, value in zip(alone, found, strict=True):
                assert torch.equal(mine.pop(0), value)
            assert torch.equal(forward(plain, inputs), stock)
        assert [p.report().to_dict()["images"] for p in patches] == reports
        patches[0].remove()
        assert torch.equal(forward(jobs[0][0], inputs), stock)
        assert torch.equal(list(steps(jobs[2][0], other))[-1], list(steps(jobs[2][0], other))[-1])
        assert patches[2].report().to_dict()["images"] == reports[2]
    for patch in patches:
        patch.remove()


# ---------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize(("family", "method"), ONE_EACH)
def test_saving_and_loading(family: str, method: str, tmp_path: Path) -> None:
    """What is saved from a patched model is the stock model."""
    options = options_of(family, method)
    model, inputs = subject(family), batch_of(family)
    stock = forward(model, inputs)
    with vtprune.patch(model, method, **options) as patch:
        expected = forward(model, inputs)
        model.save_pretrained(tmp_path)
        state = clone_state(model)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert hook_count(loaded) == hook_count(fresh(family))
        assert patch.active
        assert torch.equal(forward(model, inputs), expected)
        assert_same_tensors(loaded, state)
        assert torch.equal(forward(loaded, inputs), stock)
        with vtprune.patch(loaded, method, **options):
            assert torch.equal(forward(loaded, inputs), expected)
        written = "".join(p.read_text() for p in tmp_path.glob("*.json"))
        assert "vtprune" not in written
    assert torch.equal(forward(model, inputs), stock)


@pytest.mark.parametrize(("family", "method"), ONE_EACH)
def test_state_dict_round_trip(family: str, method: str) -> None:
    options = options_of(family, method)
    model, other = fresh(family), LVLMS[family].build(seed=1)
    inputs = batch_of(family)
    target, source = forward(other, inputs), forward(model, inputs)
    with vtprune.patch(model, method, **options) as patch:
        pruned = forward(model, inputs)
        own = clone_state(model)
        model.load_state_dict(other.state_dict())
        other.load_state_dict(own)
        assert patch.active
        assert torch.equal(forward(other, inputs), source)
        forward(model, inputs)
        model.load_state_dict(own)
        assert torch.equal(forward(model, inputs), pruned)
        model.load_state_dict(LVLMS[family].build(seed=1).state_dict())
    assert torch.equal(forward(model, inputs), target)


@pytest.mark.parametrize(("family", "method"), ONE_EACH)
def test_copies_of_a_patched_model_are_refused(family: str, method: str) -> None:
    options = options_of(family, method)
    model, inputs = subject(family), batch_of(family)
    stock, before = forward(model, inputs), snapshot(model)
    with vtprune.patch(model, method, **options):
        expected, armed = forward(model, inputs), snapshot(model)
        for duplicate in (copy.deepcopy, pickle.dumps):
            with pytest.raises(vtprune.VTPruneError) as caught:
                duplicate(model)
            assert "patch" in str(caught.value)
            assert len(str(caught.value)) > 30
        assert snapshot(model) == armed
        assert torch.equal(forward(model, inputs), expected)
    assert torch.equal(forward(copy.deepcopy(model), inputs), stock)
    assert snapshot(model) == before
    # Stock models cannot be pickled once transformers has installed its own hooks in a call.
    uncalled = fresh(family)
    with vtprune.patch(uncalled, method, **options), pytest.raises(vtprune.VTPruneError):
        pickle.dumps(uncalled)
    assert torch.equal(forward(pickle.loads(pickle.dumps(uncalled)), inputs), stock)


# ---------------------------------------------------------------------------------------------- reports, text


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_text_alone_is_exactly_stock(family: str, method: str) -> None:
    options = options_of(family, method)
    model = subject(family)
    inputs = batch_of(family, "text")
    padded = LVLMS[family].batch([rows_of(family)["text"], [20, 30], [31, 32, 33]])
    calls = [lambda: forward(model, inputs), lambda: forward(model, padded), lambda: greedy(model, padded, 4)]
    stock = [call() for call in calls]
    with vtprune.patch(model, method, **options) as patch:
        with pytest.raises(vtprune.VTPruneError, match="not been called"):
            patch.report()
        for call, expected in zip(calls, stock, strict=True):
            assert torch.equal(call(), expected)
            report = patch.report()
            assert report.images == []
            assert not report.engaged
            assert set(report.visual_tokens_in) <= {0}
            assert "no visual tokens" in str(report)
        forward(model, batch_of(family))
        assert patch.report().images
        assert torch.equal(calls[1](), stock[1])
        assert patch.report().images == []


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
def test_a_removed_patch_keeps_its_report(family: str, method: str) -> None:
    with patched(family, method) as patch:
        forward(subject(family), batch_of(family))
        said = patch.report().to_dict()
    forward(subject(family), batch_of(family, "text"))
    assert patch.report().to_dict() == said


# ---------------------------------------------------------------------------------------------- lost hooks


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    return [v for k, v in vars(module).items() if k.startswith("_forward") and k.endswith("hooks")]


def clear_hooks(modules: Iterator[nn.Module], but: set[int]) -> int:
    """Forgets forward hooks, as foreign code might; returns how many there were.

    Args:
        but: ids of hooks that stay: those of transformers itself, without which stock models fail.
    """
    lost = 0
    for module in modules:
        for hooks in hooks_of(module):
            for key in [k for k, hook in hooks.items() if id(hook) not in but]:
                del hooks[key]
                lost += 1
    return lost


def hook_ids(model: nn.Module) -> set[int]:
    return {id(hook) for module in model.modules() for hooks in hooks_of(module) for hook in hooks.values()}


LOST: dict[str, Callable[[Any], Iterator[nn.Module]]] = {
    "decoder layers": lambda model: (m for layer in decoder_of(model).layers for m in layer.modules()),
    "language model": lambda model: iter([decoder_of(model)]),
    "language model and below": lambda model: decoder_of(model).modules(),
    "vision tower": lambda model: (m for tower in towers_of(model) for m in tower.modules()),
    "base model": lambda model: iter([model.model]),
}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
def test_lost_hooks_never_pass_silently(family: str, method: str, lost: str) -> None:
    """InertPruningError where hooks were lost that mattered; else the result is that of the patch."""
    options = options_of(family, method)
    model, inputs, right = spare(family), batch_of(family), answers(family, method)
    before, own = hook_count(model), hook_ids(model)
    patch = vtprune.patch(model, method, **options)
    if not clear_hooks(LOST[lost](model), own):
        assert torch.equal(forward(model, inputs), right.logits)
        patch.remove()
        return
    with pytest.raises(vtprune.InertPruningError):
        forward(model, inputs)
    with pytest.raises(vtprune.InertPruningError):
        greedy(model, inputs, 2)
    patch.remove()
    assert hook_count(model) == before
    assert torch.equal(forward(model, inputs), right.stock)
    with vtprune.patch(model, method, **options):
        assert torch.equal(forward(model, inputs), right.logits)


@pytest.mark.parametrize(("family", "method"), ONE_EACH)
def test_a_report_notices_that_every_hook_is_gone(family: str, method: str) -> None:
    """Nothing is left then that a call itself could notice."""
    options = options_of(family, method)
    model, inputs = fresh(family), batch_of(family)
    forward(model, inputs)
    own = hook_ids(model)
    with vtprune.patch(model, method, **options) as patch:
        forward(model, inputs)
        assert patch.report().images
        assert clear_hooks(model.modules(), own)
        forward(model, inputs)
        with pytest.raises(vtprune.InertPruningError):
            patch.report()


@pytest.mark.parametrize(("family", "method"), KEY_CELLS)
def test_hooks_lost_after_a_good_call(family: str, method: str) -> None:
    """State of an earlier call does not hide the loss; text alone still passes."""
    options = options_of(family, method)
    model, inputs, text = spare(family), batch_of(family), batch_of(family, "text")
    stock = forward(model, text)
    own = hook_ids(model)
    with vtprune.patch(model, method, **options):
        forward(model, inputs)
        assert clear_hooks(decoder_of(model).modules(), own)
        with pytest.raises(vtprune.InertPruningError):
            forward(model, inputs)
        assert torch.equal(forward(model, text), stock)
    torch.testing.assert_close(forward(model, text)[0], judge_of(family).logits(text), atol=1e-4, rtol=0)
