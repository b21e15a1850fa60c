"""Less common calls of a patched model, judged by the dense reference: right, or refused by name."""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from versions import ENCODES_BEFOREHAND, HOOKS_INSIDE_CHECKPOINTS

import vtprune
from vtprune.testing import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl


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

FAMILIES = ("llava", "qwen")
# Every way of removing tokens: behind the encoder with renumbering (LLaVA), at the first decoder layer, and
# in the middle of the decoder by the prompt's last token.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "vtc-cls": ("vtc-cls", {"keep": 5}),
    "decoder 0": ("stride", {"keep": 5, "where": "decoder", "layer": 0}),
    "fastv": ("fastv", {"keep": 5}),
}
CASES = [(family, method) for family in FAMILIES for method in METHODS]


def build(family: str) -> Any:
    """A fresh tiny model."""
    return tiny_qwen2_5_vl() if family == "qwen" else tiny_llava()


@functools.cache
def judge(family: str) -> Any:
    """The reference on a model that is never patched."""
    return ref.Reference(build(family))


def prompt(family: str, *rows: list[Any]) -> dict[str, Tensor]:
    """A batch; "image" stands for a picture."""
    if family == "llava":
        return llava_inputs(rows)
    return qwen_inputs([[(4, 5) if item == "image" else item for item in row] for row in rows])


ONE = [1, 10, 11, "image", 12, 13]


@contextmanager
def patched(model: Any, family: str, method: str) -> Iterator[vtprune.Patch]:
    """A patch for the length of a block."""
    name, options = METHODS[method]
    if name == "vtc-cls" and family == "qwen":
        options = {**options, "scorer": "received"}
    with vtprune.patch(model, name, **options) as patch:
        yield patch


def told(patch: vtprune.Patch, sample: int = 0) -> dict[str, Any]:
    """What the reference must know of the last call."""
    report = patch.report()
    return {
        "kept": [image.kept for image in report.images if image.sample == sample],
        "dense_sites": [site for site, policy in report.positions.items() if policy == "dense"],
    }


def close(found: Tensor, expected: Tensor) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


class Scene:
    """One patched model after one plain call, and what the reference expects of the row."""

    def __init__(self, model: Any, family: str, patch: vtprune.Patch) -> None:
        self.model, self.family, self.patch, self.judge = model, family, patch, judge(family)
        self.inputs = prompt(family, ONE)
        self.n = self.inputs["input_ids"].shape[1]
        self.row = self.judge.split(self.inputs)[0]
        model(**self.inputs)
        self.told = told(patch)

    def logits(self, *more: int) -> Tensor:
        """Expected logits of the row, continued by `more`."""
        return self.judge.row_logits(self.row, more=more, **self.told)

    def text(self, steps: int) -> list[int]:
        """Expected greedy text."""
        return self.judge.greedy(self.row, steps, **self.told)

    def prefill(self) -> Any:
        """A filled cache."""
        return self.model(**self.inputs, use_cache=True).past_key_values

    def follow(self, cache: Any, *text: int) -> None:
        """Feeds text to a cache and compares."""
        out = self.model(input_ids=torch.tensor([text]), past_key_values=cache)
        close(out.logits[0], self.logits(*text)[-len(text) :])


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """Every family with every way of removing tokens."""
    family, method = request.param
    model = build(family)
    with torch.no_grad(), patched(model, family, method) as patch:
        yield Scene(model, family, patch)


# ------------------------------------------------------------------------------------ forward


def test_some_logits(scene: Scene) -> None:
    expected = scene.logits()
    close(scene.model(**scene.inputs, logits_to_keep=1).logits[0], expected[-1:])
    close(scene.model(**scene.inputs, logits_to_keep=7).logits[0], expected[-7:])
    columns = torch.tensor([2, scene.n - 2])
    close(scene.model(**scene.inputs, logits_to_keep=columns).logits[0], expected[columns])


def test_call_styles(scene: Scene) -> None:
    """Tuples, no mask, explicit positions, the base model, ready-made features, no cache."""
    expected, inputs, model = scene.logits(), scene.inputs, scene.model
    close(model(**inputs, return_dict=False)[0][0], expected)
    close(model(**{k: v for k, v in inputs.items() if k != "attention_mask"}).logits[0], expected)
    positions = scene.judge.positions(scene.row, scene.n)
    positions = positions[:, None] if scene.family == "qwen" else positions
    close(model(**inputs, position_ids=positions).logits[0], expected)
    close(model.lm_head(model.model(**inputs).last_hidden_state)[0], expected)
    out = model(**inputs, use_cache=False)
    close(out.logits[0], expected)
    assert out.past_key_values is None
    grid = [inputs["image_grid_thw"]] if scene.family == "qwen" else []
    features = model.get_image_features(inputs["pixel_values"], *grid)
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    if ENCODES_BEFOREHAND:
        close(model(**rest, mm_encoder_outputs={"image": features}).logits[0], expected)


@pytest.mark.parametrize(("family", "method"), CASES)
@torch.no_grad()
def test_pictures_at_the_edges_of_a_row(family: str, method: str) -> None:
    """A picture first, last or alone; the last prompt token may be removed itself."""
    model, reference = build(family), judge(family)
    rows = [["image", 7, 8], [1, 7, "image"], ["image"], [1, "image", "image"], [1, 20, 21]]
    inputs = prompt(family, *rows)
    with patched(model, family, method) as patch:
        logits = model(**inputs).logits
        first = told(patch)
        text = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for sample, row in enumerate(reference.split(inputs)):
            expected = reference.row_logits(row, **told(patch, sample))
            shown = logits[sample][inputs["attention_mask"][sample].bool()]
            assert shown.isfinite().all()
            defined = ~expected.isnan()  # columns before the first survivor show nothing in particular
            assert defined.any(1).sum() >= 3
            close(shown[defined], expected[defined])
            assert text[sample].tolist() == reference.greedy(row, 4, **told(patch, sample))
    assert first["kept"]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_gradient_checkpointing(family: str, method: str) -> None:
    """Layers that run again in the backward pass prune nothing twice."""
    inputs = prompt(family, ONE)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 7, -100)
    grads = []
    for checkpointing in (False, True):
        model = build(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if HOOKS_INSIDE_CHECKPOINTS and method not in ("vtc-cls", "decoder 0"):
                refused = pytest.raises(vtprune.UnsupportedCallError, match="gradient checkpointing")
                with patched(model, family, method), refused:
                    model(**inputs, labels=labels)
                return
        with patched(model, family, method):
            model(**inputs, labels=labels).loss.backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any(g.abs().max() > 0 for g in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_inference_mode_before_training(scene: Scene) -> None:
    with torch.inference_mode():
        scene.model.generate(**scene.inputs, max_new_tokens=2)
    with torch.enable_grad():
        out = scene.model(**scene.inputs).logits
        close(out[0], scene.logits())
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "method"), CASES)
@torch.no_grad()
def test_half_precision(family: str, method: str, dtype: torch.dtype) -> None:
    model, reference = build(family).to(dtype), judge(family)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in prompt(family, ONE).items()}
    with patched(model, family, method) as patch:
        logits = model(**inputs).logits
        assert logits.dtype == dtype
        row = reference.split(prompt(family, ONE))[0]
        expected = reference.row_logits(row, **told(patch))
        assert (logits[0].float() - expected).abs().mean() < 0.1
        cached = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert cached.shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("layer", [-1, -3])
@torch.no_grad()
def test_other_feature_layers_of_llava(layer: int) -> None:
    model = tiny_llava()
    model.config.vision_feature_layer = layer
    reference = ref.Reference(copy.deepcopy(model))
    inputs = prompt("llava", ONE)
    row = reference.split(inputs)[0]
    for name, options in (("vtc-cls", {}), ("stride", {"where": "vit", "layer": 1})):
        with vtprune.patch(model, name, keep=5, **options) as patch, torch.no_grad():
            close(model(**inputs).logits[0], reference.row_logits(row, **told(patch)))
            assert patch.facts.encoder_layers == 5 + layer
            if name == "vtc-cls":
                half = round(0.5 * (5 + layer))
                voted = ref.vtc_cls_decision(reference, reference.frames(row)[0], 5, half, "cls")
                assert voted == told(patch)["kept"][0]["encoder"].tolist()


# ------------------------------------------------------------------------------------ caches


def test_cache_given_by_the_caller(scene: Scene) -> None:
    for cache in (DynamicCache(), DynamicCache(config=scene.model.config)):
        out = scene.model.generate(**scene.inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
        assert out[0, scene.n :].tolist() == scene.text(6)
    cache = DynamicCache()
    close(scene.model(**scene.inputs, past_key_values=cache).logits[0], scene.logits())
    scene.follow(cache, 21)


def test_cache_that_holds_a_text_prefix(scene: Scene) -> None:
    """A system prompt is cached first, the picture comes in the second call."""
    cache = scene.model(input_ids=scene.inputs["input_ids"][:, :2], use_cache=True).past_key_values
    rest = dict(scene.inputs)
    for key in ("input_ids", "mm_token_type_ids"):
        if key in rest:
            rest[key] = rest[key][:, 2:]
    if scene.family == "qwen":
        rest["position_ids"] = scene.judge.positions(scene.row, scene.n)[:, None, 2:]
    close(scene.model(**rest, past_key_values=cache).logits[0], scene.logits()[2:])
    scene.follow(cache, 21, 22)


def test_forked_caches_do_not_meet(scene: Scene) -> None:
    cache = scene.prefill()
    twin = copy.deepcopy(cache)
    scene.follow(cache, 21)
    scene.follow(twin, 30, 31)
    close(
        scene.model(input_ids=torch.tensor([[22]]), past_key_values=cache).logits[0],
        scene.logits(21, 22)[-1:],
    )


def test_cropping(scene: Scene) -> None:
    """Generated tokens and the prompt's tail can be taken back."""
    cache = scene.prefill()
    scene.model(input_ids=torch.tensor([[30, 31]]), past_key_values=cache)
    cache.crop(-2)
    scene.follow(cache, 21)
    cache = scene.prefill()
    cache.crop(-1)
    out = scene.model(input_ids=scene.inputs["input_ids"][:, -1:], past_key_values=cache)
    close(out.logits[0], scene.logits()[-1:])


@pytest.mark.parametrize("columns", [4, 9])
def test_cropping_into_the_picture(scene: Scene, columns: int) -> None:
    """Lengths count columns of the unpruned prompt, so removed tokens must not be counted again; or refused."""
    cache = scene.prefill()
    try:
        cache.crop(-columns)
    except vtprune.VTPruneError:
        scene.follow(cache, 21)  # and nothing has changed
        return
    assert cache.get_seq_length() == scene.n - columns
    (frame,) = scene.judge.frames(scene.row)
    ((site, kept),) = scene.told["kept"][0].items()
    for number, layer in enumerate(cache.layers):
        early = site.startswith("decoder") and number < int(site[8:-1])
        alive = range(frame.n) if early else kept.tolist()
        columns_left = [c for c in range(scene.n) if c not in frame.columns] + [
            frame.columns[i] for i in alive
        ]
        assert layer.keys.shape[-2] == sum(c < scene.n - columns for c in columns_left)


def test_rows_of_a_cache(scene: Scene) -> None:
    cache = scene.prefill()
    cache.batch_repeat_interleave(2)
    out = scene.model(input_ids=torch.tensor([[21], [22]]), past_key_values=cache)
    for i, token in enumerate((21, 22)):
        close(out.logits[i], scene.logits(token)[-1:])
    cache.batch_select_indices(torch.tensor([1]))
    out = scene.model(input_ids=torch.tensor([[23]]), past_key_values=cache)
    close(out.logits[0], scene.logits(22, 23)[-1:])


def test_second_turn_of_a_ragged_batch(scene: Scene) -> None:
    inputs = prompt(scene.family, ONE, [1, 10, "image", 11, "image", 12, 13, 14, 15], [1, 20, 21])
    n = inputs["input_ids"].shape[1]
    first = scene.model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    rows = scene.judge.split(inputs)
    known = [told(scene.patch, sample) for sample in range(3)]
    ids = torch.cat([first.sequences, torch.tensor([[40, 41]] * 3)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 6, dtype=torch.long)], 1)
    call = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
    second = scene.model.generate(**call, max_new_tokens=4, do_sample=False)
    for sample, row in enumerate(rows):
        start = [*first.sequences[sample, n:].tolist(), 40, 41]
        expected = scene.judge.greedy(row, 4, start=start, **known[sample])
        assert second[sample, ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_speculative_decoding_equals_greedy(scene: Scene, how: str) -> None:
    """Draft tokens behind the prompt must not take part in decisions."""
    extra: dict[str, Any] = (
        {"prompt_lookup_num_tokens": 3}
        if how == "prompt lookup"
        else {"assistant_model": build(scene.family)}
    )
    for row in (ONE, [1, 12, 13, 10, 11, 12, "image", 10, 11]):
        inputs = prompt(scene.family, row)
        n = inputs["input_ids"].shape[1]
        plain = scene.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected = scene.judge.greedy(scene.judge.split(inputs)[0], 8, **told(scene.patch))
        assert plain[0, n:].tolist() == expected
        try:
            drafted = scene.model.generate(**inputs, max_new_tokens=8, do_sample=False, **extra)
        except vtprune.VTPruneError:
            continue  # refused by name
        assert drafted[0, n:].tolist() == expected


def test_two_conversations_of_one_model(scene: Scene) -> None:
    """Everything a conversation needs lies in its cache, not in the model."""
    other = prompt(scene.family, [1, 9, "image", 17, "image", 18])
    row = scene.judge.split(other)[0]
    first = scene.prefill()
    second = scene.model(**other, use_cache=True).past_key_values
    known = told(scene.patch)
    length = other["input_ids"].shape[1]
    for n_text in (1, 2, 3):
        text = [30, 31, 32][:n_text]
        for cache, inputs, columns, expected in (
            (first, scene.row, scene.n, scene.logits(*text)),
            (second, row, length, scene.judge.row_logits(row, more=text, **known)),
        ):
            call = {"input_ids": torch.tensor([text[-1:]])}
            if scene.family == "qwen":  # the stock model keeps the offset of the latest prompt only
                last = scene.judge.positions(inputs, columns).max()
                call["position_ids"] = (last + n_text).view(1, 1, 1).expand(3, 1, 1)
            close(scene.model(**call, past_key_values=cache).logits[0], expected[-1:])


def test_calls_leave_no_memory(scene: Scene) -> None:
    """A decision kept for cache-free generation must not reach the next prompt, even after an exception."""
    longer = prompt(scene.family, [*ONE, 20, 21, 22])
    expected = scene.model(**longer).logits

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    scene.model.generate(**scene.inputs, max_new_tokens=3, do_sample=False, use_cache=False)
    close(scene.model(**longer).logits, expected)
    with pytest.raises(KeyboardInterrupt):
        scene.model.generate(
            **scene.inputs, max_new_tokens=3, do_sample=False, use_cache=False, stopping_criteria=[stop]
        )
    close(scene.model(**longer).logits, expected)
    scene.model(**scene.inputs, use_cache=False)
    close(scene.model(**longer, use_cache=False).logits, expected)


@pytest.mark.parametrize(("family", "method"), CASES)
@torch.no_grad()
def test_patching_the_base_model(family: str, method: str) -> None:
    """`LlavaModel` and `Qwen2_5_VLModel` can be patched on their own; the model around them then prunes."""
    model, inputs = build(family), prompt(family, ONE)
    row = judge(family).split(inputs)[0]
    with patched(model.model, family, method) as patch:
        hidden = model.model(**inputs).last_hidden_state
        close(model.lm_head(hidden)[0], judge(family).row_logits(row, **told(patch)))
        text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert text[0, inputs["input_ids"].shape[1] :].tolist() == judge(family).greedy(row, 4, **told(patch))
        with pytest.raises(vtprune.AlreadyPatchedError):
            vtprune.patch(model, "stride", keep=5)


# ------------------------------------------------------------------------------------ timm


@dataclass(frozen=True, kw_only=True)
class Adaptive(vtprune.Method):
    """Keeps tokens whose norm is above the picture's mean: the count depends on the picture."""

    key: ClassVar[str] = "test-adaptive"
    keep: int | float = 1.0
    where: vtprune.Site | None = None

    def stages(self, facts: vtprune.ModelFacts) -> list[vtprune.Stage]:
        return [vtprune.Stage(self.where or vtprune.Site("encoder"), None, self.decide)]

    def decide(self, view: vtprune.View) -> vtprune.Selection:
        size = view.features.norm(dim=-1)
        return vtprune.Selection.where(size >= size.mean(-1, keepdim=True))


@pytest.mark.parametrize("site", [vtprune.Site("encoder"), vtprune.Site("vit", 1)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "token"},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "reg_tokens": 2, "fc_norm": False},
        {"global_pool": "map"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@torch.no_grad()
def test_timm_with_different_counts_in_a_batch(options: dict[str, Any], site: vtprune.Site) -> None:
    """Equal to single runs, or refused; a pool must never see padding."""
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = timm_vit.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=7, **options
    ).eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with vtprune.patch(model, Adaptive(where=site)) as patch:
        alone, counts = [], set()
        for image in images:
            alone.append(model(image[None])[0])
            (site_kept,) = patch.report().images[0].kept.values()
            counts.add(len(site_kept))
            at = 4 if site.layer is None else site.layer
            close(alone[-1], ref.timm_run(model_twin(model), image, {at: site_kept.tolist()})[1])
        assert len(counts) > 1
        try:
            together = model(images)
        except vtprune.UnsupportedCallError:
            return
        close(together, torch.stack(alone))


def model_twin(model: Any) -> Any:
    """An unpatched model with the same weights."""
    twin = type(model)(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=4,
        num_heads=4,
        num_classes=7,
        global_pool=model.global_pool,
        reg_tokens=model.num_reg_tokens,
        fc_norm=not isinstance(model.fc_norm, torch.nn.Identity),
    ).eval()
    twin.load_state_dict(model.state_dict())
    return twin


# ------------------------------------------------------------------------------------ copies


def test_weights_can_be_saved_while_patched(scene: Scene, tmp_path: Path) -> None:
    scene.model.save_pretrained(tmp_path)
    loaded = type(scene.model).from_pretrained(tmp_path)
    stock = scene.judge.model(**scene.inputs).logits
    close(loaded(**scene.inputs).logits, stock)
    with pytest.raises(vtprune.VTPruneError):
        copy.deepcopy(scene.model)
    close(scene.model(**scene.inputs).logits[0], scene.logits())
