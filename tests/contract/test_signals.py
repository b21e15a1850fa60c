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
from contract.evidence import Probe, Row, claims, inputs_of, ragged, row_of, units_of, visual
from judge import CHOPPED, QWEN, Judge, Unit, best_resolution
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

import vtprune
from vtprune import methods
from vtprune.testing.matrix import facts_of
from vtprune.testing.zoo import LVLMS

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
