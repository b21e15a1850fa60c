"""Encoders alone: every one against stock modules run by hand on a shorter sequence."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import vtprune
from vtprune.methods import REGISTRY
from vtprune.testing.zoo import ENCODERS


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
SIZE = (32, 40)
_TIMM: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 7,
}
_VITS: dict[str, dict[str, Any]] = {
    "vit cls avg": {"global_pool": "avg"},
    "vit reg token": {"reg_tokens": 4},
    "vit reg avg": {"global_pool": "avg", "reg_tokens": 4},
    "vit no cls": {"global_pool": "avg", "class_token": False},
    "vit map": {"global_pool": "map", "class_token": False},
    "vit qk norm": {"qk_norm": True},
}
_EVAS: dict[str, dict[str, Any]] = {
    "eva token": {"use_rot_pos_emb": True, "global_pool": "token"},
    "eva mixed": {
        "use_rot_pos_emb": True,
        "global_pool": "token",
        "rope_type": "mixed",
        "rope_grid_indexing": "xy",
        "attn_type": "rope",
    },
    "eva post-norm": {"use_post_norm": True, "global_pool": "token"},
    "eva split projections": {"use_rot_pos_emb": True, "qkv_fused": False, "dynamic_img_size": True},
    "eva no cls": {"use_rot_pos_emb": True, "class_token": False, "global_pool": "avg"},
}
NAMES = (*ENCODERS, *_VITS, *_EVAS, "siglip head")
TIMM = tuple(n for n in NAMES if not n.startswith("hf_") and n != "siglip head")
HF = tuple(n for n in NAMES if n not in TIMM)
NO_CLS = ("hf_siglip", "siglip head", "vit no cls", "vit map", "eva no cls")


def build(name: str, attention: str = "sdpa") -> Any:
    """A fresh model; `attention` matters to those of transformers."""
    if name in TIMM:
        pytest.importorskip("timm")
    if name in ENCODERS:
        return ENCODERS[name].build(**({"attention": attention} if name in HF else {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name in _VITS:
            from timm.models.vision_transformer import VisionTransformer

            model: Any = VisionTransformer(**_TIMM, **_VITS[name])
        elif name in _EVAS:
            from timm.models.eva import Eva

            try:
                model = Eva(**_TIMM, **_EVAS[name])
            except TypeError as error:  # some versions cannot build post-norm blocks
                pytest.skip(f"this timm cannot build it: {error}")
        else:
            from transformers import SiglipVisionConfig, SiglipVisionModel

            config = SiglipVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            )
            model = SiglipVisionModel._from_config(config, attn_implementation=attention)
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.2)
    return model.eval()


@functools.cache
def subject(name: str, attention: str = "sdpa") -> Any:
    """The model that is patched; shared by tests that leave it as they found it."""
    return build(name, attention)


def pictures(name: str, n: int = 2, seed: int = 1) -> Tensor:
    if name in ENCODERS:
        return ENCODERS[name].pixels(n, seed)
    size = (32, 32) if name == "siglip head" else SIZE
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def outputs(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, prefix + kept, D] and what is pooled from them."""
    if hasattr(model, "forward_features"):
        return model.forward_features(images), model(images)
    out = model(images)
    pooled = out.pooler_output
    return out.last_hidden_state, out.last_hidden_state[:, :1] if pooled is None else pooled


@contextmanager
def patched(model: Any, method: Any, **options: Any) -> Iterator[vtprune.Patch]:
    patch = vtprune.patch(model, method, **options)
    try:
        yield patch
    finally:
        patch.remove()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name}: attributes"] = sorted(module.__dict__)
        state[f"{name}: class"] = type(module)
        for key, value in module.__dict__.items():
            if "hooks" in key and hasattr(value, "items"):
                state[f"{name}: {key}"] = dict(value)
    state["state_dict"] = list(model.state_dict())
    return state


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# ------------------------------------------------------------------------------------ the judge


def _path(module: nn.Module, *names: str) -> Any:
    for name in names:
        try:
            return module.get_submodule(name)
        except AttributeError:
            continue
    raise AttributeError(f"{type(module).__name__} has none of {names}")


def _turn(x: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """Rotary embedding of x [..., n, d], pairs being halves or neighbours."""
    if half:
        a, b = x.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


class Stock:
    """Stock modules of a model that is never patched, called by hand on one picture.

    Attributes:
        signals: per layer of the last run, of the patches alive there: "cls" and "received" [heads, n], "keys"
            [n, d]; attention comes from the eager implementation of the stock model (timm: from its weights).
    """

    def __init__(self, name: str) -> None:
        self.model: Any = build(name, "eager")
        self.timm = name in TIMM
        self.layers = list(
            _path(self.model, "blocks", "encoder.layers", "encoder.layer", "model.layer", "layers")
        )
        m = self.model
        if self.timm:
            self.prefix = m.num_prefix_tokens
        else:
            tokens = getattr(m.embeddings, "register_tokens", torch.zeros(1, 0, 1))
            has_cls = hasattr(m.embeddings, "cls_token") or hasattr(m.embeddings, "class_embedding")
            self.prefix = int(has_cls) + tokens.shape[1]
        self.signals: list[dict[str, Any]] = []

    def embed(self, image: Tensor) -> tuple[Tensor, Any]:
        """[1, prefix + n, D] at the input of layer 0, and rotary tables of all patches."""
        m = self.model
        if self.timm:
            x = m._pos_embed(m.patch_embed(image[None]))
            x, tables = x if isinstance(x, tuple) else (x, None)
            return m.norm_pre(x), tables
        x = m.embeddings(image[None])
        if hasattr(m, "pre_layrnorm"):
            x = m.pre_layrnorm(x)
        return x, m.rope_embeddings(image[None]) if hasattr(m, "rope_embeddings") else None

    def layer(self, number: int, x: Tensor, tables: Any, alive: list[int]) -> Tensor:
        layer = self.layers[number]
        seen: dict[str, Any] = {}
        if self.timm:
            attention = layer.attn
            handles = [attention.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))]
            if tables is None:
                rope, out = None, layer(x)
            else:
                rope = (tables[number] if self.model.__dict__.get("rope_mixed") else tables)[..., alive, :]
                out = layer(x, rope=rope)
        else:
            attention = _path(layer, "attention.attention", "self_attn", "attention")
            key = _path(attention, "k_proj", "key")
            handles = [
                attention.register_forward_hook(lambda _, args, output: seen.update(weights=output[1])),
                key.register_forward_hook(lambda _, args, output: seen.update(key=output)),
            ]
            rope = None if tables is None else tuple(t[alive] for t in tables)
            if rope is not None:
                out = layer(x, position_embeddings=rope)
            elif "attention_mask" in inspect.signature(type(layer).forward).parameters:
                out = layer(x, None)
            else:
                out = layer(x)
        for handle in handles:
            handle.remove()
        weights, keys = (
            self._timm_attention(attention, seen["x"], rope) if self.timm else self._hf(seen, rope)
        )
        p = self.prefix
        self.signals.append(
            {
                "cls": weights[:, 0, p:].double().numpy(),
                "received": weights.mean(1)[:, p:].double().numpy(),
                "keys": keys[:, p:].mean(0).double().numpy(),
            }
        )
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def _hf(self, seen: dict[str, Any], rope: Any) -> tuple[Tensor, Tensor]:
        weights = seen["weights"][0]
        keys = seen["key"][0].unflatten(-1, (len(weights), -1)).transpose(0, 1)
        if rope is not None:
            keys = torch.cat(
                [keys[:, : self.prefix], _turn(keys[:, self.prefix :], rope[0], rope[1], True)], 1
            )
        return weights, keys

    def _timm_attention(self, attn: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        if attn.qkv is None:
            q, k = attn.q_proj(x[0]), attn.k_proj(x[0])
        else:
            bias = attn.qkv.bias
            if getattr(attn, "q_bias", None) is not None:
                bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            q, k, _ = nn.functional.linear(x[0], attn.qkv.weight, bias).chunk(3, -1)
        q, k = (t.unflatten(-1, (attn.num_heads, -1)).transpose(0, 1) for t in (q, k))
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            sin, cos = rope.chunk(2, -1)
            p = self.prefix
            q, k = (
                torch.cat([t[:, :p], _turn(t[:, p:], cos, sin, getattr(attn, "rotate_half", False))], 1)
                for t in (q, k)
            )
        weights = (q.double() @ k.double().transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        return weights, k

    def finish(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = self.model
        if self.timm:
            x = m.norm(x)
            return x[0], m.forward_head(x)[0]
        if hasattr(m, "pre_layrnorm"):
            return x[0], m.post_layernorm(x[:, 0])[0]
        x = _path(m, "post_layernorm", "layernorm", "norm")(x)
        pool = next((getattr(m, name) for name in ("pooler", "head") if hasattr(m, name)), None)
        if pool is not None:
            return x[0], pool(x)[0]
        return x[0], x[0, 0] if self.prefix else x[0, :1]

    def run(
        self,
        image: Tensor,
        drops: Mapping[int, Callable[[], list[int]]] | None = None,
        merge: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features [prefix + kept, D] and what is pooled from them.

        Args:
            drops: layer -> surviving patches at its input, asked for when the run is there; 4 is behind the last.
            merge: maps all patches behind the last layer to the kept ones.
        """
        drops = drops or {}
        self.signals = []
        x, tables = self.embed(image)
        p = self.prefix
        alive = list(range(x.shape[1] - p))
        for number in range(len(self.layers) + 1):
            if number in drops:
                kept = drops[number]()
                if number == len(self.layers) and merge is not None:
                    x = torch.cat([x[:, :p], merge(x[0, p:])[None]], 1)
                else:
                    x = x[:, [*range(p), *(p + alive.index(i) for i in kept)]]
                alive = kept
            if number < len(self.layers):
                x = self.layer(number, x, tables, alive)
        return self.finish(x)


@functools.cache
def stock(name: str) -> Stock:
    return Stock(name)


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
KEEP = 5


def applies(name: str, method: str, options: dict[str, Any]) -> bool:
    return name not in NO_CLS or method not in ("vtc-cls", "visionzip") or "scorer" in options


PAIRS = [(n, m, o) for n in NAMES for m, o in CASES if applies(n, m, o)]


def _ids(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(map(str, value.values())) or "default"
    return None


def test_every_method_is_tried() -> None:
    """Methods without a literal plan here are tried by tests/contract/test_encoder_methods.py."""
    assert {m for m, _ in CASES} <= set(REGISTRY)


@pytest.mark.parametrize(("name", "method", "options"), PAIRS, ids=_ids)
@torch.no_grad()
def test_keeping_everything_is_dense(name: str, method: str, options: dict[str, Any]) -> None:
    model, images = subject(name), pictures(name)
    dense = outputs(model, images)
    with patched(model, method, **({} if method == "keep-all" else {"keep": 1.0}), **options) as patch:
        found = outputs(model, images)
        assert not patch.report().engaged
    for a, b in zip(found, dense, strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize(("name", "method", "options"), PAIRS, ids=_ids)
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


# ------------------------------------------------------------------------------------ signals

ENCODER = vtprune.Site("encoder")


@dataclass(frozen=True, kw_only=True)
class Scripted(vtprune.Method):
    """Does what the test says at one site."""

    key: ClassVar[str] = "test-scripted"
    keep: int | float = KEEP
    where: vtprune.Site = ENCODER
    reads: tuple[vtprune.Signal, ...] = ()
    script: list[Callable[[vtprune.View], vtprune.Selection]] = field(default_factory=list)

    def site(self, facts: vtprune.ModelFacts) -> vtprune.Site:
        return self.where

    def needs(self, facts: vtprune.ModelFacts) -> tuple[vtprune.Signal, ...]:
        return self.reads

    def decide(self, view: vtprune.View) -> vtprune.Selection:
        return self.script[0](view)


def first_k(view: vtprune.View) -> vtprune.Selection:
    """Keeps the first k tokens."""
    return vtprune.Selection.of(torch.arange(view.k).expand(len(view.features), -1))


def boom(view: vtprune.View) -> vtprune.Selection:
    """A bug in a method."""
    raise RuntimeError("boom")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_signals_of_every_layer(name: str) -> None:
    model, judge, images = subject(name), stock(name), pictures(name)
    names = {"received_attention": "received", "encoder_keys": "keys"}
    if name not in NO_CLS:
        names["cls_attention"] = "cls"
    reads = tuple(vtprune.Signal(kind, layer) for kind in names for layer in range(4))  # type: ignore[arg-type]
    views: list[vtprune.View] = []

    def keep(view: vtprune.View) -> vtprune.Selection:
        views.append(view)
        return first_k(view)

    with patched(model, Scripted(reads=reads, script=[keep])) as patch:
        model(images)
        assert set(names) <= set(patch.facts.signals)
    for i, image in enumerate(images):
        judge.run(image)
        for signal in reads:
            expected = torch.from_numpy(judge.signals[signal.layer][names[signal.kind]])
            close(views[0][signal][i].double(), expected, 1e-5)


@pytest.mark.parametrize("name", [n for n in HF if n not in NO_CLS])
@torch.no_grad()
def test_vtc_cls_ranks_by_the_attention_that_the_stock_model_returns(name: str) -> None:
    model, images = subject(name), pictures(name, 3)
    weights = build(name, "eager")(images, output_attentions=True).attentions
    votes = sum(w[:, :, 0, stock(name).prefix :].mean(1) for w in weights[2:])
    assert isinstance(votes, Tensor)
    with patched(model, "vtc-cls", keep=KEEP) as patch:
        model(images)
        for i, image in enumerate(patch.report().images):
            assert image.kept["encoder"].tolist() == votes[i].topk(KEEP).indices.sort().values.tolist()


@pytest.mark.parametrize("name", ["hf_clip", "hf_vit", "hf_dinov3"])
@torch.no_grad()
def test_recorded_hidden_states_have_the_lengths_that_the_layers_saw(name: str) -> None:
    model, images = subject(name), pictures(name)
    prefix = stock(name).prefix
    with patched(model, "stride", keep=KEEP, where="vit", layer=2):
        out = model(images, output_hidden_states=True)
    lengths = [h.shape[1] - prefix for h in out.hidden_states]
    assert lengths[3:] == [KEEP, KEEP]
    assert lengths[0] == lengths[1] > KEEP


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


@pytest.mark.parametrize("where", [{"where": "encoder"}, {"where": "vit", "layer": 1}], ids=_ids)
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


# ------------------------------------------------------------------------------------ undo, errors, dtypes


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_undo_is_exact(name: str) -> None:
    model, images = subject(name), pictures(name)
    before, dense = snapshot(model), outputs(model, images)
    scorer = "received" if name in NO_CLS else "cls"
    chain = [
        vtprune.methods.create("stride", keep=9, where="vit", layer=1),
        vtprune.methods.create("vtc-cls", keep=KEEP, scorer=scorer),
    ]
    with patched(model, chain):
        outputs(model, images)
        assert list(model.state_dict()) == before["state_dict"]
    assert snapshot(model) == before
    for a, b in zip(outputs(model, images), dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("site", [ENCODER, vtprune.Site("vit", 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_exception_leaves_the_model_clean(name: str, site: vtprune.Site) -> None:
    model, images = subject(name), pictures(name)
    before, dense = snapshot(model), outputs(model, images)
    method = Scripted(where=site, script=[boom])
    with patched(model, method):
        with pytest.raises(RuntimeError, match="boom"):
            model(images)
        method.script[0] = first_k
        features = outputs(model, images)[0]
        assert features.shape[1] == stock(name).prefix + KEEP
        method.script[0] = lambda view: vtprune.Selection.everything(2, view.n, view.features.device)
        with pytest.raises(vtprune.InertPruningError):
            model(images)
    assert snapshot(model) == before
    for a, b in zip(outputs(model, images), dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bfloat16(name: str) -> None:
    model, images = build(name).bfloat16(), pictures(name).bfloat16()
    try:
        outputs(model, images)
    except RuntimeError as error:  # mixed rotary tables in some versions of timm
        pytest.skip(f"the stock model cannot run in bfloat16: {error}")
    scorer = "received" if name in NO_CLS else "cls"
    for method, options in (
        ("stride", {"where": "vit", "layer": 1}),
        ("visionzip", {"contextual": 0.4, "scorer": scorer}),
    ):
        with patched(model, method, keep=KEEP, **options):
            for x in outputs(model, images):
                assert x.dtype == torch.bfloat16
                assert bool(x.isfinite().all())


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", NAMES)
def test_unsupported_methods(name: str) -> None:
    model = subject(name)
    before = snapshot(model)
    with pytest.raises(vtprune.UnsupportedMethodError, match="stride"):
        vtprune.patch(model, "fastv", keep=KEEP)
    for method in ("vtc-cls", "visionzip") if name in NO_CLS else ():
        with pytest.raises(vtprune.UnsupportedMethodError, match=r"scorer='received'.*divprune"):
            vtprune.patch(model, method, keep=KEEP)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", [n for n in ENCODERS if n in HF])
@torch.no_grad()
def test_an_attention_mask_is_refused(name: str) -> None:
    model, images = subject(name), pictures(name)
    with (
        patched(model, "stride", keep=KEEP),
        pytest.raises(vtprune.UnsupportedCallError, match="attention_mask"),
    ):
        model(images, attention_mask=torch.ones(2, model(images[:1]).last_hidden_state.shape[1]))


@pytest.mark.parametrize("name", ["vit reg token", "timm_deit", "eva token"])
@torch.no_grad()
def test_timm_calls_that_are_refused(name: str) -> None:
    model, images = subject(name), pictures(name)
    n = outputs(model, images)[0].shape[1]
    before = snapshot(model)
    mask = torch.ones(1, 1, n, n, dtype=torch.bool)
    with patched(model, "stride", keep=KEEP), pytest.raises(vtprune.UnsupportedCallError, match="full grid"):
        model.forward_intermediates(images)
    takes = inspect.signature(model.forward_features).parameters
    with patched(model, "vtc-cls", keep=KEEP):
        if "attn_mask" in takes:
            with pytest.raises(vtprune.UnsupportedCallError, match="attn_mask"):
                model.forward_features(images, attn_mask=mask)
        if "is_causal" in takes:
            with pytest.raises(vtprune.UnsupportedCallError, match="is_causal"):
                model.forward_features(images, is_causal=True)
    with patched(model, "stride", keep=KEEP, where="vit", layer=1):
        if "attn_mask" in takes:
            with pytest.raises(vtprune.UnsupportedCallError, match="attn_mask"):
                model.forward_features(images, attn_mask=mask)
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["VisionTransformer", "Eva"])
@torch.no_grad()
def test_patch_dropout_in_training_is_refused(kind: str) -> None:
    models = pytest.importorskip("timm.models")
    model: Any = getattr(models.eva if kind == "Eva" else models.vision_transformer, kind)(
        **_TIMM, patch_drop_rate=0.5
    )
    images = pictures("vit reg token")
    with patched(model, "stride", keep=KEEP):
        with pytest.raises(vtprune.UnsupportedCallError, match="patch_drop_rate"):
            model(images)
        assert model.eval()(images).shape == (2, 7)


@pytest.mark.parametrize("where", [{"where": "encoder"}, {"where": "vit", "layer": 1}], ids=_ids)
@pytest.mark.parametrize("name", ["timm_vit", "eva token", "hf_clip", "hf_vit", "hf_dinov3"])
def test_gradients_under_checkpointing_are_those_without_it_or_refused(
    name: str, where: dict[str, Any]
) -> None:
    found = []
    for checkpointing in (False, True):
        model = build(name).train()
        if checkpointing and name in HF:
            # The old name warns where the new one exists.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        elif checkpointing:
            model.set_grad_checkpointing()
        layer = type(stock(name).layers[0])
        with patched(model, "stride", keep=KEEP, **where):
            # Where a layer is checkpointed together with its hooks, they would run twice.
            if checkpointing and (name in TIMM or layer.__call__ is not nn.Module.__call__):
                with pytest.raises(vtprune.UnsupportedCallError, match="checkpointing"):
                    model(pictures(name))
                with torch.no_grad():
                    assert outputs(model, pictures(name))[0].shape[1] == stock(name).prefix + KEEP
                return
            torch.manual_seed(0)  # DINOv3 augments positions in training
            outputs(model, pictures(name))[0].square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_attention_that_cannot_be_read_is_refused() -> None:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    model = timm_vit.VisionTransformer(**_TIMM, block_fn=timm_vit.ParallelScalingBlock)
    with pytest.raises(vtprune.UnsupportedModelError, match="ParallelScalingBlock"):
        vtprune.patch(model, "stride", keep=KEEP)
    if hasattr(timm_vit, "DiffAttention"):
        model = timm_vit.VisionTransformer(**_TIMM, attn_layer="diff")
        with pytest.raises(vtprune.UnsupportedModelError, match="DiffAttention"):
            vtprune.patch(model, "stride", keep=KEEP)


def test_encoders_are_listed() -> None:
    listed = {c for m in vtprune.list_models() if m.kind == "encoder" for c in m.classes}
    assert {type(subject(name)).__name__ for name in HF} <= listed


@torch.no_grad()
def test_an_encoder_inside_another_model() -> None:
    """CLIP's vision model is patched where it stands; the whole model is not supported, and says so."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {**vision, "vocab_size": 32, "max_position_embeddings": 8}
    config = CLIPConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8}, text_config=text, projection_dim=16
    )
    model = CLIPModel._from_config(config).eval()
    with pytest.raises(vtprune.UnsupportedModelError, match="vision_model"):
        vtprune.patch(model, "stride", keep=KEEP)
    images = pictures("hf_clip")
    with patched(model.vision_model, "vtc-cls", keep=KEEP, first_layer=-1):
        found = model.get_image_features(images)
        features = found if isinstance(found, Tensor) else found.pooler_output
        assert features.shape == (2, 16)
