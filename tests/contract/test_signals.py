"""What a method is shown in its View, against the attention that stock models compute eagerly."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contract.common import FAMILIES, TOLERANCE, judge_of, subject
from contract.evidence import PROJECTOR, Probe, Row, claims, inputs_of, ragged, row_of, units_of, visual
from judge import CHOPPED, QWEN, Judge, Unit, best_resolution
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

import vtprune
from vtprune import methods
from vtprune.testing.matrix import facts_of
from vtprune.testing.zoo import ENCODERS, LVLMS

VISION = ("cls_attention", "received_attention", "encoder_keys")
Seen = dict[int, list[tuple[Tensor, Tensor]]]
"""ViT layer -> (keys [B, H, S, d], softmax attention [B, H, S, S]) of every call of its attention."""


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE / 10, rtol=TOLERANCE)


@contextmanager
def watched(judge: Judge) -> Iterator[Seen]:
    """Records keys and weights at the stock eager attention of the vision tower."""
    decoder = set(judge.decoder.modules())
    towers = {
        m: n
        for n, m in judge.model.named_modules()
        if hasattr(sys.modules[type(m).__module__], "eager_attention_forward") and m not in decoder
    }
    libraries = {sys.modules[type(m).__module__] for m in towers}
    seen: Seen = {}
    stock = {library: library.eager_attention_forward for library in libraries}  # type: ignore[attr-defined]

    def wrapper(library: Any) -> Any:
        def attend(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = stock[library](module, query, key, *args, **kwargs)
            if module in towers:
                found = re.search(r"\.(\d+)\.", towers[module])
                assert found is not None
                seen.setdefault(int(found[1]), []).append((key, output[1]))
            return output

        return attend

    try:
        for library in libraries:
            library.eager_attention_forward = wrapper(library)  # type: ignore[attr-defined]
        yield seen
    finally:
        for library in libraries:
            library.eager_attention_forward = stock[library]  # type: ignore[attr-defined]


@functools.cache
def vision(family: str, name: str) -> Seen:
    """What the vision tower computed for one row."""
    judge = judge_of(family)
    with watched(judge) as seen, torch.no_grad():
        judge.run(row_of(family, name))
    return seen


def blocks(values: Tensor, rows: int, cols: int, size: int = 2) -> Tensor:
    """Means over blocks of patches: [C, patches] to [C, tokens], both in raster order."""
    return avg_pool2d(values.view(1, -1, rows, cols), size)[0].flatten(1)


def composite(family: str, row: Row, picture: int, tiles: Tensor, unit: Unit) -> Tensor:
    """A tile's share of the composite that stock packing makes of all tiles of a picture, [C, tokens]."""
    config = judge_of(family).config
    size, side = (
        config.vision_config.image_size,
        config.vision_config.image_size // config.vision_config.patch_size,
    )
    height, width = row["image_sizes"][picture].tolist()
    high, wide = (x // size for x in best_resolution(height, width, config.image_grid_pinpoints))
    channels = tiles.shape[1]
    whole = tiles.view(high, wide, channels, side, side).permute(2, 0, 3, 1, 4)
    whole = whole.reshape(channels, high * side, wide * side)
    module = sys.modules[type(judge_of(family).base).__module__]
    whole = module.unpad_image(whole, (height, width))  # type: ignore[attr-defined]
    if family == "llava_onevision":
        limit = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = (whole.shape[1] * whole.shape[2] / (limit * side**2)) ** 0.5
        if ratio > 1.1:
            shape = [int(whole.shape[1] // ratio), int(whole.shape[2] // ratio)]
            whole = interpolate(whole[None], shape, mode="bilinear")[0]
    window = whole[:, unit.top : unit.top + unit.rows, unit.left : unit.left + unit.cols]
    return window.flatten(1)


def voters(family: str, name: str, patches: int) -> Tensor | None:
    """Patches [images, patches] that hold something, where a family masks those that are padding."""
    if family not in CHOPPED:
        return None
    side = int(patches**0.5)
    mask = row_of(family, name)["pixel_attention_mask"][0]
    return avg_pool2d(mask[:, None].float(), mask.shape[-1] // side).flatten(1) > 0


def per_patch(calls: list[tuple[Tensor, Tensor]], kind: str, skip: int, voting: Tensor | None) -> Tensor:
    """The signal per patch, [images, C, patches]; C are heads, or dimensions of keys."""
    keys, weights = (torch.cat([call[i] for call in calls]) for i in (0, 1))
    if kind == "encoder_keys":
        return keys.mean(1)[:, skip:].transpose(1, 2)
    if kind == "cls_attention":
        assert skip == 1
        return weights[:, :, 0, skip:]
    if voting is not None:
        return torch.stack([w[:, v].mean(1) for w, v in zip(weights, voting, strict=True)])
    return weights.mean(2)[:, :, skip:]


def window_order(family: str, name: str) -> Tensor:
    """Which block of patches stands where while Qwen2.5-VL computes attention in windows."""
    tower, seen = judge_of(family).base.visual, {}
    handles = [
        tower.patch_embed.register_forward_hook(lambda m, a, output: seen.update(before=output)),
        tower.blocks[0].register_forward_pre_hook(
            lambda m, args, kwargs: seen.update(after=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
    ]
    judge_of(family).run(row_of(family, name))
    for handle in handles:
        handle.remove()
    patches = torch.cdist(seen["after"], seen["before"]).argmin(-1)
    assert patches.sort().values.tolist() == list(range(len(patches)))
    return patches[::4] // 4


def of_qwen(family: str, name: str, calls: list[tuple[Tensor, Tensor]], kind: str) -> list[Tensor]:
    """Qwen computes attention in chunks (windows or frames) of blocks of patches."""
    parts = [k.mean(1)[0].T if kind == "encoder_keys" else w.mean(2)[0] for k, w in calls]
    tokens = torch.cat(parts, -1).unflatten(-1, (-1, 4)).mean(-1)
    if family == "qwen2_5_vl":
        tokens = tokens[:, window_order(family, name).argsort()]
    return list(tokens.split([len(u.columns) for u in visual(family, name).units], -1))


def of_mistral(name: str, calls: list[tuple[Tensor, Tensor]], kind: str) -> list[Tensor]:
    """Pixtral attends in one sequence with closed blocks between pictures."""
    ((keys, weights),) = calls
    found, start = [], 0
    for unit in visual("mistral3", name).units:
        end = start + 4 * len(unit.columns)
        values = (
            keys[0].mean(0)[start:end].T
            if kind == "encoder_keys"
            else weights[0, :, start:end, start:end].mean(1)
        )
        found.append(blocks(values, 2 * unit.rows, 2 * unit.cols))
        start = end
    return found


@functools.cache
def expected(family: str, name: str, kind: str, layer: int) -> list[Tensor]:
    """Per unit of a row the signal per token, [C, tokens]."""
    calls = vision(family, name)[layer]
    units = visual(family, name).units
    if family in QWEN:
        return of_qwen(family, name, calls, kind)
    if family == "mistral3":
        return of_mistral(name, calls, kind)
    side = {"llava_onevision": 5, "internvl": 6}.get(family, 4)
    values = per_patch(calls, kind, calls[0][0].shape[2] - side**2, voters(family, name, side**2))
    if family in ("gemma3", "internvl", *CHOPPED):
        return [blocks(v, side, side) for v in values]
    if units[0].kind == "video" and family == "llava_next_video":
        return [blocks(v, side, side) for v in values]
    if units[0].kind == "video" and family == "llava_onevision":
        small = interpolate(values.unflatten(-1, (side, side)), (3, 3), mode="bilinear")
        return list(small.flatten(2))
    if family not in ("llava_next", "llava_next_video", "llava_onevision") or units[0].kind == "video":
        return list(values)
    pictures = {u.picture: 1 + max(v.part for v in units if v.picture == u.picture) for u in units}
    tiles = values.split([pictures[p] for p in sorted(pictures)])
    return [
        composite(family, row_of(family, name), u.picture, tiles[u.picture][1:], u)
        if u.part
        else tiles[u.picture][0]
        for u in units
    ]


def seen_by(
    family: str, names: tuple[str, ...], probe: Probe, *before: vtprune.Method, padding: str = "left"
) -> Any:
    """What a probe was shown, by (sample, number of the unit), and the report."""
    units = units_of(family, names)
    with vtprune.patch(subject(family), [*before, probe]) as patch, torch.no_grad():
        subject(family)(**inputs_of(family, names, padding))
        report = patch.report()
    place = {
        i.layout: (s, visual(family, names[s]).units.index(u))
        for i, (s, u, _) in zip(report.images, units, strict=True)
    }
    assert len(probe.seen) == len(units) == len(place)
    return {place[layout]: (layout, index, values) for layout, index, values in probe.seen}, report


OFFERED = [(f, kind) for f in FAMILIES for kind in VISION if kind in facts_of(f)[2].signals]


@pytest.mark.parametrize(("family", "kind"), OFFERED)
def test_signals_of_the_encoder(family: str, kind: str) -> None:
    facts = facts_of(family)[2]
    layers = sorted({0, facts.encoder_layers - 1, max(facts.signals[kind])})
    names = ("two", "text", "large", *(["video"] if LVLMS[family].has_video else []))
    signals = tuple(vtprune.Signal(kind, layer) for layer in layers)  # type: ignore[arg-type]
    for where in {facts.behind_encoder(), vtprune.Site("projector")}:
        seen, _ = seen_by(family, names, Probe(where=where, signals=signals))
        for (sample, number), (layout, index, values) in seen.items():
            unit = visual(family, names[sample]).units[number]
            assert index.tolist() == list(range(len(unit.columns)))
            places = [
                [layout.time, unit.top + r, unit.left + c] for r in range(unit.rows) for c in range(unit.cols)
            ]
            assert layout.coordinates(index).T.tolist() == places
            for signal in signals:
                reference = expected(family, names[sample], kind, signal.layer)[number]
                close(values[signal], reference.T if kind == "encoder_keys" else reference)
                assert float(reference.std(-1).max()) > 10 * TOLERANCE, "cannot fail"


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_signals_are_refused(family: str) -> None:
    facts = facts_of(family)[2]
    for kind in VISION:
        probe = Probe(where=facts.behind_encoder(), signals=(vtprune.Signal(kind, 0),))  # type: ignore[arg-type]
        if kind not in facts.signals:
            with pytest.raises(vtprune.UnsupportedMethodError, match=re.escape(facts.missing[kind][:30])):
                vtprune.patch(subject(family), probe)


def stages_before(family: str) -> dict[str, list[vtprune.Method]]:
    """What may have happened before the attention is read."""
    make = methods.create
    policy = "original" if facts_of(family)[2].mrope else "dense"
    return {
        "nothing": [],
        "projector": [make("random", keep=0.6, positions=policy)],
        "decoder": [make("random", keep=0.6, where="decoder", layer=1)],
        "decoder dense": [make("random", keep=0.6, where="decoder", layer=2, positions=policy)],
    }


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("before", ["nothing", "projector", "decoder", "decoder dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_the_last_prompt_token(family: str, before: str, padding: str) -> None:
    judge, names = judge_of(family), ragged(family)
    layers = (0, 2) if before in ("nothing", "projector") else (2,)
    if family == "gemma3":
        assert judge.decoder.config.layer_types[0] != judge.decoder.config.layer_types[2]
    for layer in layers:
        signal = vtprune.Signal("text_attention", layer)
        probe = Probe(keep=0.3, where=vtprune.Site("decoder", layer + 1), signals=(signal,))
        seen, report = seen_by(family, names, probe, *stages_before(family)[before], padding=padding)
        known = claims(report, family, names)
        for sample, name in enumerate(names):
            found = known[sample]
            found.removed.pop(layer + 1, None)
            gone = {c for columns in found.removed.values() for c in columns}
            units = visual(family, name).units
            if not units:
                continue
            weights = judge.attention(
                row_of(family, name), layer, removed=found.removed, positions=found.renumbered & gone
            )[:, -1]
            for number, unit in enumerate(units):
                _, index, values = seen[sample, number]
                alive = [i for i, c in enumerate(unit.columns) if c not in gone]
                assert index.tolist() == alive
                close(values[signal], weights[:, [unit.columns[i] for i in alive]])
            assert float(weights[:, [c for u in units for c in u.columns]].max()) > 100 * TOLERANCE


# ---------------------------------------------------------------------- pixels

PIXELS = vtprune.Signal("patch_pixels", 0)


def sliced(picture: Tensor, rows: int, cols: int) -> Tensor:
    """The pixels [C P, tokens] of a picture [C, H, W] cut into rows x cols rectangles; a rest at its edges is left out."""
    high, wide = picture.shape[1] // rows, picture.shape[2] // cols
    rectangles = [
        picture[:, r * high : (r + 1) * high, c * wide : (c + 1) * wide]
        for r in range(rows)
        for c in range(cols)
    ]
    return torch.stack([rectangle.flatten() for rectangle in rectangles], -1)


def pixels_of(family: str, name: str) -> list[Tensor]:
    """Per unit of a row [C P, tokens]."""
    row, units = row_of(family, name), visual(family, name).units
    if not units:
        return []
    pixels = row[next(key for key in row if key.startswith("pixel_values"))]
    if family in QWEN:  # four patches [C T h w] in a row make a token
        tokens = pixels.view(len(pixels) // 4, 4, 3, -1)
        parts = torch.stack([torch.cat([t[i, c] for c in range(3) for i in range(4)]) for t in tokens], -1)
        return list(parts.split([len(u.columns) for u in units], -1))
    if family == "mistral3":
        real = [p[:, :h, :w] for p, (h, w) in zip(pixels, row["image_sizes"].tolist(), strict=True)]
        return [sliced(p, u.rows, u.cols) for p, u in zip(real, units, strict=True)]
    if family in ("llava_next", "llava_next_video") and units[0].kind == "image":
        found = []
        for u in units:
            tiles = pixels[u.picture, : 1 + max(v.part for v in units if v.picture == u.picture)]
            cut = torch.stack([sliced(tile, 4, 4) for tile in tiles])
            found.append(composite(family, row, u.picture, cut[1:], u) if u.part else cut[0])
        return found
    if pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)
    return [sliced(p, u.rows, u.cols) for p, u in zip(pixels, units, strict=True)]


def assert_same_pixels(found: Tensor, expected: Tensor) -> None:
    """[N, C, P] holds [C P, N], in any order within a token's channel."""
    wanted = expected.T.unflatten(1, (found.shape[1], -1))
    assert torch.equal(found.sort(-1).values, wanted.sort(-1).values)
    assert float(wanted.std()) > 0.1, "cannot fail"


@pytest.mark.parametrize("family", [f for f in FAMILIES if "patch_pixels" in facts_of(f)[2].signals])
def test_pixels_of_every_token(family: str) -> None:
    names = ("two", "text", "large", *(["video"] if LVLMS[family].has_video else []))
    inner = vtprune.Site("decoder", 2)
    for where, before in ((PROJECTOR, []), (inner, [methods.create("random", keep=0.6)])):
        probe = Probe(where=where, signals=(PIXELS,), keep=0.3)
        seen, _ = seen_by(family, names, probe, *before)
        assert seen
        for (sample, number), (_, index, values) in seen.items():
            expected = pixels_of(family, names[sample])[number]
            assert_same_pixels(values[PIXELS], expected[:, index])


@pytest.mark.parametrize("name", sorted(ENCODERS))
@torch.no_grad()
def test_pixels_of_an_encoder_alone(name: str) -> None:
    entry = ENCODERS[name]
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model, pictures = entry.build(), entry.pixels(2, 5)
    probe = Probe(where=vtprune.Site("vit", 0), signals=(PIXELS,))
    with vtprune.patch(model, probe):
        model(pictures)
    assert len(probe.seen) == 2
    for picture, (layout, _, values) in zip(pictures, probe.seen, strict=True):
        assert_same_pixels(values[PIXELS], sliced(picture, layout.rows, layout.cols))


def test_pixels_at_incomplete_patches() -> None:
    """timm pads the last patches with zeros where it is told to; transformers leaves a rest out."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, dynamic_img_size=True, dynamic_img_pad=True
    ).eval()
    picture = torch.randn(1, 3, 40, 56)
    probe = Probe(where=vtprune.Site("encoder"), signals=(PIXELS,))
    with vtprune.patch(model, probe), torch.no_grad():
        model(picture)
    padded = torch.zeros(3, 48, 64)
    padded[:, :40, :56] = picture[0]
    ((layout, _, values),) = probe.seen
    assert (layout.rows, layout.cols) == (3, 4)
    assert_same_pixels(values[PIXELS], sliced(padded, 3, 4))


def test_pixels_are_asked_for_only_where_a_method_reads_them() -> None:
    assert not any(PIXELS in s.needs for s in methods.create("vflowopt").stages(facts_of("llava")[2]))
    for family, reason in (("llava_onevision", "resizes features"), ("aria", "learned queries")):
        with pytest.raises(vtprune.UnsupportedMethodError, match=reason):
            vtprune.patch(subject(family), Probe(where=PROJECTOR, signals=(PIXELS,)))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_entropy_changes_what_vflowopt_keeps(family: str) -> None:
    names, kept = ("two", "large"), []
    for alpha in (0.0, 1.0):
        with vtprune.patch(subject(family), "vflowopt", keep=0.4, alpha=alpha) as patch, torch.no_grad():
            subject(family)(**inputs_of(family, names))
            kept.append([i.kept["projector"].tolist() for i in patch.report().images])
    assert kept[0] != kept[1]


# ---------------------------------------------------------------------- text of the prompt

TEXT = vtprune.Signal("text_features", 0)


def text_of(family: str, name: str) -> Tensor:
    """[T, D] embeddings of all tokens of a row that are no placeholders, so no separators in a picture either."""
    judge, row = judge_of(family), row_of(family, name)
    config = judge.model.config
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    placeholders = {getattr(config, n) for n in names if getattr(config, n, None) is not None}
    ids = [token for token in row["input_ids"][0].tolist() if token not in placeholders]
    return judge.model.get_input_embeddings()(torch.tensor(ids))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_text_of_the_prompt(family: str, padding: str) -> None:
    names = ragged(family)
    layer = 1
    attention = vtprune.Signal("prompt_attention", layer)
    probe = Probe(keep=0.3, where=vtprune.Site("decoder", layer + 1), signals=(TEXT, attention))
    seen, _ = seen_by(family, names, probe, padding=padding)
    for sample, name in enumerate(names):
        expected = text_of(family, name)
        for number, unit in enumerate(visual(family, name).units):
            _, _, values = seen[sample, number]
            found = values[TEXT]
            close(found[: len(expected)], expected)
            assert not found[len(expected) :].any()
            assert values[attention].shape[1] == len(found)
            rows = judge_of(family).attention(row_of(family, name), layer)[:, text_columns(family, name)]
            close(values[attention][:, : len(expected)], rows[..., unit.columns])


def text_columns(family: str, name: str) -> list[int]:
    """Columns of the tokens of :func:`text_of`."""
    row, prompt = row_of(family, name), visual(family, name)
    shown = {c for unit in prompt.units for c in unit.columns} | set(prompt.loose)
    return [c for c in range(row["input_ids"].shape[1]) if c not in shown]
