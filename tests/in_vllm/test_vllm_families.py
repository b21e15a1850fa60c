"""Families with tiles, another encoder and other decoders: tiny random models in vLLM against transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip(
    "vllm", reason="vLLM is not installed; `bash .ci/vllm` makes an environment for these tests"
)

from in_vllm import checkpoints
from in_vllm.engines import Engine, Reference

from vtprune import methods
from vtprune.integrations.vllm_plugin.families import FAMILIES
from vtprune.integrations.vllm_plugin.pruning import Pruner
from vtprune.integrations.vllm_plugin.settings import pruning_of, runnable

# Height, width: square, wide, high, small. Tiles of LLaVA-NeXT lose padding rows or columns, or none.
SIZES = ((64, 64), (30, 64), (64, 22), (17, 17), (40, 60))
FIXED = {"llava_siglip": 48}
ARCHITECTURES = {
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_siglip": "LlavaForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Noise in blocks of four pixels, so that resizing leaves something of it."""
    blocks = np.random.default_rng(seed).integers(
        0, 256, (size[0] // 4 + 1, size[1] // 4 + 1, 3), dtype=np.uint8
    )
    return Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]])


class Case:
    """A family: checkpoint, engine that prunes, and the same model in transformers."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        self.name, self.folder, self.settings = name, folder, settings
        make: Callable[[Path], Path] = getattr(checkpoints, name)
        make(folder)
        rows, cols = FAMILIES[ARCHITECTURES[name]].grid(getattr(checkpoints, f"{name}_config")())
        self.most = rows * cols
        self.reference = Reference(folder)
        self.engine = Engine(folder, settings)
        token = self.reference.processor.image_token
        side = FIXED.get(name)
        sizes = SIZES if side is None else [(side, side)] * 3
        images = [picture(seed, size) for seed, size in enumerate(sizes)]
        self.prompts = [(f"user : {token} what is at the top ?", [image]) for image in images]
        self.pairs = [
            (f"user : {token} a b {token} what is red ?", [a, b]) for a, b in itertools.pairwise(images)
        ]
        self.method = methods.create(
            settings["method"], **{k: v for k, v in settings.items() if k != "method"}, positions="dense"
        )


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}
    settings = {
        "llava_next": {"method": "fastervlm", "keep": 6},
        "llava_siglip": {"method": "divprune", "keep": 0.25},
        "internvl": {"method": "visionzip", "keep": 4},
    }

    def get(name: str) -> Case:
        if name not in made:
            made[name] = Case(name, tmp_path_factory.mktemp(name), settings[name])
        return made[name]

    return get


@pytest.mark.parametrize("tiny", ARCHITECTURES)
def test_answers_and_counts_equal_transformers(cases: Callable[[str], Case], tiny: str) -> None:
    case = cases(tiny)
    token = case.reference.model.config.image_token_id
    lengths = set()
    for prompts in (case.prompts, case.pairs):
        for out, (text, images) in zip(case.engine.generate(prompts), prompts, strict=True):
            whole = case.reference.inputs(text, images)["input_ids"][0].tolist()
            rows, _ = (
                case.reference.pictures(text, images[:1], case.method) if len(images) == 1 else (None, None)
            )
            assert [i for i in out.prompt_token_ids if i != token] == [i for i in whole if i != token]
            assert out.prompt_token_ids.count(token) < whole.count(token)
            if rows is not None:
                assert out.prompt_token_ids.count(token) == len(rows)
                lengths.add(len(rows))
            assert list(out.outputs[0].token_ids) == case.reference.answer(text, images, case.method)
    assert tiny in FIXED or len(lengths) > 1  # tiles make pictures of different lengths


def pairs() -> list[tuple[str, str, dict[str, Any]]]:
    """Models, the methods that run on them, and the options that these need there."""
    found = []
    for tiny, family in ARCHITECTURES.items():
        facts = FAMILIES[family].facts(getattr(checkpoints, f"{tiny}_config")(), None)
        found += [(tiny, one.method, dict(one.options)) for one in runnable(facts)]
    return found


@pytest.mark.parametrize(
    ("tiny", "method", "options"), pairs(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_method_keeps_the_same_tokens(
    cases: Callable[[str], Case], tiny: str, method: str, options: dict[str, Any]
) -> None:
    case = cases(tiny)
    chosen = methods.create(method, keep=0.4, positions="dense", **options)
    expected = [case.reference.pictures(text, images, chosen) for text, images in case.prompts]

    def run(model: Any) -> tuple[list[torch.Tensor], list[list[int]]]:
        config = model.config
        asked = type(config).from_dict(
            {**config.to_dict(), "vtprune": {"method": method, "keep": 0.4, **options}}
        )
        model.pruner.journal.revert()
        old, model.pruner = model.pruner, Pruner(model._tower(config), pruning_of(asked, str(case.folder)))
        try:
            with torch.inference_mode():
                return model.embed_multimodal(**together(case)), [
                    alive.tolist() for alive in model.pruner.kept
                ]
        finally:
            model.pruner.journal.revert()
            model.pruner = Pruner(model._tower(config), old.pruning)

    rows, kept = case.engine.on_model(run)
    assert kept == [one for _, all_kept in expected for one in all_kept]
    assert method == "keep-all" or any(len(one) < case.most for one in kept)
    for mine, (theirs, _) in zip(rows, expected, strict=True):
        torch.testing.assert_close(mine.clone(), theirs, atol=1e-4, rtol=1e-3)


def together(case: Case) -> dict[str, Any]:
    """All pictures of a case in one call of vLLM's model, as its runner hands them over."""
    inputs = [case.reference.inputs(text, images) for text, images in case.prompts]
    pixels = [one["pixel_values"] for one in inputs]
    if case.name == "llava_next":
        return {
            "pixel_values": [p[0] for p in pixels],
            "image_sizes": torch.cat([i["image_sizes"] for i in inputs]),
        }
    if case.name == "internvl":
        return {
            "pixel_values": torch.cat(pixels),
            "image_num_patches": torch.tensor([len(p) for p in pixels]),
            "image_token_id": torch.tensor(case.reference.model.config.image_token_id),
        }
    return {"pixel_values": torch.cat(pixels)}


def test_internvl_takes_pictures_only(cases: Callable[[str], Case]) -> None:
    engine = cases("internvl").engine
    video = np.zeros((2, 24, 24, 3), dtype=np.uint8)
    with pytest.raises(Exception, match=r"At most 0 video\(s\)"):
        engine.llm.generate(
            [{"prompt": "user : <video> what ?", "multi_modal_data": {"video": [video]}}], use_tqdm=False
        )
