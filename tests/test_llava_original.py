"""The original `llava` package (llava-torch, installed without its pins) on stock transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtprune
from vtprune.errors import UnsupportedCallError, UnsupportedModelError

pytest.importorskip("llava", reason="pip install --no-deps llava-torch==1.2.2.post1")

SIDE, N = 4, 16


class Tower(nn.Module):
    """The package's CLIPVisionTower around a random CLIP, which it can otherwise only download."""

    def __new__(cls, attention: str) -> Any:
        from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
        from transformers import CLIPVisionConfig, CLIPVisionModel

        config = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
        tower = CLIPVisionTower.__new__(CLIPVisionTower)
        nn.Module.__init__(tower)
        tower.vision_tower = CLIPVisionModel._from_config(config, attn_implementation=attention)
        tower.is_loaded, tower.select_layer, tower.select_feature = True, -2, "patch"
        return tower


def build(padding: str = "left", mistral: bool = False, attention: str = "sdpa", **more: Any) -> Any:
    """A random LlavaLlamaForCausalLM, or LlavaMistralForCausalLM."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM

    config = (LlavaMistralConfig if mistral else LlavaConfig)(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tokenizer_padding_side=padding,
        pretraining_tp=1,
        **more,
    )
    cls = LlavaMistralForCausalLM if mistral else LlavaLlamaForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = cls._from_config(config, attn_implementation=attention)
        model.model.vision_tower = Tower(attention)
        model.model.mm_projector = nn.Linear(32, 32)
        model.model.image_newline = nn.Parameter(torch.randn(32))
        for name, p in model.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.4 if "embed_tokens" in name else 0.2)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def batch(rows: list[list[int | str]], padding: str = "left") -> tuple[Tensor, Tensor, Tensor]:
    """ids with -200 for "image", mask, images; a row without one takes a blank picture, as the package wants."""
    width = max(len(r) for r in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    images = []
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if padding == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor([-200 if x == "image" else x for x in row])
        mask[i, where] = 1
        seeds = [sum(x for x in row if x != "image") + k for k in range(row.count("image"))]
        images += [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in seeds]
        if not seeds:
            images.append(torch.zeros(3, 32, 32))
    return ids, mask.bool(), torch.stack(images)


ROWS: list[list[int | str]] = [
    [5, 6, "image", 7, 8],
    [9, 10, 11],
    [12, "image", 13, 14, "image", 15, 16, 17],
]


def cut(model: Any, row: list[int | str], kept: list[list[int]], extra: Tensor) -> Tensor:
    """Logits of the stock decoder at the surviving columns of one row, tokens cut out by hand."""
    ids, mask, images = batch([row])
    with torch.no_grad():
        *_, embeds, _ = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, images)
        stays: list[int] = []
        at = 0
        pictures = iter(kept)
        for item in row:
            if item == "image":
                stays += [at + i for i in next(pictures)]
                at += N
            else:
                stays.append(at)
                at += 1
        positions = torch.tensor([*stays, *range(at, at + len(extra))])
        embeds = torch.cat([embeds[:, stays], model.model.embed_tokens(extra)[None]], 1)
        ones = torch.ones(1, embeds.shape[1], dtype=torch.long)
        hidden = model.model(
            inputs_embeds=embeds, position_ids=positions[None], attention_mask=ones, use_cache=False
        ).last_hidden_state
        logits: Tensor = model.lm_head(hidden)[0]
    return logits


CASES = [
    ("divprune", {"positions": "original"}),
    ("stride", {"where": "encoder"}),
    ("random", {"where": "vit", "layer": 1}),
    ("vtc-cls", {"positions": "original"}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_forward_equals_the_shortened_sequence(method: str, options: dict[str, Any], padding: str) -> None:
    model = build(padding)
    ids, mask, images = batch(ROWS, padding)
    with vtprune.patch(model, method, keep=5, **options) as patch, torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, images=images, use_cache=True).logits
        report = patch.report()
    assert report.visual_tokens_in == [N, 0, 2 * N]
    assert report.visual_tokens_out == [5, 0, 10]
    if options.get("where") == "vit":
        return  # what is cut inside the tower changes the features; the next test covers the counts
    for i, row in enumerate(ROWS):
        kept = [list(image.kept.values())[-1].tolist() for image in report.images if image.sample == i]
        expected = cut(model, row, kept, torch.zeros(0, dtype=torch.long))
        length = sum(N if x == "image" else 1 for x in row)
        last = logits.shape[1] - 1 if padding == "left" else length - 1
        torch.testing.assert_close(logits[i, last], expected[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["divprune", "vtc-cls", "fastv", "visionzip"])
def test_generate(method: str) -> None:
    model = build()
    ids, mask, images = batch(ROWS)
    with vtprune.patch(model, method, keep=5) as patch:
        together = model.generate(ids, images=images, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert patch.report().visual_tokens_out == [5, 0, 10]
        assert patch.report().decode_steps == 5
        beams = model.generate(ids, images=images, attention_mask=mask, max_new_tokens=4, num_beams=3)
        assert patch.report().visual_tokens_out == [5] * 3 + [0] * 3 + [10] * 3
        assert beams.shape == (3, 4)
        for i, row in enumerate(ROWS):
            one, one_mask, one_images = batch([row])
            alone = model.generate(
                one, images=one_images, attention_mask=one_mask, max_new_tokens=6, do_sample=False
            )
            assert torch.equal(together[i], alone[0])


def test_greedy_tokens_equal_the_cut_sequence() -> None:
    model = build()
    row = ROWS[0]
    ids, mask, images = batch([row])
    with vtprune.patch(model, "divprune", keep=5, positions="original") as patch:
        tokens = model.generate(ids, images=images, attention_mask=mask, max_new_tokens=6, do_sample=False)[0]
        kept = [list(image.kept.values())[-1].tolist() for image in patch.report().images]
    done = torch.zeros(0, dtype=torch.long)
    for token in tokens:
        assert cut(model, row, kept, done)[-1].argmax() == token
        done = torch.cat([done, token[None]])


def test_text_only_generation_and_undo() -> None:
    model = build()
    ids, mask, images = batch(ROWS)
    before = model(input_ids=ids, attention_mask=mask, images=images).logits
    attributes = set(vars(model)) | set(vars(model.model))
    text = torch.tensor([[5, 6, 7]])
    dense = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=4, do_sample=False)
    with vtprune.patch(model, "fastv", keep=4):
        model.generate(ids, images=images, attention_mask=mask, max_new_tokens=2)
        patched = model.generate(
            text, attention_mask=torch.ones_like(text), max_new_tokens=4, do_sample=False
        )
    assert torch.equal(dense, patched)
    assert torch.equal(model(input_ids=ids, attention_mask=mask, images=images).logits, before)
    assert set(vars(model)) | set(vars(model.model)) == attributes


# ------------------------------------------------------------------------- lists, tiles, newlines, text behind them


PINPOINTS = [[32, 64], [64, 32], [64, 64]]
MERGES: dict[str, dict[str, Any]] = {
    "square": {},  # `images` a list of pictures, as `process_images` gives them with image_aspect_ratio="pad"
    "flat": {"image_aspect_ratio": "anyres"},
    "spatial": {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"},
    "spatial_unpad": {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
}
# (width, height): two tiles beside each other and half a row of padding; four tiles with padding on the sides; one above
# the other.
SIZES = [(60, 20), (40, 60), (32, 64)]
TILES = [2, 4, 2]


def tiled(merge: str) -> tuple[Any, dict[str, Any], list[Tensor]]:
    """A model, a call with three rows of one, no and two pictures, and the tiles of every picture."""
    model = build(image_grid_pinpoints=PINPOINTS, **MERGES[merge])
    ids, mask, _ = batch(ROWS)
    counts = [1 if merge == "square" else 1 + n for n in TILES]
    generator = torch.Generator().manual_seed(5)
    pictures = [torch.randn(n, 3, 32, 32, generator=generator) for n in counts]
    blank = torch.zeros(counts[0], 3, 32, 32)
    given = [pictures[0], blank, *pictures[1:]]  # the row of text takes one, too
    if merge == "square":
        given = [x[0] for x in given]
    sizes = [SIZES[0], SIZES[0], *SIZES[1:]]
    call = {"input_ids": ids, "attention_mask": mask, "images": given, "image_sizes": sizes}
    return model, call, pictures


def alone(call: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of such a call, without padding."""
    ids = call["input_ids"][row][call["attention_mask"][row]][None]
    first = [0, 1, 2, 4]
    some = slice(first[row], first[row + 1])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids).bool(),
        "images": call["images"][some],
        "image_sizes": call["image_sizes"][some],
    }


def merged(model: Any, call: dict[str, Any]) -> Tensor:
    """[n, D] embeddings of one row, by the stock method."""
    with torch.no_grad():
        out = model.prepare_inputs_labels_for_multimodal(
            call["input_ids"], None, call["attention_mask"], None, None, call["images"], call["image_sizes"]
        )
    embeds: Tensor = out[4][0]
    return embeds


def places(model: Any, call: dict[str, Any]) -> dict[tuple[int, int], int]:
    """(tile of the row, token of the tile) -> column, read off the stock method with marked features."""

    def marked(images: Tensor) -> Tensor:
        codes = torch.arange(len(images) * N).view(len(images), N, 1).expand(-1, -1, 32)
        return 1000.0 + codes

    newline = model.model.image_newline.data.clone()
    model.encode_images = marked
    model.model.image_newline.data.fill_(-1000)
    try:
        codes = merged(model, call)[:, 0]
    finally:
        del model.encode_images
        model.model.image_newline.data.copy_(newline)
    found = {int(c) - 1000: col for col, c in enumerate(codes.tolist()) if c > 900}
    return {(code // N, code % N): col for code, col in found.items()}


def kept_columns(model: Any, call: dict[str, Any], report: Any, row: int) -> tuple[set[int], set[int]]:
    """Visual columns of a row, and those that a report says are kept."""
    where = places(model, call)
    shown: dict[int, list[int]] = {}
    for (tile, _), col in sorted(where.items(), key=lambda item: item[1]):
        shown.setdefault(tile, []).append(col)  # in reading order, which is that of a tile's grid
    images = [i for i in report.images if i.sample == row]
    assert [i.layout.n_tokens for i in images] == [len(cols) for cols in shown.values()]
    kept: set[int] = set()
    for image, cols in zip(images, shown.values(), strict=True):
        kept |= {cols[i] for i in list(image.kept.values())[-1].tolist()}
    return set(where.values()), kept


def through(model: Any, embeds: Tensor, stays: list[int], layer: int) -> Tensor:
    """Logits at the columns that stay, when the others leave in front of a decoder layer: stock layers in a plain loop."""
    stem, positions = model.model, torch.arange(len(embeds))[None]
    hidden = embeds[None]
    with torch.no_grad():
        for i, block in enumerate(stem.layers):
            if i == layer:
                hidden, positions = hidden[:, stays], positions[:, stays]
            tables = stem.rotary_emb(hidden, positions)
            hidden = block(
                hidden,
                attention_mask=None,
                position_embeddings=tables,
                position_ids=positions,
                use_cache=False,
            )
        logits: Tensor = model.lm_head(stem.norm(hidden))[0]
    return logits


@pytest.mark.parametrize(
    ("method", "layer"), [("divprune", 0), ("fastervlm", 0), ("fastv", 2), ("vtprune", 0)]
)
@pytest.mark.parametrize("merge", MERGES)
def test_lists_and_tiles(merge: str, method: str, layer: int) -> None:
    model, call, _ = tiled(merge)
    options: dict[str, Any] = {} if method == "vtprune" else {"positions": "original"}
    if method == "vtprune":
        options["beta"] = 0.0
    with vtprune.patch(model, method, keep=3, **options) as patch, torch.no_grad():
        logits = model(**call, use_cache=True).logits
        report = patch.report()
        tokens = model.generate(
            call["input_ids"],
            **{k: v for k, v in call.items() if k != "input_ids"},
            max_new_tokens=5,
            do_sample=False,
        )
        assert patch.report().decode_steps == 4
    for row in range(len(ROWS)):
        one = alone(call, row)
        embeds = merged(model, one)
        visual, kept = kept_columns(model, one, report, row) if row != 1 else (set(), set())
        stays = [c for c in range(len(embeds)) if c not in visual or c in kept]
        assert report.visual_tokens_in[row] == len(visual)
        assert (
            report.visual_tokens_out[row]
            == len(kept)
            == 3 * len([i for i in report.images if i.sample == row])
        )
        assert report.separator_tokens[row] == len(embeds) - len(visual) - sum(
            x != "image" for x in ROWS[row]
        )
        expected = through(model, embeds, stays, layer)
        torch.testing.assert_close(logits[row, -1], expected[-1], atol=1e-4, rtol=1e-4)
        assert tokens[row, 0] == expected[-1].argmax()
        # One row at a time says the same.
        with vtprune.patch(model, method, keep=3, **options):
            single = model.generate(
                one["input_ids"],
                **{k: v for k, v in one.items() if k != "input_ids"},
                max_new_tokens=5,
                do_sample=False,
            )
        assert torch.equal(single[0], tokens[row])


@pytest.mark.parametrize("merge", MERGES)
def test_tiles_are_scored_by_their_own_attention(merge: str) -> None:
    """FasterVLM's definition on every tile, from the attention that stock CLIP itself returns."""
    model, call, pictures = tiled(merge)
    with vtprune.patch(model, "fastervlm", keep=3) as patch, torch.no_grad():
        model(**call)
        images = patch.report().images
    slow = build(attention="eager").model.vision_tower.vision_tower
    tiles = torch.cat(pictures)
    with torch.no_grad():
        attention = slow(tiles, output_attentions=True).attentions[
            2
        ]  # the last of 4 layers that features pass is the third
    scores = attention.mean(1)[:, 0, 1:]
    where = [places(model, alone(call, row)) for row in (0, 2)]
    tile = 0
    for found in where:
        for local in sorted({t for t, _ in found}):
            shown = [token for t, token in sorted(found, key=found.__getitem__) if t == local]
            best = scores[tile + local][shown].topk(3).indices.sort().values
            assert torch.equal(list(images.pop(0).kept.values())[-1], best)
        tile += sum(TILES[:1]) + 1 if merge != "square" else 1
    assert not images


@pytest.mark.parametrize("merge", ["flat", "spatial_unpad"])
@pytest.mark.parametrize(
    "options", [{"where": "vit", "layer": 1}, {"where": "encoder"}], ids=["vit", "encoder"]
)
def test_tiles_lose_tokens_in_and_behind_the_encoder(merge: str, options: dict[str, Any]) -> None:
    model, call, _ = tiled(merge)
    with vtprune.patch(model, "stride", keep=3, **options) as patch, torch.no_grad():
        together = model(**call).logits
        report = patch.report()
        assert set(report.visual_tokens_out) == {9, 0, 24}
        for row in range(len(ROWS)):
            torch.testing.assert_close(
                model(**alone(call, row)).logits[0, -1], together[row, -1], atol=1e-4, rtol=1e-4
            )
    if "layer" in options:
        return
    one = alone(call, 2)
    embeds = merged(model, one)
    visual, kept = kept_columns(model, one, report, 2)
    stays = [c for c in range(len(embeds)) if c not in visual or c in kept]
    expected = through(model, embeds, stays, 0)[-1]
    torch.testing.assert_close(together[2, -1], expected, atol=1e-4, rtol=1e-4)


def test_frames_as_one_tensor() -> None:
    """[pictures, tiles, 3, height, width], as videos are given to LLaVA-1.5."""
    model = build()
    ids, mask, _ = batch([ROWS[0]])
    frames = torch.randn(1, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with vtprune.patch(model, "divprune", keep=2) as patch, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, images=frames)
        assert patch.report().visual_tokens_in == [3 * N]
        assert patch.report().visual_tokens_out == [6]


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_labels_and_gradients(method: str, padding: str) -> None:
    """The loss of text tokens, each row cut by hand; its gradient reaches projector and language model."""
    model = build(padding)
    ids, mask, images = batch(ROWS, padding)
    first = mask & (
        mask.cumsum(1) == 1
    )  # behind left padding stock code predicts it from a column of padding
    labels = ids.masked_fill(~mask | first, -100)
    with vtprune.patch(model, method, keep=5, positions="original") as patch:
        loss = model(input_ids=ids, attention_mask=mask, images=images, labels=labels).loss
        report = patch.report()
        loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.model.mm_projector.parameters())
    assert bool(model.model.layers[0].mlp.up_proj.weight.grad.any())
    losses: list[Tensor] = []
    for row, text in enumerate(ROWS):
        one, one_mask, pictures = batch([text])
        call = {"input_ids": one, "attention_mask": one_mask, "images": pictures, "image_sizes": None}
        embeds = merged(model, call)
        kept = [list(i.kept.values())[-1].tolist() for i in report.images if i.sample == row]
        stays: list[int] = []
        wanted: list[int] = []
        at = 0
        for item in text:
            if item == "image":
                left = kept.pop(0)
                stays += [at + i for i in left]
                wanted += [-100] * len(left)
                at += N
            else:
                stays.append(at)
                wanted.append(int(item))
                at += 1
        logits = through(model, embeds, stays, 2 if method == "fastv" else 0)
        losses += [
            nn.functional.cross_entropy(logits[i], torch.tensor(wanted[i + 1]))
            for i in range(len(wanted) - 1)
            if wanted[i + 1] != -100
        ]
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["divprune", "fastv", "sparsevlm", "pyramiddrop"])
def test_mistral(method: str) -> None:
    model = build(mistral=True)
    ids, mask, images = batch(ROWS)
    with vtprune.patch(model, method, keep=5) as patch:
        together = model.generate(ids, images=images, attention_mask=mask, max_new_tokens=4, do_sample=False)
        assert patch.report().engaged
        for i, row in enumerate(ROWS):
            one, one_mask, own = batch([row])
            single = model.generate(
                one, images=own, attention_mask=one_mask, max_new_tokens=4, do_sample=False
            )
            assert torch.equal(together[i], single[0])


def test_without_a_cache() -> None:
    model = build()
    ids, mask, images = batch(ROWS)
    call = {"images": images, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    with vtprune.patch(model, "fastv", keep=5):
        assert torch.equal(model.generate(ids, **call), model.generate(ids, **call, use_cache=False))


def test_pictures_cut_off_are_refused() -> None:
    """tokenizer_model_max_length may cut text, but not pictures."""
    model = build()
    row: list[int | str] = ["image", 5, 6, 7, 8, 9]
    ids, mask, images = batch([row])
    with vtprune.patch(model, "divprune", keep=5, positions="original") as patch, torch.no_grad():
        model.config.tokenizer_model_max_length = N + 3
        logits = model(input_ids=ids, attention_mask=mask, images=images).logits
        kept = list(patch.report().images[0].kept.values())[-1].tolist()
        model.config.tokenizer_model_max_length = N - 3
        with pytest.raises(UnsupportedCallError, match="tokenizer_model_max_length=13 cuts off"):
            model(input_ids=ids, attention_mask=mask, images=images)
        model.config.tokenizer_model_max_length = None
    call = {"input_ids": ids, "attention_mask": mask, "images": images, "image_sizes": None}
    expected = through(model, merged(model, call)[: N + 3], [*kept, N, N + 1, N + 2], 0)
    torch.testing.assert_close(logits[0, -1], expected[-1], atol=1e-4, rtol=1e-4)


def test_refusals() -> None:
    model = build()
    model.model.vision_tower.select_feature = "cls_patch"
    with pytest.raises(UnsupportedModelError, match="visual token"):
        vtprune.patch(model, "fastv")
    model.model.vision_tower = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="load_model"):
        vtprune.patch(model, "fastv")
